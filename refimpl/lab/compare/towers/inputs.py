"""What the towers are given in a traced prompt: patches of pictures, frames of sounds, and where their soft tokens stand.

In the ids of a trace -1 - k stands for a soft token of picture or sound number k of the prompt, whatever made it. (The numbers that the
forward pass is given are hashes of weights and pixels: other ones for every engine.)
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from refimpl.lab.compare.trace import Trace, TraceError
from refimpl.loading.model import Model
from refimpl.loading.projector import Projector
from refimpl.media.parts import Audio, Image
from refimpl.model.soft import Soft, SoftTokens
from refimpl.model.tap import Look, no_tap
from refimpl.text.prompt import Part, encode_prompt, in_pictures, markers_of

GIVEN = {"image": ("patches", "positions"), "audio": ("frames",)}       # names of what a tower is given
CROP = 4                # soft tokens of a side of the piece of a picture that noise is measured on
CROP_TOKENS = 24        # soft tokens of the piece of a sound


@dataclass(frozen=True)
class TowerInput:
    """A picture or a sound as the tower takes it.

    name      "image0", "audio0", ...: what stands before the names of its values
    given     name -> array: float32 patches (T, P) and int64 positions (T, 2), or float32 frames (T, M)
    together  its soft tokens see each other in sliding layers
    facts     what the header of a trace says about it
    """

    name: str
    given: Mapping[str, np.ndarray]
    together: bool
    projector: Projector
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def tower(self) -> str:
        """"image" or "audio"."""
        return tower_of(self.name)

    def run(self, look: Look = no_tap) -> SoftTokens:
        """Its soft tokens, computed at once. `look` sees what the tower is given (copies), then the tower's values, and may change them."""
        def tap(name: str, value: np.ndarray):
            look(f"{self.name}.{name}", value)

        given = [self.given[name].copy() for name in GIVEN[self.tower]]
        for name, array in zip(GIVEN[self.tower], given):
            tap(name, array)
        x_TD = self.projector.image_tokens(*given, tap) if self.tower == "image" else self.projector.audio_tokens(*given, tap)
        return SoftTokens(hashlib.sha256(self.name.encode()).digest(), len(x_TD), self.together, lambda look: x_TD)

    def cropped(self) -> "TowerInput":
        """A piece of it, which has the same rounding errors and takes less time: the upper left of a picture, the beginning of a sound."""
        if self.tower == "audio":
            return replace(self, given={"frames": self.given["frames"][:CROP_TOKENS * self.projector.frames_per_token]})
        inside = (self.given["positions"] < CROP * self.projector.squares[1]).all(axis=1)
        return replace(self, given={name: array[inside] for name, array in self.given.items()})


def traced_prompt(model: Model, projector: Projector, parts: Sequence[Part]) -> tuple[list[int], list[TowerInput]]:
    """A prompt of parts (text/prompt.py) as `record.trace` takes it: ids with -1 - k for soft tokens, and its pictures and sounds.

    Raises ValueError (MediaError, ChatError) for what cannot be opened, seen or heard.
    """
    parts = in_pictures(parts, projector)
    encoded, media = encode_prompt(model.tokenizer, None, parts, projector), [part for part in parts if isinstance(part, Image | Audio)]
    ids, inputs = [], []
    for i in encoded.ids:
        if i < 0:
            soft, row = encoded.soft.place[i]
            if row == 0:
                part = media[len(inputs)]
                tower = "image" if isinstance(part, Image) else "audio"
                number = sum(other.tower == tower for other in inputs)
                inputs.append(TowerInput(f"{tower}{number}", dict(zip(GIVEN[tower], projector.given(part))), soft.together, projector, {
                    "name": f"{tower}{number}", "n_tokens": soft.n, "placeholder": markers_of(model.tokenizer, part)[1]} | facts_of(part)))
            i = -len(inputs)
        ids.append(i)
    return ids, inputs


def facts_of(part: Image | Audio) -> dict[str, object]:
    """What identifies a picture or a sound: its name, the SHA-256 of what was decoded, its size."""
    found = {"source": part.name, "sha256": part.digest}
    if isinstance(part, Image):
        return found | {"width": part.rgb_HWC.shape[1], "height": part.rgb_HWC.shape[0], "budget": part.tokens}
    return found | {"samples": len(part.samples_N)}


def with_soft_tokens(ids: Sequence[int], inputs: Sequence[TowerInput], look: Look = no_tap) -> tuple[list[int], Soft]:
    """The ids as the forward pass takes them, and the soft tokens of all inputs, computed one after the other.

    Raises TraceError where the ids have more or fewer places for soft tokens than were made.
    """
    made, numbers, n_places = [part.run(look) for part in inputs], [], [0] * len(inputs)
    for i in map(int, ids):
        if -len(inputs) <= i < 0:
            n_places[-1 - i] += 1
            i = made[-1 - i].ids[min(n_places[-1 - i], made[-1 - i].n) - 1]
        numbers.append(i)
    for part, soft, n in zip(inputs, made, n_places):
        if soft.n != n:
            raise TraceError(f"{part.name} is {soft.n} soft tokens, the prompt has places for {n}")
    return numbers, Soft(made)


def inputs_of(model: Model, projector: Projector, *traces: Trace) -> list[TowerInput]:
    """The inputs that a trace was made of, from the first of `traces` that has all of them. Raises TraceError where none does.

    One of the traces has a header that lists them: it is one of ours.
    """
    media = next((trace.facts["media"] for trace in traces if trace.facts.get("media")), [])
    names = [f"{part['name']}.{which}" for part in media for which in GIVEN[tower_of(part["name"])]]
    holds = next((trace for trace in traces if all(name in trace.arrays for name in names)), traces[0])
    return [TowerInput(name, arrays, tower_of(name) == "image" and model.config.looks_ahead_in_images, projector)
            for name, arrays in given_of(replace(holds, facts={"media": media})).items()]


def given_of(trace: Trace) -> dict[str, dict[str, np.ndarray]]:
    """What the towers were given, by "image0", "audio0", ... in the order of the prompt. Raises TraceError where the trace lacks it."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for part in trace.facts.get("media", ()):
        found[part["name"]] = {}
        for which in GIVEN[tower_of(part["name"])]:
            name = f"{part['name']}.{which}"
            if name not in trace.arrays:
                raise TraceError(f"{trace.where}: what a tower was given is not there, {name}: trace it too (--tensors), or compare with "
                                 "--guess")
            found[part["name"]][which] = np.asarray(trace.arrays[name], np.int64 if which == "positions" else np.float32)
    return found


def tower_of(name: str) -> str:
    """"image" for "image0"."""
    return name.rstrip("0123456789")


def with_ids_of(a: Trace, b: Trace) -> Trace:
    """`b` with the numbers of `a` where both have soft tokens: another engine may have any negative number there, or the placeholder."""
    placeholders = {part.get("placeholder") for part in a.facts.get("media", ())}
    shared = [x if x < 0 and (y < 0 or y in placeholders) else y for x, y in zip(a.ids, b.ids)]
    return replace(b, ids=(*shared, *b.ids[len(shared):]))


def shortened(ids: Sequence[int], inputs: Sequence[TowerInput], n: int) -> tuple[list[int], list[TowerInput]]:
    """A prompt like it for measurements: the first `n` ids of text, and pieces of all pictures and sounds."""
    pieces = [part.cropped() for part in inputs]
    left = {-1 - k: n_soft_tokens(part) for k, part in enumerate(pieces)}
    kept, n_text = [], 0
    for i in map(int, ids):
        if i in left:
            wanted, left[i] = left[i] > 0, left[i] - 1
        else:
            wanted, n_text = n_text < n, n_text + 1
        if wanted:
            kept.append(i)
    return kept, pieces


def n_soft_tokens(part: TowerInput) -> int:
    """How many soft tokens it is."""
    n = len(part.given[GIVEN[part.tower][0]])
    if part.tower == "image":
        return n // part.projector.squares[1] ** 2
    return -(-n // part.projector.frames_per_token)
