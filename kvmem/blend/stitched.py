"""What composing a prompt gives, and the buffer that it may take over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from kvmem.kv.buffer import BlendedCache
from kvmem.kv.entry import KVEntry
from kvmem.prompt.span import Span

Origin = Literal["exact", "computed", "reused"]


@dataclass(frozen=True)
class Placed:
    """A span at its position in the buffer, and where its KV came from.

    known: of a span that was computed, how many of its first tokens the buffer held already.
    """

    span: Span
    start: int
    origin: Origin
    known: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.span)


@dataclass(eq=False)
class Stitched:
    """A composed buffer with prefix and chunks. Rows before `exact_end` are exact, later ones are approximate.

    Attributes:
        cache: The buffer.
        placed: The spans, in order.
        exact_end: Number of leading rows that are exact.
        unsaved: Entries that were computed while composing and are not stored yet.
        forwarded: Number of tokens that ran through the model while composing.
        known: Number of leading query tokens that the buffer already holds exactly.
    """

    cache: BlendedCache
    placed: list[Placed] = field(default_factory=list)
    exact_end: int = 0
    unsaved: list[KVEntry] = field(default_factory=list)
    forwarded: int = 0
    known: int = 0

    @property
    def token_ids(self) -> list[int]:
        return [token for item in self.placed for token in item.span.token_ids]

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """The range [start, end) of every approximate span."""
        return tuple((item.start, item.end) for item in self.placed if item.end > self.exact_end)


@dataclass(eq=False)
class Resident:
    """A buffer kept from an earlier prompt; its rows for `token_ids` are exact.

    prompt: how many of the tokens are the prompt; the others are its answer. conversation: whether its last part is
    likely to be continued.
    """

    cache: BlendedCache
    token_ids: tuple[int, ...]
    prompt: int = 0
    conversation: bool = False

    def shared(self, token_ids: Sequence[int], start: int = 0) -> int:
        """How many of `token_ids` are in its rows from `start` on."""
        pairs = zip(self.token_ids[start : start + len(token_ids)], token_ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
