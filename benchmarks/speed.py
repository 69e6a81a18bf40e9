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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.common import Question
from benchmarks.first_token import DEFAULT, WAYS
from kvmem.errors import KVMemError
from kvmem.measure import describe, track
from kvmem.model.local import LanguageModel
from kvmem.settings import ModelSettings


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
    command = [sys.executable, "-m", "benchmarks.first_token"]
    # Otherwise the tokenizer would use all cores.
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=env)  # noqa: S603
    if result.returncode:
        raise KVMemError(f"A benchmark process failed: {result.stderr[-2000:]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


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
