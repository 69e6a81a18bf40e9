"""One measurement of the speed benchmark, in a process of its own: `python -m benchmarks.first_token`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from benchmarks.common import PeakMemory
from kvmem.engine import KVMem
from kvmem.measure import Clock
from kvmem.model.local import LanguageModel
from kvmem.results import Usage
from kvmem.settings import ModelSettings

DEFAULT = "default, 7%"
# name -> (whether the passages are in the order in which they were read, the blend setting)
WAYS: dict[str, tuple[bool, Any]] = {
    "exact": (True, "query"),
    DEFAULT: (False, "query"),
    "query 10%": (False, {"selector": "query", "recompute": 0.1}),
    "deviation 15%": (False, {"selector": "deviation", "recompute": 0.15}),
    "none": (False, "none"),
}


def main() -> None:
    """Run one phase in a separate process. Reads the job as JSON from stdin and writes the result as JSON to stdout."""
    job = json.loads(sys.stdin.read())
    torch.set_num_threads(job["threads"])
    with KVMem(job["model"], job["store"], threads=job["threads"], max_tokens=32) as mem:
        if job["phase"] == "prepare":
            for passage in job["passages"]:
                mem.prefill(job["question"], context=[passage])
            mem.prefill(job["question"], context=job["passages"], blend="none")
            mem.ask(job["question"], context=job["passages"], blend="all", max_tokens=1)
            result: dict[str, Any] = {}
        else:
            phases = {"measure": _measure, "decode": _measure_decoding, "memory": _measure_memory}
            result = phases[job["phase"]](mem, job)
    sys.stdout.write(json.dumps(result) + "\n")


def _measure(mem: KVMem, job: dict[str, Any]) -> dict[str, Any]:
    in_order, blend = WAYS[job["way"]]
    context = job["passages"] if in_order else job["passages"][::-1]
    answer = mem.ask(job["question"], context=context, blend=blend, max_tokens=1)
    usage, timings = answer.usage, answer.timings
    prefill = mem.prefill(job["question"], context=context, blend=blend)
    full = _full(_plain(job), prefill.token_ids)
    again = mem.ask(job["question"], context=context, blend=blend, max_tokens=1)
    work = usage.token_layers / mem.local_model.depth / usage.prompt
    return {
        "prompt_tokens": usage.prompt,
        "usage": vars(usage),
        "timings": vars(timings),
        "first_token": timings.first_token,
        "first_token_again": again.timings.first_token,
        "full": full,
        "ratio": timings.first_token / full,
        "ratio_again": again.timings.first_token / full,
        "work": work,
        "floor": work + _copy_seconds(usage.prompt * mem.local_model.bytes_per_token) / full,
        "kernels": _kernel_seconds(mem.local_model, usage) / full,
    }


def _plain(job: dict[str, Any]) -> LanguageModel:
    """The model as transformers loads it, warmed up so that its weights are in memory."""
    plain = LanguageModel.load(job["model"], ModelSettings(threads=job["threads"], packed=False))
    _full(plain, torch.arange(64))
    return plain


def _copy_seconds(size: int) -> float:
    """Seconds to copy `size` bytes in memory."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)

    def copy() -> None:
        target.copy_(source)

    return _best(copy)


def _measure_memory(mem: KVMem, job: dict[str, Any]) -> dict[str, Any]:
    """Peak private memory of one answer, in addition to the weights."""
    in_order, blend = WAYS[job["way"]]
    context = job["passages"] if in_order else job["passages"][::-1]
    weights = sum(p.numel() * p.element_size() for p in mem.local_model.hf.parameters())
    with PeakMemory() as memory:
        answer = mem.ask(job["question"], context=context, blend=blend, max_tokens=1)
    kv = answer.usage.prompt * mem.local_model.bytes_per_token
    return {
        "weights": weights,
        "kv": kv,
        "taken": memory.taken,
        "memory_ratio": None if memory.taken is None else (weights + memory.taken) / (weights + kv),
    }


def _full(model: LanguageModel, ids: torch.Tensor) -> float:
    """Seconds to the first token with `model.generate` and transformers' own cache."""
    clock = Clock()
    began = time.perf_counter()
    model.hf.generate(ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=1, streamer=clock)
    return clock.stamps[1] - began


def _measure_decoding(mem: KVMem, job: dict[str, Any], rounds: int = 4) -> dict[str, Any]:
    """Seconds per token after the first, as the median of the best round.

    ours: on a blended cache. plain: transformers on its own cache. packed: the same with packed weights. The three
    alternate.
    """
    in_order, blend = WAYS[job["way"]]
    context = job["passages"] if in_order else job["passages"][::-1]
    prefill = mem.prefill(job["question"], context=context, blend=blend)
    model, plain, ids, cache = mem.local_model, _plain(job), prefill.token_ids, prefill.cache
    theirs = DynamicCache(config=model.hf.config.get_text_config())
    with torch.no_grad():
        model.hf.base_model(ids[None, :-1], past_key_values=theirs, use_cache=True)
    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "packed": []}
    for _ in range(rounds):
        # The last prompt token is run again, because its output is the first token of the answer.
        cache.length = len(ids) - 1
        with model.decoding():
            seconds["ours"].append(_decode(model, ids, cache))
        seconds["plain"].append(_decode(plain, ids, deepcopy(theirs)))
        seconds["packed"].append(_decode(model, ids, deepcopy(theirs)))
    return {name: min(found) for name, found in seconds.items()}


def _decode(model: LanguageModel, ids: torch.Tensor, cache: Any, tokens: int = 16) -> float:
    """Median seconds per token of `model.generate` after the first, on a cache of all ids except the last."""
    clock = Clock()
    mask = torch.ones_like(ids)[None]
    # No token ends the answer. `min_new_tokens` would do the same, but it processes all logits at every step.
    options = {
        "max_new_tokens": tokens,
        "eos_token_id": model.hf.config.get_text_config().vocab_size,
        "do_sample": False,
    }
    model.hf.generate(ids[None], attention_mask=mask, past_key_values=cache, streamer=clock, **options)
    return float(np.median(np.diff(clock.stamps[2:])))


def _kernel_seconds(model: LanguageModel, usage: Usage) -> float:
    """Seconds that the matrix products and attention kernels alone take for the computed tokens.

    This is one forward pass of that many tokens without a cache, plus, per layer, one unmasked attention of that many
    rows over the average number of visible keys. Recomputed tokens are assumed to lie halfway between the exact part
    and the end of the prompt.
    """
    rows = usage.recomputed + usage.computed
    halfway = (usage.exact + usage.prompt) / 2
    keys = round((usage.recomputed * halfway + usage.computed * usage.prompt) / rows)
    group, config = model.anatomy.groups[0], model.hf.config.get_text_config()
    shared = config.num_attention_heads // group.kv_heads
    query = torch.randn(1, group.kv_heads, shared * rows, group.key_dim, dtype=model.dtype)
    key = torch.randn(1, group.kv_heads, keys, group.key_dim, dtype=model.dtype)
    ids = torch.arange(rows)[None]

    def forward() -> None:
        with torch.no_grad():
            model.hf.base_model(ids, use_cache=False)

    def attention() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, key)

    return _best(forward) + model.depth * _best(attention, 5)


def _best(call: Callable[[], None], rounds: int = 3) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    main()
