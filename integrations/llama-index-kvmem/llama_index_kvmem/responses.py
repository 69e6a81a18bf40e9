"""Answers as LlamaIndex's responses, whole and while they are written."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
)

from kvmem import Answer, TextPart, ThoughtPart
from kvmem.parsing.parts import Part
from llama_index_kvmem.convert import to_raw


class Growing:
    """An answer that grows. Responses have all of it so far, and `delta` what is new of its text."""

    def __init__(self) -> None:
        self._text = ""
        self._thoughts = ""
        self._calls: dict[int, dict[str, Any]] = {}

    def add(self, part: Part) -> ChatResponse:
        """The response with one more part."""
        delta, more = "", {}
        if isinstance(part, TextPart):
            delta = part.text
            self._text += delta
        elif isinstance(part, ThoughtPart):
            self._thoughts += part.text
            more = {"thinking_delta": part.text}
        else:
            fresh = {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
            self._calls.setdefault(part.index, fresh)["function"]["arguments"] += part.arguments
        calls = [{**call, "function": dict(call["function"])} for call in self._calls.values()]
        return ChatResponse(message=_message(self._text, self._thoughts, calls), delta=delta, additional_kwargs=more)


def to_last(answer: Answer) -> ChatResponse:
    """The end of a stream: nothing new, but all of it."""
    response = to_response(answer)
    response.delta = ""
    return response


def to_response(answer: Answer) -> ChatResponse:
    """An answer as a response. Calls that are not valid stand in its text, as the model wrote them."""
    text = "\n".join([*([answer.text] if answer.text else []), *(call.text for call in answer.invalid_calls)])
    calls = [call.as_openai() for call in answer.tool_calls]
    return ChatResponse(message=_message(text, answer.reasoning, calls), raw=to_raw(answer))


def _message(text: str, thoughts: str, calls: list[dict[str, Any]]) -> ChatMessage:
    blocks: list[ContentBlock] = [ThinkingBlock(content=thoughts)] if thoughts else []
    more = {"tool_calls": calls} if calls else {}
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=[*blocks, TextBlock(text=text)], additional_kwargs=more)


def to_completion(response: ChatResponse) -> CompletionResponse:
    return CompletionResponse(text=response.message.content or "", raw=response.raw, delta=response.delta)
