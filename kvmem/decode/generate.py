"""Decode with transformers' own `generate` on a filled buffer, and stream the text to a callback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from kvmem.cancellation import NEVER, Cancellation
from kvmem.decode.json_constraint import JsonConstraint
from kvmem.errors import InputError, KVMemError, ModelError, first_line
from kvmem.kv.buffer import BlendedCache
from kvmem.model.local import LanguageModel
from kvmem.options import Sampling
from kvmem.results import FinishReason


@dataclass(frozen=True)
class Generated:
    """A decoded answer.

    Attributes:
        text: The text, without the stop string, and without special tokens except those that `sampling.marks` keeps.
        token_ids: The generated token ids.
        finish_reason: Why decoding ended.
        first_token: Time of the first token (`time.perf_counter()` seconds).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    first_token: float


def generate(
    model: LanguageModel,
    cache: BlendedCache,
    token_ids: Sequence[int],
    sampling: Sampling,
    emit: Callable[[str], None],
    cancellation: Cancellation = NEVER,
    first_forward: AbstractContextManager[None] | None = None,
) -> Generated:
    """Continue `token_ids`, whose first `cache.length` tokens are in `cache`; `emit` receives each piece of text.

    Cancelling raises before the first token; afterwards it ends the answer after the current token. `first_forward` is
    a context that is open during generation; see `LanguageModel.first_forward`.
    """

    def began() -> None:
        cache.cancellation = NEVER

    streamer = _Streamer(model, sampling, emit, began)
    prompt = torch.tensor([list(token_ids)], device=model.device)
    processors = []
    if sampling.schema is not None:
        processors.append(JsonConstraint(model, sampling.schema, sampling.max_tokens, sampling.opening))
    with model.decoding(), first_forward or nullcontext():
        call_generate(
            model,
            sampling,
            processors,
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Stop(streamer, cancellation, len(token_ids))]),
        )
    reason: FinishReason = "length"
    if streamer.stopped or (streamer.token_ids and streamer.token_ids[-1] in ends(model, sampling)):
        reason = "stop"
    elif cancellation.stopped:
        reason = "cancelled"
    return Generated(streamer.text, tuple(streamer.token_ids), reason, streamer.first_token)


def call_generate(
    model: LanguageModel, sampling: Sampling, processors: Sequence[LogitsProcessor], **arguments: Any
) -> Tensor:
    """Call transformers' `generate` with exactly these sampling options. Returns token ids, int64 [batch, all]."""
    options = sampling.for_generate()
    if processors:
        options["logits_processor"] = LogitsProcessorList([*options.get("logits_processor", ()), *processors])
    with (
        torch.no_grad(),
        torch.random.fork_rng(enabled=sampling.seed is not None),
        _own_defaults(model, GenerationConfig(**_ends(model))),
    ):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        try:
            found: Tensor = model.hf.generate(**arguments, **options)
        except (KVMemError, torch.OutOfMemoryError):
            raise
        except (ValueError, TypeError) as error:
            if sampling.extra:
                raise InputError(
                    f"transformers' generate rejected its arguments: {first_line(error)}. "
                    f"Check the extra arguments: {dict(sampling.extra)!r}."
                ) from error
            raise _failed(error) from error
        except RuntimeError as error:
            raise _failed(error) from error
    return found


def _failed(error: Exception) -> ModelError:
    return ModelError(
        f"The model failed while generating: {type(error).__name__}: {first_line(error)}. "
        "The question and its arguments were not the reason; see the exception that caused this one."
    )


def ends(model: LanguageModel, sampling: Sampling) -> list[int]:
    """The tokens that end an answer."""
    end = sampling.extra.get("eos_token_id", _ends(model)["eos_token_id"])
    return end if isinstance(end, list) else [end]


@contextmanager
def _own_defaults(model: LanguageModel, config: GenerationConfig) -> Iterator[None]:
    """Hide the checkpoint's sampling defaults (repetition penalty, top_k), which would change the caller's options."""
    before = model.hf.generation_config
    model.hf.generation_config = config
    try:
        yield
    finally:
        model.hf.generation_config = before


def _ends(model: LanguageModel) -> dict[str, Any]:
    """The model's own end, padding and start tokens, as options for `generate`."""
    base = model.hf.generation_config
    end = base.eos_token_id if base.eos_token_id is not None else model.tokenizer.eos_token_id
    pad = base.pad_token_id if base.pad_token_id is not None else model.tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    return {"eos_token_id": end, "pad_token_id": pad, "bos_token_id": base.bos_token_id}


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[bool, str]:
    """Whether `text` contains a stop string, and the text before the first one."""
    hits = [text.find(string) for string in stop if string in text]
    return bool(hits), text[: min(hits)] if hits else text


class _Streamer(BaseStreamer):
    """Decodes tokens as they arrive. Holds back text that may be the beginning of a stop string."""

    def __init__(
        self, model: LanguageModel, sampling: Sampling, emit: Callable[[str], None], began: Callable[[], None]
    ) -> None:
        self._decode = partial(model.decode, marks=sampling.marks)
        self._stop, self._emit, self._began = sampling.stop, emit, began
        self._prompt_is_next = True
        self._sent = 0
        self.text = ""
        self.token_ids: list[int] = []
        self.stopped = False
        self.first_token = 0.0

    def put(self, value: Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        if not self.token_ids:
            self.first_token = time.perf_counter()
            self._began()
        self.token_ids += value.flatten().tolist()
        if not self.stopped:
            self._advance(final=False)

    def end(self) -> None:
        if not self.stopped:
            self._advance(final=True)

    def ends(self, token_ids: list[int]) -> bool:
        """Whether these tokens contain a stop string."""
        return bool(self._stop) and cut_at_stop(self._decode(token_ids), self._stop)[0]

    def _advance(self, final: bool) -> None:
        text = self._decode(self.token_ids)
        self.stopped, text = cut_at_stop(text, self._stop)
        ready = len(text) if final or self.stopped else len(text) - self._held_back(text)
        if ready > self._sent:
            self._emit(text[self._sent : ready])
            self._sent = ready
        self.text = text

    def _held_back(self, text: str) -> int:
        """Number of final characters that may still change (incomplete UTF-8) or may begin a stop string."""
        held = len(text) - len(text.rstrip("\ufffd"))
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:size]):
                    held = size
                    break
        return held


class _Stop(StoppingCriteria):
    """Ends generation at a stop string or on cancellation. transformers calls it before the streamer."""

    def __init__(self, streamer: _Streamer, cancellation: Cancellation, prompt: int) -> None:
        self._streamer, self._cancellation, self._prompt = streamer, cancellation, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = self._streamer.ends(input_ids[0, self._prompt :].tolist()) or self._cancellation.stopped
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)
