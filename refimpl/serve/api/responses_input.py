"""The Responses API's input items and tools in the chat's form, which templates take."""

from __future__ import annotations

from collections.abc import Mapping

from refimpl.serve.api.chat import ROLES
from refimpl.serve.api.contents import content_of, objects, string, text_of
from refimpl.serve.errors import bad


def chat_of(instructions: str | None, items: str | list) -> list[dict]:
    """The conversation. Raises ApiError."""
    chat: list[dict] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(items, str):
        return [*chat, {"role": "user", "content": items}]
    thought = ""
    for i, item in enumerate(objects(items, "input")):
        place, kind = f"input.{i}", item.get("type") or "message"
        if kind == "reasoning":
            thought = text_of(item.get("content") or item.get("summary"), f"{place}.content")
            continue
        if kind == "message":
            if item.get("role") not in ROLES[:-1]:
                raise bad(f"{place}.role", f"{place}.role must be one of {', '.join(ROLES[:-1])}, not {item.get('role')!r:.60}")
            content = content_of if item["role"] == "user" else text_of
            message = {"role": item["role"], "content": content(item.get("content"), f"{place}.content")}
        elif kind == "function_call":
            call = {"id": string(item.get("call_id"), f"{place}.call_id"), "type": "function",
                    "function": {"name": string(item.get("name"), f"{place}.name"),
                                 "arguments": string(item.get("arguments"), f"{place}.arguments")}}
            if chat and chat[-1]["role"] == "assistant" and not thought:         # what was one message is one again
                chat[-1].setdefault("tool_calls", []).append(call)
                continue
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
        elif kind == "function_call_output":
            message = {"role": "tool", "tool_call_id": string(item.get("call_id"), f"{place}.call_id"),
                       "content": text_of(item.get("output"), f"{place}.output")}
        else:
            raise bad(f"{place}.type", f"{place}: an item of type {kind!r:.60} cannot be read here")
        if thought and message["role"] == "assistant":
            message["reasoning_content"] = thought
        thought = ""
        chat.append(message)
    if not chat:
        raise bad("input", "input must hold at least one item")
    return chat


def tools_of(tools: list | None) -> list[dict]:
    """Tools in the chat's form. Raises ApiError."""
    found = []
    for i, tool in enumerate(objects(tools or [], "tools")):
        if tool.get("type") != "function":
            raise bad(f"tools.{i}", f"tools.{i}: {tool.get('type')!r:.60} is run by OpenAI; only tools of type function can be used here")
        parameters = tool.get("parameters")
        if not isinstance(parameters, Mapping | None):
            raise bad(f"tools.{i}.parameters", f"tools.{i}.parameters must be a JSON schema, not {parameters!r:.60}")
        description = {} if tool.get("description") is None else {"description": string(tool["description"], f"tools.{i}.description")}
        found.append({"type": "function", "function": {"name": string(tool.get("name"), f"tools.{i}.name"), **description,
                                                       "parameters": parameters or {"type": "object", "properties": {}}}})
    return found
