"""VLLMBackend: answers by a vLLM server, which keeps what it has read in a prefix cache of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from kvmem.answer import Answer, Prefill, Timings, Usage
from kvmem.entry import EntryInfo
from kvmem.errors import InputError
from kvmem.generate import Sampling
from kvmem.narrow import narrow_for
from kvmem.prompt import Span
from kvmem.request import Request
from kvmem.settings import BlendSettings
from kvmem.stream import Deadline, Listener
from kvmem.thread import Branch, Turn
from kvmem.vllm.model import VLLMModel
from kvmem.vllm.server import Completion

# Prompts that are remembered, to make others begin like them.
_RECENT = 128
# Chunks that are known to have been read; those that were forgotten are read again when they are added again.
_KNOWN = 200_000
# What the checkpoint's own defaults would change, and a caller did not ask for.
_NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class VLLMBackend:
    """Whole prompts go out, as token ids, salted with the namespace; what they share with earlier ones from their
    beginning on is not read again. Nothing is moved or repaired there: what stands elsewhere is read anew."""

    def __init__(self, model: VLLMModel, namespace: str) -> None:
        self._model, self._namespace = model, namespace
        self._recent: OrderedDict[tuple[str, ...], Sequence[Span]] = OrderedDict()
        self._read: set[str] = set()
        self._lock = threading.Lock()

    def arrange(self, before: Sequence[Span], groups: Sequence[Sequence[Span]]) -> list[int]:
        """An order in which the prompt begins like an earlier one for most blocks of the server's; then as given."""
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
        """The server lets go of it when it needs the room; until then it is reached with this namespace's salt only."""
        self._read.discard(span.digest)

    def read(self, spans: Sequence[Span], in_place: str | None = None) -> None:
        ids = [token for span in spans for token in span.token_ids][: self._model.window - 1]
        options = {"max_tokens": 1, "temperature": 0.0}
        extra = {"cache_salt": self._namespace}
        server = self._model.server
        given_up = self._model.patience()
        server.run(server.complete(ids, options, extra, lambda _: None, given_up))
        self._note(spans)

    def answer(
        self,
        request: Request,
        blend: BlendSettings,
        sampling: Sampling,
        listener: Listener,
        conversation: bool = False,
    ) -> tuple[Answer, Turn | None]:
        server = self._model.server
        prompt = request.prompt
        found = server.run(self._complete(prompt.token_ids, sampling, listener))
        self._note(prompt.spans)
        turn = None
        if conversation and found.finish_reason != "cancelled":
            ids = (*prompt.token_ids, *found.token_ids[:-1])
            turn = Turn(Branch(ids, (len(ids),)), prompt.said)
        return _answer(request, found), turn

    def answer_all(
        self, requests: Sequence[Request], blend: BlendSettings, sampling: Sampling, deadline: Deadline
    ) -> list[Answer]:
        """All at once, as many as the server takes; the first alone, so that the others find read what they share."""
        limit = asyncio.Semaphore(self._model.parallel)

        async def one(request: Request) -> Completion:
            async with limit:
                return await self._complete(request.prompt.token_ids, sampling, deadline)

        async def all_of() -> list[Completion]:
            first = await one(requests[0])
            rest = [asyncio.ensure_future(one(request)) for request in requests[1:]]
            try:
                return [first, *await asyncio.gather(*rest)]
            except BaseException:
                # Nobody will look at the others.
                for task in rest:
                    task.cancel()
                await asyncio.gather(*rest, return_exceptions=True)
                raise

        if not requests:
            return []
        found = self._model.server.run(all_of())
        deadline.check()
        for request in requests:
            self._note(request.prompt.spans)
        return [_answer(request, completion) for request, completion in zip(requests, found, strict=True)]

    def prefill(self, request: Request, blend: BlendSettings) -> Prefill:
        raise InputError("A vLLM server keeps its tensors to itself. Use ask(), or a model in this process.")

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

    async def _complete(self, token_ids: Sequence[int], sampling: Sampling, listener: Listener) -> Completion:
        options: dict[str, Any] = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        optional = {"top_p": sampling.top_p, "stop": list(sampling.stop) or None, "seed": sampling.seed}
        options |= {name: value for name, value in optional.items() if value is not None}
        extra: dict[str, Any] = {**_NEUTRAL, **sampling.extra, "cache_salt": self._namespace}
        if sampling.schema is not None:
            schema = narrow_for(self._model, sampling.schema, sampling.max_tokens)
            extra["structured_outputs"] = {"json": schema}
        return await self._model.server.complete(token_ids, options, extra, listener.text, listener.cancelled)


def _follow(spans: Sequence[Span], groups: Sequence[Sequence[Span]]) -> tuple[list[int], int]:
    """An order of `groups` that begins like `spans`, and how many tokens it shares with them; empty if none."""
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
