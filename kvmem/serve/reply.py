"""Converts answers to OpenAI's response format."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from uuid import uuid4

from kvmem.parsing.parts import Part, TextPart, ThoughtPart
from kvmem.prompt.layout import REASONING
from kvmem.results import Answer
from kvmem.text.document import Document

Kind = Literal["chat.completion", "text_completion"]


@dataclass(frozen=True)
class Reply:
    """Builds the responses to one request, which share an id, a time and a model."""

    kind: Kind
    model: str
    fingerprint: str
    number: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The complete answer, not streamed."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason(answer)}
        if self.kind == "chat.completion":
            text = "\n".join([*([answer.text] if answer.text else []), *(call.text for call in answer.invalid_calls)])
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            if answer.reasoning:
                choice["message"][REASONING] = answer.reasoning
            if answer.tool_calls:
                choice["message"] |= {"content": text or None, "tool_calls": tool_calls(answer)}
        else:
            choice["text"] = answer.text
        return {**self._head(self.kind), "choices": [choice], "usage": usage(answer), "kvmem": account(answer)}

    def role(self) -> dict[str, Any]:
        """The first event of a chat stream."""
        return self._event({"role": "assistant", "content": ""})

    def part(self, part: Part) -> dict[str, Any]:
        """The event of one part of the answer."""
        if isinstance(part, TextPart):
            return self._event({"content": part.text})
        if isinstance(part, ThoughtPart):
            return self._event({REASONING: part.text})
        function: dict[str, Any] = {"arguments": part.arguments}
        call: dict[str, Any] = {"index": part.index, "function": function}
        if part.name is not None:
            call |= {"id": part.id, "type": "function", "function": {"name": part.name, **function}}
        return self._event({"tool_calls": [call]})

    def end(self, answer: Answer) -> dict[str, Any]:
        return {**self._event({}, finish_reason(answer)), "kvmem": account(answer)}

    def usage(self, answer: Answer) -> dict[str, Any]:
        """The last event, sent if the client asked for usage."""
        return {**self._head(self._object), "choices": [], "usage": usage(answer)}

    @property
    def _object(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat.completion" else "text_completion"

    def _head(self, what: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.kind == 'chat.completion' else 'cmpl'}-{self.number}",
            "object": what,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _event(self, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if self.kind == "chat.completion":
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        return {**self._head(self._object), "choices": [choice]}


def event(data: Mapping[str, Any] | str) -> str:
    """Format one server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


def finish_reason(answer: Answer) -> str:
    if answer.tool_calls:
        return "tool_calls"
    return "length" if answer.finish_reason == "length" else "stop"


def tool_calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for call in answer.tool_calls
    ]


def usage(answer: Answer) -> dict[str, Any]:
    """Token counts. `cached_tokens` are the exact and reused tokens."""
    used = answer.usage
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.generated,
        "total_tokens": used.prompt + used.generated,
        "prompt_tokens_details": {"cached_tokens": used.exact + used.reused},
    }


def account(answer: Answer) -> dict[str, Any]:
    """The fields that OpenAI's format lacks: tokens by class, the plan, the sources and the timings in seconds."""
    return {
        "usage": asdict(answer.usage),
        "plan": {"mode": answer.plan.mode, "reason": answer.plan.reason, "dropped": answer.plan.dropped},
        "sources": [
            {"document": source.document_id, "chunk": source.index, "score": source.score} for source in answer.sources
        ],
        "seconds": asdict(answer.timings),
    }


def describe(document: Document, text: bool = False) -> dict[str, Any]:
    """A document as JSON."""
    found = {
        "object": "document",
        "id": document.id,
        "characters": len(document.text),
        "chunks": len(document.chunks),
        "metadata": dict(document.metadata),
    }
    return {**found, "text": document.text} if text else found
