"""Judges an engine that answers over HTTP: asks, computes the same here, and gives a verdict on each question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from refimpl.lab.judge.ask import OTHERS, PICTURE, Answers, Asking
from refimpl.lab.judge.endpoint import Endpoint, explore
from refimpl.lab.judge.http import Http
from refimpl.lab.judge.measure import Position
from refimpl.lab.judge.pictures import ask_pictures, picture
from refimpl.lab.judge.verdicts.probabilities import by_prompt, chat_probabilities, of_texts, probabilities, window
from refimpl.lab.judge.verdicts.repeats import again, company
from refimpl.lab.judge.verdicts.sampling import sampling
from refimpl.lab.judge.verdicts.texts import ids, other_tokens, template
from refimpl.lab.judge.verdicts.verdict import DEPARTS, RIGHT, Verdict, distance, level, rounding
from refimpl.lab.judge.vocabulary import Vocabulary
from refimpl.lab.judge.work import Compute, here, measure
from refimpl.lab.judge.yardstick import Yardstick
from refimpl.loading.model import Model
from refimpl.loading.projector import Projector
from refimpl.progress import Progress, silent

QUESTIONS = ("template", "ids", "probabilities", "chat", "window", "again", "company", "picture", "sampling")     # in order of layers
ESSENTIAL = ("probabilities", "chat", "sampling")       # where they are asked, one of them has to be answered
N_EXPLAINED = 10                                        # answers that other explanations are tried on, those that depart most
AS_LARGE = 1.6                                          # the largest level of right engines so far
ROUNDINGS = (("q8", "f16"), ("q8", "q8_0"), ("q8", "q4_0"), ("bfloat16", "f16"))      # what else may explain a departure


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
        """0: nothing departs; 1: something does; 3: neither probabilities nor draws could be judged, or nothing of what was asked."""
        if any(verdict.answer == DEPARTS for verdict in self.verdicts):
            return 1
        essential = [verdict for verdict in self.verdicts if verdict.question in ESSENTIAL] or self.verdicts
        return 0 if any(verdict.answer == RIGHT for verdict in essential) else 3

    def figures(self) -> dict[str, object]:
        """As JSON has it."""
        return asdict(self) | {"status": self.status}


def collect(http: Http, model: Model, *, name: str | None = None, questions: Sequence[str] = QUESTIONS, long: bool = False,
            projector: Projector | None = None, progress: Progress = silent) -> tuple[Endpoint, Answers]:
    """Asks an endpoint everything. `name`: what it calls the model; `projector`: exact, for pictures, which are not
    sent without. Raises EndpointError where it answers nothing.
    """
    probe = model.tokenizer.encode("x = 1")
    end = explore(http, name, probe, "x = 1")
    return end, ask_all(end, model, long=long, questions=questions, projector=projector, progress=progress)


def ask_all(end: Endpoint, model: Model, *, long: bool = False, questions: Sequence[str], projector: Projector | None = None,
            progress: Progress = silent) -> Answers:
    """Asks everything that these questions need."""
    asking = Asking(end, model, lambda n: None)
    with progress("requests", asking.n_requests()) as advance:
        asking.advance = advance
        if {"probabilities", "window", "sampling"} & set(questions):
            asking.texts()
        if {"template", "ids"} & set(questions):
            asking.tokenizer_and_template()
        if {"template", "chat", "sampling"} & set(questions) and end.chat_top is not None:
            asking.chats()
        if {"again", "company"} & set(questions):
            asking.twice()
        if "sampling" in questions and not end.gives_probabilities:
            asking.drawn()
        if projector is not None and "picture" in questions and end.chat_top is not None:
            ask_pictures(asking, projector)
        if long:
            asking.long()
    return asking.found


def arithmetic_of(end: Endpoint) -> str:
    """What an engine computes in, where nobody says: engines of GGUF files round activations to 8 bits, others to bfloat16."""
    return "q8" if end.engine.split()[0] in ("llama-server", "refimpl", "ollama") else "bfloat16"


def judge(end: Endpoint, found: Answers, model: Model, *, arithmetic: str | None = None, kv_type: str = "f16",
          questions: Sequence[str] = QUESTIONS, compute: Compute = here, progress: Progress = silent) -> Judgement:
    """The verdicts on answers of `collect`. `model` in exact arithmetic (lab.compare.tolerance.judge); `arithmetic`: the endpoint's, None
    for what `arithmetic_of` says; `kv_type`: of its keys and values; `compute`: who computes what they are compared with (`work.team`).
    """
    arithmetic = arithmetic or arithmetic_of(end)
    yardstick, tokenizer = Yardstick(model, arithmetic, kv_type), model.tokenizer
    vocabulary = Vocabulary(tokenizer, bool(found.others()))
    others = other_tokens(found.asked, vocabulary)
    positions = measure([asked for asked in found.asked if asked.way not in (OTHERS, PICTURE)], yardstick, vocabulary, compute, progress)
    positions += measure(found.of(PICTURE), yardstick, vocabulary, progress=progress)       # towers are not handed out
    windows = {layer.window for layer in model.config.layers if layer.window is not None}
    name = arithmetic + ("" if kv_type == "f16" else f" with keys and values in {kv_type}")
    made = {
        "template": lambda: template(end, found, tokenizer),
        "ids": lambda: ids(end, found, tokenizer, others),
        "probabilities": lambda: probabilities(end, found, positions, name),
        "chat": lambda: chat_probabilities(end, found, positions, tokenizer, name),
        "window": lambda: window(positions, windows),
        "again": lambda: again(end, found, positions),
        "company": lambda: company(end, found, positions),
        "picture": lambda: picture(end, found, positions, name),
        "sampling": lambda: sampling(end, found, yardstick),
    }
    left_out = {"sampling" if end.gives_probabilities else None, None if found.of(PICTURE) else "picture"}
    asked = [question for question in QUESTIONS if question in questions and question not in left_out]
    result = [_explained(made[question](), positions, yardstick, vocabulary, compute) for question in asked]
    return Judgement(end.http.url, end.engine, end.model, arithmetic, kv_type, result,
                     [*(f"{name}: not asked, {why}" for name, why in found.not_rendered.items()), *found.failed,
                      *_left_out(found, vocabulary)])


def _left_out(found: Answers, vocabulary: Vocabulary) -> list[str]:
    """Answers that do not list all of their tokens, in words."""
    if vocabulary.first_only:
        return ["its lists of tokens are not believed: of an answer only its first token is judged"]
    n = sum(len(vocabulary.known(asked.answer)) < len(asked.answer.steps) for asked in found.asked)
    return [f"{n} of {len(found.asked)} answers leave out tokens that they count; what may follow one is not judged"] if n else []


def _explained(verdict: Verdict, positions: Sequence[Position], yardstick: Yardstick, vocabulary: Vocabulary,
               compute: Compute) -> Verdict:
    """A departure of probabilities that resembles nothing else, and which other rounding would be as large."""
    if verdict.question != "probabilities" or verdict.figures.get("looks_like") != "":
        return verdict
    prompts = by_prompt(of_texts(positions)).values()
    few = [own[0].asked for own in sorted(prompts, key=lambda own: -distance(own) / rounding(own))[:N_EXPLAINED]]
    for arithmetic, kv_type in ROUNDINGS:
        if (arithmetic, kv_type) == (yardstick.arithmetic, yardstick.kv_type):
            continue
        if level(measure(few, Yardstick(yardstick.model, arithmetic, kv_type), vocabulary, compute)) <= AS_LARGE:
            how = f"--arithmetic {arithmetic}" if kv_type == "f16" else f"--arithmetic {arithmetic} --kv {kv_type}"
            return replace(verdict, evidence=f"{verdict.evidence}; the rounding of {how} would be as large",
                           figures=verdict.figures | {"as_large": [arithmetic, kv_type]})
    return verdict
