"""A cache entry: the KV of a span of tokens, given the context it was read in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

FORMAT_VERSION = 1


def digest_tokens(token_ids: Iterable[int]) -> str:
    """The SHA-256 of token ids (as little-endian int32), in hexadecimal."""
    return hashlib.sha256(np.fromiter(token_ids, dtype="<i4").tobytes()).hexdigest()


class Context:
    """The tokens before a span, as a running digest; `spans` are the digests of the spans it is made of."""

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
    """What an entry is found by. `context` and `tokens` are digests of token ids."""

    namespace: str
    fingerprint: str
    context: str
    tokens: str

    @cached_property
    def digest(self) -> str:
        """One hexadecimal name for the key; it is also the entry's file name."""
        return _digest_fields(self.namespace, self.fingerprint, self.context, self.tokens)

    @cached_property
    def group(self) -> str:
        """The same for every entry of these tokens, whatever their context."""
        return _digest_fields(self.namespace, self.fingerprint, self.tokens)


def _digest_fields(*fields: str) -> str:
    # Lengths are part of what is hashed, so that no two tuples of fields share one digest.
    blob = b"".join(len(raw).to_bytes(8, "big") + raw for raw in (field.encode() for field in fields))
    return hashlib.sha256(blob).hexdigest()


@dataclass(frozen=True)
class EntryInfo:
    """An entry without its tensors.

    start: the number of tokens before the span when it was read, its first position.
    spans: digests of the spans before it, first to last.
    nbytes: bytes of its keys, values and states.
    """

    key: EntryKey
    start: int
    spans: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, eq=False)
class KVEntry:
    """The keys and values of a span of n tokens.

    token_ids: n token ids.
    keys, values: one tensor per layer group of the model (see `kvmem.model.LayerGroup`), of shape
        [layers in the group, kv heads, n, head dim], in the model's dtype. Never written to.
    states: of recurrent layers, what they remember after the span; see `BlendedCache.states`. Empty without them.
    expires: `time.time` seconds after which the store that it comes from will not serve it, None for never.
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
