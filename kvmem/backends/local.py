"""LocalBackend: from a planned prompt to an answer, on a buffer that is kept from one prompt to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kvmem.backends.resident import Residents
from kvmem.blend.compose import Allowance, Composer
from kvmem.blend.repair import count_usage, plan_repair, plan_shared_repair
from kvmem.blend.stitched import Resident, Stitched
from kvmem.cancellation import NEVER, Cancellation
from kvmem.decode.batch import generate_together
from kvmem.decode.generate import generate
from kvmem.kv.entry import Context, EntryInfo
from kvmem.library.request import Request
from kvmem.library.threads import Branch, Turn
from kvmem.model.local import LanguageModel
from kvmem.options import Blend, Sampling
from kvmem.prompt.span import Span
from kvmem.results import Answer, Prefill, Timings
from kvmem.runtime.channel import Listener, Silent
from kvmem.settings import BlendSettings
from kvmem.store.base import Store


class LocalBackend:
    """Runs a model in this process, one prompt at a time; not for several threads at once.

    Args:
        blend: the engine's settings. find_recompute: what `recompute="auto"` stands for, found by a check of the model.
    """

    reorders = False

    def __init__(
        self,
        model: LanguageModel,
        store: Store,
        composer: Composer,
        blend: BlendSettings,
        find_recompute: Callable[[], float],
        buffer_bytes: int = 0,
    ) -> None:
        self._model, self._store, self._composer = model, store, composer
        self._blend, self._find_recompute = blend, find_recompute
        self._residents = Residents(model.bytes_per_token, buffer_bytes)
        # What the buffers were computed with.
        self._fingerprint = model.fingerprint

    @property
    def local_model(self) -> LanguageModel:
        """The model."""
        return self._model

    @property
    def limitation(self) -> str | None:
        """See `Backend`."""
        return None if self._model.blendable else self._model.anatomy.reason

    def parse_blend(self, blend: Blend) -> BlendSettings:
        """See `Backend`."""
        return self._blend if blend is None else BlendSettings.parse(blend)

    def resolve(self, blend: BlendSettings) -> BlendSettings:
        """With a number for "auto"; the first time, this checks the model."""
        if blend.recompute != "auto":
            return blend
        return blend.model_copy(update={"recompute": self._find_recompute()})

    def arrange(self, before: Sequence[Span], groups: Sequence[Sequence[Span]]) -> list[int]:
        """See `Composer.arrange`."""
        return self._composer.arrange(before, groups)

    def has_read(self, span: Span) -> bool:
        """Whether there is an entry of these tokens, in whatever context."""
        return bool(self._composer.known(span))

    def known(self, span: Span) -> list[EntryInfo]:
        """Every entry of these tokens in this namespace."""
        return self._composer.known(span)

    def forget(self, span: Span) -> None:
        """Delete every entry of these tokens in this namespace."""
        self._composer.forget(span)

    def read(
        self, spans: Sequence[Span], cancellation: Cancellation, in_place: frozenset[str | None] = frozenset()
    ) -> None:
        """Bring `spans` into the store; see `Composer.compose`."""
        self._keep(self._stitch(spans, cancellation, in_place=in_place))

    def answer(
        self,
        request: Request,
        blend: BlendSettings,
        sampling: Sampling,
        listener: Listener,
        cancellation: Cancellation,
        conversation: bool = False,
    ) -> tuple[Answer, Turn | None]:
        """Stitch, repair, generate, and store what was read.

        conversation: the query and the answer are stored, too, if all is exact, and what the turn left behind is
            returned. It is None when the answer was cancelled.
        """
        prompt = request.prompt
        spare = sampling.max_tokens
        allowance = None
        if request.lasting and blend.selector != "none" and blend.share > 0:
            # This costs about as much as repairing, and its effect lasts.
            allowance = Allowance(int(blend.share * len(prompt.token_ids)), one_span=True)
        stitched = self._stitch(prompt.spans, cancellation, prompt.query, spare, request.in_place, allowance)
        after_stitch = time.perf_counter()
        try:
            repair = plan_repair(self._model, stitched, prompt.query, blend)
            first = repair.as_first_forward(self._model, stitched.cache)
            generated = generate(
                self._model, stitched.cache, prompt.token_ids, sampling, listener.text, cancellation, first
            )
        except BaseException:
            # Nothing says that the repair was run: what was approximate still is.
            self._keep(stitched)
            raise
        after = (*prompt.query, *generated.token_ids)
        self._keep(stitched, blend, after, len(prompt.token_ids), request.conversation)
        turn = None
        if conversation and generated.finish_reason != "cancelled":
            turn = self._keep_turn(stitched, prompt.said, (*prompt.query, *generated.token_ids))
        answer = Answer(
            text=generated.text,
            sources=request.sources,
            usage=count_usage(self._model, stitched, repair, len(generated.token_ids)),
            plan=request.plan,
            timings=_timings(request, after_stitch, generated.first_token),
            finish_reason=generated.finish_reason,
        )
        return answer, turn

    def _keep_turn(self, stitched: Stitched, spans: frozenset[str], after: tuple[int, ...]) -> Turn:
        """Store what was read and said behind exact spans; the last token said was not read."""
        if stitched.segments:
            return Turn(None, spans)
        start, end = len(stitched.token_ids), stitched.cache.length
        tail = Span(after[: end - start])
        context = Context()
        for item in stitched.placed:
            context.extend(item.span.token_ids, item.span.digest)
        key = self._composer.key(context, tail)
        self._store.put(stitched.cache.entry(key, tail.token_ids, start, context.spans))
        branch = Branch((*stitched.token_ids, *tail.token_ids), (*(item.end for item in stitched.placed), end))
        return Turn(branch, spans | {tail.digest})

    def answer_all(
        self, requests: Sequence[Request], blend: BlendSettings, sampling: Sampling, cancellation: Cancellation
    ) -> list[Answer]:
        """Answer all, in their order: those whose prompts differ in the query alone together, if the model can."""
        groups: dict[tuple[Span, ...], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(request.prompt.spans, []).append(number)
        answers: dict[int, Answer] = {}
        for members in groups.values():
            chosen = [requests[number] for number in members]
            if len(chosen) > 1 and self._model.blendable and not self._model.anatomy.recurrent:
                found = self._answer_together(chosen, blend, sampling, cancellation)
            else:
                found = [self.answer(request, blend, sampling, Silent(), cancellation)[0] for request in chosen]
            cancellation.check()
            answers.update(zip(members, found, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _answer_together(
        self, requests: Sequence[Request], blend: BlendSettings, sampling: Sampling, cancellation: Cancellation
    ) -> list[Answer]:
        """Answer requests whose prompts differ in the query alone. What is read and repaired for all of them is counted
        as the work of the first. The model can be blended."""
        spans = requests[0].prompt.spans
        stitched = self._stitch(spans, cancellation, spare=max(len(request.prompt.query) for request in requests))
        after_stitch = time.perf_counter()
        queries = [request.prompt.query for request in requests]
        try:
            repair = plan_shared_repair(self._model, stitched, queries, blend)
            if repair.step is not None:
                repair.run(self._model, stitched.cache)
            found = generate_together(self._model, stitched.cache, stitched.token_ids, queries, sampling, cancellation)
        except BaseException:
            self._keep(stitched)
            raise
        self._keep(stitched, blend)
        answers = []
        for number, (request, generated) in enumerate(zip(requests, found, strict=True)):
            count = len(generated.token_ids)
            usage = count_usage(self._model, stitched, repair, count, query=len(request.prompt.query))
            if number:
                usage = replace(usage, token_layers=len(request.prompt.query) * self._model.depth)
            timings = _timings(request, after_stitch, generated.first_token)
            plan, reason = request.plan, generated.finish_reason
            answers.append(Answer(generated.text, request.sources, usage, plan, timings, reason))
        return answers

    def prefill(self, request: Request, blend: BlendSettings, cancellation: Cancellation) -> Prefill:
        """Stitch, repair and read the question; the buffer is the caller's from there on."""
        stitched = self._stitch(request.prompt.spans, cancellation, request.prompt.query)
        after_stitch = time.perf_counter()
        repair = plan_repair(self._model, stitched, request.prompt.query, blend)
        logits = repair.run(self._model, stitched.cache)
        ready = time.perf_counter()
        self._save(stitched, blend)
        stitched.cache.cancellation = NEVER
        timings = _timings(request, after_stitch, ready)
        usage = count_usage(self._model, stitched, repair, 0)
        token_ids = torch.tensor(request.prompt.token_ids, dtype=torch.long)
        return Prefill(token_ids, stitched.cache, logits, usage, request.plan, timings)

    def release(self) -> None:
        """Forget the buffer."""
        self._residents.clear()

    def close(self) -> None:
        self.release()

    def _stitch(
        self,
        spans: Sequence[Span],
        cancellation: Cancellation,
        query: Sequence[int] = (),
        spare: int = 0,
        in_place: frozenset[str | None] = frozenset(),
        allowance: Allowance | None = None,
    ) -> Stitched:
        if self._fingerprint != self._model.fingerprint:
            self.release()
            self._fingerprint = self._model.fingerprint
        ids = [token for span in spans for token in span.token_ids]
        resident = self._residents.take([*ids, *query])
        capacity = len(ids) + len(query) + spare
        if resident is None and (close := self._residents.closest([*ids, *query])) is not None:
            donor, shared = close
            cache = self._model.new_cache(capacity)
            cache.copy_rows(donor.cache, shared)
            resident = Resident(cache, donor.token_ids[:shared])
        return self._composer.compose(spans, capacity, resident, in_place, query, cancellation, allowance)

    def _keep(
        self,
        stitched: Stitched,
        blend: BlendSettings | None = None,
        after: Sequence[int] = (),
        prompt: int = 0,
        conversation: bool = False,
    ) -> None:
        """Store what is new, and keep the buffer's exact rows for a later prompt.

        after: tokens behind the spans: the query, and what was generated. prompt: tokens of the prompt.
        """
        self._save(stitched, blend)
        stitched.cache.cancellation = NEVER
        exact = stitched.token_ids[: stitched.exact_end]
        if after and not stitched.segments:
            exact = [*exact, *after][: stitched.cache.length]
        self._residents.keep(Resident(stitched.cache, tuple(exact), prompt, conversation))

    def _save(self, stitched: Stitched, blend: BlendSettings | None) -> None:
        if blend is not None and blend.selector == "all":
            self._composer.make_exact(stitched)
        for entry in stitched.unsaved:
            self._store.put(entry)


def _timings(request: Request, after_stitch: float, first_token: float) -> Timings:
    return Timings(
        prepare=request.prepared - request.started,
        stitch=after_stitch - request.prepared,
        repair=first_token - after_stitch,
        first_token=first_token - request.started,
        total=time.perf_counter() - request.started,
    )
