"""How the server is run, and what all endpoints share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from refimpl.decode.request import SOURCES
from refimpl.serve.metrics import Metrics
from refimpl.text.templates import CONTINUATION_TEMPLATE, CONTINUED

if TYPE_CHECKING:
    from refimpl.serve.engine import Engine
    from refimpl.text.prompt import Projector
    from refimpl.text.tokenizer import Tokenizer

MAX_CHOICES = 64
"""Answers to one request: n times the number of prompts."""


@dataclass(frozen=True)
class Settings:
    """What `refimpl serve` can be told.

    name              of the model, as clients see it
    api_key           asked for by every endpoint but /health; None: nobody is asked
    cors              origins whose pages may read answers ("*": all)
    allowed_hosts     names under which the server is reached, besides localhost, `host` and IP addresses ("*": any)
    drafts            who may draft tokens (decode/request.py)
    max_body          bytes of a request
    body_seconds      a request has to be there after so long
    header_seconds    the same for its headers
    ping_seconds      a stream says so often that it lives
    most_connections  beyond them requests get 503; beyond twice as many connections are closed at once
    """

    host: str = "127.0.0.1"
    port: int = 8080
    name: str = "gemma-4"
    api_key: str | None = None
    cors: Collection[str] = ()
    allowed_hosts: Collection[str] = ()
    drafts: Collection[str] = SOURCES
    max_body: int = 20 << 20
    body_seconds: float = 30.0
    header_seconds: float = 30.0
    ping_seconds: float = 5.0
    most_connections: int = 256


class Site:
    """What an endpoint needs: engine, settings, metrics; in a running app it is `request.app.state.site`."""

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings, self.metrics = engine, settings, Metrics(engine)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.engine.model.tokenizer

    @property
    def projector(self) -> Projector | None:
        """What takes pictures and sounds; None: nothing does."""
        return self.engine.projector

    @cached_property
    def template(self) -> str | None:
        """The model's chat template."""
        return self.engine.model.file.metadata.get("tokenizer.chat_template")

    @property
    def default_limit(self) -> int:
        """New tokens of an answer in a conversation where none is given: no limit (-1), but for a model that has no turns to end."""
        return CONTINUED if self.template == CONTINUATION_TEMPLATE else -1
