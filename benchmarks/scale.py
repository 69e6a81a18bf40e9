"""Estimates the hardware for many requests over a large corpus, from model shapes, a data sheet and measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


def kv_bytes(model: dict[str, Any], bytes_per_number: int = 2) -> int:
    """KV bytes per token, from a model's shapes."""
    return int(2 * model["layers"] * model["kv_heads"] * model["head_dim"] * bytes_per_number)


@dataclass(frozen=True)
class Need:
    """The requirements of one model.

    token, corpus: KV bytes per token and for the corpus. reading_hours: hours of one device to read the corpus once.
    prompts, links, decoding: number of devices for prefill (by method), for KV transfer, and for decoding.
    moved: KV bytes per second sent to the devices. held: sequences that fit on one device.
    """

    token: int
    corpus: float
    reading_hours: float
    prompts: dict[str, float]
    moved: float
    links: float
    decoding: float
    held: int


def need(model: dict[str, Any], given: dict[str, Any], ratios: dict[str, float]) -> Need:
    """Compute the requirements.

    given: the workload, as in `scale.json`. ratios: time to the first token ÷ full prefill, by method.
    """
    device, rate = given["device"], given["requests_per_second"]
    prompt = given["context_tokens"] + given["question_tokens"]
    flops, bandwidth = device["flops"] * device["compute_used"], device["bytes_per_second"] * device["bandwidth_used"]
    token = kv_bytes(model)
    # Two operations per parameter and token, plus causal attention over the keys and over the values.
    full = 2 * model["parameters"] * prompt + 2 * model["layers"] * model["hidden"] * prompt**2
    devices = rate * full / flops
    moved = rate * given["context_tokens"] * token
    row = (prompt + given["answer_tokens"] / 2) * token
    weights = 2 * model["parameters"]
    return Need(
        token=token,
        corpus=given["corpus_tokens"] * token,
        reading_hours=given["corpus_tokens"] * 2 * model["parameters"] / flops / 3600,
        prompts={name: devices * ratio for name, ratio in ratios.items()},
        moved=moved,
        links=moved / device["link_bytes_per_second"],
        decoding=rate * given["answer_tokens"] * row / bandwidth,
        held=max(0, math.floor((device["memory"] * 0.9 - weights) / row)),
    )
