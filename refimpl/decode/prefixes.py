"""What a model has read, as a tree over token ids: a prompt that begins like it is read from where they part.

A node is a block of 64 positions of all layers (model/blocks.py). Its key are the ids at these positions, and the path to it gives the ids
before. Keys and values depend on these ids alone, and a row's bits do not depend on the rows that are computed with it: what is found here
has the bits that reading again would give.

To go on at a position, full layers need all blocks before it, sliding layers those of the window before it. So where memory is short, the
blocks of sliding layers go first: the least recently used, and last among them those before the end of a sequence, from where
conversations go on. Of a long sequence the windows before every 1024th position stay longer, those before every 2048th longer still, and so
on: what is left is spread evenly, and from wherever it is edited, the nearest point is not far. Then whole sequences go, from their ends.
Blocks that are on the disk (snapshots.py) are mapped while a sequence uses them, and take no memory.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from refimpl.decode.snapshots import Snapshot, Snapshots
from refimpl.loading.model import Model
from refimpl.model.blocks import BLOCK
from refimpl.model.cache import Cache

POINT = 1024            # positions, a multiple of BLOCK: at its multiples what is read and written is remembered before it ends


@dataclass(frozen=True)
class Found:
    """A cache that holds the first `cache.length` ids of a prompt, and, where that is less than could be, why."""

    cache: Cache
    why: str


class Nothing:
    """Remembers nothing: every prompt is read from its beginning."""

    def __init__(self, model: Model):
        self.model = model

    def find(self, ids: Sequence[int], n_ctx: int | None) -> Found:
        """An empty cache for `n_ctx` tokens (None: the model's own context)."""
        return Found(self.model.new_cache(n_ctx), "nothing is kept from one prompt to the next")

    def keep(self, ids: Sequence[int], cache: Cache, ended: bool = True):
        """Nothing."""

    def forget(self):
        """Nothing."""


@dataclass(eq=False)
class _Node:
    """One block: its ids, its part of each table (number of the table -> block in memory, or the file that has it, never both), when it
    was last used, and whether a sequence ended where it was visible.
    """

    ids: tuple[int, ...]
    depth: int
    parent: "_Node | None"
    children: dict[tuple[int, ...], "_Node"] = field(default_factory=dict)
    blocks: dict[int, np.ndarray] = field(default_factory=dict)
    stored: dict[int, Snapshot] = field(default_factory=dict)
    used: int = 0
    seen: int = 0           # the same for blocks of sliding layers
    at_end: bool = False

    def has(self, number: int) -> bool:
        """Is its part of this table known?"""
        return number in self.blocks or number in self.stored

    @property
    def n_known(self) -> int:
        """Of how many tables its part is known."""
        return len(self.blocks) + len(self.stored)


class Prefixes:
    """The sequences that a model has read, within `budget` bytes.

    n_bytes   memory that they take
    snapshots where they are kept on the disk as well, None where they are not
    """

    def __init__(self, model: Model, budget: int, snapshots: Snapshots | None = None):
        """`snapshots`: what they hold is known from the beginning, and what is read later is written there."""
        self.model, self.budget, self.n_bytes, self.snapshots = model, budget, 0, snapshots
        self._root, self._clock = _Node((), -1, None), 0
        self._windows = [table.window for table in model.new_cache(1).tables]
        self._window = max((window for window in self._windows if window is not None), default=0)
        if snapshots is not None:
            self._load()

    def find(self, ids: Sequence[int], n_ctx: int | None) -> Found:
        """A cache for `n_ctx` tokens (None: the model's own context) that holds as much of `ids` as is known, all but the last at most:
        its state is needed.
        """
        path, n_same = self._walk(ids)
        n_same = min(n_same, len(ids) - 1)
        length = self._usable(path, n_same)
        while None in (opened := self._opened(path, length)).values():
            self._forget([snapshot for snapshot, blocks in opened.items() if blocks is None])
            length = self._usable(path, n_same)
        cache = self.model.new_cache(n_ctx, keep=self._keep())
        self._clock += 1
        for node in path[:-(-length // BLOCK)]:
            node.used = self._clock
        for node, number in self._needed(path, length):
            node.seen = self._clock
            block = node.blocks[number] if number in node.blocks else self._block(opened[node.stored[number]], number, node.depth)
            cache.tables[number].put(node.depth, block)
        cache.start_at(length)
        why = ""
        if length < n_same:
            why = f"the keys and values that token {n_same} sees are not all there any more"
        elif length < len(ids) - 1:
            why = f"token {length} is not the one that was read there before" if length else "nothing that was read before begins like it"
        return Found(cache, why)

    def keep(self, ids: Sequence[int], cache: Cache, ended: bool = True):
        """Remembers the committed positions of `cache`, whose tokens are `ids`; where it has more of them than `ids`, only those.

        `ended`: a conversation goes on from there, and it is written to the disk. Without it, it is a point on the way.
        """
        self._clock += 1
        node, n = self._root, min(cache.length, len(ids))
        path = []
        for depth in range(-(-n // BLOCK)):
            key = tuple(int(i) for i in ids[depth * BLOCK:min(n, (depth + 1) * BLOCK)])
            node = node.children.get(key) or self._longer(node, key) or self._add(node, key, depth)
            node.used = node.seen = self._clock
            for number, table in enumerate(cache.tables):
                if depth in table.blocks and not node.has(number):
                    block = table.blocks[depth]
                    block.flags.writeable = False
                    node.blocks[number] = block
                    self.n_bytes += block.nbytes
            self._replace_shorter(node)
            path.append(node)
        if ended:
            needed = list(self._needed(path, n))
            for node, number in needed:
                node.at_end |= self._windows[number] is not None
            if self.snapshots is not None:
                self._save(path, needed)
        self._trim()

    def resize(self, budget: int):
        """From now on no more than `budget` bytes are taken."""
        self.budget = budget
        self._trim()

    def forget(self):
        """Frees all memory; what is on the disk is still known."""
        budget = self.budget
        self.resize(0)
        self.budget = budget

    def _usable(self, path: Sequence[_Node], n_same: int) -> int:
        """Up to where a sequence along `path` can go on: at `n_same` or an earlier beginning of a block."""
        points = [n_same, *range((n_same - 1) // BLOCK * BLOCK, -1, -BLOCK)] if n_same else [0]
        return next(n for n in points if all(node.has(number) for node, number in self._needed(path, n)))

    # ---- on the disk

    def _load(self):
        """Puts the blocks of all files into the tree, where there are none from a file."""
        ends: dict[str, _Node] = {"": self._root}
        for snapshot in self.snapshots.found():
            above = ends[snapshot.parent]
            while above.depth >= snapshot.first:
                above = above.parent
            ends[snapshot.name] = self._store(snapshot, above) if above.depth == snapshot.first - 1 else above

    def _save(self, path: Sequence[_Node], needed: Sequence[tuple[_Node, int]]):
        """Writes the nodes at the end of a sequence that are not on the disk yet, and maps what was written."""
        full = [number for number, window in enumerate(self._windows) if window is None]
        first = next((node.depth for node in path if not all(number in node.stored for number in full)), len(path))
        if first == len(path):
            return
        blocks: list[dict[int, np.ndarray]] = [{} for _ in self._windows]
        for node, number in needed:
            if node.depth >= first:
                opened = node.stored[number].open() if number in node.stored else None
                if number not in node.blocks and opened is None:
                    return                              # the sequence cannot be gone on with: others have displaced it
                blocks[number][node.depth] = self._block(opened, number, node.depth) if opened else node.blocks[number]
        above = path[first - 1] if first else self._root
        parent = above.stored[full[0]] if first else None
        ids = [i for node in path[first:] for i in node.ids]
        snapshot = self.snapshots.write(parent.name if parent else "", first, ids, blocks)
        if self.snapshots.deleted:
            self._without(self.snapshots.deleted)
            self.snapshots.deleted.clear()
        if snapshot:
            self._store(snapshot, above)
            for ancestor in dict.fromkeys(node.stored[full[0]] for node in reversed(path[:first]) if full[0] in node.stored):
                ancestor.touch()                        # the first last: without it the others are of no use

    def _store(self, snapshot: Snapshot, above: _Node) -> _Node:
        """Makes the blocks of a file those of the nodes below `above`. Returns the last one."""
        node = above
        for depth in range(snapshot.first, snapshot.first - (-len(snapshot.ids) // BLOCK)):
            begin = (depth - snapshot.first) * BLOCK
            key = snapshot.ids[begin:begin + BLOCK]
            node = node.children.get(key) or self._add(node, key, depth)
            for number, mine in enumerate(snapshot.blocks):
                if depth in mine and number not in node.stored:
                    if number in node.blocks:
                        self._drop(node, number)
                    node.stored[number] = snapshot
            self._replace_shorter(node)
        snapshot.ids = ()                   # the nodes have them
        return node

    def _opened(self, path: Sequence[_Node], length: int) -> dict[Snapshot, list[dict[int, np.ndarray]] | None]:
        """The files that a sequence needs (`Snapshot.open`). From the last to the first: parents count as used last."""
        needed = {node.stored[number] for node, number in self._needed(path, length) if number in node.stored}
        return {snapshot: snapshot.open() for snapshot in sorted(needed, key=lambda snapshot: -snapshot.first)}

    def _block(self, opened: Sequence[dict[int, np.ndarray]], number: int, depth: int) -> np.ndarray:
        return opened[number][depth].reshape(self.snapshots.shapes[number])

    def _forget(self, unsound: Collection[Snapshot]):
        """Does without these files. What others have of the same blocks takes the place of those that are gone."""
        gone = [self.snapshots.remove(snapshot) for snapshot in unsound]
        self._without({snapshot.name for snapshot in unsound})
        if all(gone):                   # one that could not be opened would be found again
            self._load()

    def _without(self, names: Collection[str]):
        """Forgets that these files have anything, and nodes that have nothing left."""
        for node in sorted(self._nodes(), key=lambda node: -node.depth):
            node.stored = {number: snapshot for number, snapshot in node.stored.items() if snapshot.name not in names}
            if not node.n_known and not node.children:
                self._remove(node)

    # ---- the tree

    def _keep(self) -> int:
        """How many positions beyond the window the sliding layers of a cache keep, until they are remembered; fewer for a small budget."""
        a_token = sum(2 * spec.n_kv * spec.head_dim * self.model.backend.kv_type.itemsize for spec in self.model.config.layers
                      if spec.has_own_kv and spec.window is not None)
        return min(POINT, self.budget // a_token) if a_token else 0

    def _walk(self, ids: Sequence[int]) -> tuple[list[_Node], int]:
        """The nodes along `ids`, the last of which may have more, or others; and how many ids are the same."""
        path, node, n = [], self._root, 0
        while node is not None:
            key = tuple(int(i) for i in ids[n:n + BLOCK])
            node = node.children.get(key) if len(key) == BLOCK else None
            if node is not None:
                path.append(node)
                n += BLOCK
        children = (path[-1] if path else self._root).children.values()
        best = max(children, key=lambda child: (n_common(child.ids, key), child.n_known), default=None)
        if best is None or not (more := n_common(best.ids, key)):
            return path, n
        return [*path, best], n + more

    def _needed(self, path: Sequence[_Node], length: int) -> Iterator[tuple[_Node, int]]:
        """(node, number of a table) for every block that a sequence needs to go on at `length`."""
        for number, window in enumerate(self._windows):
            first = 0 if window is None else max(0, length - window + 1)
            for node in path[first // BLOCK:-(-length // BLOCK)]:
                yield node, number

    def _longer(self, parent: _Node, key: tuple[int, ...]) -> _Node | None:
        """A node that has these ids and more, and all blocks."""
        whole = (node for node in parent.children.values() if node.n_known == len(self._windows))
        return next((node for node in whole if node.ids[:len(key)] == key), None)

    def _add(self, parent: _Node, key: tuple[int, ...], depth: int) -> _Node:
        node = parent.children[key] = _Node(key, depth, parent)
        return node

    def _replace_shorter(self, node: _Node):
        """Removes the nodes of which this one has all ids, if it has all blocks."""
        if node.n_known == len(self._windows):
            siblings = node.parent.children.items()
            for other in [other for ids, other in siblings if len(ids) < len(node.ids) and node.ids[:len(ids)] == ids]:
                self._remove(other)

    def _remove(self, node: _Node):
        for number in list(node.blocks):
            self._drop(node, number)
        del node.parent.children[node.ids]

    def _drop(self, node: _Node, number: int):
        self.n_bytes -= node.blocks.pop(number).nbytes

    def _trim(self):
        """Drops what is least likely to be needed, until the rest is within the budget."""
        if self.n_bytes <= self.budget:
            return
        nodes = list(self._nodes())
        for node in sorted(nodes, key=lambda node: (node.at_end, node.seen, self._worth(node), node.depth)):
            for number in [number for number in node.blocks if self._windows[number] is not None]:
                if self.n_bytes <= self.budget:
                    return
                self._drop(node, number)
        for node in sorted(nodes, key=lambda node: (node.used, -node.depth)):
            if self.n_bytes <= self.budget:
                return
            if not node.children and not node.stored:
                self._remove(node)

    def _worth(self, node: _Node) -> int:
        """Of a block of sliding layers: the largest power of two that divides the number of the POINT that sees it, 0 where none does."""
        point = -(-(node.depth + 1) * BLOCK // POINT)
        return point & -point if point * POINT - self._window + 1 < (node.depth + 1) * BLOCK else 0

    def _nodes(self) -> Iterator[_Node]:
        left = list(self._root.children.values())
        while left:
            node = left.pop()
            yield node
            left += node.children.values()


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
