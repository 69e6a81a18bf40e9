"""A cache entry: the KV of a span, computed in one context."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

FORMAT_VERSION = 1


def digest_tokens(token_ids: Iterable[int]) -> str:
    """The hexadecimal SHA-256 of token ids, as little-endian int32."""
    return hashlib.sha256(np.fromiter(token_ids, dtype="<i4").tobytes()).hexdigest()


class Context:
    """The tokens before a span, as a running digest; `spans` holds the digests of the spans they form."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.length = 0
        self.spans: tuple[str, ...] = ()

    def extend(self, token_ids: tuple[int, ...], span_digest: str) -> None:
        self._hash.update(np.asarray(token_ids, dtype="<i4").tobytes())
        self.length += len(token_ids)
        self.spans = (*self.spans, span_digest)

    def copy(self) -> Context:
        twin = Context()
        twin._hash = self._hash.copy()
        twin.length, twin.spans = self.length, self.spans
        return twin

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True)
class EntryKey:
    """The lookup key of an entry. `context` and `tokens` are digests of token ids."""

    namespace: str
    fingerprint: str
    context: str
    tokens: str

    @cached_property
    def digest(self) -> str:
        """A hexadecimal digest of the key; also the entry's file name."""
        return _digest_fields(self.namespace, self.fingerprint, self.context, self.tokens)

    @cached_property
    def group(self) -> str:
        """A digest shared by all entries for these tokens, in any context."""
        return _digest_fields(self.namespace, self.fingerprint, self.tokens)


def _digest_fields(*fields: str) -> str:
    # The lengths are hashed too, so that different tuples of fields never produce the same bytes.
    blob = b"".join(len(raw).to_bytes(8, "big") + raw for raw in (field.encode() for field in fields))
    return hashlib.sha256(blob).hexdigest()


@dataclass(frozen=True)
class EntryInfo:
    """The description of an entry, without its tensors.

    Attributes:
        key: The entry's key.
        start: Position of the span's first token, which is the number of tokens in its context.
        spans: Digests of the spans in its context, first to last.
        nbytes: Size of keys, values and states, in bytes.
    """

    key: EntryKey
    start: int
    spans: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, eq=False)
class KVEntry:
    """The keys and values of a span of n tokens, computed in one context. Treat the tensors as read-only.

    Attributes:
        key: The entry's key.
        token_ids: The n token ids.
        start: Position of the span's first token, which is the number of tokens in its context.
        spans: Digests of the spans in its context, first to last.
        keys: One tensor per layer group of the model (see `kvmem.kv.layer.LayerGroup`), of shape
            [layers in the group, kv heads, n, head dim], in the model's dtype.
        values: Like `keys`.
        states: States of the recurrent layers after the span (see `BlendedCache.states`); empty without such layers.
        expires: Time (`time.time()` seconds) after which the store no longer returns the entry; None for never.
    """

    key: EntryKey
    token_ids: tuple[int, ...]
    start: int
    spans: tuple[str, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    states: tuple[Tensor, ...] = ()
    expires: float | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values, *self.states))

    @property
    def info(self) -> EntryInfo:
        return EntryInfo(self.key, self.start, self.spans, self.nbytes)
