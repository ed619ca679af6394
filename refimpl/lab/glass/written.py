"""A text is written, and recorded: what a page needs that has no server."""

from collections.abc import Sequence

from refimpl.decode.drafter import Drafter
from refimpl.decode.generate import Text, events
from refimpl.decode.prefixes import Nothing
from refimpl.decode.sampling import Sampling
from refimpl.decode.speculative import Round
from refimpl.lab.glass.record import record, round_as_json
from refimpl.lab.glass.taken_apart import samples
from refimpl.loading.model import Model
from refimpl.progress import Advance, silent
from refimpl.text.prompt import Encoded


def write(model: Model, prompt: Encoded, sampling: Sampling, max_new_tokens: int, *, n_ctx: int | None = None,
          drafter: Drafter | None = None, draft_max: int | str = "auto", draft_min_p: float = 0.0, advance: Advance = lambda n: None
          ) -> dict[str, object]:
    """The record of `prompt` and its continuation, with how it was written, and with blocks of weights. Arguments and errors are those of
    `generate` and `record`; `advance(1)` is called for every new token.
    """
    ids, rounds = list(prompt.ids), []
    for event in events(model, prompt, max_new_tokens=max_new_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
                        top_p=sampling.top_p, min_p=sampling.min_p, seed=sampling.seed, n_ctx=n_ctx, special=True, drafter=drafter,
                        draft_max=draft_max, draft_min_p=draft_min_p, prefixes=Nothing(model), progress=silent):
        if isinstance(event, Text) and event.ids:
            if event.round is not None:
                rounds.append((len(ids), event.round))
            ids += event.ids
            advance(len(event.ids))
    made = record(model, ids, len(prompt.ids), prompt.soft)
    return made | {"written": how(model, sampling, rounds), "blocks": samples(model)}


def how(model: Model, sampling: Sampling, rounds: Sequence[tuple[int, Round]]) -> dict[str, object]:
    """How a text was written: settings, and rounds of decoding with the place of their first token."""
    return {"sampling": {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}, "reused": 0,
            "rounds": [{"at": at, **round_as_json(model.tokenizer, done)} for at, done in rounds]}
