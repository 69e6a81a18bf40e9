"""The result types of `ask`, `chat` and `prefill`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvmem.kv.buffer import BlendedCache
from kvmem.parsing.parts import InvalidCall, ToolCall
from kvmem.prompt.layout import REASONING
from kvmem.prompt.plan import Plan
from kvmem.text.document import Metadata

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Usage:
    """Token counts of one prompt and its answer.

    `exact`, `reused`, `recomputed` and `computed` are disjoint and add up to `prompt`. With a vLLM server, `exact`
    counts hits in the server's prefix cache, `computed` counts the rest, and `token_layers` is 0 because the server
    does not report it.

    Attributes:
        exact: Prompt tokens whose KV was computed earlier for the same tokens in the same context, reused bit for bit.
        reused: Prompt tokens whose KV comes from another context and was moved to this position, not recomputed.
        recomputed: Prompt tokens whose KV came from another context and was recomputed in this one.
        computed: Prompt tokens that were not in the store, including the question.
        generated: Tokens of the answer.
        token_layers: Model work before generation, in tokens x layers. Includes the additional partial pass over the
            question that finds the tokens it attends to.

    Example:
        ```python
        usage = mem.ask("When does the lease begin?").usage
        print(f"{usage.exact + usage.reused} of {usage.prompt} prompt tokens came from the cache")
        ```
    """

    exact: int
    reused: int
    recomputed: int
    computed: int
    generated: int
    token_layers: int

    @property
    def prompt(self) -> int:
        """The number of tokens in the prompt."""
        return self.exact + self.reused + self.recomputed + self.computed

    def as_dict(self) -> dict[str, int]:
        """All counts by name, `prompt` included."""
        return {**vars(self), "prompt": self.prompt}


@dataclass(frozen=True)
class Timings:
    """Durations, in seconds.

    Attributes:
        prepare: From the call until the prompt is planned.
        stitch: Composing: looking up entries, and prefilling the chunks that have none.
        repair: Blending: choosing and recomputing tokens and prefilling the question, up to the first token. Entries
            are loaded at the same time.
        first_token: From the call to the first token of the answer; the sum of the three above.
        total: From the call until the answer is complete and all new entries are stored.

    Example:
        ```python
        timings = mem.ask("When does the lease begin?").timings
        print(f"first token after {timings.first_token:.2f} s")
        ```
    """

    prepare: float
    stitch: float
    repair: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Source:
    """A chunk that was in the prompt, or that `retrieve` found.

    Attributes:
        document_id: Id of the chunk's document.
        index: Position of the chunk in its document, from 0.
        text: The chunk's text.
        metadata: Metadata of the document.
        score: The retriever's score; None if all chunks fit and nothing was retrieved.

    Example:
        ```python
        sources = mem.retrieve("When does the lease begin?", 4)
        answer = mem.ask("When does the lease begin?", context=sources)
        print([source.document_id for source in answer.sources])
        ```
    """

    document_id: str
    index: int
    text: str
    metadata: Metadata
    score: float | None = None


def rank(sources: Sequence[Source], k: int | None = None) -> tuple[Source, ...]:
    """Sources by score, best first; equal ones in the order of the prompt."""
    return tuple(sorted(sources, key=lambda source: -(source.score or 0.0))[:k])


@dataclass(frozen=True)
class Answer:
    """The answer to a question or a conversation.

    Attributes:
        text: The answer, as it was streamed, without thoughts and calls.
        sources: The chunks in the prompt, in prompt order.
        usage: Token counts.
        plan: Which chunks went into the prompt, and why.
        timings: Durations, in seconds.
        finish_reason: "stop" if the model ended the answer or a stop string occurred, "length" if `max_tokens` was
            reached, "cancelled" if the stream was closed early.
        tool_calls: The tool calls the model made, instead of or in addition to the text.
        invalid_calls: Calls that are not valid, because their arguments are not JSON, or the answer was cut off.
        reasoning: The model's thoughts before the answer, if it wrote any.

    Example:
        ```python
        answer = mem.ask("When does the lease begin?", max_tokens=32)
        print(answer.text)
        print([source.document_id for source in answer.sources], answer.plan.reason)
        print(answer.usage, answer.timings.first_token)
        ```
    """

    text: str
    sources: tuple[Source, ...]
    usage: Usage
    plan: Plan
    timings: Timings
    finish_reason: FinishReason
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_calls: tuple[InvalidCall, ...] = ()
    reasoning: str = ""

    def top_sources(self, k: int | None = None) -> tuple[Source, ...]:
        """The sources by relevance, best first; the first `k` of them, or all."""
        return rank(self.sources, k)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as an assistant message in OpenAI's format, to append to a conversation.

        Thoughts are in it as `reasoning_content`; the chat template decides whether the model sees them again.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message[REASONING] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_openai(as_text=False) for call in self.tool_calls]
        return message


@dataclass(frozen=True, eq=False)
class Prefill:
    """The state of the model after a prefill, to continue from or to compare.

    Attributes:
        token_ids: int64 [n], the token ids of the prompt.
        cache: The KV of all n positions. It belongs to the caller; `model(...)` may append to it.
        logits: float32 [vocab], the next-token logits after the last token.
        usage: Token counts; `generated` is 0.
        plan: Which chunks went into the prompt, and why.
        timings: Durations, in seconds.

    Example:
        ```python
        state = mem.prefill("Who pays?", context=["The tenant pays."], blend="all")
        with torch.no_grad():
            full = mem.local_model.hf(state.token_ids[None]).logits[0, -1]
        print((state.logits - full).abs().max())
        ```
    """

    token_ids: Tensor
    cache: BlendedCache
    logits: Tensor
    usage: Usage
    plan: Plan
    timings: Timings

    def __post_init__(self) -> None:
        if self.cache.length != self.token_ids.numel() or self.logits.dtype != torch.float32:
            raise AssertionError("a Prefill needs the KV of every prompt position and float32 logits")
