"""The walk: a prompt's spans, left to right, each in the best context there is.

While the exact entry is there, it is taken. A cold span with nothing approximate before it is read in place:
exact, and stored. From the first approximate span on, the best entry is taken; cold spans there are read behind
the preamble, stored, and composed like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Literal

from kvmem.cache import BlendedCache
from kvmem.entry import Context, EntryInfo, EntryKey, KVEntry
from kvmem.errors import PromptTooLongError
from kvmem.model import LanguageModel
from kvmem.prompt import Span
from kvmem.store.base import Store

Origin = Literal["exact", "computed", "reused"]


@dataclass(frozen=True)
class Placed:
    """A span at its place in the buffer, and where its KV came from."""

    span: Span
    start: int
    origin: Origin

    @property
    def end(self) -> int:
        return self.start + len(self.span)


@dataclass(eq=False)
class Stitched:
    """A buffer holding prefix and chunks. Rows up to `exact_end` are exact, those behind are approximate.

    unsaved: entries that were computed on the way and are not stored yet.
    forwarded: tokens that went through the model on the way.
    known: tokens of the query that the buffer holds as well, exactly.
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
        """The [start, end) of every approximate span."""
        return tuple((item.start, item.end) for item in self.placed if item.end > self.exact_end)


@dataclass(eq=False)
class Resident:
    """A buffer kept from an earlier prompt: its leading `token_ids` are exact in it."""

    cache: BlendedCache
    token_ids: tuple[int, ...]

    def covers(self, start: int, span: Span) -> bool:
        return self.token_ids[start : start + len(span)] == span.token_ids


class Composer:
    """Stitches prompts for one model, one store and one namespace."""

    def __init__(self, model: LanguageModel, store: Store, namespace: str, preamble: Span) -> None:
        self._model, self._store, self._namespace = model, store, namespace
        self._preamble = preamble

    def key(self, context: Context, span: Span) -> EntryKey:
        return EntryKey(self._namespace, self._model.fingerprint, context.digest, span.digest)

    def make_exact(self, stitched: Stitched) -> None:
        """Note that every row of `stitched` was recomputed in place: from here on all of it is exact."""
        context = Context()
        for item in stitched.placed:
            if item.end > stitched.exact_end:
                key = self.key(context, item.span)
                entry = stitched.cache.entry(key, item.span.token_ids, item.start, context.spans)
                stitched.unsaved.append(entry)
            context.extend(item.span.token_ids, item.span.digest)
        stitched.exact_end = context.length

    def known(self, span: Span) -> list[EntryInfo]:
        """Every entry of these tokens in this namespace."""
        return self._store.find(self.key(Context(), span))

    def forget(self, span: Span) -> None:
        """Delete every entry of these tokens in this namespace."""
        for info in self.known(span):
            self._store.delete(info.key)

    def arrange(self, before: Sequence[Span], groups: Sequence[Sequence[Span]]) -> list[int]:
        """An order of `groups` behind `before` of which more is exact: one after the other, that with the most exact
        tokens there; as given where nothing is."""
        context = Context()
        for span in before:
            context.extend(span.token_ids, span.digest)
        ordered: list[int] = []
        rest = list(range(len(groups)))
        while rest:
            found = {number: self._exact_behind(context, groups[number]) for number in rest}
            best = max(rest, key=lambda number: found[number].length)
            if found[best].length == context.length:
                break
            ordered.append(best)
            rest.remove(best)
            whole = found[best].length == context.length + sum(map(len, groups[best]))
            context = found[best]
            if not whole:
                break
        return ordered + rest

    def _exact_behind(self, context: Context, spans: Sequence[Span]) -> Context:
        """`context` and those of `spans` behind it that are there exactly."""
        context = context.copy()
        for span in takewhile(lambda span: self._store.contains(self.key(context, span)), spans):
            context.extend(span.token_ids, span.digest)
        return context

    def compose(
        self,
        spans: Sequence[Span],
        capacity: int,
        resident: Resident | None = None,
        in_place: str | None = None,
        query: Sequence[int] = (),
    ) -> Stitched:
        """Stitch `spans` (the prefix first) into a buffer of at least `capacity` rows.

        resident: a buffer to take over; it becomes the result's, with what it holds of `query` behind the spans.
        in_place: a document whose spans are read in place, if all before them is exact, even where the same
            tokens were read in another context.
        """
        if resident is not None and resident.cache.recurrent:
            resident = None  # a recurrent state cannot go back to where an earlier prompt ended
        if resident is not None:
            resident.cache.length = len(resident.token_ids)
            resident.cache.reserve(capacity)
        cache = resident.cache if resident is not None else self._model.new_cache(capacity)
        cache.length = 0
        stitched = Stitched(cache)
        context = Context()
        rest = list(spans)
        while rest:
            if resident is not None and not resident.covers(cache.length, rest[0]):
                resident = None  # what it holds further on was read behind other tokens
            placed = self._place_exact(stitched, context, rest, resident is not None, in_place)
            if not placed:
                break
            del rest[:placed]
        stitched.exact_end = cache.length
        if rest:
            self._place_approximate(stitched, context, rest)
        elif resident is not None:
            # The last token of the query is left to be read: its output is the first token of the answer.
            pairs = zip(resident.token_ids[cache.length :], query[:-1], strict=False)
            stitched.known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            cache.length += stitched.known
        cache.load_ahead()
        return stitched

    def _place_exact(
        self, stitched: Stitched, context: Context, spans: Sequence[Span], resident: bool, in_place: str | None
    ) -> int:
        """Place the first of `spans` exactly, from the resident buffer, the store, or by reading it, then together with
        what is cold behind it; how many were placed, 0 if the first is approximate."""
        cache, span, start = stitched.cache, spans[0], stitched.cache.length
        key = self.key(context, span)
        if resident:
            cache.length = start + len(span)
            if not self._store.contains(key):
                stitched.unsaved.append(cache.entry(key, span.token_ids, start, context.spans))
        elif (entry := self._store.get(key)) is not None:
            cache.load(entry, start)
            cache.length = start + len(span)
        elif start > 0 and not self._is_to_be_read(span, in_place):
            return 0
        else:
            run = [span] if cache.recurrent else self._cold_run(context, spans, in_place)
            self._model.append([token for item in run for token in item.token_ids], cache)
            for item in run:
                read = cache.entry(self.key(context, item), item.token_ids, start, context.spans)
                stitched.unsaved.append(read)
                stitched.placed.append(Placed(item, start, "computed"))
                stitched.forwarded += len(item)
                context.extend(item.token_ids, item.digest)
                start += len(item)
            return len(run)
        stitched.placed.append(Placed(span, start, "exact"))
        context.extend(span.token_ids, span.digest)
        return 1

    def _cold_run(self, context: Context, spans: Sequence[Span], in_place: str | None) -> list[Span]:
        """The first of `spans`, which is to be read, and those behind it that are to be read as well. Not for models
        with recurrent layers, whose state is known at the end of a forward only."""
        context, run = context.copy(), [spans[0]]
        for span in spans[1:]:
            context.extend(run[-1].token_ids, run[-1].digest)
            # Looked for, and not only listed: a damaged entry is removed by that.
            if self._store.get(self.key(context, span)) is not None or not self._is_to_be_read(span, in_place):
                break
            run.append(span)
        return run

    def _is_to_be_read(self, span: Span, in_place: str | None) -> bool:
        """Whether `span` is read in place, if all before it is exact."""
        anew = in_place is not None and span.document == in_place
        return anew or not self._candidates(self.key(Context(), span))

    def _candidates(self, key: EntryKey) -> list[EntryInfo]:
        return self._store.find(key) if self._model.blendable else []

    def _place_approximate(self, stitched: Stitched, context: Context, spans: Sequence[Span]) -> None:
        cache, start = stitched.cache, stitched.cache.length
        before = context.spans
        cold: dict[str, KVEntry] = {}
        counted: set[str] = set()
        for index, span in enumerate(spans):
            entry = self._best(span, before) or cold.get(span.digest)
            origin: Origin = "reused"
            if entry is None:
                document = span.document
                run = [span, *takewhile(lambda s: self._is_cold(s, document), spans[index + 1 :])]  # noqa: B023
                for read in self._read_behind_preamble(stitched, run):
                    cold.setdefault(read.key.tokens, read)
                entry = cold[span.digest]
            if span.digest in cold and span.digest not in counted:
                origin = "computed"
                counted.add(span.digest)
            cache.load(entry, start)
            stitched.placed.append(Placed(span, start, origin))
            start += len(span)
            before = (*before, span.digest)
        cache.length = start

    def _is_cold(self, span: Span, document: str | None) -> bool:
        """Whether `span` continues a run of unread chunks of that document."""
        return span.document == document and not self._candidates(self.key(Context(), span))

    def _best(self, span: Span, before: tuple[str, ...]) -> KVEntry | None:
        """The entry of `span` whose context is closest to `before`: the longest run of the same spans before
        it, then the most alike prefix, then the shortest context."""
        infos = self._store.find(self.key(Context(), span))

        def closeness(info: EntryInfo) -> tuple[int, bool, int]:
            pairs = zip(reversed(info.spans), reversed(before), strict=False)
            run = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            return run, info.spans[:1] == before[:1], -info.start

        for info in sorted(infos, key=closeness, reverse=True):
            entry = self._store.get(info.key)
            if entry is not None:
                return entry
        return None

    def _read_behind_preamble(self, stitched: Stitched, spans: Sequence[Span]) -> list[KVEntry]:
        """Read consecutive chunks of one document behind the preamble, restarting it when the window is full."""
        read: list[KVEntry] = []
        pending = list(spans)
        while pending:
            room = self._model.window
            needed = len(self._preamble) + sum(len(span) for span in pending)
            scratch = self.compose([self._preamble], min(room, needed))
            stitched.forwarded += scratch.forwarded
            stitched.unsaved += scratch.unsaved
            context = Context()
            context.extend(self._preamble.token_ids, self._preamble.digest)
            if context.length + len(pending[0]) > room:
                raise PromptTooLongError(
                    f"A chunk of {len(pending[0])} tokens is longer than the model's window of {room}. "
                    "Give smaller chunks, or let kvmem split the text."
                )
            fitting = sum(1 for end in accumulate(map(len, pending)) if context.length + end <= room)
            run, pending = pending[:fitting], pending[fitting:]
            self._model.append([token for span in run for token in span.token_ids], scratch.cache)
            for span in run:
                key, start = self.key(context, span), context.length
                read.append(scratch.cache.entry(key, span.token_ids, start, context.spans))
                stitched.forwarded += len(span)
                context.extend(span.token_ids, span.digest)
        stitched.unsaved += read
        return read
