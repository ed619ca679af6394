"""The whole server with the built-in model: the same bits beside others, places that are given back, grammars, restarts."""

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import weakref

import pytest
from cli import assert_one_line, run
from serving import on_a_port, until

import refimpl
from refimpl.decode.prefixes import Prefixes
from refimpl.decode.request import SOURCES, Done, Request
from refimpl.decode.run import Run
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.decode.snapshots import Snapshots
from refimpl.serve.check import Server, check_server
from refimpl.serve.engine import Engine
from refimpl.serve.scheduler import Scheduler

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "description": {"type": "string", "maxLength": 12},
                                           "enabled": {"type": "boolean"}}, "required": ["name", "description", "enabled"],
          "additionalProperties": False}


@pytest.fixture(scope="module")
def pair():
    model = refimpl.load()
    return model, refimpl.load_drafter(None, model)


@pytest.fixture
def engine(pair):
    model, drafter = pair
    made = Engine(Scheduler(model, Prefixes(model, 1 << 28), 2048, drafter=drafter, most_running=6))
    yield made
    made.close()


def ask(url, path="/v1/completions", key="", **fields):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url + path, json.dumps(fields).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.mark.parametrize("n", [4, pytest.param(6, marks=pytest.mark.exhaustive)])
def test_answers_are_the_same_alone_and_beside_others(n, engine):
    with on_a_port(engine) as (url, _):
        result = check_server(url, n=n)
        assert result["ok"] and result["differ"] == {"alone again": [], "beside others": []}, result["first"]
        until(lambda: not engine.n_running and not engine.n_waiting)


def test_the_check_notices_a_server_whose_answers_depend_on_others(engine, monkeypatch):
    """One generator for all requests: what mlx_lm.server avoids by not batching."""
    import numpy as np

    shared, init = np.random.default_rng(1), Sampler.__init__

    def leaky(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self._random = shared
    monkeypatch.setattr(Sampler, "__init__", leaky)
    with on_a_port(engine) as (url, _):
        result = check_server(url, n=3)
    assert not result["ok"] and result["differ"]["alone again"] and 0 not in result["differ"]["beside others"], "greedy ones stay"
    assert result["first"]["at first"] != result["first"]["then"]


def test_the_answer_is_the_librarys(engine, pair):
    want = refimpl.generate(pair[0], "class Stack:", max_new_tokens=40, temperature=0.8, seed=11)
    with on_a_port(engine) as (url, _):
        got = ask(url, prompt="class Stack:", max_tokens=40, temperature=0.8, seed=11)
    assert got["choices"][0]["text"] == want.text and got["usage"]["completion_tokens"] == len(want.ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_kept_and_forced_tokens_are_drafts(pair, temperature):
    """With drafts from anywhere and without any: the same text; what the grammar forces is accepted."""
    model, drafter = pair
    engine = Engine(Scheduler(model, Prefixes(model, 1 << 28), 2048, drafter=drafter, draft_max=4))
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}

    def answer(drafts):
        with on_a_port(engine, drafts=drafts) as (url, _):
            return ask(url, prompt="{", max_tokens=120, temperature=temperature, seed=3, response_format=wanted)
    plain, drafted = answer(()), answer(SOURCES)
    engine.close()
    text = drafted["choices"][0]["text"]
    assert text == plain["choices"][0]["text"] and set(json.loads(text)) == set(SCHEMA["required"])
    assert drafted["timings"]["draft_n_accepted"] > 5 and "draft_n" not in plain["timings"]


def test_who_goes_away_frees_the_place(engine):
    body = json.dumps({"prompt": "x", "max_tokens": 1900, "stream": True}).encode()
    with on_a_port(engine) as (url, port):
        def leave():
            request = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                response.read(300)
        threads = [threading.Thread(target=leave) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: not engine.n_running and not engine.n_waiting)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            assert "refimpl_requests_running 0.0" in response.read().decode()


def test_what_an_answer_took_is_freed_when_it_ends(engine, monkeypatch):
    """Not when Python looks for cycles the next time: that is hundreds of answers later, and each has its keys and values."""
    caches, init = [], Run.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        caches.append(weakref.ref(self.cache))
    monkeypatch.setattr(Run, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        with on_a_port(engine) as (url, _):
            for i in range(3):
                ask(url, prompt=f"x{i}", max_tokens=3)
            ask(url, "/v1/chat/completions", messages=[{"role": "user", "content": "a"}], max_tokens=3, n=2)
            body = json.dumps({"prompt": "y", "max_tokens": 900, "stream": True}).encode()
            request = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as left:
                left.read(200)
            until(lambda: not engine.n_running and len(caches) == 6)
            until(lambda: not any(cache() for cache in caches))
    finally:
        gc.enable()


def test_what_waits_when_it_is_stopped_is_told(pair):
    model, _ = pair
    engine, events = Engine(Scheduler(model, Prefixes(model, 1 << 28), 512, most_running=1)), []

    async def main():
        answers = [await engine.submit(Request([2, 300 + i], Sampling(seed=i))) for i in range(3)]
        await asyncio.to_thread(engine.close)
        for answer in answers:
            events.append([event async for event in answer][-1])
        with pytest.raises(RuntimeError, match="being stopped"):
            await engine.submit(Request([2], Sampling()))
    asyncio.run(main())
    assert [type(event) for event in events] == [Done] * 3 and {event.stats.stop for event in events} <= {"gone", "context"}


def test_the_command_stops_saves_and_goes_on(pair, tmp_path):
    """SIGTERM: what has been read is on the disk, and who starts next knows it. A port that is taken is one line."""
    model, prompts = pair[0], ["def f():\n" * 40, "class A:\n" * 40]

    def known():
        """What another process would know that starts now."""
        return Prefixes(model, 1 << 28, Snapshots(tmp_path, model, 1 << 30))
    engine = Engine(Scheduler(model, known(), 2048))
    with on_a_port(engine) as (url, _):
        ask(url, prompt=prompts[0], max_tokens=3)
    engine.close()
    arguments = ["serve", "--port", "0", "--cache-dir", str(tmp_path)]
    server = subprocess.Popen([sys.executable, "-m", "refimpl", *arguments], stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"REFIMPL_API_KEY": "k"})
    line = next(line for line in server.stderr if "http://" in line)
    url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
    n_known = [ask(url, key="k", prompt=prompt, max_tokens=3)["usage"]["prompt_tokens_details"]["cached_tokens"] for prompt in prompts]
    taken = run("serve", "--port", url.rpartition(":")[2], "--cache-dir", "none")
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0 and "stopped" in server.stderr.read()
    assert taken[0] == 1 and re.search("^refimpl: cannot listen on 127.0.0.1:.*another --port", taken[2], re.MULTILINE)
    assert n_known[0] > 100 and n_known[1] == 0
    assert known().find(model.tokenizer.encode(prompts[1]), 2048).cache.length > 100


def test_a_model_without_turns_ends_and_has_no_tools(engine):
    """The built-in one would write until its context is full."""
    message = [{"role": "user", "content": "def f():"}]
    with on_a_port(engine) as (url, _):
        assert ask(url, "/v1/chat/completions", messages=message, seed=1)["usage"]["completion_tokens"] <= 128
        assert ask(url, "/v1/responses", input="def f():", seed=1)["usage"]["output_tokens"] <= 128
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(url, "/v1/chat/completions", messages=message, tools=[{"type": "function", "function": {"name": "f"}}])
        assert refused.value.code == 400 and "does not know tools" in refused.value.read().decode()


def test_a_server_that_cannot_be_asked_is_one_line():
    for url, words in (("http://127.0.0.1:9", "127.0.0.1:9/v1/completions: .*refused"), ("localhost", "no address of a server")):
        with pytest.raises(ValueError, match=words):
            check_server(url)


def test_verify_asks_for_the_model_by_name_and_refuses_what_is_about_files(monkeypatch):
    asked = []
    monkeypatch.setattr(Server, "ask", lambda self, fields, leave_after=None: asked.append(fields) or {"text": "a"})
    for given in (["-m", "some/model"], ["some/model"]):
        asked.clear()
        assert run("verify", "--server", "http://127.0.0.1:9", *given)[0] == 0
        assert len(asked) == 32 and {fields["model"] for fields in asked} == {"some/model"}
    for given, name in ((["--no-run"], "--no-run"), (["--sha256", "0" * 64], "--sha256"), (["--strict", "-t", "2"], "--strict"),
                        (["a", "-m", "b"], "give the model once")):
        asked.clear()
        assert_one_line(run("verify", "--server", "http://127.0.0.1:9", *given), 2, name)
        assert not asked
