"""Anthropic's messages and tools in OpenAI's form, which templates take."""

from __future__ import annotations

from collections.abc import Mapping

from refimpl.serve.api.contents import joined, objects, part_of, result_of, string, text_of, text_of_part
from refimpl.serve.asking import MAX_TOOLS, chosen_tool
from refimpl.serve.errors import bad

BILLING = "x-anthropic-billing-header"
"""Claude Code begins its system prompt with a block like this, which changes with every request: nothing could be reused."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_of(system: object, messages: object) -> list[dict]:
    """The conversation. `cache_control` is of no use here, and left out. Raises ApiError."""
    chat = []
    if isinstance(system, list):
        system = [block for block in objects(system, "system") if not str(block.get("text", "")).startswith(BILLING)]
    if text := text_of(system, "system"):
        chat.append({"role": "system", "content": text})
    for i, message in enumerate(objects(messages, "messages")):
        place, role = f"messages.{i}", message.get("role")
        if role not in ("user", "assistant", "system"):
            raise bad(f"{place}.role", f"{place}.role must be user or assistant, not {role!r:.60}")
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else objects(content, f"{place}.content")
        chat += _assistant(blocks, place) if role == "assistant" else _user(blocks, role, place)
    if not messages:
        raise bad("messages", "messages must hold at least one message")
    return chat


def tools_of(tools: list | None) -> list[dict]:
    """Tools. Raises ApiError."""
    if len(tools or []) > MAX_TOOLS:
        raise bad("tools", f"tools: at most {MAX_TOOLS} are accepted, not {len(tools)}")
    found = []
    for i, tool in enumerate(objects(tools or [], "tools")):
        if tool.get("type") not in (None, "custom"):
            raise bad(f"tools.{i}", f"tools.{i}: {tool['type']!r:.60} is run by Anthropic; only tools of your own can be used here")
        schema = tool.get("input_schema")
        if not isinstance(schema, Mapping):
            raise bad(f"tools.{i}.input_schema", f"tools.{i}.input_schema must be a JSON schema, not {schema!r:.60}")
        description = {} if tool.get("description") is None else {"description": string(tool["description"], f"tools.{i}.description")}
        found.append({"type": "function", "function": {"name": string(tool.get("name"), f"tools.{i}.name"), **description,
                                                       "parameters": schema}})
    return found


def choice_of(choice: Mapping | None, tools: list[dict]) -> tuple[str, bool]:
    """(choice, are parallel calls allowed) as `constraint_of` takes them. Raises ApiError."""
    choice = choice or {"type": "auto"}
    parallel = not choice.get("disable_parallel_tool_use")
    if choice.get("type") == "tool":
        return chosen_tool({"type": "function", "name": choice.get("name")}, tools), parallel
    if choice.get("type") not in CHOICES:
        raise bad("tool_choice", f"tool_choice.type must be auto, any, tool or none, not {choice.get('type')!r:.60}")
    return chosen_tool(CHOICES[choice["type"]], tools), parallel


def _assistant(blocks: list[Mapping], place: str) -> list[dict]:
    texts, thoughts, calls = [], [], []
    for j, block in enumerate(blocks):
        at, kind = f"{place}.content.{j}", block.get("type")
        if kind == "tool_use":
            if not isinstance(block.get("input"), Mapping):
                raise bad(f"{at}.input", f"{at}.input must be an object")
            calls.append({"id": string(block.get("id"), f"{at}.id"), "type": "function",
                          "function": {"name": string(block.get("name"), f"{at}.name"), "arguments": block["input"]}})
        elif kind == "thinking":
            thoughts.append(string(block.get("thinking"), f"{at}.thinking"))
        elif kind != "redacted_thinking":
            texts.append(text_of_part(block, at))
    thought = {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    return [{"role": "assistant", "content": "\n".join(texts), **thought, **({"tool_calls": calls} if calls else {})}]


def _user(blocks: list[Mapping], role: str, place: str) -> list[dict]:
    chat, parts = [], []
    for j, block in enumerate(blocks):
        at = f"{place}.content.{j}"
        if block.get("type") == "tool_result":
            text, *shown = [result] if isinstance(result := result_of(block.get("content"), f"{at}.content"), str) else result
            text = f"Error: {text}" if block.get("is_error") else text
            chat.append({"role": "tool", "tool_call_id": string(block.get("tool_use_id"), f"{at}.tool_use_id"),
                         "content": [text, *shown] if shown else text})
        else:
            parts.append(part_of(block, at) if role == "user" else text_of_part(block, at))
    return [*chat, {"role": role, "content": joined(parts)}] if parts or not chat else chat
