"""Measures time to the first token, decoding speed and memory, relative to plain transformers in the same process.

Each measurement is the first question of a fresh process whose entries are on disk. Right after it, the same process
prefills the same token ids with `model.generate`, transformers' own cache, and a model loaded as transformers does.
Only ratios are reported, because machines differ and drift: the best time of all processes divided by the best full
prefill (other load on the machine only adds time), and the median of the single ratios. The effect of packed weights
on plain transformers is measured separately.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import DynamicCache

from benchmarks.common import PeakMemory, Question
from kvmem.engine import KVMem
from kvmem.errors import KVMemError
from kvmem.measure import Clock, describe, track
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


def run(
    model: str, questions: Sequence[Question], sizes: Sequence[int], *, threads: int = 1, repeats: int = 5
) -> dict[str, Any]:
    """Measure every variant at every approximate prompt size in tokens, `repeats` times each."""
    rows = []
    loaded = LanguageModel.load(model, ModelSettings(threads=threads))
    texts = {size: text_of_size(loaded, questions, size) for size in sizes}
    jobs = [(size, way, n) for size in sizes for n in range(repeats) for way in WAYS]
    with tempfile.TemporaryDirectory() as scratch:
        stores: dict[int, Path] = {}
        for size, way, n in track(jobs, "speed"):
            if size not in stores:
                stores[size] = Path(scratch) / str(size)
                _child("prepare", model, texts[size], stores[size], way, threads)
            # Decoding speed does not depend on the blend setting, so it is measured once.
            for phase in ["measure", *["memory"] * (n == 0), *["decode"] * (way == DEFAULT)]:
                row = _child(phase, model, texts[size], stores[size], way, threads)
                rows.append({"size": size, "way": way, "repeat": n, "phase": phase, **row})
    settings = {"sizes": list(sizes), "threads": threads, "repeats": repeats}
    return {
        "benchmark": "speed",
        **describe(loaded, **settings),
        "bytes_per_token": loaded.bytes_per_token,
        "summary": summarise(rows),
        "packing": _packing(model, threads),
        "rows": rows,
    }


def text_of_size(model: LanguageModel, questions: Sequence[Question], size: int) -> dict[str, Any]:
    """One question, with passages (from several questions if needed) of about `size` tokens in total."""
    passages: list[str] = []
    tokens = 0
    for passage in (passage for question in questions for passage in question.passages):
        more = len(model.tokenizer(passage).input_ids)
        if passages and tokens + more / 2 > size:
            return {"question": questions[0].question, "passages": passages}
        passages.append(passage)
        tokens += more
    raise KVMemError(f"The questions have less than {size} tokens. Give more questions or smaller sizes.")


def _child(phase: str, model: str, text: dict[str, Any], store: Path, way: str, threads: int) -> dict[str, Any]:
    job = {"phase": phase, "model": model, "store": str(store), "way": way, "threads": threads, **text}
    command = [sys.executable, "-m", "benchmarks.speed"]
    # Otherwise the tokenizer would use all cores.
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=env)  # noqa: S603
    if result.returncode:
        raise KVMemError(f"A benchmark process failed: {result.stderr[-2000:]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


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


def _packing(model: str, threads: int) -> list[dict[str, float]]:
    """Best time of a forward pass with packed weights divided by that with plain weights, by number of tokens."""
    packed, plain = (
        LanguageModel.load(model, ModelSettings(threads=threads, packed=choice)).hf.base_model
        for choice in (True, False)
    )
    rows = []
    for tokens in (1, 32, 256, 2048):
        ids = torch.arange(tokens)[None]
        seconds: dict[Any, list[float]] = {packed: [], plain: []}
        with torch.no_grad():
            for _ in range(9):
                for module, found in seconds.items():
                    began = time.perf_counter()
                    module(ids, use_cache=False)
                    found.append(time.perf_counter() - began)
        rows.append({"tokens": tokens, "ratio": min(seconds[packed]) / min(seconds[plain])})
    return rows


def _best(call: Callable[[], None], rounds: int = 3) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per size and variant: the best times, their ratio, and medians."""
    summary = []
    for size, way in dict.fromkeys((row["size"], row["way"]) for row in rows):
        group = [row for row in rows if (row["size"], row["way"]) == (size, way)]
        measured = [row for row in group if row["phase"] == "measure"]
        best = {
            name: min(float(row[name]) for row in measured) for name in ("first_token", "first_token_again", "full")
        }
        names = ("prompt_tokens", "work", "floor", "kernels")
        found: dict[str, Any] = {
            "size": size,
            "way": way,
            **best,
            "ratio": best["first_token"] / best["full"],
            "ratio_median": float(np.median([row["ratio"] for row in measured])),
            "ratio_again": best["first_token_again"] / best["full"],
            **{name: float(np.median([row[name] for row in measured])) for name in names},
        }
        found["memory_ratio"] = next(row["memory_ratio"] for row in group if row["phase"] == "memory")
        found["decoding"] = _decoding([row for row in group if row["phase"] == "decode"])
        summary.append(found)
    return summary


def _decoding(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Decoding time on the blended cache divided by that of transformers, with plain and packed weights.

    Best divided by best, and the single ratios. None if decoding was not measured.
    """
    if not rows:
        return None
    found: dict[str, Any] = {}
    for name in ("plain", "packed"):
        found[name] = min(row["ours"] for row in rows) / min(row[name] for row in rows)
        found[f"{name}_single"] = sorted(row["ours"] / row[name] for row in rows)
    return found


def table(result: dict[str, Any]) -> Table:
    """The summary as a terminal table of at most 80 columns."""
    title = f"{result['model']}, {result['threads']} thread(s): first token ÷ full prefill in the same process"
    names = ("tokens", "", "best", "median", "2nd ask", "floor", "kernels", "decode", "memory")
    shown = Table(*names, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in result["summary"]:
        ratios = [f"{row[key]:.3f}" for key in ("ratio", "ratio_median", "ratio_again", "floor", "kernels")]
        memory = "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        decoding = "" if row["decoding"] is None else f"{row['decoding']['plain']:.2f}"
        shown.add_row(f"{row['prompt_tokens']:.0f}", row["way"], *ratios, decoding, memory)
    return shown


if __name__ == "__main__":
    main()
