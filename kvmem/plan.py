"""Whether the whole corpus fits the window, and which documents or chunks to take when it does not. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvmem.errors import PromptTooLongError

Mode = Literal["whole", "route", "retrieve"]
# Documents are clearly best when every other's best chunk scores less than this share of the best of all.
CLEARLY = 0.5
_FEW = 3


@dataclass(frozen=True)
class Plan:
    """What a prompt will consist of.

    mode: "whole" when every chunk is in the prompt; "route" when it is a few whole documents that score clearly best;
        "retrieve" when it is chunks.
    reason: why, in one sentence.
    chunks: indices of the chunks taken, in the order of the prompt.
    prompt_tokens: prefix + chunks + query. window: the model's limit. over: tokens that did not fit.
    dropped: messages of the history that were left out, oldest first.
    """

    mode: Mode
    reason: str
    chunks: tuple[int, ...]
    prompt_tokens: int
    window: int
    over: int = 0
    dropped: int = 0


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
    """Take all chunks if they fit; else whole documents that are clearly best; else the best chunks that fit.

    All sizes are tokens; `answer` is kept free. `scores` is only called on overflow.
    documents: the document of every chunk, if scores are comparable over the corpus. Then documents may be taken whole,
        and room that is left goes to the neighbours of the chunks taken. None: nothing is taken that scores 0 or less.
    limit: at most so many tokens of chunks. Chunks are in their own order.
    Raises PromptTooLongError when the query alone does not fit.
    """
    fixed = prefix + query + answer
    if fixed > window:
        raise PromptTooLongError(
            f"The question needs {query} tokens; with {prefix} before it and {answer} kept free for the "
            f"answer that is {fixed - window} more than the model's window of {window}. "
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
        reason = f"{where}; {len(names)} of {len(set(documents))} documents score clearly best and are in it whole"
    else:
        taken = _retrieve(chunks, documents, relevance, room)
        reason = f"{where}; retrieval took {len(taken)} of {len(chunks)} chunks"
    if not taken:
        raise PromptTooLongError(
            f"No chunk fits beside the question: {room} tokens are free, the smallest chunk has "
            f"{min(chunks)}. Lower max_tokens, shorten the question, or split documents into smaller chunks."
        )
    size = prefix + query + sum(chunks[i] for i in taken)
    return Plan(mode, reason, tuple(sorted(taken)), size, window, over)


def _route(chunks: Sequence[int], documents: Sequence[str], relevance: Sequence[float], room: int) -> list[int]:
    """The chunks of the documents that score clearly best, if they are few and fit; else none."""
    best: dict[str, float] = {}
    for document, score in zip(documents, relevance, strict=True):
        best[document] = max(score, best.get(document, 0.0))
    top = max(best.values())
    likely = {document for document, score in best.items() if score >= CLEARLY * top}
    taken = [i for i, document in enumerate(documents) if document in likely]
    fits = top > 0 and len(likely) <= _FEW and sum(chunks[i] for i in taken) <= room
    return taken if fits else []


def _retrieve(
    chunks: Sequence[int], documents: Sequence[str] | None, relevance: Sequence[float], room: int
) -> list[int]:
    """The best chunks that fit, and if there is room left, those next to them in their documents."""
    taken: list[int] = []

    def take(index: int) -> None:
        nonlocal room
        if chunks[index] <= room and index not in seen:
            taken.append(index)
            seen.add(index)
            room -= chunks[index]

    seen: set[int] = set()
    for index in sorted(range(len(chunks)), key=lambda i: (-relevance[i], i)):
        if relevance[index] > 0 or not taken:
            take(index)
    if documents is not None:
        for index in tuple(taken):
            for near in (index - 1, index + 1):
                if 0 <= near < len(chunks) and documents[near] == documents[index]:
                    take(near)
    return taken
