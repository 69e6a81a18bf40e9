"""VLLMBackend: runs prompts on a vLLM server and relies on its prefix cache."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from kvmem.backends.vllm.model import VLLMModel
from kvmem.backends.vllm.server import Completion
from kvmem.cancellation import Cancellation
from kvmem.errors import InputError
from kvmem.kv.entry import EntryInfo
from kvmem.library.request import Request
from kvmem.library.threads import Branch, Turn
from kvmem.model.local import LanguageModel
from kvmem.options import Blend, Sampling
from kvmem.prompt.json_schema import narrow_for
from kvmem.prompt.span import Span
from kvmem.results import Answer, Prefill, Timings, Usage
from kvmem.runtime.channel import Listener, Silent
from kvmem.settings import BlendSettings

# Number of recent prompts remembered, so that later ones can start the same way.
_RECENT = 128
# Maximum number of chunk digests remembered as read. Forgotten chunks are read again when they are added again.
_KNOWN = 200_000
# Overrides the sampling defaults of the checkpoint, which the caller did not ask for.
_NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class VLLMBackend:
    """Sends whole prompts as token ids, with the namespace as cache salt.

    The server reuses only the part that a prompt shares with an earlier one from the start. It cannot blend, so
    everything after the first difference is computed.
    """

    reorders = True
    limitation = None

    def __init__(self, model: VLLMModel, namespace: str, blend: BlendSettings) -> None:
        self._model, self._namespace, self._blend = model, namespace, blend
        self._recent: OrderedDict[tuple[str, ...], Sequence[Span]] = OrderedDict()
        self._read: set[str] = set()
        self._lock = threading.Lock()

    @property
    def local_model(self) -> LanguageModel:
        """Raises InputError."""
        raise InputError(f"{self._model.name} runs on a server, and this needs a model in this process.")

    def parse_blend(self, blend: Blend) -> BlendSettings:
        """See `Backend`. Raises InputError: a server does not blend."""
        if blend is not None:
            raise InputError(f"{self._model.name} reuses prefixes and does not blend. Leave blend out.")
        return self._blend

    def resolve(self, blend: BlendSettings) -> BlendSettings:
        """See `Backend`."""
        return blend

    def arrange(self, before: Sequence[Span], groups: Sequence[Sequence[Span]]) -> list[int]:
        """Order the groups so that the prompt shares as many cache blocks as possible with a recent prompt."""
        with self._lock:
            recent = list(self._recent.values())
        start = [span.digest for span in before]
        fixed = sum(map(len, before))
        best, best_blocks = list(range(len(groups))), fixed // self._model.block_size
        for spans in reversed(recent):
            if [span.digest for span in spans[: len(start)]] != start:
                continue
            order, shared = _follow(spans[len(start) :], groups)
            blocks = (fixed + shared) // self._model.block_size
            if order and blocks > best_blocks:
                best, best_blocks = order, blocks
        return best

    def has_read(self, span: Span) -> bool:
        return span.digest in self._read

    def known(self, span: Span) -> list[EntryInfo]:
        return []

    def forget(self, span: Span) -> None:
        """Forget that a span was read. The server evicts it later; until then only this namespace's salt hits it."""
        self._read.discard(span.digest)

    def read(self, spans: Sequence[Span], cancellation: Cancellation, in_place: frozenset[str] = frozenset()) -> None:
        ids = [token for span in spans for token in span.token_ids][: self._model.window - 1]
        options = {"max_tokens": 1, "temperature": 0.0}
        extra = {"cache_salt": self._namespace}
        server = self._model.server
        server.run(server.complete(ids, options, extra, lambda _: None, cancellation))
        self._note(spans)

    def answer(
        self,
        request: Request,
        blend: BlendSettings,
        sampling: Sampling,
        listener: Listener,
        cancellation: Cancellation,
        conversation: bool = False,
    ) -> tuple[Answer, Turn | None]:
        server = self._model.server
        prompt = request.prompt
        found = server.run(self._complete(prompt.token_ids, sampling, listener, cancellation))
        self._note(prompt.spans)
        turn = None
        if conversation and found.finish_reason != "cancelled":
            ids = (*prompt.token_ids, *found.token_ids[:-1])
            turn = Turn(Branch(ids, (len(ids),)), prompt.said)
        return _answer(request, found), turn

    def answer_all(
        self, requests: Sequence[Request], blend: BlendSettings, sampling: Sampling, cancellation: Cancellation
    ) -> list[Answer]:
        """Answer concurrently. The first prompt runs alone, so that the others find the shared part cached."""
        limit = asyncio.Semaphore(self._model.parallel)

        async def one(request: Request) -> Completion:
            async with limit:
                return await self._complete(request.prompt.token_ids, sampling, Silent(), cancellation)

        async def all_of() -> list[Completion]:
            first = await one(requests[0])
            rest = [asyncio.ensure_future(one(request)) for request in requests[1:]]
            try:
                return [first, *await asyncio.gather(*rest)]
            except BaseException:
                # The other answers are no longer needed.
                for task in rest:
                    task.cancel()
                await asyncio.gather(*rest, return_exceptions=True)
                raise

        if not requests:
            return []
        found = self._model.server.run(all_of())
        cancellation.check()
        for request in requests:
            self._note(request.prompt.spans)
        return [_answer(request, completion) for request, completion in zip(requests, found, strict=True)]

    def prefill(self, request: Request, blend: BlendSettings, cancellation: Cancellation) -> Prefill:
        raise InputError(
            "prefill() is not available: a vLLM server does not return KV tensors. Use ask(), or a local model."
        )

    def release(self) -> None:
        with self._lock:
            self._recent.clear()
        self._read.clear()

    def close(self) -> None:
        self.release()

    def _note(self, spans: Sequence[Span]) -> None:
        with self._lock:
            name = tuple(span.digest for span in spans)
            self._recent[name] = spans
            self._recent.move_to_end(name)
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        if len(self._read) > _KNOWN:
            self._read.clear()
        self._read.update(span.digest for span in spans if span.document is not None)

    async def _complete(
        self, token_ids: Sequence[int], sampling: Sampling, listener: Listener, cancellation: Cancellation
    ) -> Completion:
        options: dict[str, Any] = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        optional = {"top_p": sampling.top_p, "stop": list(sampling.stop) or None, "seed": sampling.seed}
        options |= {name: value for name, value in optional.items() if value is not None}
        drawn = {"top_k": sampling.top_k, "min_p": sampling.min_p, "repetition_penalty": sampling.repetition_penalty}
        given = {name: value for name, value in drawn.items() if value is not None}
        extra: dict[str, Any] = {**_NEUTRAL, **given, **sampling.extra, "cache_salt": self._namespace}
        if sampling.marks and self._model.mark_ids:
            extra["skip_special_tokens"] = False
        if sampling.schema is not None:
            schema = narrow_for(self._model, sampling.schema, sampling.max_tokens)
            extra["structured_outputs"] = {"json": schema}
        return await self._model.server.complete(token_ids, options, extra, listener.text, cancellation)


def _follow(spans: Sequence[Span], groups: Sequence[Sequence[Span]]) -> tuple[list[int], int]:
    """The order of `groups` that shares the longest prefix with `spans`, and that prefix's length in tokens.

    The order is empty if nothing is shared.
    """
    rest = {number: [span.digest for span in group] for number, group in enumerate(groups)}
    order: list[int] = []
    shared = place = 0
    while rest and place < len(spans):
        ahead = [span.digest for span in spans[place:]]
        same = {n: len(_common(digests, ahead)) for n, digests in rest.items()}
        number = max(same, key=lambda n: same[n])
        if not same[number]:
            break
        order.append(number)
        shared += sum(map(len, groups[number][: same[number]]))
        whole = same[number] == len(rest.pop(number))
        place += same[number]
        if not whole:
            break
    return [*order, *sorted(rest)] if order else [], shared


def _common(first: Sequence[str], second: Sequence[str]) -> Sequence[str]:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return [one for one, _ in pairs]


def _answer(request: Request, found: Completion) -> Answer:
    usage = Usage(
        exact=found.cached,
        reused=0,
        recomputed=0,
        computed=found.prompt - found.cached,
        generated=found.generated,
        token_layers=0,
    )
    timings = Timings(
        prepare=request.prepared - request.started,
        stitch=0.0,
        repair=found.first_token - request.prepared,
        first_token=found.first_token - request.started,
        total=time.perf_counter() - request.started,
    )
    return Answer(found.text, request.sources, usage, request.plan, timings, found.finish_reason)
