"""What comes back from a question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvmem.cache import BlendedCache
from kvmem.document import Metadata
from kvmem.plan import Plan
from kvmem.tools import ToolCall

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Usage:
    """Tokens by what was done for them. The first four are disjoint and add up to `prompt`.

    exact: reused, bit for bit what the model computed for these very tokens in this very context.
    reused: taken from another context, moved here, not recomputed.
    recomputed: taken from another context, then computed again in this one.
    computed: read now because it was not in the store, or the question itself.
    generated: tokens of the answer.
    token_layers: the model's work before generation, in tokens x layers. It holds what the four classes do not
        show: that the question is read once more, through some of the layers, to find what it attends to.

    Of a model on a vLLM server: exact is what was in its prefix cache, computed the rest, and token_layers 0, since it
    tells none.
    """

    exact: int
    reused: int
    recomputed: int
    computed: int
    generated: int
    token_layers: int

    @property
    def prompt(self) -> int:
        return self.exact + self.reused + self.recomputed + self.computed


@dataclass(frozen=True)
class Timings:
    """Seconds. All begin at the call.

    prepare: until the plan stands. stitch: finding caches, and reading chunks that have none. repair: choosing and
    recomputing tokens and reading the question, up to the first token; caches are loaded beside it.
    first_token: from the call until the first token of the answer, the sum of the three.
    total: until the answer is complete and everything new is stored.
    """

    prepare: float
    stitch: float
    repair: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Source:
    """A chunk that was in the prompt. index: its place in the document, from 0. score: the retriever's, None when
    everything fitted."""

    document_id: str
    index: int
    text: str
    metadata: Metadata
    score: float | None = None


@dataclass(frozen=True)
class Answer:
    """text: the answer, as it was streamed. sources: the chunks in the prompt, in order. plan: how they were chosen.

    tool_calls: calls the model made instead of, or beside, answering.
    finish_reason: "stop" at the model's own end or a stop string, "length" at max_tokens, "cancelled" when the stream
        was closed early.
    """

    text: str
    sources: tuple[Source, ...]
    usage: Usage
    plan: Plan
    timings: Timings
    finish_reason: FinishReason
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The answer as the assistant's message of a conversation."""
        calls = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
            for c in self.tool_calls
        ]
        return {"role": "assistant", "content": self.text, **({"tool_calls": calls} if calls else {})}


@dataclass(frozen=True, eq=False)
class Prefill:
    """The state of the model after reading a prompt, ready to be continued or compared.

    token_ids: int64 [n], the prompt. cache: holds all n positions; it is yours, `model(...)` may append to it.
    logits: float32 [vocab], the next-token logits after the last token.
    """

    token_ids: Tensor
    cache: BlendedCache
    logits: Tensor
    usage: Usage
    plan: Plan
    timings: Timings

    def __post_init__(self) -> None:
        if self.cache.length != self.token_ids.numel() or self.logits.dtype != torch.float32:
            raise AssertionError("a prefill holds every position of its prompt")
