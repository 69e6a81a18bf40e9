"""The public API as a caller's type checker sees it; checked by mypy --strict, never run."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch

from kvmem import Answer, AnswerStream, Document, KVMem, LanguageModel, Plan, Prefill, Source, Stats, ToolCall, Usage


def as_a_caller() -> None:
    mem = KVMem("smollm2", Path("kv"), threads=1, blend={"selector": "query", "recompute": 0.1})
    assert_type(mem.add("text", id="a", metadata={"n": 1}), Document)
    answer = mem.ask("question", max_tokens=3, stop=["\n"])
    assert_type(answer, Answer)
    assert_type(answer.text, str)
    assert_type(answer.usage, Usage)
    assert_type(answer.usage.prompt, int)
    assert_type(answer.plan, Plan)
    assert_type(answer.timings.first_token, float)
    stream = mem.stream("question", context=["a", "b"])
    assert_type(stream, AnswerStream)
    for piece in stream:
        assert_type(piece, str)
    reply = mem.chat([{"role": "user", "content": "Hi"}], context=["a"], tools=[], max_tokens=3)
    assert_type(reply, Answer)
    assert_type(reply.tool_calls, tuple[ToolCall, ...])
    assert_type(mem.stream_chat([{"role": "user", "content": "Hi"}]), AnswerStream)
    assert_type(mem.retrieve("question", 3), tuple[Source, ...])
    prefill = mem.prefill("question", system="s", blend="all")
    assert_type(prefill, Prefill)
    assert_type(prefill.token_ids, torch.Tensor)
    assert_type(mem.stats(), Stats)
    assert_type(mem.local_model, LanguageModel)
    with mem as opened:
        assert_type(opened, KVMem)


async def as_an_async_caller(mem: KVMem) -> None:
    stream = mem.stream("question")
    async for piece in stream:
        assert_type(piece, str)
    assert_type(await stream.wait(), Answer)
