"""The Responses API's input items and tools in the chat's form, which templates take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from refimpl.serve.api.chat import ROLES
from refimpl.serve.api.contents import content_of, objects, result_of, string, text_of
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
                    "function": {"name": _full(string(item.get("namespace") or "", f"{place}.namespace"),
                                               string(item.get("name"), f"{place}.name")),
                                 "arguments": string(item.get("arguments"), f"{place}.arguments")}}
            if chat and chat[-1]["role"] == "assistant" and not thought:         # what was one message is one again
                chat[-1].setdefault("tool_calls", []).append(call)
                continue
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
        elif kind == "function_call_output":
            message = {"role": "tool", "tool_call_id": string(item.get("call_id"), f"{place}.call_id"),
                       "content": result_of(item.get("output"), f"{place}.output")}
        else:
            raise bad(f"{place}.type", f"{place}: an item of type {kind!r:.60} cannot be read here")
        if thought and message["role"] == "assistant":
            message["reasoning_content"] = thought
        thought = ""
        chat.append(message)
    if not chat:
        raise bad("input", "input must hold at least one item")
    return chat


@dataclass
class Tools:
    """The tools of a request.

    chat        in the chat's form; the name of one in a namespace is "namespace.name"
    namespaces  such names -> their namespaces
    notes       on those that are left out
    """

    chat: list[dict] = field(default_factory=list)
    namespaces: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def tools_of(tools: list | None) -> Tools:
    """Tools of type function, also those in namespaces. Others are left out with a note, as agents offer them beside their own; where
    there is nothing else, they are refused. Raises ApiError.
    """
    found = Tools()
    for i, tool in enumerate(objects(tools or [], "tools")):
        place = f"tools.{i}"
        if tool.get("type") == "namespace":
            namespace = string(tool.get("name"), f"{place}.name")
            inner = [(each, f"{place}.tools.{j}") for j, each in enumerate(objects(tool.get("tools"), f"{place}.tools"))]
        else:
            namespace, inner = "", [(tool, place)]
        for each, at in inner:
            if each.get("type") != "function":
                found.notes.append(f"{at} is left out: only tools of type function can be used here, not {each.get('type')!r:.60}")
                continue
            made = _tool(each, at, namespace)
            found.chat.append(made)
            if namespace:
                found.namespaces[made["function"]["name"]] = namespace
    if found.notes and not found.chat:
        raise bad("tools", found.notes[0].replace(" is left out", "", 1))
    return found


def _tool(tool: Mapping, place: str, namespace: str) -> dict:
    parameters = tool.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise bad(f"{place}.parameters", f"{place}.parameters must be a JSON schema, not {parameters!r:.60}")
    description = {} if tool.get("description") is None else {"description": string(tool["description"], f"{place}.description")}
    name = _full(namespace, string(tool.get("name"), f"{place}.name"))
    return {"type": "function", "function": {"name": name, **description, "parameters": parameters or {"type": "object", "properties": {}}}}


def _full(namespace: str, name: str) -> str:
    return f"{namespace}.{name}" if namespace else name
