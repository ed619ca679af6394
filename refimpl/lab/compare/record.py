"""Runs a model and keeps every named value, in memory or in a trace file (trace.py)."""

import fnmatch
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from refimpl.decode.draft_length import FixedDraftLength
from refimpl.decode.drafter import Drafter
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.decode.speculative import Round, speculative
from refimpl.formats.hashing import files_hash
from refimpl.formats.safetensors import TensorWriter
from refimpl.lab.compare.background_writer import BackgroundWriter, Memory
from refimpl.lab.compare.towers.inputs import TowerInput, with_soft_tokens
from refimpl.lab.compare.trace import FORMAT, Trace, TraceError
from refimpl.loading.model import CHUNK, Model
from refimpl.model.cache import Cache
from refimpl.model.soft import NO_SOFT, Soft
from refimpl.model.tap import Look, no_tap, prefixed
from refimpl.progress import Advance, Progress, silent

ALL_LOGITS_BELOW = 65_536                 # default: all logits of vocabularies up to this size
TOP = 256                                 # and of larger ones the largest so many
LOGIT_BYTES = 32 << 20                    # logits in memory at a time


class Recorder:
    """A tap that writes the wanted rows to `out`. `patterns`: names with `*` and `?`, as in a shell.

    `before` and `after` are taps that see a value of the prompt before its rows are taken and after, and may change it.
    """

    def __init__(self, out: BackgroundWriter | Memory, positions: Sequence[int], patterns: Sequence[str], top: int, before: Look = no_tap,
                 after: Look = no_tap):
        self.before, self.after = before, after
        self.out, self.positions, self.patterns, self.top = out, np.array(positions), list(patterns), top
        self._written, self._wanted = {}, {}
        self._rows, self._at = slice(0, 0), np.array([], int)

    def wants(self, name: str) -> bool:
        """Is this name asked for?"""
        if name not in self._wanted:
            self._wanted[name] = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)
        return self._wanted[name]

    def at(self, first: int, n_rows: int):
        """The next values are those of positions first, first + 1, ... of the prompt."""
        here = self.positions[(self.positions >= first) & (self.positions < first + n_rows)]
        self._at = here - first
        if len(here) == n_rows:                 # all of them: no copy
            self._at = slice(None)

    def tap(self, name: str, value: np.ndarray):
        """A value of the prompt."""
        self.before(name, value)
        if self.wants(name):
            rows = value[self._at]
            if len(rows):
                self.put(name, rows, len(self.positions))
        self.after(name, value)

    def whole(self, name: str, value: np.ndarray):
        """A value of a draft step or a round, which is recorded with all its rows."""
        if self.wants(name):
            self._logits(name, value, len(value)) if name.endswith("result_output") else self.put(name, value, len(value))

    def of_tower(self, name: str, value: np.ndarray):
        """A value of a tower, which is recorded with all its rows."""
        self.before(name, value)
        if self.wants(name):
            self.put(name, value, len(value))
        self.after(name, value)

    def logits(self, logit_TV: np.ndarray):
        """Logits of the prompt, of rows that are asked for."""
        self.before("result_output", logit_TV)
        self._logits("result_output", logit_TV, len(self.positions))

    def _logits(self, name: str, logit_TV: np.ndarray, n_rows: int):
        if not self.top:
            self.put(name, logit_TV, n_rows)
            return
        id_TK = np.argsort(-logit_TV, axis=1, kind="stable")[:, :self.top]
        largest_T = logit_TV.max(axis=1, keepdims=True)
        self.put(f"{name}.ids", id_TK, n_rows)
        self.put(f"{name}.top", np.take_along_axis(logit_TV, id_TK, axis=1), n_rows)
        self.put(f"{name}.logsumexp", largest_T + np.log(np.exp(logit_TV - largest_T).sum(axis=1, keepdims=True)), n_rows)

    def put(self, name: str, rows: np.ndarray, n_rows: int):
        """The next rows of a tensor that will have `n_rows`."""
        if rows.dtype.kind in "iu":
            rows = rows.astype(np.int32)
        if name not in self._written:
            self.out.add(name, rows.dtype, (n_rows, *rows.shape[1:]))
            self._written[name] = 0
        self.out.write(name, self._written[name], rows)
        self._written[name] += len(rows)

    def check(self):
        """Raises TraceError for a pattern that matched no name."""
        for pattern in self.patterns:
            if not any(fnmatch.fnmatchcase(name.removesuffix(".top"), pattern) for name in self._written):
                raise TraceError(f"no value is called {pattern!r}: refimpl trace --names lists them")


def record(model: Model, ids: Sequence[int], recorder: Recorder, *, media: Sequence[TowerInput] = (), drafter: Drafter | None = None,
           draft_max: int = 4, rounds: int = 0, advance: Advance = lambda n: None):
    """Runs the towers on `media`, then `ids` (-1 - k: a soft token of number k of them), then `draft_max` draft steps as `refimpl.propose`
    makes them, then speculative rounds, all seen by `recorder`.
    """
    numbers, soft = with_soft_tokens(ids, media, recorder.of_tower)
    ids_T, cache = model.checked(numbers, soft), model.new_cache(len(ids) + (rounds + 1) * (draft_max + 1))
    if drafter is None:
        _run(model, ids_T, cache, recorder, advance, soft)
        return
    before = _run(model, ids_T[:-1], cache, recorder, advance, soft)
    if before is not None:
        drafter.draft(int(ids_T[-1]), before, cache, draft_max, tap=recorder.whole)
    state_D = _run(model, ids_T[-1:], cache, recorder, advance, soft)
    if rounds:
        greedy, pair = Sampler(Sampling(temperature=0.0), model.tokenizer.suppress), _TappedPair(model, drafter, recorder.whole)
        token = greedy.pick(model.head(state_D[None])[0])
        for done in speculative(pair, pair.draft, cache, greedy, token, state_D, rounds * (draft_max + 1), FixedDraftLength(draft_max),
                                model.tokenizer.end_of_generation):
            pair.finish(done)
            if pair.round == rounds:
                break


class _TappedPair:
    """Target and drafter as `speculative` uses them, with a tap that sees the values of round r under names that begin with "round{r}."."""

    def __init__(self, model: Model, drafter: Drafter, tap: Look):
        self.model, self.drafter, self._tap, self.round = model, drafter, tap, 0

    def tap(self, name: str, value: np.ndarray):
        self._tap(f"round{self.round}.{name}", value)

    def draft(self, token: int, state_C: np.ndarray, cache: Cache, n: int) -> list[int]:
        return self.drafter.draft(token, state_C, cache, n, tap=self.tap)

    def forward(self, ids_T: np.ndarray, cache: Cache) -> np.ndarray:
        return self.model.forward(ids_T, cache, prefixed(self.tap, "verify."))

    def head(self, state_TD: np.ndarray) -> np.ndarray:
        logit_TV = self.model.head(state_TD)
        self.tap("verify.result_output", logit_TV)
        return logit_TV

    def finish(self, done: Round):
        """Shows what the round drafted and emitted."""
        self.tap("drafted", np.array(done.drafted))
        self.tap("emitted", np.array(done.emitted))
        self.round += 1


def _run(model: Model, ids_T: np.ndarray, cache: Cache, recorder: Recorder, advance: Advance, soft: Soft = NO_SOFT) -> np.ndarray | None:
    """Runs and commits ids chunk by chunk. Returns the last state."""
    state_TD = None
    for part in soft.chunks(ids_T, CHUNK):
        first, n = cache.length, len(part)
        recorder.at(first, n)
        state_TD = model.forward(part, cache, recorder.tap, soft)
        for i, layer in cache.layers.items():
            names = [f"cache_k-{i}", f"cache_v-{i}"]
            for name, value in zip(names, layer.read(first, first + n) if any(map(recorder.wants, names)) else ()):
                if recorder.wants(name):
                    recorder.tap(name, value)
        if recorder.wants("result_output"):
            wanted_TD = state_TD[recorder._at]
            step = max(1, LOGIT_BYTES // (4 * model.config.n_vocab))
            for i in range(0, len(wanted_TD), step):
                recorder.logits(model.head(wanted_TD[i:i + step]))
        cache.advance(n)
        advance(n)
    return None if state_TD is None else state_TD[-1]


def n_top(model: Model, logits: int | str | None) -> int:
    """How many logits to keep, 0 for all: `logits` is a number, "all", or None for what suits the vocabulary."""
    if logits is None:
        return 0 if model.config.n_vocab <= ALL_LOGITS_BELOW else TOP
    if logits == "all":
        return 0
    if type(logits) is not int or not 1 <= logits <= model.config.n_vocab:
        raise TraceError(f"logits={logits!r}: expected 'all' or a number from 1 to {model.config.n_vocab}")
    return logits


def facts_of(model: Model, prompt: str | None = None, media: Sequence[TowerInput] = (),
             template: str | None = None) -> dict[str, object]:
    """How a trace was made, for its header."""
    import refimpl

    isa = "NumPy"
    if model.backend.name == "kernels":
        from refimpl.kernels.machine.isa import ISA as isa
    facts = {"engine": f"refimpl {refimpl.__version__}", "backend": model.backend.name, "isa": isa, "threads": model.backend.threads,
             "model": str(Path(model.file.path).absolute()), "prompt": prompt}
    if template is not None:
        facts["template"] = template
    if media:
        facts |= {"projector": str(Path(media[0].projector.file.path).absolute()), "media": [dict(part.facts) for part in media]}
    return facts


def trace(model: Model, ids: Sequence[int], *, positions: Iterable[int] | None = None, tensors: Sequence[str] = ("*",),
          logits: int | str | None = None, before: Look = no_tap, after: Look = no_tap, media: Sequence[TowerInput] = (),
          **drafting) -> Trace:
    """A trace in memory; default: all positions. `before` and `after` as in Recorder, `media` as in `record` (towers/inputs.py)."""
    kept = Memory()
    positions = tuple(range(len(ids))) if positions is None else checked_positions(positions, len(ids))
    recorder = Recorder(kept, positions, tensors, n_top(model, logits), before, after)
    record(model, ids, recorder, media=media, **drafting)
    recorder.check()
    return Trace("this run", tuple(map(int, ids)), positions, model.backend.arithmetic, kept, facts_of(model, media=media))


def write_trace(path: str | os.PathLike, model: Model, ids: Sequence[int], *, positions: Iterable[int] | None = None,
                tensors: Sequence[str] = ("*",), logits: int | str | None = None, prompt: str | None = None,
                template: str | None = None, progress: Progress = silent, media: Sequence[TowerInput] = (),
                **drafting) -> dict[str, object]:
    """Writes a trace file and returns its header. Memory holds the values of one chunk, or of one step of a tower; a run that fails leaves
    no file.

    `positions`, `tensors`, `logits` say what to keep, `template` is what the chat template made of `prompt`, `media` and `drafting` are
    what `record` takes. Raises TraceError, OSError naming the file.
    """
    positions = tuple(range(len(ids))) if positions is None else checked_positions(positions, len(ids))
    steps = model.config.n_layer + (drafting.get("drafter") is not None) * 4 * drafting.get("draft_max", 4) * (
        1 + drafting.get("rounds", 0)) + model.config.n_layer * drafting.get("rounds", 0) + sum(map(n_layers, media))
    header = {"format": FORMAT, "ids": [int(i) for i in ids], "positions": [int(p) for p in positions],
              "tokens": [model.tokenizer.token(i) if i >= 0 else "" for i in ids], "arithmetic": model.backend.arithmetic
              } | facts_of(model, prompt, media, template)
    with TensorWriter(path, 10_000 + 16 * steps * 2**10 + 2 * len(json.dumps(header))) as out:
        writer, hashing = BackgroundWriter(out), ThreadPoolExecutor(1)
        try:
            with progress("positions", len(ids)) as advance, progress("MB hashed", model.file.n_bytes, 10**6) as hashed:
                sha256 = hashing.submit(files_hash, model.file.files(), hashed)
                recorder = Recorder(writer, positions, tensors, n_top(model, logits))
                record(model, ids, recorder, media=media, advance=advance, **drafting)
                recorder.check()
                writer.wait()
                header |= {"crc32": out.crc32, "model_sha256": sha256.result()}
                if media:
                    header["projector_sha256"] = files_hash(media[0].projector.file.files())
        finally:
            writer.close()
            hashing.shutdown()
        out.finish({"refimpl": json.dumps(header)})
    return header


def n_layers(part: TowerInput) -> int:
    """Layers of the tower that takes it, which may be none."""
    return getattr(getattr(part.projector.config, {"image": "vision", "audio": "audio"}[part.tower]), "n_layer", 0) + 1


def checked_positions(positions: Iterable[int], n: int) -> tuple[int, ...]:
    """Sorted, each once. Raises TraceError for one outside of the prompt."""
    found = tuple(sorted(set(positions)))
    if not found or found[0] < 0 or found[-1] >= n:
        raise TraceError(f"positions {', '.join(map(str, found[:3])) or 'none'}...: the prompt has {n} tokens, 0 to {n - 1}")
    return found
