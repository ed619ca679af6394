"""Judges an engine that answers over HTTP: asks, computes the same here, and gives a verdict on each question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from refimpl.lab.judge import verdicts
from refimpl.lab.judge.ask import NEW, Answers, Asked, ask_all
from refimpl.lab.judge.endpoint import Endpoint, explore
from refimpl.lab.judge.http import Http
from refimpl.lab.judge.measure import Position, measure
from refimpl.lab.judge.sampling import FALSE_ALARMS, smallest_seen, stake_of, texts_of
from refimpl.lab.judge.verdicts import DEPARTS, LIMIT, RIGHT, UNKNOWN, Verdict
from refimpl.lab.judge.vocabulary import Vocabulary
from refimpl.lab.judge.yardstick import Yardstick
from refimpl.loading.model import Model
from refimpl.progress import Progress, silent

QUESTIONS = ("template", "ids", "probabilities", "chat", "window", "again", "company", "sampling")         # in the order of layers
ESSENTIAL = ("probabilities", "chat", "sampling")       # one of these has to be answered for the whole to be
OTHERS = (("q8", "f16"), ("q8", "q8_0"), ("q8", "q4_0"), ("bfloat16", "f16"))      # what else may explain a departure


@dataclass(frozen=True)
class Judgement:
    """All verdicts. `notes`: what was asked and not answered."""

    url: str
    engine: str
    model: str | None
    arithmetic: str
    kv_type: str
    verdicts: list[Verdict]
    notes: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """0: nothing departs; 1: something does; 3: neither probabilities nor draws could be judged."""
        if any(verdict.answer == DEPARTS for verdict in self.verdicts):
            return 1
        return 0 if any(v.answer == RIGHT and v.question in ESSENTIAL for v in self.verdicts) else 3

    def figures(self) -> dict[str, object]:
        """As JSON has it."""
        return asdict(self) | {"status": self.status}


def collect(http: Http, model: Model, *, name: str | None = None, questions: Sequence[str] = QUESTIONS, long: bool = False,
            progress: Progress = silent) -> tuple[Endpoint, Answers]:
    """Asks an endpoint everything. `name`: what it calls the model. Raises EndpointError where it answers nothing."""
    probe = model.tokenizer.encode("x = 1")
    end = explore(http, name, probe, "x = 1")
    return end, ask_all(end, model, long=long, questions=questions, progress=progress)


def arithmetic_of(end: Endpoint) -> str:
    """What an engine computes in, where nobody says: engines of GGUF files round activations to 8 bits, others to bfloat16."""
    return "q8" if end.engine.split()[0] in ("llama-server", "refimpl", "ollama") else "bfloat16"


def judge(end: Endpoint, found: Answers, model: Model, *, arithmetic: str | None = None, kv_type: str = "f16",
          questions: Sequence[str] = QUESTIONS, progress: Progress = silent) -> Judgement:
    """The verdicts on answers of `collect`. `model` in exact arithmetic (lab.compare.tolerance.judge); `arithmetic`: the endpoint's, None
    for what `arithmetic_of` says; `kv_type`: of its keys and values.
    """
    arithmetic = arithmetic or arithmetic_of(end)
    yardstick, vocabulary, tokenizer = Yardstick(model, arithmetic, kv_type), Vocabulary(model.tokenizer), model.tokenizer
    others = other_tokens(found.asked, vocabulary)
    positions = [] if others else measure(found.asked, yardstick, vocabulary, progress)
    windows = {layer.window for layer in model.config.layers if layer.window is not None}
    name = arithmetic + ("" if kv_type == "f16" else f" with keys and values in {kv_type}")
    made = {
        "template": lambda: verdicts.template(end, found, tokenizer),
        "ids": lambda: verdicts.ids(end, found, tokenizer, others),
        "probabilities": lambda: verdicts.probabilities(end, found, positions, name),
        "chat": lambda: verdicts.chat_probabilities(end, found, positions, tokenizer, name),
        "window": lambda: verdicts.window(positions, windows),
        "again": lambda: verdicts.again(end, found, positions),
        "company": lambda: verdicts.company(end, found, positions),
    }
    result = [made[question]() for question in QUESTIONS if question in questions and question in made]
    result = [_explained(v, found.asked, yardstick, vocabulary, positions) if v.question == "probabilities" else v for v in result]
    if "sampling" in questions and not end.n_top and not end.chat_top:
        result.append(sampling(end, found, model, yardstick))
    return Judgement(end.http.url, end.engine, end.model, arithmetic, kv_type, result,
                     [*(f"{name}: not asked, {why}" for name, why in found.not_rendered.items()), *found.failed])


def other_tokens(asked: Sequence[Asked], vocabulary: Vocabulary) -> list[str]:
    """Tokens whose text at the endpoint is not theirs here, in words."""
    found = {}
    for each in asked:
        for step in each.answer.steps:
            for token in (step.chosen, *step.top):
                if vocabulary.is_other(token) and token.id not in found:
                    here = vocabulary.tokenizer.token(token.id) if 0 <= token.id < vocabulary.tokenizer.n_vocab else "outside"
                    found[token.id] = f"token {token.id} is {token.bytes.decode(errors='replace')!r}, here {here!r}"
    return list(found.values())


def _explained(verdict: Verdict, asked: Sequence[Asked], yardstick: Yardstick, vocabulary: Vocabulary,
               positions: Sequence[Position]) -> Verdict:
    """A departure, and which other rounding would explain it."""
    if verdict.answer != DEPARTS or not verdict.figures.get("level", 0) > LIMIT:
        return verdict
    taken = [each for each in asked if each.way in ("at first", NEW) and not each.chat][:8]
    for arithmetic, kv_type in OTHERS:
        if (arithmetic, kv_type) == (yardstick.arithmetic, yardstick.kv_type):
            continue
        if verdicts.level(measure(taken, Yardstick(yardstick.model, arithmetic, kv_type), vocabulary)) <= LIMIT:
            how = f"--arithmetic {arithmetic}" if kv_type == "f16" else f"--kv {kv_type}"
            return Verdict(verdict.question, DEPARTS, f"{verdict.evidence}; {how} would explain it", verdict.basis,
                           verdict.figures | {"explained_by": [arithmetic, kv_type]})
    return verdict


def sampling(end: Endpoint, found: Answers, model: Model, yardstick: Yardstick) -> Verdict:
    """Are its draws ours? For an endpoint that gives no probabilities."""
    draws = [(asked, texts) for asked, texts in found.draws if texts]
    if not draws:
        return Verdict("sampling", UNKNOWN, found.failed[-1] if found.failed else "nothing was drawn")
    stakes = {}
    for asked, texts in draws:
        first = len(asked.ids) - 1
        stake = stake_of(yardstick.exact(asked.ids, first)[0], [rows_RV[0] for rows_RV in yardstick.rounded(asked.ids, first)],
                         texts_of(model.tokenizer, stripped=asked.chat))
        for text in texts:
            stake.draw(text)
        stakes[asked.name] = stake
    n, total = sum(len(texts) for _, texts in draws), sum(stake.log for stake in stakes.values())
    figures = {"draws": n, "log_stake": total, "false_alarms": FALSE_ALARMS}
    basis = f"{n} draws, false alarms at most {FALSE_ALARMS:g}"
    if total > np.log(1 / FALSE_ALARMS):
        name = max(stakes, key=lambda name: stakes[name].log)
        return Verdict("sampling", DEPARTS, f"it draws from another distribution (stake {np.exp(min(total, 700.0)):.2g}); {name}: "
                       f"{stakes[name].most_apart()}", basis, figures)
    return Verdict("sampling", RIGHT, f"its draws may be ours; a KL of less than about {smallest_seen(n // len(draws)):.2g} nats would not "
                   "show", basis, figures)
