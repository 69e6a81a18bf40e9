"""Reads answers as they are generated: text, thoughts and tool calls, in the formats of all model families."""

from kvmem.parsing.parts import CallPart, InvalidCall, Part, TextPart, ThoughtPart, ToolCall
from kvmem.parsing.reader import AnswerReader, ReadAnswer

__all__ = ["AnswerReader", "CallPart", "InvalidCall", "Part", "ReadAnswer", "TextPart", "ThoughtPart", "ToolCall"]
