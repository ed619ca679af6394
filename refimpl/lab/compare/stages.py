"""What a run goes through before its first tensor and after its last one: the file, the text, the chat template, the token ids; then the
id that is sampled. The first that differs is the answer, and nothing behind it is compared.

A trace has `model_sha256`, `prompt` and `template` among its facts, a dump of another engine may have them (engines/convention.py).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from refimpl.lab.compare.diagnoses import Diagnosis
from refimpl.lab.compare.judgement import DEPARTS, SAME, Judgement
from refimpl.lab.compare.trace import Trace

TEXTS = {"model_sha256": "file", "prompt": "prompt", "template": "template"}        # facts of a trace, and what they are called
BEFORE, SAMPLED = (*TEXTS.values(), "ids"), "sampled"
AROUND = 20             # characters shown on each side of a difference


def before_tensors(a: Trace, b: Trace) -> tuple[list[Judgement], Diagnosis | None]:
    """The stages that both traces tell of, up to the first that differs, which is the last of the list and has the diagnosis."""
    judged = []
    for fact, stage in TEXTS.items():
        ours, theirs = a.facts.get(fact), b.facts.get(fact)
        if not isinstance(ours, str) or not isinstance(theirs, str) or not ours or not theirs:
            continue
        if ours != theirs:
            text = other_file(ours, theirs) if stage == "file" else other_text(stage, ours, theirs)
            return [*judged, Judgement(stage, DEPARTS, 1.0, 0.0, 0)], Diagnosis(f"another {stage}", text)
        judged.append(Judgement(stage, SAME, 0.0, 0.0, 0))
    where = first_difference(a.ids, b.ids)
    if where is None:
        return [*judged, Judgement("ids", SAME, 0.0, 0.0, 0)], None
    found = Judgement("ids", DEPARTS, 1.0, 0.0, where, (), *(float(t.ids[where]) if where < len(t.ids) else -1.0 for t in (a, b)))
    text = token_difference(a, b, where)
    known = [judgement.name for judgement in judged if judgement.name != "file"]
    if known:
        text += f"; the {known[-1]} is the same, so the tokenizers differ"
    elif min(t for t in (*a.ids, *b.ids)) >= 0:
        text += f"; give it the ids of the trace ({', '.join(map(str, a.ids[:4]))}{', ...' if len(a.ids) > 4 else ''})"
    return [*judged, found], Diagnosis("tokens", text)


def other_file(ours: str, theirs: str) -> str:
    """What differs in the files."""
    return f"the models are other files: SHA-256 {ours[:12]}... and {theirs[:12]}...; trace the file that the other engine ran"


def other_text(stage: str, ours: str, theirs: str) -> str:
    """Where two texts differ, and what is there."""
    at = first_difference(ours, theirs)
    shown = " and ".join(repr(text[max(0, at - AROUND):at + AROUND]) for text in (ours, theirs))
    what = {"prompt": "prompts", "template": "outputs of the chat template"}[stage]
    return f"the {what} differ at character {at} (of {len(ours)} and {len(theirs)}): {shown}"


def first_difference(a: Sequence, b: Sequence) -> int | None:
    """Where two lists of ids, or two texts, differ first, None where they do not."""
    if len(a) == len(b) and all(x == y for x, y in zip(a, b)):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def token_difference(a: Trace, b: Trace, where: int) -> str:
    """What differs in the token ids."""
    if where == min(len(a.ids), len(b.ids)):
        return f"the prompts have {len(a.ids)} and {len(b.ids)} tokens"
    tokens = [{part["name"]: part["n_tokens"] for part in t.facts.get("media", ())} for t in (a, b)]
    for name, n in tokens[0].items():
        if n != tokens[1].get(name, n):
            return f"{name} is {n} and {tokens[1][name]} soft tokens"
    known = spellings(a) | spellings(b)
    return f"the prompts differ at token {where}: {in_words(a, where, known)} and {in_words(b, where, known)}"


def spellings(trace: Trace) -> dict[int, str]:
    """How the vocabulary spells ids, as far as a trace says it: `tokens` among its facts has one text for each of its ids."""
    tokens = trace.facts.get("tokens")
    return dict(zip(trace.ids, tokens)) if isinstance(tokens, list) else {}


def in_words(trace: Trace, where: int, known: Mapping[int, str]) -> str:
    """A token id with its spelling where that is known, or of what a soft token is one."""
    i, media = trace.ids[where], trace.facts.get("media", ())
    if 0 <= -1 - i < len(media):
        return f"a soft token of {media[-1 - i]['name']}"
    return f"{i} {known[i]!r}" if i in known else str(i)


def sampled(a: Trace, b: Trace, tolerance: Mapping[str, float]) -> tuple[list[Judgement], Diagnosis | None]:
    """The id that the other engine took after the prompt: with temperature 0 the one with its largest logit, or one as good as that (by
    our logits and their tolerance where it has none). Above 0 random numbers decide, which are each engine's own: not judged, ([], None).
    """
    chosen, last = b.facts.get(SAMPLED), len(a.ids) - 1
    from_ = next((t for t in (b, a) if "result_output" in t.names() and last in t.value("result_output").positions), None)
    if chosen is None or b.facts["temperature"] > 0 or from_ is None or from_ is a and "result_output" not in tolerance:
        return [], None
    value = from_.value("result_output")
    row_V = value.array[list(value.positions).index(last)].astype(np.float64).ravel()
    best, inside = int(np.argmax(row_V)), 0 <= chosen < len(row_V)
    allowed = tolerance["result_output"] * np.sqrt(np.mean(row_V * row_V)) if from_ is a else 0.0
    right = inside and row_V[best] - row_V[chosen] <= allowed
    found = [Judgement(SAMPLED, SAME if right else DEPARTS, 0.0 if right else 1.0, 0.0, last, (), float(best), float(chosen))]
    if right:
        return found, None
    why = f"the vocabulary has 0 to {len(row_V) - 1}"
    if inside:
        why = f"but by {'its own' if from_ is b else 'our'} logits {best} is the likeliest: {row_V[chosen]:.5g} and {row_V[best]:.5g}"
    return found, Diagnosis("another token", f"id {chosen} was taken at temperature 0, {why}")
