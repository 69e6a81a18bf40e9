"""Runner: from a planned prompt to an answer, on a buffer that is kept from one prompt to the next."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from kvmem.answer import Answer, Prefill, Timings
from kvmem.blend import count_usage, plan_repair
from kvmem.compose import Composer, Resident, Stitched
from kvmem.generate import Sampling, generate
from kvmem.model import LanguageModel
from kvmem.prompt import Span
from kvmem.request import Request
from kvmem.settings import BlendSettings
from kvmem.store.base import Store
from kvmem.stream import Listener


class Runner:
    """Runs one prompt at a time; not for several threads at once."""

    def __init__(self, model: LanguageModel, store: Store, composer: Composer) -> None:
        self._model, self._store, self._composer = model, store, composer
        self._resident: Resident | None = None

    def read(self, spans: Sequence[Span], in_place: str | None = None) -> None:
        """Bring `spans` into the store; see `Composer.compose`."""
        self._keep(self._stitch(spans, in_place=in_place))

    def answer(self, request: Request, blend: BlendSettings, sampling: Sampling, listener: Listener) -> Answer:
        """Stitch, repair, generate, and store what was read."""
        prompt = request.prompt
        stitched = self._stitch(prompt.spans, prompt.query, spare=sampling.max_tokens)
        after_stitch = time.perf_counter()
        repair = plan_repair(self._model, stitched, prompt.query, blend)
        first = repair.as_first_forward(self._model, stitched.cache)
        try:
            generated = generate(self._model, stitched.cache, prompt.token_ids, sampling, listener, first)
        except BaseException:
            # Nothing says that the repair was run: what was approximate still is.
            self._keep(stitched)
            raise
        self._keep(stitched, blend, (*prompt.query, *generated.token_ids))
        return Answer(
            text=generated.text,
            sources=request.sources,
            usage=count_usage(self._model, stitched, repair, len(generated.token_ids)),
            plan=request.plan,
            timings=_timings(request, after_stitch, generated.first_token),
            finish_reason=generated.finish_reason,
        )

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
