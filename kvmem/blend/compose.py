"""Compose a prompt: place its spans left to right, each from the best available entry.

As long as everything so far is exact, a span's exact entry is used if the store has it; a span without any entry is
prefilled in place, which is exact, and stored. From the first approximate span on, the entry with the closest context
is used; spans without any entry are prefilled behind the preamble, stored, and composed like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

from kvmem.blend.stitched import Origin, Placed, Resident, Stitched
from kvmem.cancellation import NEVER, Cancellation
from kvmem.errors import PromptTooLongError
from kvmem.kv.entry import Context, EntryInfo, EntryKey, KVEntry
from kvmem.model.local import LanguageModel
from kvmem.prompt.span import Span
from kvmem.store.base import Store


@dataclass
class Allowance:
    """What may be read in place although there are entries of other contexts, so that it is exact from then on.

    Attributes:
        tokens: How many tokens.
        one_span: Whether one span may be read however long it is.
    """

    tokens: int = 0
    one_span: bool = False

    def take(self, size: int) -> bool:
        """Whether `size` more tokens may be read; they are then used up."""
        if size > self.tokens and not self.one_span:
            return False
        self.tokens, self.one_span = max(0, self.tokens - size), False
        return True


class Composer:
    """Composes prompts for one model, one store and one namespace."""

    def __init__(self, model: LanguageModel, store: Store, namespace: str, preamble: Span) -> None:
        self._model, self._store, self._namespace = model, store, namespace
        self._preamble = preamble

    def key(self, context: Context, span: Span) -> EntryKey:
        return EntryKey(self._namespace, self._model.fingerprint, context.digest, span.digest)

    def make_exact(self, stitched: Stitched) -> None:
        """Mark every row of `stitched` as exact, after all of them were recomputed in place."""
        context = Context()
        for item in stitched.placed:
            if item.end > stitched.exact_end:
                key = self.key(context, item.span)
                entry = stitched.cache.entry(key, item.span.token_ids, item.start, context.spans)
                stitched.unsaved.append(entry)
            context.extend(item.span.token_ids, item.span.digest)
        stitched.exact_end = context.length

    def known(self, span: Span) -> list[EntryInfo]:
        """All entries for these tokens in this namespace, in any context."""
        return self._store.find(self.key(Context(), span))

    def forget(self, span: Span) -> None:
        """Delete all entries for these tokens in this namespace."""
        for info in self.known(span):
            self._store.delete(info.key)

    def arrange(self, before: Sequence[Span], groups: Sequence[Sequence[Span]]) -> list[int]:
        """An order of `groups` after `before` that makes more of the prompt exact.

        Greedy: always takes the group with the most exact tokens next. Groups without any keep their order.
        """
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
        """`context`, extended by the leading `spans` that have an exact entry."""
        context = context.copy()
        for span in takewhile(lambda span: self._store.contains(self.key(context, span)), spans):
            context.extend(span.token_ids, span.digest)
        return context

    def compose(
        self,
        spans: Sequence[Span],
        capacity: int,
        resident: Resident | None = None,
        in_place: frozenset[str | None] = frozenset(),
        query: Sequence[int] = (),
        cancellation: Cancellation = NEVER,
        allowance: Allowance | None = None,
    ) -> Stitched:
        """Compose `spans` (the prefix first) in a buffer of at least `capacity` rows.

        Args:
            spans: The spans, in prompt order.
            capacity: Minimum number of rows.
            resident: A buffer to take over. The result uses it, including the query tokens it holds after the spans.
            in_place: Ids of documents whose spans are prefilled in place if everything before them is exact, even if
                the store has the same tokens in another context; None for spans that belong to no document.
            query: The token ids that follow the spans.
            cancellation: Of the work.
            allowance: More spans to prefill in place.
        """
        reads = _Reads(self._candidates, in_place, allowance or Allowance())
        if resident is not None and resident.cache.recurrent:
            resident = None  # a recurrent state cannot be rewound
        if resident is not None:
            resident.cache.length = len(resident.token_ids)
            resident.cache.reserve(capacity)
        cache = resident.cache if resident is not None else self._model.new_cache(capacity)
        cache.cancellation = cancellation
        cache.length = 0
        stitched = Stitched(cache)
        context = Context()
        rest = list(spans)
        while rest:
            held = 0 if resident is None else resident.shared(rest[0].token_ids, cache.length)
            if held < len(rest[0]):
                resident = None  # its remaining rows were computed in another context
            placed = self._place_exact(stitched, context, rest, held, reads)
            if not placed:
                break
            del rest[:placed]
        stitched.exact_end = cache.length
        if rest:
            self._place_approximate(stitched, context, rest)
        elif resident is not None:
            # The last token of the query always runs through the model: its output is the first token of the answer.
            stitched.known = resident.shared(query[:-1], cache.length)
            cache.length += stitched.known
        cache.load_ahead()
        return stitched

    def _place_exact(
        self, stitched: Stitched, context: Context, spans: Sequence[Span], held: int, reads: _Reads
    ) -> int:
        """Place the first of `spans` exactly, from the resident buffer, from the store, or by prefilling it.

        A prefill also covers the following spans that need one. Returns the number of spans placed, 0 if the first one
        is approximate.

        held: how many of the first span's tokens the buffer holds already.
        """
        cache, span, start = stitched.cache, spans[0], stitched.cache.length
        key = self.key(context, span)
        if held == len(span):
            cache.length = start + len(span)
            if not self._store.contains(key):
                stitched.unsaved.append(cache.entry(key, span.token_ids, start, context.spans))
        elif (entry := self._store.get(key)) is not None:
            cache.load(entry, start)
            cache.length = start + len(span)
        elif start > 0 and not reads.wants(span):
            return 0
        else:
            run = [span] if cache.recurrent else self._cold_run(context, spans, reads)
            cache.length = start + held
            self._model.append([token for item in run for token in item.token_ids][held:], cache)
            for item in run:
                read = cache.entry(self.key(context, item), item.token_ids, start, context.spans)
                stitched.unsaved.append(read)
                stitched.placed.append(Placed(item, start, "computed", held))
                stitched.forwarded += len(item) - held
                held = 0
                context.extend(item.token_ids, item.digest)
                start += len(item)
            return len(run)
        stitched.placed.append(Placed(span, start, "exact"))
        context.extend(span.token_ids, span.digest)
        return 1

    def _cold_run(self, context: Context, spans: Sequence[Span], reads: _Reads) -> list[Span]:
        """The first of `spans`, which needs a prefill, and the spans directly after it that need one as well.

        Not for models with recurrent layers: their state is known only at the end of a forward pass.
        """
        context, run = context.copy(), [spans[0]]
        for span in spans[1:]:
            context.extend(run[-1].token_ids, run[-1].digest)
            # `get`, not `contains`: it removes a damaged entry.
            if self._store.get(self.key(context, span)) is not None or not reads.wants(span):
                break
            run.append(span)
        return run

    def _candidates(self, span: Span) -> list[EntryInfo]:
        return self.known(span) if self._model.blendable else []

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
        """Whether `span` belongs to `document` and has no entry that can be used."""
        return span.document == document and not self._candidates(span)

    def _best(self, span: Span, before: tuple[str, ...]) -> KVEntry | None:
        """The entry of `span` whose context is closest to `before`.

        Prefers the longest run of equal spans directly before it, then the same first span, then the shortest context.
        """
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
        """Prefill consecutive chunks of one document behind the preamble, starting over when the window is full."""
        read: list[KVEntry] = []
        pending = list(spans)
        while pending:
            room = self._model.window
            needed = len(self._preamble) + sum(len(span) for span in pending)
            scratch = self.compose([self._preamble], min(room, needed), cancellation=stitched.cache.cancellation)
            stitched.forwarded += scratch.forwarded
            stitched.unsaved += scratch.unsaved
            context = Context()
            context.extend(self._preamble.token_ids, self._preamble.digest)
            if context.length + len(pending[0]) > room:
                raise PromptTooLongError(
                    f"A chunk of {len(pending[0])} tokens is longer than the model's window of {room}. "
                    "Use smaller chunks, or let kvmem split the text."
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


@dataclass
class _Reads:
    """Decides which spans are prefilled in place, given that everything before them is exact."""

    candidates: Callable[[Span], list[EntryInfo]]
    in_place: frozenset[str | None]
    allowance: Allowance

    def wants(self, span: Span) -> bool:
        """Whether to prefill `span`; asked once for each."""
        return span.document in self.in_place or not self.candidates(span) or self.allowance.take(len(span))
