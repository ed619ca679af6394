"""Every endpoint against an engine that plays scripts: what is answered, streamed and not."""

import json

import numpy as np
import pytest
from serving import CALL, SCHEMA, THOUGHT, TOOL, USER, FakeEngine, chunks, get, post

from refimpl.text.templates import CONTINUATION_TEMPLATE

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
TWO_TURNS = [{"role": "user", "content": "weather?"},
             {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {
                 "name": "weather", "arguments": '{"city": "Rome", "days": 3}'}}]},
             {"role": "tool", "tool_call_id": "1", "content": "rain"}]


def content_of(events):
    return "".join(choice["delta"].get("content") or "" for each in events for choice in each["choices"])


# ---- chat

def test_a_chat():
    engine = FakeEngine("hello there", reused=2)
    response = post(engine, CHAT, {"messages": USER, "seed": 7, "temperature": 0.5, "max_tokens": 20})
    body = response.json()
    assert response.headers["x-refimpl-seed"] == "7" and "x-refimpl-ignored" not in response.headers
    assert body["object"] == "chat.completion" and body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello there", "refusal": None}
    n, n_new = len(engine.requests[0].ids), len(engine.tokenizer.encode("hello there", bos=False))
    assert body["usage"] == {"prompt_tokens": n, "completion_tokens": n_new, "total_tokens": n + n_new,
                             "prompt_tokens_details": {"cached_tokens": 2}}
    timings = body["timings"]
    assert (timings["cache_n"], timings["prompt_n"], timings["prompt_ms"], timings["predicted_n"]) == (2, n - 2, 500, n_new)
    assert (timings["draft_n"], timings["draft_n_accepted"]) == (0, 0)
    assert engine.requests[0].sampling.temperature == 0.5 and engine.requests[0].sampling.seed == 7
    assert engine.requests[0].sampling.top_p == 1.0 and engine.requests[0].max_new_tokens == 20      # the file's own


def test_a_chat_is_streamed():
    engine = FakeEngine(THOUGHT + "hello" + CALL, reused=1)
    response = post(engine, CHAT, {"messages": USER, "stream": True, "return_progress": True, "tools": [TOOL], "reasoning_effort": "low",
                                   "stream_options": {"include_usage": True}})
    assert response.text.endswith("data: [DONE]\n\n")
    events = chunks(response)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    progress = [each["prompt_progress"] for each in events if "prompt_progress" in each]
    n = len(engine.requests[0].ids)
    assert [(p["total"], p["cache"], p["processed"]) for p in progress] == [(n, 1, 1), (n, 1, n)]
    deltas = [each["choices"][0]["delta"] for each in events if each["choices"]]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "so it is" and content_of(events) == "hello"
    calls = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
    assert calls[0]["function"]["name"] == "weather" and calls[0]["id"].startswith("call_") and calls[0]["type"] == "function"
    assert json.loads("".join(c["function"].get("arguments", "") for c in calls)) == {"city": "Rome", "days": 3} and len(calls) > 2
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls" and events[-2]["timings"]["prompt_n"] == n - 1
    assert events[-1]["choices"] == [] and events[-1]["usage"]["prompt_tokens"] == n


def test_thoughts_and_calls_in_one_message():
    engine = FakeEngine(THOUGHT + CALL + CALL)
    asked = {"messages": USER, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}}
    message = post(engine, CHAT, asked).json()["choices"][0]
    assert message["finish_reason"] == "tool_calls" and message["message"]["reasoning_content"] == "so it is"
    assert message["message"]["content"] is None and len(message["message"]["tool_calls"]) == 2
    assert json.loads(message["message"]["tool_calls"][1]["function"]["arguments"]) == {"city": "Rome", "days": 3}
    assert "<|think|>" in engine.prompt and "declaration:weather" in engine.prompt
    post(engine := FakeEngine("ok"), CHAT, {"messages": TWO_TURNS, "tools": [TOOL]})
    assert 'call:weather{city:<|"|>Rome<|"|>,days:3}' in engine.prompt and "rain" in engine.prompt and "<|think|>" not in engine.prompt


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_and_the_run(stream):
    engine = FakeEngine("one two three four five six")
    engine.stall_after = len(engine.tokenizer.encode("one two three four five six", bos=False)) - 1       # nobody waits for the end
    response = post(engine, CHAT, {"messages": USER, "stop": ["thr", "three f", "zzz"], "stream": stream})
    if stream:
        assert content_of(chunks(response)) == "one two " and chunks(response)[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        assert response.json()["choices"][0]["message"]["content"] == "one two "
    assert engine.cancelled and response.status_code == 200
    engine = FakeEngine("one two three four five six")
    i = engine.tokenizer.encode(" four", bos=False)[0]
    n = engine.tokenizer.encode("one two three four five six", bos=False).index(i)
    choice = post(engine, CHAT, {"messages": USER, "stop_token_ids": [i]}).json()["choices"][0]
    assert choice["message"]["content"] == engine.tokenizer.decode(engine.tokenizer.encode("one two three four five six", bos=False)[:n])


def test_what_may_be_a_stop_string_is_shown_before_a_call_and_at_the_end():
    asked = {"messages": USER, "max_tokens": 99, "stop_sequences": ["three"], "tools": [{"name": "weather", "input_schema": SCHEMA}]}
    content = post(FakeEngine("so th" + CALL), MESSAGES, asked).json()["content"]
    assert content[0] == {"type": "text", "text": "so th"} and content[1]["type"] == "tool_use"
    assert post(FakeEngine("so thre"), MESSAGES, asked).json()["content"] == [{"type": "text", "text": "so thre"}]


def test_length_and_choices_with_seeds():
    engine = FakeEngine("a b c d e f", "g h i", "k")
    body = post(engine, CHAT, {"messages": USER, "n": 3, "seed": 10, "max_completion_tokens": 3}).json()
    assert [c["finish_reason"] for c in body["choices"]][0] == "length" and body["choices"][2]["message"]["content"] == "k"
    assert [r.sampling.seed for r in engine.requests] == [10, 11, 12]
    events = chunks(post(FakeEngine("ab", "cd"), CHAT, {"messages": USER, "n": 2, "stream": True}))
    for i, text in enumerate(("ab", "cd")):
        assert "".join(c["delta"].get("content", "") for e in events for c in e["choices"] if c["index"] == i) == text
    seeds = {post(FakeEngine(), CHAT, {"messages": USER}).headers["x-refimpl-seed"] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_every_token(stream):
    engine = FakeEngine("h\u00e9\U0001F980llo")
    response = post(engine, CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 2, "stream": stream})
    lists = ([c["logprobs"]["content"] for e in chunks(response) for c in e["choices"] if c["logprobs"]] if stream
             else [response.json()["choices"][0]["logprobs"]["content"]])
    entries = [entry for each in lists for entry in each]
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == "h\u00e9\U0001F980llo"
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 2 for entry in entries) and engine.requests[0].n_top == 2


def test_every_parameter_arrives():
    engine = FakeEngine()
    post(engine, CHAT, {"messages": USER, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": 0.5,
                        "logit_bias": {"7": -100}, "seed": 1})
    s = engine.requests[0].sampling
    assert (s.top_k, s.top_p, s.min_p, s.presence_penalty, s.frequency_penalty, s.logit_bias) == (3, 0.5, 0.1, 1, 0.5, ((7, -100),))
    post(engine, CHAT, {"messages": USER, "top_k": -1, "temperature": None})
    assert engine.requests[1].sampling.top_k == 0 and engine.requests[1].n_top == -1 and engine.requests[1].max_new_tokens == -1


@pytest.mark.parametrize("asked, script, wrong", [
    ({"response_format": {"type": "json_object"}}, '{"a": 1}', "a"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}}, '{"city": "a", "days": 1}', "["),
    ({"regex": "a+b"}, "aab", "c"), ({"grammar": 'start: "ab" | "cd"'}, "cd", "e"), ({"grammar": 'root ::= "ab" | "cd"'}, "cd", "e"),
    ({"tools": [TOOL], "tool_choice": "required"}, CALL, "a"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, CALL, "a")], ids=str)
def test_answers_follow_a_constraint(asked, script, wrong):
    engine = FakeEngine(script)             # the engine asserts that the script is allowed
    assert post(engine, CHAT, {"messages": USER, "n": 2, **asked}).status_code == 200
    constraints = [request.constraint for request in engine.requests]
    assert constraints[0] is not constraints[1]
    post(engine, CHAT, {"messages": USER, "max_tokens": 0, **asked})
    logits = engine.requests[-1].constraint.mask(np.zeros(engine.tokenizer.n_vocab, np.float32))
    assert np.isinf(logits[engine.tokenizer.encode(wrong, bos=False)[0]])


def test_tools_that_may_not_be_called_are_in_the_prompt():
    post(engine := FakeEngine(), CHAT, {"messages": USER, "tools": [TOOL], "tool_choice": "none"})
    assert "declaration:weather" in engine.prompt and type(engine.requests[0].constraint).__name__ == "Free"


def test_unknown_parameters_are_named():
    silent = {"user": "u", "store": True, "model": "gpt"}
    response = post(FakeEngine(), CHAT, {"messages": USER, "mirostat": 2, "x\r\nset-cookie: a": 1, **silent})
    assert response.headers["x-refimpl-ignored"] == "mirostat, x??set-cookie??a" and response.status_code == 200


# ---- completions

def test_completions():
    engine = FakeEngine("one two", CALL)
    body = post(engine, TEXT, {"prompt": ["def ", [5, 6]], "logprobs": 1, "max_tokens": 5}).json()
    assert engine.requests[0].ids == engine.tokenizer.encode("def ") and engine.requests[1].ids == [5, 6]
    choice = body["choices"][0]
    assert choice["text"] == "one two" and choice["finish_reason"] == "stop" and "".join(choice["logprobs"]["tokens"]) == "one two"
    assert choice["logprobs"]["text_offset"][1] == len(choice["logprobs"]["tokens"][0])
    assert list(choice["logprobs"]["top_logprobs"][0].values()) == [-0.5] and choice["logprobs"]["token_logprobs"][0] == -0.5
    assert body["choices"][1]["text"].startswith("<|tool_call>call:")           # text as it is: no tool calls here
    post(engine, TEXT, {"prompt": "a"})
    assert engine.requests[-1].max_new_tokens == 16


def test_completions_are_streamed():
    events = chunks(post(FakeEngine("one two stop three"), TEXT, {"prompt": "a", "stream": True, "stop": "stop", "logprobs": 0, "n": 2,
                                                                  "return_progress": True, "stream_options": {"include_usage": True}}))
    for i in range(2):
        assert "".join(c["text"] for e in events for c in e["choices"] if c["index"] == i) == "one two "
    assert any("prompt_progress" in each for each in events) and events[-1]["usage"]["completion_tokens"] > 2


# ---- responses

def test_responses_are_streamed_event_by_event():
    response = post(FakeEngine(THOUGHT + "yes" + CALL), RESPONSES, {
        "input": "hi", "stream": True, "reasoning": {"effort": "high"}, "tools": [{"type": "function", **TOOL["function"]}]})
    events = chunks(response)
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    assert [line[7:] for line in response.text.splitlines() if line.startswith("event: ")] == [each["type"] for each in events]
    types = [each["type"].removeprefix("response.") for each in events]
    once = [t for i, t in enumerate(types) if i == 0 or types[i - 1] != t]
    part = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done", "output_item.done"]
    assert once == ["created", "in_progress", *(t.format("reasoning_text") for t in part), *(t.format("output_text") for t in part),
                    "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done", "completed"]
    final = events[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call"]
    assert final["output"][1]["content"][0]["text"] == "yes" and json.loads(final["output"][2]["arguments"])["city"] == "Rome"
    assert final["usage"]["output_tokens_details"]["reasoning_tokens"] > 1 and final["store"] is False


def test_a_response_continues_a_conversation():
    engine = FakeEngine("a b c d e f g")
    body = post(engine, RESPONSES, {"instructions": "be brief", "max_output_tokens": 2, "tools": [{"type": "function", **TOOL["function"]}],
                                    "input": [{"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
                                              {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                                              {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city":"Rome"}'},
                                              {"type": "function_call_output", "call_id": "1", "output": "rain"}]}).json()
    assert body["status"] == "incomplete" and body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert "be brief" in engine.prompt and 'call:weather{city:<|"|>Rome<|"|>}' in engine.prompt and "rain" in engine.prompt
    body = post(FakeEngine('{"a": 1}'), RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema", "name": "n", "schema": {
        "type": "object", "properties": {"a": {"type": "integer"}}}}}}).json()
    assert body["output"][0]["content"][0]["text"] == '{"a": 1}' and body["status"] == "completed"


# ---- messages

def test_messages_are_streamed_event_by_event():
    engine = FakeEngine(THOUGHT + "yes" + CALL, reused=3)
    response = post(engine, MESSAGES, {
        "messages": USER, "max_tokens": 99, "stream": True, "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tools": [{"name": "weather", "input_schema": SCHEMA}]})
    budget = vars(engine.requests[0].constraint)                # a few of its tokens are written by now
    assert 1000 < budget["_left"] < 1024 and type(budget["_inner"]).__name__ == "Grammar"
    events = chunks(response)
    assert [line[7:] for line in response.text.splitlines() if line.startswith("event: ")] == [each["type"] for each in events]
    types = [each["type"] for each in events]
    once = [t for i, t in enumerate(types) if i == 0 or types[i - 1] != t]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert once == ["message_start", *block * 3, "message_delta", "message_stop"]
    usage = events[0]["message"]["usage"]
    assert usage["cache_read_input_tokens"] == 3 and usage["input_tokens"] > 3
    blocks = [each["content_block"]["type"] for each in events if each["type"] == "content_block_start"]
    assert blocks == ["thinking", "text", "tool_use"] and [e["index"] for e in events if e["type"] == "content_block_start"] == [0, 1, 2]
    assert json.loads("".join(e["delta"].get("partial_json", "") for e in events if "delta" in e)) == {"city": "Rome", "days": 3}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None} and events[-2]["usage"]["output_tokens"] > 5


def test_a_message_after_a_tools_result():
    engine = FakeEngine("it rains, END of it")
    body = post(engine, MESSAGES, {
        "max_tokens": 50, "stop_sequences": ["END", "of"], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "tools": [{"name": "weather", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}], "metadata": {"user_id": "u"},
        "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=00000;"},
                   {"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": "weather?"},
                     {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""},
                                                       {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}]},
                     {"role": "user", "content": [
                         {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                         {"type": "text", "text": "and now?"}]}]})
    assert "x-refimpl-ignored" not in body.headers
    body = body.json()
    assert body["content"] == [{"type": "text", "text": "it rains, "}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "END")
    assert "billing" not in engine.prompt and "be kind" in engine.prompt and "rain" in engine.prompt and "and now?" in engine.prompt
    n = post(engine, MESSAGES + "/count_tokens", {"messages": USER, "system": "be kind"}).json()["input_tokens"]
    assert n > post(engine, MESSAGES + "/count_tokens", {"messages": USER}).json()["input_tokens"] > 3
    body = post(FakeEngine(THOUGHT + CALL), MESSAGES, {
        "messages": USER, "max_tokens": 99, "thinking": {"type": "adaptive"}, "tool_choice": {"type": "any"},
        "tools": [{"name": "weather", "input_schema": SCHEMA}]}).json()
    assert [block["type"] for block in body["content"]] == ["thinking", "tool_use"] and body["content"][1]["input"]["days"] == 3
    assert post(FakeEngine("a b c d"), MESSAGES, {"messages": USER, "max_tokens": 2}).json()["stop_reason"] == "max_tokens"


# ---- the others

def test_text_to_ids_and_back():
    engine = FakeEngine()
    ids = engine.tokenizer.encode("a <bos> b", special=True, bos=False)
    assert post(engine, "/tokenize", {"content": "a <bos> b"}).json()["tokens"] == ids
    pieces = post(engine, "/tokenize", {"content": "a", "add_special": True, "with_pieces": True}).json()["tokens"]
    assert pieces[0] == {"id": 2, "piece": "<bos>"}
    assert post(engine, "/tokenize", {"prompt": "a <bos> b", "parse_special": False}).json()["count"] > len(ids)
    assert post(engine, "/detokenize", {"tokens": ids}).json()["content"] == "a <bos> b"
    assert "<|turn>user\nhi<turn|>" in post(engine, "/apply-template", {"messages": USER}).json()["prompt"]


def test_what_can_be_looked_at():
    engine = FakeEngine("one two")
    entry = get(engine, "/v1/models", name="g").json()["data"][0]
    assert (entry["id"], entry["meta"]["n_ctx"]) == ("g", 4096) and get(engine, "/v1/models/g", name="g").json() == entry
    assert get(engine, "/health").json() == {"status": "ok"} and get(engine, "/slots").json() == []
    assert get(engine, "/v1/models/x").status_code == 404 and "not stored" in get(engine, "/v1/responses/resp_1").json()["error"]["message"]
    assert post(engine, "/v1/embeddings", {"input": "a"}).status_code == 404


def test_metrics():
    import asyncio

    from serving import client

    async def asked():
        async with client(FakeEngine("one two", reused=2)) as c:
            await c.post(CHAT, json={"messages": USER})
            await c.get("/a/b/c")
            await c.post(CHAT, json={})
            return (await c.get("/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in asyncio.run(asked()).splitlines() if not line.startswith("#"))
    assert lines['refimpl_requests_total{endpoint="/v1/chat/completions",status="200"}'] == "1.0"
    assert lines['refimpl_requests_total{endpoint="/v1/chat/completions",status="400"}'] == "1.0"
    assert lines['refimpl_requests_total{endpoint="other",status="404"}'] == "1.0"
    assert float(lines["refimpl_tokens_generated_total"]) >= 2 and lines["refimpl_prompt_tokens_reused_total"] == "2.0"
    assert lines["refimpl_time_to_first_token_seconds_count"] == "1.0" and lines["refimpl_requests_running"] == "0.0"


def test_a_template_without_turns():
    post(engine := FakeEngine(template=CONTINUATION_TEMPLATE), CHAT, {"messages": USER})
    assert engine.prompt == "<bos>hi\n"
