"""What many requests over a large corpus need: arithmetic from shapes, a data sheet, and ratios that were measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


def kv_bytes(model: dict[str, Any], bytes_per_number: int = 2) -> int:
    """Bytes of KV per token, from a model's shapes."""
    return int(2 * model["layers"] * model["kv_heads"] * model["head_dim"] * bytes_per_number)


@dataclass(frozen=True)
class Need:
    """For one model. token, corpus: bytes of KV. reading_hours: of one device, to read the corpus once. prompts, links,
    decoding: devices for prompts by way, for the links KV comes over, for decoding. moved: bytes of KV that come to the
    devices in a second. held: sequences that one device has room for."""

    token: int
    corpus: float
    reading_hours: float
    prompts: dict[str, float]
    moved: float
    links: float
    decoding: float
    held: int


def need(model: dict[str, Any], given: dict[str, Any], ratios: dict[str, float]) -> Need:
    """given: as in `scale.json`. ratios: the time to the first token divided by full prefill's, by way."""
    device, rate = given["device"], given["requests_per_second"]
    prompt = given["context_tokens"] + given["question_tokens"]
    flops, bandwidth = device["flops"] * device["compute_used"], device["bytes_per_second"] * device["bandwidth_used"]
    token = kv_bytes(model)
    # Two operations a parameter and token; attention of every token to those before it, twice (keys, values).
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
