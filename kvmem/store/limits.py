"""Storage limits and eviction rules, free of side effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvmem.errors import InputError

Policy = Literal["lru", "lfu"]


@dataclass(frozen=True)
class Limits:
    """Storage limits.

    When space runs out, a namespace's entries are evicted for another namespace only while it uses more than its
    quota: `namespace_bytes`, or an equal share of `max_bytes` if that is None.

    Attributes:
        max_bytes: Maximum total size in bytes; None for no limit.
        namespace_bytes: Maximum size of each namespace in bytes; None for no limit.
        policy: Evict the least recently used ("lru") or least frequently used ("lfu") entry first. Pinned entries are
            never evicted.
        ttl: Seconds after which an entry expires; None for never.

    Raises:
        InputError: A limit is negative, or the policy is unknown.

    Example:
        ```python
        store = DiskStore("./kv", max_bytes=20_000_000_000, namespace_bytes=2_000_000_000, ttl=86400.0)
        assert store.limits == Limits(20_000_000_000, 2_000_000_000, "lru", 86400.0)
        ```
    """

    max_bytes: int | None = None
    namespace_bytes: int | None = None
    policy: Policy = "lru"
    ttl: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "namespace_bytes", "ttl"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name}={value} is negative. Use 0 or more, or None for no limit.")
        if self.policy not in ("lru", "lfu"):
            raise InputError(f"policy={self.policy!r} is unknown. Use 'lru' or 'lfu'.")

    def fits_at_all(self, size: int) -> bool:
        """Whether an entry of `size` bytes can fit at all.

        Args:
            size: Size of the entry in bytes.

        Returns:
            False if it exceeds a limit even in an empty store.
        """
        caps = [cap for cap in (self.max_bytes, self.namespace_bytes) if cap is not None]
        return all(size <= cap for cap in caps)

    def victims(self, usage: Mapping[str, int], namespace: str, size: int) -> frozenset[str]:
        """Namespaces to evict from before `namespace` may add `size` bytes.

        Args:
            usage: Stored bytes by namespace.
            namespace: The namespace that wants to add an entry.
            size: Size of the new entry in bytes.

        Returns:
            The namespaces of which one must lose an entry; empty if the new entry fits.
        """
        own = usage.get(namespace, 0)
        if self.namespace_bytes is not None and own + size > self.namespace_bytes:
            return frozenset({namespace})
        if self.max_bytes is None or sum(usage.values()) + size <= self.max_bytes:
            return frozenset()
        share = self.namespace_bytes or self.max_bytes // len({*usage, namespace})
        over = {name for name, kept in usage.items() if kept > share}
        return frozenset(over | ({namespace} if own else set()))
