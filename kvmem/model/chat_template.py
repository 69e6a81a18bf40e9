"""ChatTemplate: what a tokenizer's chat template can show, found by trying."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from kvmem.errors import ModelError, first_line
from kvmem.parsing import AnswerReader
from kvmem.parsing.marks import SPECIAL_THOUGHTS, THOUGHTS
from kvmem.parsing.tools import ToolIndex

_FUNCTION = {
    "name": "probe_tool",
    "description": "A tool.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_TOOL = {"type": "function", "function": _FUNCTION}
_ARGUMENTS = {"city": "Paris"}
_ASKED = "What is it like there?"
# A part of the rendered call -> the name of its format, the more specific ones first.
_FORMATS = {
    "<|channel|>": "channels (gpt-oss)",
    "[TOOL_CALLS]": "[TOOL_CALLS] (Mistral)",
    "<｜tool▁call▁begin｜>": "<｜tool▁call▁begin｜> (DeepSeek)",
    "<|tool_call_begin|>": "<|tool_call_begin|> (Kimi)",
    "<|tool_call>call:": "<|tool_call> (Gemma 4)",
    "<start_function_call>": "<start_function_call> (FunctionGemma)",
    "<|tool_call_start|>": "<|tool_call_start|> (LFM2, MiniCPM3)",
    "<tool_calls>": "<tool_calls> (Jamba)",
    "<|tool_call|>": "<|tool_call|> (Phi, Granite)",
    "<|START_ACTION|>": "<|START_ACTION|> (Command)",
    "<|python_tag|>": "<|python_tag|> (Llama)",
    "<arg_key>": "<arg_key> (GLM)",
    "<invoke name=": "<invoke> (MiniMax)",
    "<parameter=": "<parameter> (Qwen3-Coder)",
    "<function=": "<function> (Llama)",
    "<tool_call>": "<tool_call> with JSON (Hermes, Qwen)",
}


@dataclass(frozen=True)
class CallStyle:
    """How a template wants calls.

    Attributes:
        format: Name of the format.
        example: A call as the template shows it; empty if it only describes calls.
        as_text: Whether arguments are JSON text, not a mapping.
        named_ids: Whether the id of a call has to hold the name of the tool (Kimi).
    """

    format: str
    example: str = ""
    as_text: bool = False
    named_ids: bool = False


class ChatTemplate:
    """The chat template of a tokenizer, or plain text if it has none."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        self.source = tokenizer.chat_template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as a prompt, up to where the answer begins. Raises ModelError for what the template rejects."""
        if not self.source:
            lines = [message["content"] for message in messages]
            return (self._tokenizer.bos_token or "") + "\n\n".join(lines) + "\n\nAnswer:"
        try:
            return self._apply(messages, tools, add_generation_prompt=True, **(options or {}))
        except Exception as error:
            raise ModelError(
                f"The chat template of {self._name!r} rejects these messages: {first_line(error)}. "
                "Check their roles and order."
            ) from error

    def _apply(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, **options: Any) -> str:
        given = {"tools": [dict(tool) for tool in tools]} if tools else {}
        copies = [dict(message) for message in messages]
        return str(self._tokenizer.apply_chat_template(copies, tokenize=False, **given, **options))

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template tells the model what tools there are."""
        if not self.source:
            return False
        message = [{"role": "user", "content": _ASKED}]
        try:
            return self.render(message, [_TOOL]) != self.render(message)
        except ModelError:
            return False

    @property
    def thinks(self) -> bool:
        """Whether the template has a place for thoughts."""
        sources = self.source.values() if isinstance(self.source, dict) else [self.source or ""]
        return any(mark.strip() in source for source in sources for mark in (*THOUGHTS, *SPECIAL_THOUGHTS))

    @cached_property
    def calls(self) -> CallStyle | None:
        """How the template wants calls; None if it has no tools, or calls in a format that cannot be read."""
        if not self.shows_tools:
            return None
        for as_text, named in product((False, True), (False, True)):
            # Mistral's templates take ids of nine letters and digits only.
            shown = self._shown_call(as_text, "functions.probe_tool:0" if named else "probe0123")
            if shown is not None and _is_read(shown):
                return CallStyle(_format_of(shown), shown.strip(), as_text, named)
        described = self.render([{"role": "user", "content": _ASKED}], [_TOOL]).split(_ASKED)[0]
        return CallStyle(_format_of(described)) if "<tool_call>" in described else None

    def describe_calls(self) -> dict[str, str]:
        """How a model with this template makes calls: the format, and one call there and back."""
        if self.calls is None:
            shows = "shows calls in a format that cannot be read" if self.shows_tools else "does not show tools"
            return {"format": f"JSON that follows the tools' schemas, because the chat template {shows}"}
        if not self.calls.example:
            return {"format": self.calls.format, "shown": "only described by the chat template"}
        return {"format": self.calls.format, "shown": self.calls.example, "read": _read_back(self.calls.example)}

    def _shown_call(self, as_text: bool, identity: str) -> str | None:
        """What the template makes of a call, and of the markup around it."""
        arguments: Any = json.dumps(_ARGUMENTS) if as_text else dict(_ARGUMENTS)
        called = {"id": identity, "type": "function", "function": {"name": "probe_tool", "arguments": arguments}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": _ASKED},
            {"role": "assistant", "content": "", "tool_calls": [called]},
        ]
        result = {"role": "tool", "name": "probe_tool", "tool_call_id": identity, "content": "Sunny."}
        for shown in (messages, [*messages, result]):
            try:
                return self._apply(shown, [_TOOL]).split(_ASKED)[-1].split("Sunny.")[0]
            except Exception:  # noqa: S112 - templates raise whatever they like
                continue
        return None


def _format_of(text: str) -> str:
    return next((name for mark, name in _FORMATS.items() if mark in text), "JSON")


def _is_read(shown: str) -> bool:
    return _read_back(shown) == f"probe_tool({json.dumps(_ARGUMENTS)})"


def _read_back(shown: str) -> str:
    reader = AnswerReader(ToolIndex.of([_TOOL]), "<|start|>assistant" if "<|channel|>" in shown else "")
    reader.feed(shown)
    return ", ".join(f"{call.name}({json.dumps(call.arguments)})" for call in reader.finish().tool_calls)
