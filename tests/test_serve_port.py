"""A real server on a port: clients that leave, and clients that send half of something."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec
import pytest
from serving import USER, FakeEngine, on_a_port, until

from refimpl.serve.connections import DESCRIPTORS, more_descriptors

CHAT = "/v1/chat/completions"


# ---- clients that leave

@pytest.fixture(scope="module")
def stalling():
    """(engine, port) of a server: it takes longer to stop one than to leave it."""
    engine = FakeEngine()
    with on_a_port(engine) as (_, port):
        yield engine, port


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path, body", [
    (CHAT, {"messages": USER, "n": 2}), ("/v1/completions", {"prompt": "a"}), ("/v1/responses", {"input": "a"}),
    ("/v1/messages", {"messages": USER, "max_tokens": 9})], ids=lambda value: value if isinstance(value, str) else "")
def test_who_leaves_ends_the_work(path, body, stream, stalling):
    engine, port = stalling
    engine.__init__("a b c d", stall_after=2)
    raw = msgspec.json.encode({**body, "stream": stream})
    with socket.create_connection(("127.0.0.1", port)) as s:
        s.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                  % (path.encode(), len(raw), raw))
        if stream:
            until(lambda: b"data: " in s.recv(1 << 16))
        until(lambda: engine.n_running == body.get("n", 1))
        time.sleep(0.05)
        assert not engine.cancelled
        left = time.monotonic()
        s.close()
        until(lambda: not engine.n_running)
        assert time.monotonic() - left < 1


def test_a_stream_is_pinged():
    with on_a_port(FakeEngine("a b c", stall_after=1), ping_seconds=0.05) as (url, _), \
            httpx.stream("POST", url + CHAT, json={"messages": USER, "stream": True}) as response:
        assert any(line == ": ping" for line in response.iter_lines())


# ---- half of something

def last_words(port, sent, seconds=3, slowly=b""):
    """What a server says until it closes the connection, and after how long; `slowly` is sent byte by byte."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as s:
        s.sendall(sent)
        s.settimeout(0.03 if slowly else seconds)
        said = b""
        while True:
            try:
                if not (chunk := s.recv(1 << 16)):
                    break
                said += chunk
            except TimeoutError:
                assert slowly and time.monotonic() - started < seconds, "the connection is still open"
                s.sendall(slowly[:1])
                slowly = slowly[1:]
            except ConnectionResetError:
                break
    return said, time.monotonic() - started


def test_half_a_request_and_silence():
    with on_a_port(FakeEngine(), body_seconds=0.2, header_seconds=0.3) as (url, port):
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        evil = head.replace(b"localhost", b"evil.example")
        cases = [
            (head + b'Content-Length: 100\r\n\r\n{"mess', b""), (head + b'Transfer-Encoding: chunked\r\n\r\n6\r\n{"mess\r\n', b""),
            (b"", b""), (b"GET /hea", b""), (head, b"X-Slow: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
            (evil + b"Content-Length: 100\r\n\r\n", b"a" * 99)]       # the body of a request that was refused is not waited for either
        with ThreadPoolExecutor(len(cases)) as pool:
            *bodies, nothing, half, slow, refused = pool.map(lambda case: last_words(port, case[0], slowly=case[1]), cases)
        for said, seconds in bodies:
            assert said.startswith(b"HTTP/1.1 408 ") and b"0.2 s" in said and seconds < 1
        for said, seconds in (nothing, half, slow):
            assert said == b"" and 0.2 < seconds < 1
        assert refused[0].startswith(b"HTTP/1.1 403 ") and refused[1] < 1
        assert httpx.get(url + "/health").status_code == 200


def test_a_long_answer_outlives_the_time_for_headers():
    engine = FakeEngine("a b c", stall_after=1)
    with on_a_port(engine, header_seconds=0.1, ping_seconds=0.05) as (url, _), httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200         # the same connection
        with client.stream("POST", CHAT, json={"messages": USER, "stream": True}) as response:
            lines = response.iter_lines()
            assert [next(line for line in lines if line == ": ping") for _ in range(6)]


def test_too_many_connections_do_not_break_it():
    from contextlib import ExitStack
    with on_a_port(FakeEngine(), most_connections=20, header_seconds=0.5) as (url, port):
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            time.sleep(0.1)
            said, _ = last_words(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert said.startswith(b"HTTP/1.1 503 ") or said == b""
        until(lambda: _status(url) == 200)


def _status(url):
    try:
        return httpx.get(url + "/health").status_code
    except httpx.TransportError:
        return 0


def test_what_is_no_http():
    with on_a_port(FakeEngine()) as (url, port):
        for sent in (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET / HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 100_000):
            assert last_words(port, sent)[0].startswith(b"HTTP/1.1 400 ")
        assert httpx.get(url + "/health").status_code == 200


def test_a_server_may_open_more_files_than_a_shell_lets_it():
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        more_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard if hard > 0 else DESCRIPTORS, DESCRIPTORS), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
