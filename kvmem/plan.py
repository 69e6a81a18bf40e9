"""Whether the whole corpus fits the window, and which chunks to take when it does not. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvmem.errors import PromptTooLongError

Mode = Literal["whole", "retrieve"]


@dataclass(frozen=True)
class Plan:
    """What a prompt will consist of.

    mode: "whole" when every chunk is in the prompt, "retrieve" when some had to be left out.
    reason: why, in one sentence.
    chunks: indices of the chunks taken, ascending.
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
) -> Plan:
    """Take all chunks if they fit, else the best by `scores()` that do, in their own order.

    All sizes are tokens; `answer` is kept free. `scores` is only called on overflow.
    Raises PromptTooLongError when the query alone does not fit.
    """
    fixed = prefix + query + answer
    if fixed > window:
        raise PromptTooLongError(
            f"The question needs {query} tokens; with {prefix} before it and {answer} kept free for the "
            f"answer that is {fixed - window} more than the model's window of {window}. "
            "Shorten the question, pass long text as context or add() it, or lower max_tokens."
        )
    total = fixed + sum(chunks)
    if total <= window:
        what = f"all {len(chunks)} chunks fit" if chunks else "the prompt fits"
        reason = f"{what}: {total} of {window} tokens, {answer} of them for the answer"
        return Plan("whole", reason, tuple(range(len(chunks))), total - answer, window)
    room = window - fixed
    relevance = scores()
    taken: list[int] = []
    for index in sorted(range(len(chunks)), key=lambda i: (-relevance[i], i)):
        if chunks[index] <= room and (relevance[index] > 0 or not taken):
            taken.append(index)
            room -= chunks[index]
    if not taken:
        raise PromptTooLongError(
            f"No chunk fits beside the question: {window - fixed} tokens are free, the smallest chunk has "
            f"{min(chunks)}. Lower max_tokens, shorten the question, or split documents into smaller chunks."
        )
    reason = (
        f"the corpus is {total - window} tokens over the window of {window}; "
        f"retrieval took {len(taken)} of {len(chunks)} chunks"
    )
    size = prefix + query + sum(chunks[i] for i in taken)
    return Plan("retrieve", reason, tuple(sorted(taken)), size, window, total - window)
