"""Template and tokenizer: does a conversation become the same text, a text the same ids?"""

from __future__ import annotations

from collections.abc import Sequence

from refimpl.lab.judge.ask import Answers, Asked
from refimpl.lab.judge.endpoint import Endpoint
from refimpl.lab.judge.verdicts.verdict import DEPARTS, RIGHT, UNKNOWN, Verdict, reason
from refimpl.lab.judge.vocabulary import Vocabulary
from refimpl.text.tokenizer import LOST_BOM, Tokenizer

MARKED = "; control tokens that a user spells become such, as in transformers (here they stay text)"


def template(end: Endpoint, found: Answers, tokenizer: Tokenizer) -> Verdict:
    """Does a conversation become the same prompt? By its text or ids where the endpoint shows them, else by how many tokens it counts."""
    if not found.rendered:
        return _template_by_counts(end, found, tokenizer)
    wrong, note, n = [], "", len(found.rendered)
    shown = "text" if all(isinstance(theirs, str) for _, theirs in found.rendered.values()) else "ids"
    for name, (ours, theirs) in found.rendered.items():
        if isinstance(theirs, str):
            theirs = tokenizer.encode(theirs, special=True)
            theirs = theirs[1:] if theirs[1:2] == [tokenizer.bos] else theirs       # llama-server leaves <bos> to its tokenizer
        if theirs != ours and theirs == marked(tokenizer, ours):
            note = MARKED
        elif theirs != ours:
            wrong.append((name, ours, theirs))
    if not wrong:
        return Verdict("template", RIGHT, f"{n} of {n} conversations become the same {shown}{note}", f"{shown} compared")
    name, ours, theirs = wrong[0]
    return Verdict("template", DEPARTS,
                   f"{len(wrong)} of {n} conversations become other {shown}; {name}: {differ(tokenizer, ours, theirs)}",
                   f"{shown} compared", {"differ": [each[0] for each in wrong]})


def _template_by_counts(end: Endpoint, found: Answers, tokenizer: Tokenizer) -> Verdict:
    chats = [asked for asked in found.asked if asked.chat and asked.answer.n_prompt is not None]
    if not chats:
        return Verdict("template", UNKNOWN, reason(end, found, "chat", "it tells neither the prompt of a conversation nor its length"))
    wrong = [each for each in chats if each.answer.n_prompt not in (len(each.ids), len(marked(tokenizer, each.ids)))]
    if not wrong:
        return Verdict("template", RIGHT, f"{len(chats)} of {len(chats)} conversations have as many tokens as here", "counts only")
    hint = "; <bos> is missing" if len(wrong) == len(chats) and all(each.answer.n_prompt == len(each.ids) - 1 for each in wrong) else ""
    return Verdict("template", DEPARTS, f"{len(wrong)} of {len(chats)} conversations have another number of tokens; {wrong[0].name}: "
                   f"{wrong[0].answer.n_prompt}, here {len(wrong[0].ids)}{hint}", "counts", {"differ": [each.name for each in wrong]})


def ids(end: Endpoint, found: Answers, tokenizer: Tokenizer, others: Sequence[str]) -> Verdict:
    """Does a text become the same ids? By /tokenize where it is, else by counts. `others`: as of `other_tokens`."""
    wrong = [(name, ours, theirs) for name, (ours, theirs) in found.ids.items() if ours != theirs]
    if wrong:
        name, ours, theirs = wrong[0]
        return Verdict("ids", DEPARTS, f"{len(wrong)} of {len(found.ids)} texts become other ids; {name}: "
                       f"{differ(tokenizer, ours, theirs)}", "ids compared", {"differ": [each[0] for each in wrong]})
    if listed := found.others():
        name, other = listed[0].name, listed[0].answer.other
        return Verdict("ids", DEPARTS, f"{len(listed)} of {len(found.asked)} answers list tokens that they did not write; {name}: "
                       f"{other.bytes.decode(errors='replace')!r} is not in {listed[0].answer.text!r:.60}", "texts of answers")
    if others:
        return Verdict("ids", DEPARTS, f"another vocabulary: {others[0]}" + (f", and {len(others) - 1} more" if len(others) > 1 else ""),
                       "tokens of answers")
    if found.ids:
        return Verdict("ids", RIGHT, f"{len(found.ids)} of {len(found.ids)} texts become the same ids", "ids compared")
    n, wrong = len(found.counts), [name for name, (ours, theirs) in found.counts.items() if theirs not in ours]
    if not n:
        return Verdict("ids", UNKNOWN, reason(end, found, "completions", "it tells neither the ids of a text nor their number"))
    if not wrong:
        return Verdict("ids", RIGHT, f"{n} of {n} texts have as many tokens as here", "counts only")
    ours, theirs = found.counts[wrong[0]]
    hint = "; <bos> is missing" if len(wrong) == n and all(found.counts[name][1] + 1 in found.counts[name][0] for name in wrong) else ""
    return Verdict("ids", DEPARTS, f"{len(wrong)} of {n} texts have another number of tokens; {wrong[0]}: {theirs}, here {ours[0]}{hint}",
                   "counts", {"differ": wrong})


def other_tokens(asked: Sequence[Asked], vocabulary: Vocabulary) -> list[str]:
    """Tokens whose text at the endpoint is not theirs here, in words; not those that are damaged in Google's files and restored here."""
    found = {}
    for each in asked:
        for step in each.answer.steps:
            for token in step.top:              # the chosen one may be written with bytes that waited for it
                if token.id not in found and token.id not in LOST_BOM and vocabulary.is_other(token):
                    here = repr(vocabulary.tokenizer.token(token.id)) if 0 <= token.id < vocabulary.tokenizer.n_vocab else "there is none"
                    found[token.id] = f"token {token.id} is {token.bytes.decode(errors='replace')!r}, here {here}"
    return list(found.values())


def marked(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The ids that a prompt has where control tokens spelled in it count as such."""
    return tokenizer.encode(tokenizer.decode(ids, special=True), special=True, bos=False)


def differ(tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Where two lists of ids differ first, and what stands there."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))

    def shown(ids: Sequence[int]) -> str:
        known = [i for i in ids[at:at + 4] if 0 <= i < tokenizer.n_vocab]
        return repr(tokenizer.decode(known, special=True)) if known else "its end" if at >= len(ids) else f"id {ids[at]}"
    return f"at token {at} {shown(theirs)}, here {shown(ours)}"
