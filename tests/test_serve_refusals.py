"""Every bad request is refused in one line, in its API's own form; a client that leaves ends the work."""

import asyncio
import json
import logging

import pytest
from serving import SCHEMA, TOOL, USER, FakeEngine, chunks, client, get, post

from refimpl.loading.memory import MemoryRefusal
from refimpl.serve.scheduler import Busy

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
CHAT_FIELDS = [
    ({"messages": "hi"}, "messages"), ({}, "messages"), ({"messages": []}, "messages"), ({"messages": USER, "n": 0}, "n"),
    ({"messages": USER, "n": 65}, "n"), ({"messages": USER, "temperature": "hot"}, "temperature"), ({"messages": USER, "n": True}, "n"),
    ({"messages": USER, "temperature": -1}, "temperature"), ({"messages": USER, "top_p": 0}, "top_p"),
    ({"messages": USER, "seed": -1}, "seed"),
    ({"messages": USER, "max_tokens": -2}, "max_tokens"), ({"messages": USER, "max_tokens": 1.5}, "max_tokens"),
    ({"messages": USER, "stop": [""]}, "stop"), ({"messages": USER, "stop": ["a"] * 65}, "stop"), ({"messages": USER, "stop": [1]}, "stop"),
    ({"messages": USER, "stop_token_ids": [1 << 30]}, "stop_token_ids"), ({"messages": USER, "logit_bias": {"a": 1}}, "logit_bias"),
    ({"messages": USER, "logit_bias": {"9999999": 1}}, "logit_bias"), ({"messages": USER, "logit_bias": {"1": 101}}, "logit_bias"),
    ({"messages": USER, "top_logprobs": 3}, "top_logprobs"), ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": USER, "reasoning_effort": "huge"}, "reasoning_effort"),
    ({"messages": USER, "thinking_token_budget": -2}, "thinking_token_budget"),
    ({"messages": [{"role": "wizard", "content": ""}]}, "wizard"),
    ({"messages": ["hi"]}, "messages"), ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}, "fetches nothing"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "JSON"),
    ({"messages": [*USER] * 10_001}, "10000"), ({"messages": USER, "tools": [{"type": "function"}]}, "tools"),
    ({"messages": USER, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}]}, "tools"),
    ({"messages": USER, "tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools"),
    ({"messages": USER, "tools": [TOOL], "tool_choice": "perhaps"}, "tool_choice"),
    ({"messages": USER, "tool_choice": "required"}, "tool_choice"),
    ({"messages": USER, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"messages": USER, "tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": USER, "response_format": {"type": "xml"}}, "response_format"),
    ({"messages": USER, "response_format": {"type": "json_schema"}}, "response_format"),
    ({"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "response_format"),
    ({"messages": USER, "grammar": "start ???"}, "grammar"), ({"messages": USER, "regex": "("}, "regex")]


def refused(response, status=400):
    """The message of an error in OpenAI's form, which is one line."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"] and len(error["message"]) < 700
    return error


@pytest.mark.parametrize("body, named", CHAT_FIELDS, ids=lambda value: str(value)[:60])
def test_a_bad_field_is_named(body, named):
    error = refused(post(engine := FakeEngine(), CHAT, body))
    assert named in (error["param"] or "") + error["message"] and not engine.requests


@pytest.mark.parametrize("path, body, named", [
    (TEXT, {"prompt": []}, "prompt"), (TEXT, {"prompt": [1, "a"]}, "prompt"), (TEXT, {"prompt": [99999]}, "prompt"),
    (TEXT, {"prompt": {}}, "prompt"),
    (TEXT, {"prompt": "a", "echo": True}, "echo"), (TEXT, {"prompt": ["a"] * 65}, "n"), (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (TEXT, {"prompt": "a", "best_of": 2}, "best_of"), (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
    (RESPONSES, {"input": "a", "previous_response_id": "resp_1"}, "not stored"),
    (RESPONSES, {"input": "a", "background": True}, "background"),
    (RESPONSES, {"input": []}, "input"), (RESPONSES, {"input": [{"type": "web_search_call"}]}, "web_search_call"),
    (RESPONSES, {"input": [{"type": "function_call", "call_id": "1"}]}, "name"),
    (RESPONSES, {"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]}, "the server fetches nothing"),
    (RESPONSES, {"input": "a", "text": {"format": {"type": "json_schema"}}}, "schema"), (RESPONSES, {"input": 5}, "input"),
    ("/tokenize", {}, "content"), ("/tokenize", {"content": 5}, "content"), ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/apply-template", {"messages": []}, "messages")], ids=lambda value: str(value)[:60])
def test_a_bad_field_of_another_endpoint_is_named(path, body, named):
    error = refused(post(engine := FakeEngine(), path, body))
    assert named in (error["param"] or "") + error["message"] and not engine.requests


@pytest.mark.parametrize("body, named", [
    ({"messages": USER}, "max_tokens"), ({"max_tokens": 1, "messages": [{"role": "tool", "content": ""}]}, "role"),
    ({"max_tokens": 1, "messages": []}, "messages"), ({"max_tokens": -1, "messages": USER}, "max_tokens"),
    ({"max_tokens": 1, "messages": USER, "tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
    ({"max_tokens": 1, "messages": USER, "tools": [{"name": "f", "input_schema": None}]}, "input_schema"),
    ({"max_tokens": 1, "messages": USER, "tools": [{"name": "f", "input_schema": SCHEMA}],
      "tool_choice": {"type": "tool", "name": "g"}}, "'g'"),
    ({"max_tokens": 1, "messages": USER, "tool_choice": {"type": "maybe"}}, "tool_choice"),
    ({"max_tokens": 1, "messages": USER, "thinking": {"type": "perhaps"}}, "thinking"),
    ({"max_tokens": 1, "messages": USER, "temperature": -1}, "temperature"),
    ({"max_tokens": 1, "messages": USER, "output_config": {"format": {"type": "xml"}}}, "output_config"),
    ({"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "source"),
], ids=lambda value: str(value)[:60])
def test_a_bad_message_is_refused_in_anthropics_form(body, named):
    response = post(FakeEngine(), MESSAGES, body)
    assert response.status_code == 400 and set(response.json()) == {"type", "error"} and response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "invalid_request_error" and named in response.json()["error"]["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"a":' * 300 + b"1" + b"}" * 300,
                                 b'{"messages": "\xff"}', b'{"messages": "\\ud800 x"}', b'{"n": NaN}', b'{"n": 1e999}',
                                 b'{"n": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}", b"a=b"], ids=lambda raw: repr(raw[:20]))
@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/tokenize"])
def test_a_body_that_is_none(path, raw):
    response = post(FakeEngine(), path, content=raw)
    assert response.status_code == 400 and "\n" not in response.json()["error"]["message"]
    if raw == b'{"messages": "\xff"}':
        assert "UTF-8" in response.json()["error"]["message"]


def test_deep_nesting_that_passes_json_does_not_pass():
    deep = json.loads('{"a":' * 150 + "1" + "}" * 150)
    assert "nested" in refused(post(FakeEngine(), CHAT, {"messages": USER, "tools": [{"type": "function", "function": {
        "name": "f", "parameters": json.loads('{"not":' * 250 + "{}" + "}" * 250)}}]}))["message"]
    assert post(FakeEngine(), CHAT, {"messages": USER, "extra": deep}).status_code == 200
    assert "200 levels" in refused(post(FakeEngine(), CHAT, {"messages": USER, "extra": {"a": deep, "b": [deep] * 3, "c": [[deep]] * 50 + [
        json.loads("[" * 198 + "]" * 198)]}}))["message"]


def test_a_body_that_is_too_large_is_not_read():
    for headers in ({}, {"transfer-encoding": "chunked"}):
        read = 0

        async def parts():
            nonlocal read
            for _ in range(1000):
                read += 1
                yield b" " * 1000

        async def one(headers=headers, parts=parts):
            async with client(FakeEngine(), max_body=5000) as c:
                headers = {"content-type": "application/json"} | headers | ({} if headers else {"content-length": "1000000"})
                return await c.post(CHAT, content=parts(), headers=headers)
        response = asyncio.run(one())
        assert refused(response, 413)["code"] == "request_too_large" and read == (6 if headers else 0)
    assert post(FakeEngine(), MESSAGES, content=b" " * 6000, max_body=5000).json()["error"]["type"] == "request_too_large"


def test_other_content_types_are_refused():
    """A page can send these to any address without asking."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert refused(post(FakeEngine(), CHAT, content=b"{}", headers={"content-type": kind}), 415)["param"] == "Content-Type"


@pytest.mark.parametrize("error, status, code", [(Busy(64, 2.5), 503, "busy"), (MemoryRefusal("not enough memory"), 400, None),
                                                 (ValueError("no\nway"), 400, None), (KeyError("oh"), 500, "internal_error")], ids=str)
def test_what_the_engine_refuses(error, status, code, caplog):
    with caplog.at_level(logging.CRITICAL if status < 500 else logging.ERROR):
        response = post(FakeEngine(error=error), CHAT, {"messages": USER})
    assert refused(response, status)["code"] == code
    assert (response.headers.get("retry-after") == "3") == (status == 503) and bool(caplog.records) == (status == 500)
    kind = post(FakeEngine(error=error), MESSAGES, {"messages": USER, "max_tokens": 1}).json()["error"]["type"]
    assert kind == {503: "overloaded_error", 400: "invalid_request_error", 500: "api_error"}[status]


def test_a_prompt_longer_than_the_context_and_a_template_that_fails():
    assert refused(post(FakeEngine(n_ctx=3), CHAT, {"messages": USER}))["code"] == "context_length_exceeded"
    assert "no cats" in refused(post(FakeEngine(template="{{ raise_exception('no cats') }}"), CHAT, {"messages": USER}))["message"]
    assert "template" in refused(post(FakeEngine(template=None), CHAT, {"messages": USER}))["message"]


def test_an_answer_that_fails_on_its_way():
    events = chunks(post(FakeEngine(failed=RuntimeError("broken")), CHAT, {"messages": USER, "stream": True}))
    assert "broken" in events[-1]["error"]["message"]
    assert refused(post(FakeEngine(failed=RuntimeError("broken")), CHAT, {"messages": USER}), 500)
    assert refused(post(FakeEngine(failed=MemoryRefusal("too much")), CHAT, {"messages": USER}), 400)
    events = chunks(post(FakeEngine(failed=RuntimeError("broken")), MESSAGES, {"messages": USER, "max_tokens": 5, "stream": True}))
    assert events[-1]["type"] == "error" and events[-1]["error"]["type"] == "api_error"
    events = chunks(post(FakeEngine(failed=RuntimeError("broken")), RESPONSES, {"input": "a", "stream": True}))
    assert events[-1]["type"] == "response.failed" and events[-1]["response"]["status"] == "failed"


# ---- who may ask

@pytest.mark.parametrize("host, status", [("localhost", 200), ("127.0.0.1:8080", 200), ("[::1]:80", 200), ("[::1]", 200),
                                          ("a.localhost", 200), ("192.168.1.5", 200), ("my.box", 200), ("evil.example", 403),
                                          ("x.example:8080", 403),
                                          ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403), ("", 403), ("x:80:80", 403)])
def test_hosts(host, status):
    response = get(FakeEngine(), "/health", headers={"host": host}, allowed_hosts=["my.box"])
    assert response.status_code == status
    assert get(FakeEngine(), "/health", headers={"host": host}, allowed_hosts=["*"]).status_code == 200


def test_the_key():
    ask = {"engine": FakeEngine(), "api_key": "s3cret\u00e9"}
    for path in ("/v1/models", "/slots", "/metrics", "/nowhere"):
        assert refused(get(path=path, **ask), 401)["code"] == "invalid_api_key"
        assert get(path=path, headers={"authorization": "Bearer wrong"}, **ask).status_code == 401
    key = "s3cret\u00e9".encode()
    for headers in ({"authorization": b"Bearer " + key}, {"x-api-key": key}, {"authorization": b"bearer  " + key}):
        assert get(path="/v1/models", headers=headers, **ask).status_code == 200
    assert get(path="/health", **ask).status_code == 200
    assert post(FakeEngine(), MESSAGES, {}, api_key="a").json()["error"]["type"] == "authentication_error"


def test_cors_is_closed_unless_opened():
    async def preflight(origin, **settings):
        headers = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        async with client(FakeEngine(), **settings) as c:
            return await c.options(CHAT, headers=headers)
    page = "https://page.example"
    assert "access-control-allow-origin" not in asyncio.run(preflight(page)).headers
    response = asyncio.run(preflight(page, cors=[page], api_key="k"))       # a preflight has no key
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == page
    assert "access-control-allow-origin" not in asyncio.run(preflight("https://other.example", cors=[page])).headers
    assert get(FakeEngine(), "/health", headers={"origin": page}, cors=[page]).headers["access-control-allow-origin"] == page


def test_paths_and_methods():
    assert refused(get(FakeEngine(), "/nowhere"), 404)["type"] == "not_found_error"
    response = get(FakeEngine(), CHAT)
    assert refused(response, 405) and response.headers["allow"] == "POST"
    assert get(FakeEngine(), MESSAGES).json()["type"] == "error"
