"""Residents: the buffers of the last prompts, kept within a byte budget."""

from __future__ import annotations

from collections.abc import Sequence

from kvmem.blend.stitched import Resident


class Residents:
    """Buffers by last use; the newest is always kept. Not for several threads at once.

    Conversations of several users take turns in one engine: each finds its own buffer, with what was said last.

    Args:
        bytes_per_token: of a buffer.
        budget: bytes of all buffers but the newest.
    """

    def __init__(self, bytes_per_token: int, budget: int) -> None:
        self._bytes_per_token, self._budget = bytes_per_token, budget
        self._kept: list[Resident] = []

    def take(self, token_ids: Sequence[int]) -> Resident | None:
        """The buffer that a prompt may take over, and with it what both begin with; None if a new one is needed.

        That is one whose rows the prompt continues, one that nobody will continue, or, when the budget is used up, the
        one that was not used for longest.
        """
        shared = {id(held): held.shared(token_ids) for held in self._kept}
        free = [held for held in self._kept if self._is_free(held, shared[id(held)])]
        best = max(free, key=lambda held: shared[id(held)], default=None)
        if best is None and self._kept and not self._has_room(len(token_ids)):
            best = self._kept[0]
        if best is not None:
            self._kept.remove(best)
        return best

    def closest(self, token_ids: Sequence[int]) -> tuple[Resident, int] | None:
        """The buffer that shares most with a prompt, and how many tokens: to copy from, not to take over."""
        found = [(held.shared(token_ids), held) for held in self._kept if not held.cache.recurrent]
        shared, best = max(found, key=lambda pair: pair[0], default=(0, None))
        return None if best is None or shared == 0 else (best, shared)

    def _is_free(self, held: Resident, shared: int) -> bool:
        return not held.conversation or shared >= len(held.token_ids) - 1 or shared >= held.prompt - 1 > 0

    def _has_room(self, tokens: int) -> bool:
        return self._size() + tokens * self._bytes_per_token <= self._budget

    def _size(self) -> int:
        return sum(held.cache.capacity for held in self._kept) * self._bytes_per_token

    def keep(self, resident: Resident) -> None:
        """Keep a buffer; those that were not used for longest go when the budget is exceeded."""
        while self._kept and self._size() > self._budget:
            self._kept.pop(0)
        self._kept.append(resident)

    def clear(self) -> None:
        self._kept.clear()
