"""Verdicts of `judge` as text."""

from refimpl.lab.judge.judge import Judgement


def as_text(result: Judgement) -> str:
    """A line about the endpoint, a line for each verdict, what was not asked, and the end."""
    wide = max(len(verdict.question) for verdict in result.verdicts)
    answers = max(len(verdict.answer) for verdict in result.verdicts)
    lines = [f"{result.url}: {result.engine}" + (f", {result.model}" if result.model else "")]
    for verdict in result.verdicts:
        basis = f" ({verdict.basis})" if verdict.basis else ""
        lines.append(f"{verdict.question:<{wide}}  {verdict.answer:<{answers}}  {verdict.evidence}{basis}")
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join(lines)
