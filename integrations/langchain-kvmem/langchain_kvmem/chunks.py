"""Answers as LangChain's messages, whole and in chunks."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from kvmem import Answer, CallPart, InvalidCall, TextPart, ThoughtPart
from kvmem.parsing.json_text import JsonScanner
from kvmem.parsing.parts import Part
from kvmem.prompt.layout import REASONING
from langchain_kvmem.convert import to_metadata, to_usage


def to_ai_message(answer: Answer, model: str) -> AIMessage:
    """An answer as a message. Thoughts are in `additional_kwargs["reasoning_content"]`."""
    invalid = [invalid_tool_call(name=c.name, args=c.text, id=c.id, error=c.error) for c in answer.invalid_calls]
    return AIMessage(
        content=answer.text,
        additional_kwargs={REASONING: answer.reasoning} if answer.reasoning else {},
        tool_calls=[tool_call(name=c.name, args=dict(c.arguments), id=c.id) for c in answer.tool_calls],
        invalid_tool_calls=invalid,
        usage_metadata=to_usage(answer.usage),
        response_metadata=to_metadata(answer, model),
    )


class Chunks:
    """Makes the chunks of one answer."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._arguments: dict[str, tuple[int, str]] = {}

    def of(self, part: Part) -> ChatGenerationChunk:
        """A part of the answer as a chunk."""
        if isinstance(part, TextPart):
            return ChatGenerationChunk(message=AIMessageChunk(content=part.text))
        if isinstance(part, ThoughtPart):
            thought: dict[str, Any] = {REASONING: part.text}
            return ChatGenerationChunk(message=AIMessageChunk(content="", additional_kwargs=thought))
        return _call_chunk(self._note(part))

    def _note(self, part: CallPart) -> CallPart:
        _, before = self._arguments.get(part.id, (part.index, ""))
        self._arguments[part.id] = (part.index, before + part.arguments)
        return part

    def last(self, answer: Answer) -> ChatGenerationChunk:
        """Usage and metadata, and what shows that the calls that were cut off are not valid."""
        message = AIMessageChunk(
            content="",
            tool_call_chunks=[self._invalid(call, number) for number, call in enumerate(answer.invalid_calls)],
            usage_metadata=to_usage(answer.usage),
            response_metadata=to_metadata(answer, self._model),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

    def _invalid(self, call: InvalidCall, number: int) -> ToolCallChunk:
        """The end of a call that was passed on, or all of one that was not; LangChain finds that it is not valid."""
        if call.id in self._arguments:
            index, arguments = self._arguments[call.id]
            return tool_call_chunk(name=None, args=_spoiling(arguments), id=None, index=index)
        index = len(self._arguments) + number
        return tool_call_chunk(name=call.name or "", args=call.text + _spoiling(call.text), id=call.id, index=index)


def _call_chunk(part: CallPart) -> ChatGenerationChunk:
    identity = part.id if part.name is not None else None
    call = tool_call_chunk(name=part.name, args=part.arguments, id=identity, index=part.index)
    return ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[call]))


def _spoiling(arguments: str) -> str:
    """What makes arguments invalid that were cut off: LangChain would complete their JSON, and run the tool with it."""
    scanner = JsonScanner()
    scanner.feed(arguments)
    return scanner.closing
