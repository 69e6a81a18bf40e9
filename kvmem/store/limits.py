"""How much may be kept, and who has to give way. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvmem.errors import InputError

Policy = Literal["lru", "lfu"]


@dataclass(frozen=True)
class Limits:
    """max_bytes: of everything kept. namespace_bytes: of any one namespace. None is no limit.

    policy: which entry goes first, the least recently or the least frequently used; pinned entries never go.
    ttl: seconds after which an entry is no longer served, None for never.

    Under pressure a namespace's entries give way to another's only while it keeps more than its quota:
    `namespace_bytes`, or without one an equal share of `max_bytes`.
    """

    max_bytes: int | None = None
    namespace_bytes: int | None = None
    policy: Policy = "lru"
    ttl: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "namespace_bytes", "ttl"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name}={value} is below 0. Give 0 or more, or None for no limit.")
        if self.policy not in ("lru", "lfu"):
            raise InputError(f"policy={self.policy!r} is not known. Give 'lru' or 'lfu'.")

    def fits_at_all(self, size: int) -> bool:
        """Whether an entry of `size` bytes could ever be kept."""
        caps = [cap for cap in (self.max_bytes, self.namespace_bytes) if cap is not None]
        return all(size <= cap for cap in caps)

    def victims(self, usage: Mapping[str, int], namespace: str, size: int) -> frozenset[str]:
        """The namespaces one entry of which has to go before `namespace` may add `size` bytes; empty if it may now.

        usage: bytes kept by namespace.
        """
        own = usage.get(namespace, 0)
        if self.namespace_bytes is not None and own + size > self.namespace_bytes:
            return frozenset({namespace})
        if self.max_bytes is None or sum(usage.values()) + size <= self.max_bytes:
            return frozenset()
        share = self.namespace_bytes or self.max_bytes // len({*usage, namespace})
        over = {name for name, kept in usage.items() if kept > share}
        return frozenset(over | ({namespace} if own else set()))
