"""Measures how fast entries load from disk, and what packing them costs.

Loading: one entry of about 100 MB is loaded from the page cache into a preallocated buffer, relative to a plain copy
of the same bytes between two warm buffers. Packing: the size, and the KL to full prefill of an exact prompt with
packed KV.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.common import Question
from kvmem.engine import KVMem
from kvmem.kv.entry import EntryKey, KVEntry, digest_tokens
from kvmem.measure import describe, track
from kvmem.model.local import LanguageModel
from kvmem.store.disk import DiskStore

WAYS: tuple[dict[str, Any], ...] = (
    {"verify": "never"},
    {"verify": "first"},
    {"verify": "always"},
    {"verify": "never", "kv_dtype": "int8"},
)
PACKINGS = ("native", "int8", "fp8")


def run(model: LanguageModel, questions: Sequence[Question], passages: int = 4, repeats: int = 7) -> dict[str, Any]:
    """Run both parts; see the module docstring."""
    return {
        "benchmark": "store",
        **describe(model, passages=passages, questions=len(questions), repeats=repeats),
        "loading": _loading(model, repeats),
        "packing": _packing(model, questions, passages),
    }


def _entry(model: LanguageModel, size: int) -> KVEntry:
    """An entry with `size` bytes of random keys and values, in the model's shapes."""
    tokens = size // model.bytes_per_token
    groups = model.anatomy.groups
    keys = tuple(torch.randn(len(g.layers), g.kv_heads, tokens, g.key_dim).to(model.dtype) for g in groups)
    values = tuple(torch.randn(len(g.layers), g.kv_heads, tokens, g.value_dim).to(model.dtype) for g in groups)
    token_ids = tuple(range(tokens))
    key = EntryKey("default", model.fingerprint, digest_tokens(()), digest_tokens(token_ids))
    return KVEntry(key, token_ids, 0, (), keys, values)


def _loading(model: LanguageModel, repeats: int) -> list[dict[str, Any]]:
    entry = _entry(model, 100_000_000)
    tensors = (*entry.keys, *entry.values)
    source, target = [t.clone() for t in tensors], [torch.empty_like(t) for t in tensors]
    copying = _median(lambda: _copy(source, target), repeats)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for way in WAYS:
            name = " ".join(str(value) for value in way.values())
            store = DiskStore(Path(scratch) / name, **way)
            store.put(entry)
            store.get(entry.key)

            def load(store: DiskStore = store) -> None:
                found = store.get(entry.key)
                if found is None:
                    raise AssertionError("the entry that was just stored is missing")
                _copy((*found.keys, *found.values), target)

            seconds = _median(load, repeats)
            rows.append({"way": name, "bytes": entry.nbytes, "seconds": seconds, "ratio_to_copy": copying / seconds})
            store.close()
    return rows


def _copy(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> None:
    for mine, theirs in zip(source, target, strict=True):
        theirs.copy_(mine)


def _median(work: Callable[[], None], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _packing(model: LanguageModel, questions: Sequence[Question], passages: int) -> list[dict[str, Any]]:
    rows = []
    for packing in PACKINGS:
        divergences, size = [], 0
        for question in track(questions, f"packing {packing}"):
            context = question.passages[:passages]
            with tempfile.TemporaryDirectory() as scratch:
                options: Any = {"kv_dtype": packing, "memory_bytes": 0}
                with KVMem(model, scratch, max_tokens=1, **options) as mem:
                    mem.prefill(question.question, context=context)
                    size += mem.stats().store.bytes
                with KVMem(model, scratch, max_tokens=1, **options) as mem:
                    divergences.append(_divergence(mem, question.question, context))
        rows.append(
            {
                "kv_dtype": packing,
                "bytes": size,
                "kl_mean": float(np.mean(divergences)),
                "kl_median": float(np.median(divergences)),
                "kl_p90": float(np.percentile(divergences, 90)),
            }
        )
    return rows


def _divergence(mem: KVMem, question: str, context: Sequence[str]) -> float:
    """KL divergence of the next token between full prefill and the stored KV, in nats."""
    prefill = mem.prefill(question, context=context)
    with torch.no_grad():
        truth = mem.local_model.hf(prefill.token_ids[None].to(mem.local_model.device), logits_to_keep=1).logits[0, -1]
    expected = truth.float().log_softmax(-1)
    return float((expected.exp() * (expected - prefill.logits.log_softmax(-1))).sum())


def table(result: dict[str, Any]) -> tuple[Table, Table]:
    """Both parts as terminal tables."""
    loading = Table("loading 100 MB", "seconds", "copy time ÷ load time")
    for row in result["loading"]:
        loading.add_row(row["way"], f"{row['seconds']:.4f}", f"{row['ratio_to_copy']:.2f}")
    packing = Table("stored as", "MB", "KL mean", "median", "p90")
    for row in result["packing"]:
        numbers = [f"{row[name]:.5f}" for name in ("kl_mean", "kl_median", "kl_p90")]
        packing.add_row(row["kv_dtype"], f"{row['bytes'] / 1e6:.1f}", *numbers)
    return loading, packing
