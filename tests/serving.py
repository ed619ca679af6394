"""An engine that plays scripts, and a server on a port: what the tests of refimpl.serve share."""

import asyncio
import contextlib
import functools
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import numpy as np

from refimpl.decode.draft_stats import DraftStats
from refimpl.decode.request import Done, Failed, Reading, Stats, Token
from refimpl.formats.gguf import open_gguf
from refimpl.loading.model import BUILT_IN
from refimpl.model.cache import ContextFull
from refimpl.serve.app import make_app
from refimpl.serve.connections import server
from refimpl.serve.settings import Settings
from refimpl.text.templates import GEMMA4_TEMPLATE
from refimpl.text.tokenizer import Tokenizer

CALL = '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>'
THOUGHT = "<|channel>thought\nso it is<channel|>"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city", "days"],
          "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
USER = [{"role": "user", "content": "hi"}]


@functools.cache
def tokenizer_and_metadata():
    with open_gguf(BUILT_IN) as file:
        metadata = dict(file.metadata)
    return Tokenizer.from_metadata(metadata, "built-in"), metadata


class FakeEngine:
    """Plays `scripts` (texts with control tokens), one for each request, the last one for all further ones."""

    def __init__(self, *scripts, template=GEMMA4_TEMPLATE, n_ctx=4096, error=None, busy=None, stall_after=None, reused=0, failed=None):
        self.tokenizer, metadata = tokenizer_and_metadata()
        metadata = metadata | {"tokenizer.chat_template": template}
        self.model = SimpleNamespace(tokenizer=self.tokenizer, file=SimpleNamespace(metadata=metadata), config=SimpleNamespace(n_ctx=n_ctx))
        self.scripts, self.n_ctx, self.drafter = list(scripts) or ["ok"], n_ctx, None
        self.error, self.busy, self.stall_after, self.reused, self.failed = error, busy, stall_after, reused, failed
        self.requests, self.cancelled, self.running = [], [], []

    n_running = property(lambda self: len(self.running))
    n_waiting, projector = 0, None

    async def submit(self, request):
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if len(request.ids) > self.n_ctx:
            raise ContextFull(f"the prompt has {len(request.ids)} tokens, the context holds {self.n_ctx}")
        self.requests.append(request)
        answer = FakeAnswer(self, request, self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0])
        self.running.append(answer)
        return answer

    def slots(self):
        return [{"id": i, "state": "writing"} for i, _ in enumerate(self.running)]

    @property
    def prompt(self):
        """The latest prompt as text."""
        return self.tokenizer.decode(self.requests[-1].ids, special=True)


class FakeAnswer:
    def __init__(self, engine, request, script):
        self.engine, self.request, self.gone = engine, request, asyncio.Event()
        self.ids = engine.tokenizer.encode(script, special=True, bos=False)

    def cancel(self):
        self.gone.set()
        self.engine.cancelled.append(self)
        if self in self.engine.running:
            self.engine.running.remove(self)

    async def __aiter__(self):
        engine, request, n = self.engine, self.request, len(self.request.ids)
        stats = Stats(n, engine.reused, prompt_seconds=0.5, decode_seconds=1.0, draft=DraftStats())
        yield Reading(engine.reused, n, engine.reused)
        yield Reading(n, n, engine.reused)
        if engine.failed is not None:
            yield Failed(engine.failed)
            return
        for i in self.ids:
            if engine.stall_after is not None and stats.n_generated == engine.stall_after:
                await self.gone.wait()
            if self.gone.is_set() or stats.n_generated == request.max_new_tokens:
                break
            logits_V = np.zeros(engine.tokenizer.n_vocab, np.float32)
            assert request.constraint.mask(logits_V)[i] == 0, f"{engine.tokenizer.token(i)!r} is not allowed here"
            request.constraint.accept(i)
            stats.n_generated += 1
            yield Token(i, -0.5, [(i, -0.5), (300, -1.5)][:request.n_top] if request.n_top > 0 else ())
            await asyncio.sleep(0)
        stats.stop = "gone" if self.gone.is_set() else "limit" if stats.n_generated == request.max_new_tokens else "end"
        if self in engine.running:
            engine.running.remove(self)
        yield Done(stats)


def client(engine, host="localhost", raise_app_exceptions=True, headers=None, **settings):
    """An httpx client of the app, without a port."""
    app = make_app(engine, Settings(**settings))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=raise_app_exceptions), base_url=f"http://{host}",
                             headers=headers)


def post(engine, path, body=None, *, headers=None, content=None, **settings):
    """The response to one request."""
    async def one():
        async with asyncio.timeout(20), client(engine, **settings) as c:
            if content is not None:
                return await c.post(path, content=content, headers={"content-type": "application/json"} | (headers or {}))
            return await c.post(path, json=body, headers=headers)
    return asyncio.run(one())


def get(engine, path, *, headers=None, **settings):
    async def one():
        async with client(engine, **settings) as c:
            return await c.get(path, headers=headers)
    return asyncio.run(one())


def chunks(response):
    """The data of a stream's events; [DONE] is checked and left out where it is there."""
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


@contextlib.contextmanager
def on_a_port(engine, use=0, **settings):
    """(base URL, port) of a real server in a thread; `use`: a port, 0 for any."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", use))
        port = s.getsockname()[1]
    settings = Settings(port=port, **settings)
    running = server(make_app(engine, settings), settings)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    until(lambda: running.started)
    try:
        yield f"http://127.0.0.1:{port}", port
    finally:
        running.should_exit = running.force_exit = True
        thread.join(5)


def until(condition, seconds=5):
    """Waits for what is to happen soon."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
