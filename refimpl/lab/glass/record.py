"""The record of a text: what the one forward pass does for each of its tokens, as JSON that the page draws.

It is made afterwards, by running the finished text once more with a tap: a row's bits depend on its tokens and on nothing else, so this run
has the numbers of the one that wrote the text, however that was batched, drafted or cached.
"""

from collections.abc import Callable, Sequence

import numpy as np

from refimpl.decode.speculative import Round
from refimpl.lab.glass import reading
from refimpl.lab.glass.attending import Attending, places
from refimpl.lab.glass.lens import Lens, chosen_layers
from refimpl.lab.glass.likely import Likely
from refimpl.lab.glass.routing import Routing
from refimpl.loading.model import CHUNK, Model
from refimpl.model.config import AttentionType, MoeFfn
from refimpl.model.soft import NO_SOFT, Soft
from refimpl.text.tokenizer import Tokenizer

FORMAT = "refimpl glass 1"
WORK = 6 * 10**12               # weights times tokens that a record may read: some seconds to half a minute
FEWEST, MOST = 256, 2048        # tokens of a record, whatever they cost
LIKELY_WORK = 2 * 10**11        # multiply-adds of the head for likelihoods
LENS_WORK = 5 * 10**10          # and for the lens
ATTENTION_BYTES = 6 * 10**6
ROWS = 128                      # rows of logits at a time


def most_tokens(model: Model) -> int:
    """So many tokens can be recorded: fewer of a large model."""
    weights = sum(8 * n for n in reading.weight_bytes(model).values()) / 4.5         # about: 4.5 bits each
    return int(np.clip(WORK // weights, FEWEST, MOST))


def record(model: Model, ids: Sequence[int], n_prompt: int, soft: Soft = NO_SOFT, pause: Callable[[], None] = lambda: None
           ) -> dict[str, object]:
    """What the model does for `ids`, the first `n_prompt` of which were given. `pause` is called where the work may be interrupted.

    Sizes are bounded: of large models likelihoods and lens are those of the last tokens, attention has fewer places (`first`, `k`).
    Raises ValueError for more than `most_tokens(model)` ids, none, or a prompt of none; MemoryRefusal.
    """
    if len(ids) > (most := min(most_tokens(model), model.config.n_ctx - 1)):
        raise ValueError(f"the text has {len(ids)} tokens; of this model at most {most} can be looked at")
    if not 1 <= n_prompt <= len(ids):
        raise ValueError(f"n_prompt is {n_prompt}, expected 1 to {len(ids)}, the number of ids")
    ids_T = model.checked(ids, soft)
    model.refuse_unless_it_fits(len(ids) + 1)
    for part in dict.fromkeys(part for part, _ in soft.place.values()):
        part.compute(lambda name, value: pause())
    cache = model.new_cache(len(ids) + 1)
    layers, n_lens = chosen_layers(model, len(ids), LENS_WORK)
    lens, routing = Lens(model, layers, len(ids) - n_lens), Routing(model.config)
    attending = Attending(model.config, cache, places(model.config, len(ids), ATTENTION_BYTES))
    likely = Likely(max(0, len(ids) - max(1, LIKELY_WORK // (model.config.n_vocab * model.config.n_embd))))

    def look(name: str, value: np.ndarray):
        attending.look(name, value)
        routing.look(name, value)
        lens.look(name, value, cache.length)
        if name.startswith("l_out-"):
            pause()
    for part_T in soft.chunks(ids_T, CHUNK):
        attending.begin(soft.ends(part_T, cache.length + np.arange(len(part_T))))
        state_TD = model.forward(part_T, cache, look, soft)
        for begin in range(max(0, likely.first - cache.length), len(part_T), ROWS):
            rows_TD, at = state_TD[begin:begin + ROWS], cache.length + begin
            likely.add(model.head(rows_TD), np.maximum(0, ids_T[at + 1:at + 1 + len(rows_TD)]))
            pause()
        cache.advance(len(part_T))
    found = {"likely": likely.as_json(), "lens": lens.as_json(pause)}
    return {"format": FORMAT, "model": about(model), "n_prompt": n_prompt, **texts(model.tokenizer, ids), **found,
            "soft": parts_of(ids, soft), "experts": routing.as_json(), "attention": attending.as_json(),
            "read": reading.as_json(model, cache, int(max(0, ids_T[-1])), pause),
            "pieces": pieces(model.tokenizer, [likely.shown, lens.shown, ids_T])}


def about(model: Model) -> dict[str, object]:
    """The model's shape."""
    layers = [{"full": spec.attention is AttentionType.FULL, "window": spec.window or 0, "n_head": spec.n_head, "n_kv": spec.n_kv,
               "head_dim": spec.head_dim, "kv_from": spec.kv_from, "n_expert": spec.ffn.n_expert if isinstance(spec.ffn, MoeFfn) else 0,
               "n_used": spec.ffn.n_used if isinstance(spec.ffn, MoeFfn) else 0} for spec in model.config.layers]
    return {"name": model.name, "n_embd": model.config.n_embd, "n_vocab": model.config.n_vocab, "layers": layers,
            "backend": model.backend.name, "arithmetic": model.backend.arithmetic, "threads": model.backend.threads}


def texts(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[str, object]:
    """`ids`, -1 for soft tokens, and what each adds to the text: "" where it is a part of a character that a later one completes."""
    stream = tokenizer.stream(special=True)
    found = ["" if i < 0 else stream.push(i) for i in ids]
    found[-1] += stream.finish()
    return {"ids": [max(-1, int(i)) for i in ids], "texts": found}


def parts_of(ids: Sequence[int], soft: Soft) -> list[dict[str, object]]:
    """Where pictures and sounds stand: the first place, how many rows, and whether these see each other in sliding layers."""
    found = [(t, *soft.place[int(i)]) for t, i in enumerate(ids) if i < 0]
    return [{"first": t, "n": part.n, "together": part.together} for t, part, row in found if row == 0]


def piece(tokenizer: Tokenizer, i: int) -> str:
    """One token alone: its text, or its name where it is a byte of a character."""
    text = tokenizer.decode([i], special=True)
    return tokenizer.token(i) if "\ufffd" in text else text


def pieces(tokenizer: Tokenizer, shown: Sequence[np.ndarray]) -> dict[str, str]:
    """All tokens that the record speaks of."""
    ids = np.unique(np.concatenate([part.ravel().astype(np.int64) for part in shown]))
    return {str(i): piece(tokenizer, i) for i in ids[ids >= 0].tolist()}


def round_as_json(tokenizer: Tokenizer, done: Round) -> dict[str, object]:
    """A round of drafting: who drafted what, how many of these the target chose too, what was written, milliseconds of both."""
    return {"source": done.source, "drafted": [[i, piece(tokenizer, i)] for i in done.drafted], "accepted": done.n_accepted,
            "emitted": len(done.emitted), "draft_ms": round(done.draft_seconds * 1000, 3),
            "verify_ms": round(done.verify_seconds * 1000, 3)}
