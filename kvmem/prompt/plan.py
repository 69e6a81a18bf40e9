"""Plan a prompt: take the whole corpus if it fits the window, otherwise choose documents or chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kvmem.errors import PromptTooLongError

Mode = Literal["whole", "route", "retrieve"]
# Documents are clearly best if the best chunk of every other document scores less than this share of the top score.
CLEARLY = 0.5
_FEW = 3


@dataclass(frozen=True)
class Plan:
    """Which chunks go into a prompt, and why.

    Attributes:
        mode: "whole": every chunk is in the prompt; "route": a few whole documents that score clearly best;
            "retrieve": the best chunks.
        reason: Why this mode was chosen, in one sentence.
        chunks: Indices of the chunks taken, in prompt order.
        prompt_tokens: Tokens of prefix, chunks and query.
        window: The model's context window, in tokens.
        over: Number of tokens by which the corpus exceeds the available room; 0 if everything fits.
        dropped: Number of history messages that were left out, oldest first.

    Example:
        ```python
        plan = mem.plan("What is the Base Rent?")  # runs no model
        print(plan.mode, plan.reason, plan.prompt_tokens)
        ```
    """

    mode: Mode
    reason: str
    chunks: tuple[int, ...]
    prompt_tokens: int
    window: int
    over: int = 0
    dropped: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As JSON, without the chunks' indices."""
        return {name: value for name, value in vars(self).items() if name != "chunks"}


def make_plan(
    *,
    prefix: int,
    chunks: Sequence[int],
    query: int,
    answer: int,
    window: int,
    scores: Callable[[], Sequence[float]],
    documents: Sequence[str] | None = None,
    limit: int | None = None,
) -> Plan:
    """Take all chunks if they fit, otherwise whole documents that are clearly best, otherwise the best chunks that fit.

    Args:
        prefix: Tokens of the prefix.
        chunks: Tokens of each chunk, in document order.
        query: Tokens of the query.
        answer: Tokens kept free for the answer.
        window: The model's context window, in tokens.
        scores: Returns one score per chunk; called only if the chunks do not all fit.
        documents: The document of each chunk, if scores are comparable over the corpus. Then documents may be taken
            whole, and remaining room goes to the neighbours of the chunks taken. If None, only chunks that score above
            0 are taken.
        limit: Maximum number of chunk tokens.

    Raises:
        PromptTooLongError: The query alone does not fit, or not even the smallest chunk fits next to it.
    """
    fixed = prefix + query + answer
    if fixed > window:
        raise PromptTooLongError(
            f"The question has {query} tokens. With {prefix} tokens before it and {answer} kept free for the answer, "
            f"that is {fixed - window} more than the model's window of {window}. "
            "Shorten the question, pass long text as context or add() it, or lower max_tokens."
        )
    total = sum(chunks)
    room = window - fixed if limit is None else min(window - fixed, limit)
    if total <= room:
        what = f"all {len(chunks)} chunks fit" if chunks else "the prompt fits"
        reason = f"{what}: {fixed + total} of {window} tokens, {answer} of them for the answer"
        return Plan("whole", reason, tuple(range(len(chunks))), prefix + query + total, window)
    relevance = scores()
    over = total - room
    beyond = "the window" if limit is None or limit > window - fixed else "context_tokens"
    where = f"the corpus is {over} tokens over {beyond} of {window if beyond == 'the window' else limit}"
    taken = _route(chunks, documents, relevance, room) if documents is not None else []
    mode: Mode = "route" if taken else "retrieve"
    if taken and documents is not None:
        names = list(dict.fromkeys(documents[i] for i in taken))
        reason = f"{where}; {len(names)} of {len(set(documents))} documents score clearly best and are included whole"
    else:
        taken = _retrieve(chunks, documents, relevance, room)
        reason = f"{where}; retrieval chose {len(taken)} of {len(chunks)} chunks"
    if not taken:
        raise PromptTooLongError(
            f"No chunk fits next to the question: {room} tokens are free, but the smallest chunk has "
            f"{min(chunks)}. Lower max_tokens, shorten the question, or split documents into smaller chunks."
        )
    size = prefix + query + sum(chunks[i] for i in taken)
    return Plan(mode, reason, tuple(sorted(taken)), size, window, over)


def _route(chunks: Sequence[int], documents: Sequence[str], relevance: Sequence[float], room: int) -> list[int]:
    """The chunks of the documents that score clearly best, if there are few and they fit; otherwise empty."""
    scores = np.asarray(relevance, dtype=np.float64)
    top = scores.max()
    if top <= 0:
        return []
    likely = {documents[index] for index in np.flatnonzero(scores >= CLEARLY * top).tolist()}
    if len(likely) > _FEW:
        return []
    taken = [i for i, document in enumerate(documents) if document in likely]
    return taken if sum(chunks[i] for i in taken) <= room else []


def _retrieve(
    chunks: Sequence[int], documents: Sequence[str] | None, relevance: Sequence[float], room: int
) -> list[int]:
    """The best chunks that fit and, if there is room left, their neighbours in the same documents."""
    taken: list[int] = []

    def take(index: int) -> None:
        nonlocal room
        if chunks[index] <= room and index not in seen:
            taken.append(index)
            seen.add(index)
            room -= chunks[index]

    seen: set[int] = set()
    smallest = min(chunks)
    for index in np.argsort(-np.asarray(relevance, dtype=np.float64), kind="stable").tolist():
        if room < smallest or (taken and relevance[index] <= 0):
            break
        take(index)
    if documents is not None:
        for index in tuple(taken):
            for near in (index - 1, index + 1):
                if 0 <= near < len(chunks) and documents[near] == documents[index]:
                    take(near)
    return taken
