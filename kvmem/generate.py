"""Decoding by transformers' own `generate` on a filled buffer, token by token into a callback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
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

from kvmem.answer import FinishReason
from kvmem.cache import BlendedCache
from kvmem.constrain import JsonConstraint
from kvmem.errors import InputError, KVMemError, first_line
from kvmem.model import LanguageModel
from kvmem.narrow import Schema
from kvmem.stream import Listener

_RESERVED = {
    "max_new_tokens": "Give max_tokens.",
    "max_length": "Give max_tokens.",
    "stop_strings": "Give stop.",
    "do_sample": "Give a temperature above 0.",
    "streamer": "Use stream().",
    "num_beams": "One answer is decoded at a time, without beams.",
    "num_return_sequences": "One answer is decoded at a time; ask again with another seed.",
    "input_ids": "The prompt is made from the question.",
    "attention_mask": "The prompt is made from the question.",
    "past_key_values": "The cache is kvmem's own.",
    "prefill_chunk_size": "The prompt is read by kvmem.",
    "prompt_lookup_num_tokens": "Candidates are not checked here.",
    "assistant_model": "Candidates are not checked here.",
    "assistant_early_exit": "Candidates are not checked here.",
    "use_cache": "The cache is kvmem's own.",
    "cache_implementation": "The cache is kvmem's own.",
    "generation_config": "Give its fields by name.",
    "stopping_criteria": "Give stop, or close the stream.",
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, by the names of LangChain and of transformers.

    temperature 0 is greedy. schema: a JSON schema that the answer keeps to. extra: more of
    `transformers.GenerationConfig`, or arguments of `generate`.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    schema: Schema | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise InputError(f"max_tokens={self.max_tokens!r} leaves no room for an answer. Give 1 or more.")
        if reserved := _RESERVED.keys() & self.extra.keys():
            name = min(reserved)
            raise InputError(f"{name} cannot be handed to generate here. {_RESERVED[name]}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise InputError(f"{name}={value!r} is not a number. Give one.")
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature} is below 0. Give 0 (greedy) or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} is outside (0, 1].")
        if any(not text for text in self.stop):
            raise InputError("A stop string is empty. Leave it out, or give text.")

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"max_new_tokens": self.max_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            options["temperature"] = self.temperature
            if self.top_p is not None:
                options["top_p"] = self.top_p
        return options | dict(self.extra)


@dataclass(frozen=True)
class Generated:
    """text: decoded, without special tokens and without the stop string. first_token: perf_counter seconds."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    first_token: float


def generate(
    model: LanguageModel,
    cache: BlendedCache,
    token_ids: Sequence[int],
    sampling: Sampling,
    listener: Listener,
    first_forward: AbstractContextManager[None] | None = None,
) -> Generated:
    """Continue `token_ids`, the first `cache.length` of which the cache holds; `listener` gets each new piece of text.

    first_forward: entered around generation; see `LanguageModel.first_forward`.
    """
    streamer = _Streamer(model, sampling.stop, listener.text)
    prompt = torch.tensor([list(token_ids)], device=model.device)
    processors = []
    if sampling.schema is not None:
        processors.append(JsonConstraint(model, sampling.schema, sampling.max_tokens))
    with model.decoding(), first_forward or nullcontext():
        call_generate(
            model,
            sampling,
            processors,
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Stop(streamer, listener, len(token_ids))]),
        )
    reason: FinishReason = "length"
    if streamer.stopped or (streamer.token_ids and streamer.token_ids[-1] in ends(model, sampling)):
        reason = "stop"
    elif listener.cancelled():
        reason = "cancelled"
    return Generated(streamer.text, tuple(streamer.token_ids), reason, streamer.first_token)


def call_generate(
    model: LanguageModel, sampling: Sampling, processors: Sequence[LogitsProcessor], **arguments: Any
) -> Tensor:
    """transformers' `generate`, sampling as asked and as nothing else says. Returns token ids, int64 [batch, all]."""
    options = sampling.options()
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
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(
                f"transformers' generate does not take these arguments: {first_line(error)}. "
                f"Given were {dict(sampling.extra)!r}."
            ) from error
    return found


def ends(model: LanguageModel, sampling: Sampling) -> list[int]:
    """The tokens that end an answer."""
    end = sampling.extra.get("eos_token_id", _ends(model)["eos_token_id"])
    return end if isinstance(end, list) else [end]


@contextmanager
def _own_defaults(model: LanguageModel, config: GenerationConfig) -> Iterator[None]:
    """Sampling defaults of the checkpoint (a repetition penalty, top_k) do not change what a caller asked for."""
    before = model.hf.generation_config
    model.hf.generation_config = config
    try:
        yield
    finally:
        model.hf.generation_config = before


def _ends(model: LanguageModel) -> dict[str, Any]:
    """Where the model's own answers end."""
    base = model.hf.generation_config
    end = base.eos_token_id if base.eos_token_id is not None else model.tokenizer.eos_token_id
    pad = base.pad_token_id if base.pad_token_id is not None else model.tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    return {"eos_token_id": end, "pad_token_id": pad, "bos_token_id": base.bos_token_id}


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[bool, str]:
    """Whether a stop string is in `text`, and the text before the first."""
    hits = [text.find(string) for string in stop if string in text]
    return bool(hits), text[: min(hits)] if hits else text


class _Streamer(BaseStreamer):
    """Decodes as tokens come. Text that may yet turn out to begin a stop string is held back."""

    def __init__(self, model: LanguageModel, stop: tuple[str, ...], emit: Callable[[str], None]) -> None:
        self._decode, self._began = model.tokenizer.decode, model.begin_answer
        self._stop, self._emit = stop, emit
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
        """Whether there is a stop string in these tokens."""
        return bool(self._stop) and cut_at_stop(str(self._decode(token_ids, skip_special_tokens=True)), self._stop)[0]

    def _advance(self, final: bool) -> None:
        text = str(self._decode(self.token_ids, skip_special_tokens=True))
        self.stopped, text = cut_at_stop(text, self._stop)
        ready = len(text) if final or self.stopped else len(text) - self._held_back(text)
        if ready > self._sent:
            self._emit(text[self._sent : ready])
            self._sent = ready
        self.text = text

    def _held_back(self, text: str) -> int:
        """Characters at the end that may still change (half a UTF-8 character) or begin a stop string."""
        held = len(text) - len(text.rstrip("\ufffd"))
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:size]):
                    held = size
                    break
        return held


class _Stop(StoppingCriteria):
    """Ends generation at a stop string or when nobody listens any more. It is asked before the streamer is told."""

    def __init__(self, streamer: _Streamer, listener: Listener, prompt: int) -> None:
        self._streamer, self._listener, self._prompt = streamer, listener, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = self._streamer.ends(input_ids[0, self._prompt :].tolist()) or self._listener.cancelled()
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)
