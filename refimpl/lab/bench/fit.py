"""Which Gemma 4 runs here, and how fast: the five models in their common files, or one file, beside what this machine has."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

import numpy as np

from refimpl.decode.draft_length import best_draft_length, rates
from refimpl.files.outline import drafter_outline, model_outline, projector_outline
from refimpl.files.synth import SHAPES
from refimpl.kernels.cores.threads import prepare
from refimpl.kernels.machine.tiles import held_bytes
from refimpl.lab.bench.disk import Room, measure_room
from refimpl.lab.bench.draft_bench import check_chances
from refimpl.lab.bench.machine import machine
from refimpl.lab.bench.predict import Memory, Outlined, draft_seconds, draft_work, memory_of, outlined, prompt_seconds, step_seconds
from refimpl.lab.bench.speed import Rest, Speed, heads_of, measure_rest, measure_speed
from refimpl.loading.memory import longest_context, weight_bytes
from refimpl.loading.model import CHUNK
from refimpl.model.backend import kernel_backend
from refimpl.model.drafter import CENTROIDS, DrafterWeights, drafter_weights_from_gguf
from refimpl.model.drafter_config import DrafterConfig, drafter_config_from_gguf
from refimpl.progress import silent

FILE = "FILE"
RECIPES = {     # of files/synth.py -> (whose files these are, where; FILE where this project knows no name)
    "google-q4_0": ("Google's QAT, Q4_0", "hf:google/gemma-4-{}-it-qat-q4_0-gguf"),
    "unsloth-q4_0": ("Unsloth's QAT, all Q4_0", FILE),
    "q4_k_m": ("Q4_K_M", "hf:unsloth/gemma-4-{}-it-GGUF:Q4_K_M"),
}
DRAFTER = "hf:google/gemma-4-{}-it-qat-q4_0-unquantized-assistant"
BEST_FIRST = ("31B", "26B-A4B", "12B", "E4B", "E2B")
FLUENT = 5.0                        # new tokens a second: about as fast as people read
START = 35                          # times `python_seconds`: imports, kernels from the disk, a tokenizer of 262,144 tokens
YES, FROM_DISK, NO = "yes", "from the disk", "no"


@dataclass(frozen=True)
class Asked:
    """What a prediction is for.

    n_ctx     tokens of context, of each of `users` who all get answers at the same time
    n_prompt  tokens of a prompt
    chances   with a drafter: the chances that the first draft token, the first two, ... are accepted; () without one
    mmproj    with a projector
    """

    n_ctx: int = 8192
    users: int = 1
    n_prompt: int = 512
    chances: tuple[float, ...] = ()
    mmproj: bool = False


@dataclass(frozen=True)
class Candidate:
    """A model that may run here: its shape's name in files/synth.py (None: another), what file it is, what to type for it, its header."""

    shape: str | None
    what: str
    name: str
    model: Outlined


def common_files(name: str | None = None) -> list[Candidate]:
    """The five models in their common files, the smallest model first; of these the one that is typed as `name`."""
    return [Candidate(shape, what, where.format(shape), outlined(model_outline(shape, recipe)))
            for shape in SHAPES for recipe, (what, where) in RECIPES.items() if name is None or name == where.format(shape) != FILE]


def of_file(source, name: str) -> Candidate:
    """The model that a file or directory has. Raises GGUFError for what is no Gemma 4 model."""
    model = outlined(source)
    widths = {SHAPES[shape][0]["hidden_size"]: shape for shape in SHAPES}
    return Candidate(widths.get(model.config.n_embd), str(source.metadata.get("general.name", source.path.stem)), name, model)


def fit(asked: Asked, candidates: Sequence[Candidate], *, threads: int | None = None,
        progress: Callable[..., AbstractContextManager] = silent) -> dict[str, object]:
    """{machine, room, asked, rows}: predictions for every candidate, as plain data (`predicted`).

    Raises ValueError for a drafter or projector of a model that is none of the five, and for chances that are none; OSError where the cache
    folder cannot be written to.
    """
    if asked.chances:
        check_chances(asked.chances)
    backend = kernel_backend("q8", prepare(threads))
    extras = [_extras(candidate, asked) for candidate in candidates]
    types = {kind for candidate in candidates for kind in candidate.model.work.types} | {kind for extra in extras for kind in extra.types}
    heads = {heads for candidate in candidates for heads in heads_of(candidate.model.config)}
    heads |= {heads for extra in extras if extra.drafter for heads in heads_of(extra.drafter[0].trunk)}
    room = measure_room(backend)
    speed = measure_speed(types, heads, backend, progress)
    rests: dict[str | None, Rest] = {}
    rows = []
    for candidate, extra in zip(candidates, extras):
        if candidate.shape is None or candidate.shape not in rests:
            rests[candidate.shape] = measure_rest(candidate.model.config, candidate.model.weights, backend)
        rows.append(predicted(candidate, extra, asked, speed, rests[candidate.shape], room, backend.kv_type))
    return {"machine": machine(backend.threads), "room": asdict(room) | {"bandwidth": speed.bandwidth}, "asked": asdict(asked),
            "rows": rows}


@dataclass(frozen=True)
class Extras:
    """What comes beside a model: a drafter, and bytes of a drafter and a projector."""

    drafter: tuple[DrafterConfig, DrafterWeights] | tuple[()] = ()
    types: frozenset[str] = frozenset()
    n_bytes: int = 0


def _extras(candidate: Candidate, asked: Asked) -> Extras:
    extras = Extras()
    if candidate.shape is None and (asked.chances or asked.mmproj):
        raise ValueError(f"{candidate.name}: no drafter and no projector are known for a model of width {candidate.model.config.n_embd}")
    if asked.chances:
        file = drafter_outline(candidate.shape)
        config = drafter_config_from_gguf(file.metadata, candidate.model.config.n_vocab, candidate.model.config, file.path)
        weights = drafter_weights_from_gguf(file, config, "centroid" if CENTROIDS in file.tensors else "dense")
        extras = Extras((config, weights), frozenset(draft_work(weights)), weight_bytes(weights, held_bytes)[0])
    return replace(extras, n_bytes=extras.n_bytes + projector_outline(candidate.shape).n_bytes) if asked.mmproj else extras


def predicted(candidate: Candidate, extras: Extras, asked: Asked, speed: Speed, rest: Rest, room: Room, kv_type: np.dtype
              ) -> dict[str, object]:
    """The row of a candidate:

    model, file, name     the shape, whose file it is, what to type for it
    fits                  "yes"; "from the disk", weights that memory does not hold are read whenever they are needed; or "no"
    memory                bytes: of the file, of weights, keys and values, buffers, process, extras; all together; and the longest context
    prompt, decode        tokens a second, of all users together, at the beginning; `decode_full`: when their contexts are full; `drafted`:
                          the number of draft tokens that is best, 0 without a drafter
    type                  the command that runs it
    load                  seconds until the first token (`starts`)
    """
    model, n_ctx = candidate.model, min(asked.n_ctx, candidate.model.config.n_ctx)
    memory = memory_of(model, n_ctx, kv_type, asked.users)
    total = memory.total + extras.n_bytes
    verdict, missing = fits(memory, extras.n_bytes, room)
    most = longest_context(model.config, (room.memory - (total - memory.cache)) // asked.users, kv_type, CHUNK)
    row = {"model": candidate.shape, "file": candidate.what, "name": candidate.name, "fits": verdict,
           "memory": {"file": model.source.n_bytes, **asdict(memory), "extras": extras.n_bytes, "total": total, "most_context": most}}
    if verdict == NO:
        return row
    reading = 0.0 if room.reading is None else 1 / room.reading         # seconds a byte
    waiting = missing_bytes(model, memory.weights, missing) * reading
    (decode, drafted), (decode_full, _) = (decode_seconds(model, extras, asked, speed, rest, depth) for depth in (0, n_ctx - 1))
    prompt = prompt_seconds(model, speed, rest, asked.n_prompt) + missing * reading * -(-asked.n_prompt // CHUNK)
    return row | {"type": command(candidate, asked, drafted), "prompt": asked.n_prompt / prompt, "decode": 1 / (decode + waiting),
                  "decode_full": 1 / (decode_full + waiting), "drafted": drafted, "load": starts(memory.weights, room)}


def starts(weight_bytes: int, room: Room) -> dict[str, float]:
    """Seconds from the command to the first token: `first` rearranges the weights, `next` maps them, `cold` has to read them from the
    disk.
    """
    start, reading = START * room.python, 0.0 if room.reading is None else weight_bytes / room.reading
    return {"first": start + reading + weight_bytes / room.rearranging, "next": start, "cold": start + reading}


def command(candidate: Candidate, asked: Asked, drafted: int) -> str:
    """What to type to run a candidate."""
    draft = f" --draft {DRAFTER.format(candidate.shape)}" if drafted else ""
    return (f"refimpl chat -m {candidate.name}{draft}" if asked.users == 1 else
            f"refimpl serve -m {candidate.name}{draft} -np {asked.users} -c {asked.n_ctx}")


def decode_seconds(model: Outlined, extras: Extras, asked: Asked, speed: Speed, rest: Rest, depth: int) -> tuple[float, int]:
    """(seconds of a new token, users taken together, whose contexts have `depth` tokens; draft tokens in a round)."""
    verify_K = [step_seconds(model, speed, rest, depth, asked.users, rows) for rows in range(1, len(asked.chances) + 2)]
    if not extras.drafter:
        return verify_K[0] / asked.users, 0
    a_draft = asked.users * draft_seconds(model.config, *extras.drafter, speed, rest, depth)
    best = best_draft_length(verify_K, a_draft, asked.chances)
    return 1 / rates(verify_K, a_draft, asked.chances)[best] / asked.users, best


def fits(memory: Memory, extra_bytes: int, room: Room) -> tuple[str, int]:
    """(YES, FROM_DISK or NO; bytes of weights that memory has no room for)."""
    total = memory.total + extra_bytes
    if total <= room.memory:
        return YES, 0
    if total - memory.weights > room.memory or memory.weights > room.disk:
        return NO, total - room.memory
    return FROM_DISK, total - room.memory


def missing_bytes(model: Outlined, weight_bytes: int, missing: int) -> float:
    """Bytes that a new token has to read from the disk where memory has no room for `missing` bytes of weights: of experts the share of
    those that it chooses, as long as they alone have to give way; of anything else everything that is missing.
    """
    work = model.work
    experts = weight_bytes * sum(n * work.n_expert for n in work.expert.values()) / max(1, work.n_weights)
    return missing * work.n_used / work.n_expert if missing <= experts else missing


def best_of(rows: Sequence[dict[str, object]]) -> dict[str, object] | None:
    """The row to recommend, of those with a name to download: of what fits the largest model that is FLUENT, else the fastest; of its files
    the fastest. None: none fits.
    """
    able = [row for row in rows if row["fits"] == YES and row["name"] != FILE]
    fluent = [row for row in able if row["decode"] >= FLUENT]
    return max(fluent, key=lambda row: (-BEST_FIRST.index(row["model"]), row["decode"]), default=max(
        able, key=lambda row: row["decode"], default=None))
