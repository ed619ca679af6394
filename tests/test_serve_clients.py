"""The official clients of OpenAI and Anthropic, and LangChain's, against a real server on a port."""

import importlib
import json
from contextlib import ExitStack

import httpx
import pytest
from serving import CALL, SCHEMA, THOUGHT, TOOL, USER, FakeEngine, on_a_port

# ---- OpenAI's client

@pytest.fixture(scope="module")
def openai():
    """The package. Not imported above: that takes seconds, and every worker of pytest-xdist reads this file."""
    return importlib.import_module("openai")


@pytest.fixture(scope="module")
def anthropic():
    return importlib.import_module("anthropic")


@pytest.fixture(scope="module")
def served():
    """(engine, URL) of a server: it takes longer to stop one than to ask it."""
    engine = FakeEngine()
    with on_a_port(engine, api_key="key") as (url, _):
        yield engine, url


@pytest.fixture
def ask(served):
    """A function from a client's class and scripts to a client of a server that plays them, and the server's engine."""
    engine, url = served
    with ExitStack() as stack:
        def start(kind, *scripts, **settings):
            engine.__init__(*scripts, **settings)
            path = "/v1" if kind.__name__ == "OpenAI" else ""
            return stack.enter_context(kind(base_url=url + path, api_key="key", max_retries=0)), engine
        yield start


def test_openai_chat_and_tools(ask, openai):
    client, engine = ask(openai.OpenAI, THOUGHT + CALL, "it rains", "it rains")
    arguments = {"model": "gemma", "tools": [TOOL], "reasoning_effort": "low"}
    messages = [{"role": "user", "content": "weather?"}]
    first = client.chat.completions.create(messages=messages, **arguments).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.reasoning_content == "so it is"
    [call] = first.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Rome", "days": 3}
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    second = client.chat.completions.create(messages=messages, **arguments)
    assert second.choices[0].message.content == "it rains" and second.usage.prompt_tokens_details.cached_tokens == 0
    assert 'call:weather{city:<|"|>Rome<|"|>,days:3}' in engine.prompt and "rain" in engine.prompt
    with client.chat.completions.stream(messages=messages, **arguments) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "it rains"
    assert client.models.list().data[0].id == "gemma-4"


def test_openai_streams_calls(ask, openai):
    client, _ = ask(openai.OpenAI, "so" + CALL + CALL)
    with client.chat.completions.stream(model="g", messages=USER, tools=[TOOL], stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion()
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert [json.loads(c.function.arguments)["days"] for c in message.choices[0].message.tool_calls] == [3, 3]
    assert message.usage.total_tokens


def test_openai_parses_structures_and_reads_logprobs(ask, openai):
    import pydantic

    class Weather(pydantic.BaseModel):
        city: str
        days: int

    client, _ = ask(openai.OpenAI, '{"city": "Rome", "days": 2}')
    parsed = client.chat.completions.parse(model="g", messages=USER, response_format=Weather, logprobs=True, top_logprobs=1)
    assert parsed.choices[0].message.parsed == Weather(city="Rome", days=2) and parsed.choices[0].logprobs.content[0].logprob == -0.5
    assert client.responses.parse(model="g", input="x", text_format=Weather).output_parsed.days == 2
    assert client.completions.create(model="g", prompt="a", logprobs=1).choices[0].logprobs.token_logprobs[0] == -0.5


def test_openai_responses(ask, openai):
    client, engine = ask(openai.OpenAI, THOUGHT + "yes" + CALL, THOUGHT + "yes" + CALL, "it rains")
    arguments = {"model": "g", "tools": [{"type": "function", **TOOL["function"]}], "reasoning": {"effort": "low"}}
    whole = client.responses.create(input="weather?", **arguments)
    assert whole.output_text == "yes" and [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    with client.responses.stream(input="weather?", **arguments) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == "yes" and json.loads(final.output[2].arguments) == {"city": "Rome", "days": 3} and final.usage.output_tokens
    items = [{"role": "user", "content": "weather?"}, *[item.model_dump(exclude_none=True) for item in whole.output],
             {"type": "function_call_output", "call_id": whole.output[2].call_id, "output": "rain"}]
    for item in items:
        item.pop("parsed_arguments", None)
    assert client.responses.create(input=items, **arguments).output_text == "it rains" and "rain" in engine.prompt


def test_openai_errors(ask, openai):
    client, _ = ask(openai.OpenAI, n_ctx=3)
    with pytest.raises(openai.BadRequestError, match="context holds 3") as caught:
        client.chat.completions.create(model="g", messages=USER)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        client.embeddings.create(model="g", input="a")


# ---- Anthropic's client

def test_anthropic_messages_and_tools(ask, anthropic):
    client, engine = ask(anthropic.Anthropic, THOUGHT + "look" + CALL, "it rains", THOUGHT + "look" + CALL)
    arguments = {"model": "claude", "max_tokens": 2000, "tools": [{"name": "weather", "description": "d", "input_schema": SCHEMA}],
                 "thinking": {"type": "enabled", "budget_tokens": 1024}}
    first = client.messages.create(messages=USER, **arguments)
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"] and first.stop_reason == "tool_use"
    assert first.content[2].input == {"city": "Rome", "days": 3} and first.usage.input_tokens
    messages = [*USER, {"role": "assistant", "content": first.content},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": first.content[2].id, "content": "rain"}]}]
    assert client.messages.create(messages=messages, **arguments).content[0].text == "it rains" and "rain" in engine.prompt
    with client.messages.stream(messages=USER, **arguments) as stream:
        text, final = "".join(stream.text_stream), stream.get_final_message()
    assert text == "look" and [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[0].thinking == "so it is" and final.content[2].input["days"] == 3 and final.usage.output_tokens > 3
    del arguments["max_tokens"]
    n = client.messages.count_tokens(messages=messages, **arguments).input_tokens
    assert n > client.messages.count_tokens(model="claude", messages=USER).input_tokens
    with pytest.raises(anthropic.BadRequestError, match="only pictures in the request itself"):
        client.messages.create(model="c", max_tokens=5, messages=[{"role": "user", "content": [
            {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}]}])
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.count_tokens(model="claude", messages=USER)
    assert client.models.list().data[0].id == "gemma-4"


def test_anthropic_is_pinged_before_the_prompt_is_read(anthropic):
    engine = FakeEngine("a b c", stall_after=1)
    with on_a_port(engine, ping_seconds=0.05) as (url, _):
        with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client, \
                client.messages.stream(model="c", max_tokens=9, messages=USER) as stream:
            for event in stream:
                if event.type == "text":
                    break
        with httpx.stream("POST", url + "/v1/messages", json={"messages": USER, "max_tokens": 9, "stream": True}) as response:
            lines = response.iter_lines()
            assert any(line == "event: ping" for line in lines) and next(lines) == 'data: {"type": "ping"}'


# ---- LangChain's

def test_langchain_streams_calls_tools_and_parses():
    """A tool loop as its agents run it: the tool's result goes back, and the answer ends."""
    import pydantic
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def weather(city: str, days: int) -> str:
        """d"""
        return f"rain in {city} for {days} days"

    class Weather(pydantic.BaseModel):
        city: str
        days: int

    engine = FakeEngine("look" + CALL, "it rains", "a b c", '{"city": "Rome", "days": 2}')
    with on_a_port(engine) as (url, _):
        model = ChatOpenAI(base_url=url + "/v1", api_key="none", model="gemma", max_retries=0)
        messages, bound = [("human", "weather?")], model.bind_tools([weather])
        first = bound.invoke(messages)
        assert first.content == "look" and first.usage_metadata["output_tokens"] > 9
        assert first.response_metadata["finish_reason"] == "tool_calls"
        messages += [first, *(weather.invoke(call) for call in first.tool_calls)]
        assert bound.invoke(messages).content == "it rains"
        assert 'response:weather{value:<|"|>rain in Rome for 3 days<|"|>}<tool_response|>' in engine.prompt
        pieces = list(model.stream("x", stream_usage=True))
        assert "".join(piece.content for piece in pieces) == "a b c" and len(pieces) > 3
        n_tokens = sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata)
        assert n_tokens == len(engine.tokenizer.encode("a b c", bos=False))
        assert model.with_structured_output(Weather).invoke("x") == Weather(city="Rome", days=2)
