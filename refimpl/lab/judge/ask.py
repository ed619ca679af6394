"""What is asked of an endpoint, and its answers. Nothing is computed here: the answers are judged when all are there (or no more come)."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from refimpl.lab.compare.towers.inputs import TowerInput
from refimpl.lab.judge.answers import Answer, Step
from refimpl.lab.judge.endpoint import Endpoint
from refimpl.lab.judge.http import EndpointError
from refimpl.loading.model import Model
from refimpl.progress import Advance
from refimpl.text.chat import ChatError
from refimpl.text.prompt import encode_messages

DATA = Path(__file__).with_name("prompts.json")
N_NEW, N_CHAT = 12, 6               # tokens of an answer
N_OWN = 48                          # of the prompt's own tokens that are judged, where their probabilities are given
N_CUTS = 8                          # beginnings of each text, where only what follows a prompt is known
N_TWICE = 6                         # prompts that are asked again, and beside others
N_PROMPTS, N_DRAWS = 4, 64          # prompts whose first token is drawn, and how often
LONG = 33_000                       # tokens of the long prompt (--long)
FIRST, NEW, AGAIN, SHARED, TOGETHER = "at first", "new", "again", "after one that begins alike", "beside others"
OTHERS, PICTURE = "one of the others", "with a picture"


@dataclass(frozen=True)
class Asked:
    """One answer. `ids`: the prompt by our tokenizer and template, or its first token where the others have probabilities as the answer
    has; `way`: in which circumstances it was asked; `chat`: by messages? `media`: pictures in it, whose tokens are -1, -2, ...
    """

    name: str
    ids: list[int]
    answer: Answer
    way: str = FIRST
    chat: bool = False
    by_ids: bool = False
    media: tuple[TowerInput, ...] = ()


@dataclass
class Answers:
    """All that was said. By name of a text or conversation: `ids`, ours and theirs; `rendered`, our ids and their text or ids; `counts`,
    how many tokens it may have and how many they say; `not_rendered`, why it is not asked. `draws`: a prompt, and texts of answers of one
    token. `failed`: what was not answered, in lines; `stopped`: was it given up?
    """

    asked: list[Asked] = field(default_factory=list)
    ids: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    rendered: dict[str, tuple[list[int], str | list[int]]] = field(default_factory=dict)
    not_rendered: dict[str, str] = field(default_factory=dict)
    draws: list[tuple[Asked, list[str]]] = field(default_factory=list)
    counts: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    stopped: bool = False

    def others(self) -> list[Asked]:
        """Answers that list a token which they did not write; none where it is one alone, which a text's end may explain."""
        found = [asked for asked in self.asked if asked.answer.other is not None]
        return found if len(found) > 1 else []

    def of(self, *ways: str, chat: bool = False) -> list[Asked]:
        """Those of some ways."""
        return [asked for asked in self.asked if asked.way in ways and asked.chat == chat]


class Asking:
    """Asks `end` everything that `model` can judge; what fails is written down, and nothing more is asked where that has no sense."""

    def __init__(self, end: Endpoint, model: Model, advance: Advance):
        self.end, self.model, self.tokenizer, self.advance = end, model, model.tokenizer, advance
        self.data, self.found, self.nonce = prompts(), Answers(), secrets.token_hex(4)
        self.room = min(model.config.n_ctx, end.n_ctx or model.config.n_ctx) - N_NEW - 1

    def texts(self):
        """Short texts, and long ones around the window and beyond two of it."""
        for name, text in self.data["texts"].items():
            self._complete(name, self.tokenizer.encode(text), text, FIRST)
        for name, n in self.lengths().items():
            ids = self.long_ids(n, f"# {name}\n")
            self._complete(name, ids, None, FIRST)
        if self.found.others():
            self.beginnings()

    def beginnings(self):
        """More prompts, of which only the next token is asked for."""
        for name, text in self.data["texts"].items():
            for end in np.linspace(2, len(text), N_CUTS, endpoint=False).astype(int):
                self._complete(f"{name} to {end}", self.tokenizer.encode(text[:end]), text[:end], FIRST, n_new=1)

    def lengths(self) -> dict[str, int]:
        """Names and tokens of the long texts: the answer to the first passes the window's length on its way."""
        windows = {layer.window for layer in self.model.config.layers if layer.window is not None}
        found = {"to the window": min(windows) - N_NEW // 2, "past the window": min(windows) + 40, "three windows": 3 * min(windows) + 7,
                 "some hundred": 300} if windows else {"some hundred": 300}
        return {name: n for name, n in found.items() if 2 <= n <= self.room}

    def long(self):
        """A text past 32k tokens, where model and endpoint have room for it."""
        if self.room < LONG:
            self.found.failed.append(f"long: there is room for {self.room} tokens, of {LONG} that would be asked")
            return
        self._complete("past 32k", self.long_ids(LONG, "# long\n"), None, FIRST)

    def tokenizer_and_template(self):
        """/tokenize and /apply-template, where they are; vLLM's /tokenize is both."""
        for name, text in self.data["texts"].items():
            theirs = self.tried(f"/tokenize of {name}", lambda text=text: self.end.tokenize(text))
            if theirs is None:
                break
            self.found.ids[name] = self.tokenizer.encode(text, special=True), theirs
        if not self.found.ids:
            self._count_tokens()
        for name, ids, conversation in self.conversations():
            theirs = self.tried(f"the prompt of {name}", lambda c=conversation: self.end.render(
                c["messages"], tools=c.get("tools", ()), thinking=c.get("thinking", False)))
            if theirs is None:
                break
            self.found.rendered[name] = ids, theirs

    def _count_tokens(self):
        """How many tokens the texts have there, by what an answer says of its prompt."""
        for name, text in self.data["texts"].items():
            answer = self.tried(f"tokens of {name}", lambda text=text: self.end.complete(text, 1)) if self.end.completes else None
            if answer is not None and answer.n_prompt is not None:
                ours = tuple(len(self.tokenizer.encode(text, special=special)) for special in (False, True))
                self.found.counts[name] = ours, answer.n_prompt

    def conversations(self) -> list[tuple[str, list[int], Mapping]]:
        """(name, ids by our template, fields) of those that the file's template can render."""
        template, found = self.model.file.metadata.get("tokenizer.chat_template"), []
        for name, conversation in self.data["conversations"].items():
            if "tools" in conversation and "tools" not in (template or ""):
                self.found.not_rendered[name] = "the file's template has no tools"
                continue
            if conversation.get("thinking") and not self.end.thinking_fields(True):
                self.found.not_rendered[name] = "this engine may not know how to be asked for it"
                continue
            try:
                ids = encode_messages(self.tokenizer, template, conversation["messages"], thinking=conversation.get("thinking", False),
                                      tools=conversation.get("tools")).ids
            except (ChatError, ValueError) as error:
                self.found.not_rendered[name] = str(error)
                continue
            if len(ids) <= self.room:
                found.append((name, ids, conversation))
        return found

    def chats(self):
        """Conversations."""
        for name, ids, c in self.conversations():
            answer = self.tried(f"chat {name}", lambda c=c: self.end.chat(c["messages"], N_CHAT, tools=c.get("tools", ()),
                                                                          thinking=c.get("thinking", False)))
            if answer is not None:
                self.found.asked.append(Asked(name, ids, answer, chat=True))

    def twice(self):
        """Prompts that nobody has asked before: cold, again, after one that shares their first half, and all at once among others."""
        made = self.unheard()
        for name, ids in made.items():
            self._complete(name, ids, None, NEW, cold=True)
        for name, ids in made.items():
            self._complete(name, ids, None, AGAIN)
        for name, ids in made.items():
            if len(ids) > 24:
                half = ids[:len(ids) // 2] + self.tokenizer.encode(f"\nelse {self.nonce}:\n", bos=False)
                self._complete(name, half, None, SHARED)
        if self.found.stopped:
            return
        others = self.unheard("other ")
        with ThreadPoolExecutor(2 * len(made)) as pool:
            waiting = [pool.submit(self._complete, name, ids, None, OTHERS) for name, ids in others.items()]
            waiting += [pool.submit(self._complete, name, ids, None, TOGETHER) for name, ids in made.items()]
            for each in waiting:
                each.result()

    def drawn(self):
        """First tokens, drawn again and again."""
        for asked in self.found.asked[:N_PROMPTS]:
            texts = []
            for seed in range(N_DRAWS):
                answer = self.tried(f"draws of {asked.name}", lambda asked=asked, seed=seed: self._draw(asked, seed))
                if answer is None:
                    break
                texts.append(answer.text.strip() if asked.chat else answer.text)
            self.found.draws.append((asked, texts))

    def _draw(self, asked: Asked, seed: int) -> Answer:
        if asked.chat:
            c = self.data["conversations"][asked.name]
            return self.end.chat(c["messages"], 1, tools=c.get("tools", ()), thinking=c.get("thinking", False), seed=seed)
        return self.end.complete(asked.ids if self.end.takes_ids else self.data["texts"][asked.name], 1, seed=seed)

    def unheard(self, prefix: str = "") -> dict[str, list[int]]:
        """Prompts of several lengths that begin with a number drawn for this run."""
        window = min((layer.window for layer in self.model.config.layers if layer.window is not None), default=64)
        lengths = (12, 33, 80, window + 20, 2 * window + 9, 300)[:N_TWICE]
        return {f"{prefix}new {i}": self.long_ids(min(n, self.room - 40), f"{self.nonce} {prefix}{i}\n") for i, n in enumerate(lengths)}

    def long_ids(self, n: int, start: str) -> list[int]:
        """`n` ids of varied text that begins with `start`."""
        lines, i, ids = self.data["lines"], 0, self.tokenizer.encode(start)
        while len(ids) < n:
            ids += self.tokenizer.encode(lines[i % len(lines)].replace("{n}", str(i + 2)), bos=False)
            i += 1
        return ids[:n]

    def n_requests(self) -> int:
        """How many there will be at most, for the bar."""
        draws = 0 if self.end.gives_probabilities else N_PROMPTS * N_DRAWS
        return 2 * len(self.data["texts"]) + 4 + 2 * len(self.data["conversations"]) + 5 * N_TWICE + draws

    def _complete(self, name: str, ids: list[int], text: str | None, way: str, cold: bool = False, n_new: int = N_NEW):
        """`text`: the same as the ids, where no ids are taken; None: their own text, if it has these ids again."""
        if not self.end.completes or not 1 <= len(ids) <= self.room:
            return
        prompt: str | list[int] = ids
        if not self.end.takes_ids:
            prompt = self.tokenizer.decode(ids) if text is None else text
        temperature = 1.0 if self.end.n_top else 0.0            # without probabilities texts are compared, which are to be the same
        whole = way == FIRST and len(ids) < LONG
        answer = self.tried(f"{name} ({way})", lambda: self.end.complete(prompt, n_new, seed=len(ids), temperature=temperature, cold=cold,
                                                                        whole=whole))
        if answer is not None:
            ids = ids if self.end.takes_ids else self._as_counted(prompt, answer.n_prompt)
        if answer is not None and answer.prompt:
            ids, answer = ids[:1], replace(answer, steps=(*_thinned(answer.prompt), *answer.steps))
        if answer is not None and ids:
            self.found.asked.append(Asked(name, ids, answer, way, by_ids=self.end.takes_ids))

    def _as_counted(self, text: str, n_prompt: int | None) -> list[int]:
        """The ids of a text: with control tokens in it as such or not, as the endpoint's count says; none where it says neither."""
        plain, marked = (self.tokenizer.encode(text, special=special) for special in (False, True))
        if plain == marked or n_prompt is None:
            return plain if n_prompt in (None, len(plain)) else []
        return next((ids for ids in (marked, plain) if len(ids) == n_prompt), [])

    def tried(self, what: str, ask: Callable[[], object]):
        """The answer, or None where there is none: why is written down, once for each kind of reason."""
        if self.found.stopped:
            return None
        try:
            return ask()
        except EndpointError as error:
            self.found.stopped |= error.fatal
            line = str(error)
            if line not in self.found.failed:
                self.found.failed.append(f"{what}: {line}")
            return None
        finally:
            self.advance(1)


def _thinned(steps: Sequence[Step]) -> list[Step]:
    """The same tokens, N_OWN of them with their probabilities."""
    kept = {round(n) for n in np.linspace(0, len(steps) - 1, min(N_OWN, len(steps)))}
    return [step if n in kept else replace(step, top=()) for n, step in enumerate(steps)]


def prompts() -> dict[str, dict]:
    """The data."""
    return json.loads(DATA.read_text())
