"""Runner: from a planned prompt to an answer, on a buffer that is kept from one prompt to the next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from kvmem.answer import Answer, Prefill, Timings
from kvmem.batch import generate_together
from kvmem.blend import count_usage, plan_repair, plan_shared_repair
from kvmem.compose import Composer, Resident, Stitched
from kvmem.entry import Context, EntryInfo
from kvmem.generate import Sampling, generate
from kvmem.model import LanguageModel
from kvmem.prompt import Span
from kvmem.request import Request
from kvmem.settings import BlendSettings
from kvmem.store.base import Store
from kvmem.stream import Deadline, Listener
from kvmem.thread import Branch, Turn


class Runner:
    """Runs one prompt at a time; not for several threads at once."""

    def __init__(self, model: LanguageModel, store: Store, composer: Composer) -> None:
        self._model, self._store, self._composer = model, store, composer
        self._resident: Resident | None = None

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

    def read(self, spans: Sequence[Span], in_place: str | None = None) -> None:
        """Bring `spans` into the store; see `Composer.compose`."""
        self._keep(self._stitch(spans, in_place=in_place))

    def answer(
        self,
        request: Request,
        blend: BlendSettings,
        sampling: Sampling,
        listener: Listener,
        conversation: bool = False,
    ) -> tuple[Answer, Turn | None]:
        """Stitch, repair, generate, and store what was read.

        conversation: the query and the answer are stored, too, if all is exact, and what the turn left behind is
            returned. It is None when the answer was cancelled.
        """
        prompt = request.prompt
        with self._model.giving_up(listener.cancelled):
            stitched = self._stitch(prompt.spans, prompt.query, spare=sampling.max_tokens)
            after_stitch = time.perf_counter()
            try:
                repair = plan_repair(self._model, stitched, prompt.query, blend)
                first = repair.as_first_forward(self._model, stitched.cache)
                generated = generate(self._model, stitched.cache, prompt.token_ids, sampling, listener, first)
            except BaseException:
                # Nothing says that the repair was run: what was approximate still is.
                self._keep(stitched)
                raise
        self._keep(stitched, blend, (*prompt.query, *generated.token_ids))
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
        self, requests: Sequence[Request], blend: BlendSettings, sampling: Sampling, deadline: Deadline
    ) -> list[Answer]:
        """Answer all, in their order: those whose prompts differ in the query alone together, if the model can."""
        groups: dict[tuple[Span, ...], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(request.prompt.spans, []).append(number)
        answers: dict[int, Answer] = {}
        for members in groups.values():
            chosen = [requests[number] for number in members]
            if len(chosen) > 1 and self._model.blendable and not self._model.anatomy.recurrent:
                found = self._answer_together(chosen, blend, sampling, deadline)
            else:
                found = [self.answer(request, blend, sampling, deadline)[0] for request in chosen]
            deadline.check()
            answers.update(zip(members, found, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _answer_together(
        self, requests: Sequence[Request], blend: BlendSettings, sampling: Sampling, deadline: Deadline
    ) -> list[Answer]:
        """Answer requests whose prompts differ in the query alone. What is read and repaired for all of them is counted
        as the work of the first. The model can be blended."""
        spans = requests[0].prompt.spans
        stitched = self._stitch(spans, spare=max(len(request.prompt.query) for request in requests))
        after_stitch = time.perf_counter()
        queries = [request.prompt.query for request in requests]
        try:
            repair = plan_shared_repair(self._model, stitched, queries, blend)
            if repair.step is not None:
                repair.run(self._model, stitched.cache)
            found = generate_together(self._model, stitched.cache, stitched.token_ids, queries, sampling, deadline)
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

    def prefill(self, request: Request, blend: BlendSettings) -> Prefill:
        """Stitch, repair and read the question; the buffer is the caller's from there on."""
        stitched = self._stitch(request.prompt.spans, request.prompt.query)
        after_stitch = time.perf_counter()
        repair = plan_repair(self._model, stitched, request.prompt.query, blend)
        logits = repair.run(self._model, stitched.cache)
        ready = time.perf_counter()
        self._save(stitched, blend)
        timings = _timings(request, after_stitch, ready)
        usage = count_usage(self._model, stitched, repair, 0)
        token_ids = torch.tensor(request.prompt.token_ids, dtype=torch.long)
        return Prefill(token_ids, stitched.cache, logits, usage, request.plan, timings)

    def release(self) -> None:
        """Forget the buffer."""
        self._resident = None

    def close(self) -> None:
        self.release()

    def _stitch(
        self, spans: Sequence[Span], query: Sequence[int] = (), spare: int = 0, in_place: str | None = None
    ) -> Stitched:
        resident, self._resident = self._resident, None
        capacity = sum(map(len, spans)) + len(query) + spare
        return self._composer.compose(spans, capacity, resident, in_place, query)

    def _keep(self, stitched: Stitched, blend: BlendSettings | None = None, after: Sequence[int] = ()) -> None:
        """Store what is new, and keep the buffer's exact rows for the next prompt.

        after: tokens that were read or generated behind the spans.
        """
        self._save(stitched, blend)
        exact = stitched.token_ids[: stitched.exact_end]
        if after and not stitched.segments:
            exact = [*exact, *after][: stitched.cache.length]
        self._resident = Resident(stitched.cache, tuple(exact))

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
