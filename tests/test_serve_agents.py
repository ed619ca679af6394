"""What coding agents need of the APIs, and three of them at work on a file (exhaustive: npm installs them, 0.2 to 0.4 GB each).

    npm install -g @mariozechner/pi-coding-agent @openai/codex opencode-ai
"""

import json
import os
import shutil
import subprocess

import pytest
from serving import SCHEMA, TOOL, USER, FakeEngine, chunks, on_a_port, post

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
Q = '<|"|>'
THOUGHT = "<|channel>thought\nI look first.<channel|>"


def call(name, **arguments):
    """A tool call as the model writes it. Arguments: strings, or text in its notation in a list."""
    return f"<|tool_call>call:{name}{{{','.join(f'{key}:{_value(value)}' for key, value in arguments.items())}}}<tool_call|>"


def _value(value):
    return value[0] if isinstance(value, list) else Q + value + Q


# ---- what they need

SAID = {CHAT: [{"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"}],
        RESPONSES: [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
                    {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
                    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'},
                    {"type": "function_call_output", "call_id": "c1", "output": "rain"}],
        MESSAGES: [{"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rome"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "rain"}]}]}


@pytest.mark.parametrize("path", SAID)
def test_text_beside_a_call_stays_before_it_and_the_model_is_asked_in_its_turn(path):
    engine, field = FakeEngine(), "input" if path == RESPONSES else "messages"
    assert post(engine, path, {field: [*USER, *SAID[path]], "max_tokens": 9}).status_code == 200
    assert engine.prompt.index("I look.") < engine.prompt.index("<|tool_call>") < engine.prompt.index("rain")
    assert engine.prompt.endswith(f"<|tool_response>response:weather{{value:{Q}rain{Q}}}<tool_response|>")


def test_a_picture_beside_a_call_is_refused_and_no_error_of_the_server():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    response = post(FakeEngine(), CHAT, {"messages": [{**SAID[CHAT][0], "role": "user", "content": [image]}]})
    assert response.status_code == 400, response.text


def test_a_developer_is_the_system():
    engine = FakeEngine()
    post(engine, CHAT, {"messages": [{"role": "developer", "content": "a"}, *USER, {"role": "developer", "content": "b"}]})
    assert "<|turn>system\na<turn|>" in engine.prompt and "<|turn>system\nb<turn|>" in engine.prompt and "developer" not in engine.prompt


def test_thoughts_are_signed():
    """A client that gets a thought without a signature sends it back as text."""
    body = {"messages": USER, "max_tokens": 99, "thinking": {"type": "adaptive"}}
    thought = post(FakeEngine(THOUGHT + "a"), MESSAGES, body).json()["content"][0]
    assert thought["type"] == "thinking" and thought["signature"]
    events = chunks(post(FakeEngine(THOUGHT + "a"), MESSAGES, body | {"stream": True}))
    at = next(i for i, event in enumerate(events) if event["type"] == "content_block_stop")
    assert events[at - 1]["delta"] == {"type": "signature_delta", "signature": thought["signature"]}
    assert sum(event.get("delta", {}).get("type") == "signature_delta" for event in events) == 1


TOOLS = [{"type": "web_search"}, {"type": "function", **TOOL["function"]},
         {"type": "namespace", "name": "sky", "description": "d", "tools": [
             {"type": "function", "name": "weather", "parameters": SCHEMA}, {"type": "custom", "name": "paint"}]}]


def test_tools_in_namespaces_are_called_there_and_others_are_left_out_with_a_note():
    """As Codex sends them: those of MCP servers are in namespaces, and a search that OpenAI would run is always among them."""
    script = call("sky.weather", city="Rome", days=["3"]) + call("weather", city="Bern", days=["1"])
    engine = FakeEngine(script)
    response = post(engine, RESPONSES, {"input": "x", "tools": TOOLS})
    calls = response.json()["output"]
    assert [(each.get("namespace"), each["name"], json.loads(each["arguments"])["city"]) for each in calls] == [
        ("sky", "weather", "Rome"), (None, "weather", "Bern")]
    assert "tools.0 is left out" in response.headers["x-refimpl-notes"] and "tools.2.tools.1" in response.headers["x-refimpl-notes"]
    assert "declaration:sky.weather{" in engine.prompt and "web_search" not in engine.prompt and "paint" not in engine.prompt
    events = chunks(post(FakeEngine(script), RESPONSES, {"input": "x", "tools": TOOLS, "stream": True}))
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [(each.get("namespace"), each["name"]) for each in added] == [("sky", "weather"), (None, "weather")]
    result = {"type": "function_call_output", "call_id": calls[0]["call_id"], "output": "rain"}
    post(engine, RESPONSES, {"input": [*USER, calls[0], result], "tools": TOOLS})
    assert engine.prompt.endswith(f"<|tool_response>response:sky.weather{{value:{Q}rain{Q}}}<tool_response|>")


# ---- agents at work: the model reads a file, corrects it, and ends

def pi(api):
    def start(url, folder):
        base = url if api == "anthropic-messages" else f"{url}/v1"
        provider = {"baseUrl": base, "api": api, "apiKey": "none", "models": [{"id": "gemma-4", "reasoning": True}]}
        (folder / "home" / "models.json").write_text(json.dumps({"providers": {"refimpl": provider}}))
        return (["--provider", "refimpl", "--model", "gemma-4", "--thinking", "low", "--no-session", "-p"],
                {"PI_CODING_AGENT_DIR": str(folder / "home"), "PI_OFFLINE": "1", "PI_TELEMETRY": "0"})
    return start


def codex(url, folder):
    (folder / "home" / "config.toml").write_text(f"""
        model = "gemma-4"
        model_provider = "refimpl"
        model_reasoning_effort = "low"
        check_for_update_on_startup = false
        analytics.enabled = false
        model_providers.refimpl = {{ name = "refimpl", base_url = "{url}/v1", wire_api = "responses" }}
    """)
    return ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"], {"CODEX_HOME": str(folder / "home")}


def opencode(url, folder):
    provider = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{url}/v1", "apiKey": "none"},
                "models": {"gemma-4": {"tool_call": True, "limit": {"context": 32768, "output": 4096}}}}
    settings = {"provider": {"refimpl": provider}, "autoupdate": False, "share": "disabled"}
    (folder / "work" / "opencode.json").write_text(json.dumps(settings))
    return (["run", "--model", "refimpl/gemma-4"],
            {f"OPENCODE_DISABLE_{what}": "1" for what in ("MODELS_FETCH", "LSP_DOWNLOAD", "DEFAULT_PLUGINS")})


def of_pi(file):
    edits = [f"[{{oldText:{_value('helo')},newText:{_value('hello')}}}]"]
    return THOUGHT + call("read", path="greet.py"), call("edit", path="greet.py", edits=edits)


def of_codex(file):
    return THOUGHT + call("exec_command", cmd="cat greet.py"), call("exec_command", cmd="sed -i s/helo/hello/ greet.py")


def of_opencode(file):
    return call("read", filePath=str(file)), call("edit", filePath=str(file), oldString="helo", newString="hello")


@pytest.mark.exhaustive
@pytest.mark.parametrize("command, start, calls", [
    *[pytest.param("pi", pi(api), of_pi, id=f"pi-{api}") for api in ("openai-completions", "openai-responses", "anthropic-messages")],
    pytest.param("codex", codex, of_codex, id="codex"), pytest.param("opencode", opencode, of_opencode, id="opencode")])
def test_an_agent_edits_a_file(tmp_path, command, start, calls):
    program = shutil.which(command)
    if program is None:
        pytest.skip(f"the agent {command} is not installed: npm install -g, see the top of this file")
    for name in ("work", "home"):
        (tmp_path / name).mkdir()
    file = tmp_path / "work" / "greet.py"
    file.write_text('import sys\nprint("helo")\n')
    read, edit = calls(file)
    title = ["Spelling"] if command == "opencode" else []               # which it asks for first
    engine = FakeEngine(*title, read, "Now I correct it." + edit, "Done.", n_ctx=1 << 20)
    with on_a_port(engine) as (url, _):
        arguments, environment = start(url, tmp_path)
        environment |= {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")}
        done = subprocess.run([program, *arguments, "Correct the spelling in greet.py"], cwd=file.parent, env=environment,
                              capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert file.read_text() == 'import sys\nprint("hello")\n' and "Done." in done.stdout
    assert len(engine.requests) == len(title) + 3
    head, _, conversation = engine.prompt.partition("<|turn>model\n")
    tools = [part.partition("{")[0].partition(":")[2] for part in (read, edit) for part in part.split("<|tool_call>")[1:]]
    assert all(f"<|tool>declaration:{tool}{{" in head for tool in tools)
    results = conversation.split("<|tool_response>")[1:]
    assert [result.partition("{")[0] for result in results] == [f"response:{tool}" for tool in tools] and "helo" in results[0]
    assert conversation.endswith(f"{Q}}}<tool_response|>") and conversation.index("Now I correct it.") > conversation.index("helo")
    assert ("I look first." in conversation.partition("<|tool_call>")[0]) == ("I look first." in read)
