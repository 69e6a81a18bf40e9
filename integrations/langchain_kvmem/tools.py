"""Tool calls: how tools are told to a model, and how its calls are read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from langchain_core.messages import ToolCall

from kvmem import InputError

Tool = Mapping[str, Any]
# What a model whose template knows no tools calls when it has an answer.
ANSWER: Tool = {
    "type": "function",
    "function": {
        "name": "answer",
        "description": "Answer the user.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    },
}
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def schema_of(tools: Sequence[Tool], choice: str) -> dict[str, Any]:
    """The JSON schema of one call: of the tool named `choice`, or of any. Raises InputError."""
    functions = [tool["function"] for tool in tools]
    if choice not in ("any", "required"):
        functions = [function for function in functions if function["name"] == choice]
        if not functions:
            known = ", ".join(tool["function"]["name"] for tool in tools)
            raise InputError(f"tool_choice={choice!r} is not one of the tools. Known are: {known}.")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in functions
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def describe(tools: Sequence[Tool]) -> str:
    """Instructions for a model whose template does not know tools: each of its answers is one call."""
    functions = "\n".join(json.dumps(tool["function"]) for tool in tools)
    return (
        "You work by calling one of these functions:\n"
        f"{functions}\n"
        'Write nothing but JSON: {"name": "<function>", "arguments": {...}}'
    )


def parse(text: str, tools: Sequence[Tool]) -> tuple[str, list[ToolCall]]:
    """The text of an answer and the calls in it: bare JSON, or in `<tool_call>` tags."""
    names = {tool["function"]["name"] for tool in (*tools, ANSWER)}
    bare = _read(text.strip(), names)
    if bare is not None and bare["name"] == ANSWER["function"]["name"]:
        return str(bare["args"].get("text", "")), []
    if bare is not None:
        return "", [bare]
    calls = [call for found in _CALL.findall(text) if (call := _read(found, names)) is not None]
    return (_CALL.sub("", text).strip(), calls) if calls else (text, [])


def _read(text: str, names: set[str]) -> ToolCall | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return ToolCall(name=value["name"], args=arguments, id=f"call_{uuid4().hex[:24]}", type="tool_call")
