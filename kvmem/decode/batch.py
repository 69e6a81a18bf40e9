"""Decode several answers at once after a shared prefix, with transformers' own `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from kvmem.cancellation import NEVER, Cancellation
from kvmem.decode.generate import Generated, call_generate, cut_at_stop, ends
from kvmem.decode.shared import SharedCache, left_padded
from kvmem.errors import InputError
from kvmem.kv.buffer import BlendedCache
from kvmem.model.local import LanguageModel
from kvmem.options import Sampling
from kvmem.results import FinishReason


def generate_together(
    model: LanguageModel,
    prefix: BlendedCache,
    prefix_ids: Sequence[int],
    queries: Sequence[Sequence[int]],
    sampling: Sampling,
    cancellation: Cancellation = NEVER,
) -> list[Generated]:
    """Answer every query after `prefix_ids`, whose KV is in `prefix` and is not modified. Raises InputError."""
    if sampling.schema is not None:
        raise InputError("A batch does not support a JSON schema. Ask the questions one at a time.")
    end = ends(model, sampling)
    rows, padding = left_padded(queries, end[0], model.device)
    before = torch.tensor(list(prefix_ids), device=model.device).expand(len(queries), -1)
    prompt = torch.cat([before, rows], dim=1)
    seen = torch.ones_like(prompt)
    places = torch.arange(rows.shape[1], device=model.device)
    seen[:, len(prefix_ids) :] = (places >= padding[:, None]).long()
    cache = SharedCache(prefix, padding, rows.shape[1] + sampling.max_tokens)
    watch = _Watch(model, sampling, prompt.shape[1], cancellation)
    with cache.attending(model):
        found = call_generate(
            model,
            sampling,
            (),
            input_ids=prompt,
            attention_mask=seen,
            past_key_values=cache,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
    return [_read(model, ids, end, sampling, watch.first_token) for ids in found[:, prompt.shape[1] :].tolist()]


def _read(model: LanguageModel, ids: list[int], end: list[int], sampling: Sampling, first_token: float) -> Generated:
    """One answer: `ids` up to the first end token or stop string; the padding after it is dropped."""
    kept = list(takewhile(lambda token: token not in end, ids))
    kept += ids[len(kept) : len(kept) + 1]
    stopped, text = _cut(model, kept, sampling)
    if stopped:
        # transformers pads a row that has ended.
        kept = kept[: 1 + next(n for n in range(len(kept)) if _cut(model, kept[: n + 1], sampling)[0])]
    reason: FinishReason = "stop" if stopped or kept[-1] in end else "length"
    return Generated(text, tuple(kept), reason, first_token)


def _cut(model: LanguageModel, ids: list[int], sampling: Sampling) -> tuple[bool, str]:
    return cut_at_stop(model.decode(ids, marks=sampling.marks), sampling.stop)


class _Watch(StoppingCriteria):
    """Ends each row at its stop string, ends all rows on cancellation, and records the time of the first token."""

    def __init__(self, model: LanguageModel, sampling: Sampling, prompt: int, cancellation: Cancellation) -> None:
        self._cancellation = cancellation
        self._decode = partial(model.decode, marks=sampling.marks)
        self._stop, self._prompt = sampling.stop, prompt
        self.first_token = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.first_token = self.first_token or time.perf_counter()
        over = self._cancellation.stopped
        done = [over or self._has_stopped(row) for row in input_ids[:, self._prompt :].tolist()]
        return torch.tensor(done, device=input_ids.device)

    def _has_stopped(self, ids: list[int]) -> bool:
        return bool(self._stop) and cut_at_stop(self._decode(ids), self._stop)[0]
