"""Sections on speed, frameworks and sizing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.scale import kv_bytes, need
from benchmarks.sections.markdown import spread, table


def speed(result: dict[str, Any]) -> list[str]:
    ratios = ("ratio", "ratio_median", "ratio_again", "floor", "kernels")
    rows = [
        (
            f"{row['prompt_tokens']:.0f}",
            row["way"],
            *(f"{row[name]:.3f}" for name in ratios),
            "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}",
        )
        for row in result["summary"]
    ]
    names = ("tokens", "", "first token", "median", "second call", "floor", "kernels", "memory")
    return [
        f"## Speed: {result['model']}, bfloat16 by {result['machine']['bfloat16']}",
        "",
        *([result["note"], ""] if "note" in result else []),
        "Time to the first token, measured from the call in a fresh process with entries on disk, divided by the time of "
        "`model.generate` for the same tokens in the same process, with the model as transformers loads it. First token "
        f"is the best of {result['settings']['repeats']} processes divided by the best full prefill, median is the median of "
        "the single ratios, and second call is the best second call. Floor is what no implementation can avoid: the share "
        "of tokens x layers computed, plus copying the KV once. Kernels is the time of torch's matrix products and "
        "attention alone for the computed tokens; recomputed tokens are in the middle of the prompt on average and each "
        "see as many keys as those of full prefill. Memory is the weights plus the answer's peak memory, divided by the "
        "weights plus one KV of the prompt.",
        "",
        *table(names, rows),
        "",
        "Decoding: time per token after the first on a cache blended with the default settings, divided by that of "
        "transformers on its own cache, with plain weights (as it loads them) and with weights packed like kvmem's. Ratio "
        "is the best of all processes divided by the best; median is the median and range of the single ratios.",
        "",
        *table(("tokens", "transformers with", "ratio", "median"), _decoding(result)),
        "",
        "The effect of packed weights alone: time of a forward pass with packed weights, divided by one with plain weights.",
        "",
        *table(
            ("tokens", "packed ÷ plain"), [(str(row["tokens"]), f"{row['ratio']:.2f}") for row in result["packing"]]
        ),
    ]


def _decoding(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows on decoding: prompt tokens, what it is compared with, ratio, and the single ratios."""
    return [
        (
            f"{row['prompt_tokens']:.0f}",
            f"{against} weights",
            f"{found[against]:.2f}",
            spread(found[f"{against}_single"]),
        )
        for row in result["summary"]
        if (found := row["decoding"]) is not None
        for against in ("plain", "packed")
    ]


def frameworks(result: dict[str, Any]) -> list[str]:
    settings, rows = result["settings"], []
    by_name = {(row["pipeline"], row["pass"]): row for row in result["summary"]}
    for (name, number), row in by_name.items():
        theirs = next(
            other for (n, p), other in by_name.items() if p == number and n.split(",")[0] == name.split(",")[0]
        )
        ratios = (f"{row[key] / theirs[key]:.2f}" for key in ("first", "answer"))
        rows.append((name, str(number), *ratios))
    return [
        f"## In LangChain and LlamaIndex: {result['model']}",
        "",
        f"RAG over {settings['passages']} passages: the top {settings['k']} by BM25 for each of {settings['questions']} "
        f"questions, with streamed answers of up to {settings['tokens']} tokens. Every pipeline answers every question, in "
        "turn, in two passes. Values are medians divided by those of the framework's Hugging Face model in the same pass.",
        "",
        *table(("", "pass", "first token", "whole answer"), rows),
    ]


def sizing(result: dict[str, Any]) -> list[str]:
    rows = []
    for model in result["models"]:
        size = kv_bytes(model)
        rows.append((model["name"], f"{size / 1e3:.1f} kB", f"{size * 1e4 / 1e9:.2f} GB", f"{size * 1e6 / 1e9:.0f} GB"))
    return [
        "## Sizing",
        "",
        "KV size from the shapes in each model's published config: 2 (keys and values) x layers x KV heads x head "
        f'dimension x {result["bytes_per_number"]} bytes. `kv_dtype="int8"` halves the size on disk.',
        "",
        *table(("model", "per token", "10,000 tokens", "1 million tokens"), rows),
    ]


def scale(result: dict[str, Any], directory: Path) -> list[str]:
    measured = json.loads((directory / result["measured"]).read_text(encoding="utf-8"))
    ratios = {row["way"]: row["ratio"] for row in measured["summary"] if row["size"] == result["measured_size"]}
    blended = next(ratio for way, ratio in ratios.items() if way.startswith("default"))
    ways = {"full prefill": 1.0, "kvmem, blended": blended, "kvmem, exact": ratios["exact"]}
    device, rows = result["device"], []
    for model in result["models"]:
        found = need(model, result, ways)
        rows += [
            (f"{model['name']}: KV of the corpus", f"{found.corpus / 1e12:.2f} TB"),
            ("reading it once, in hours of one device", f"{found.reading_hours:.1f}"),
            *((f"devices for prefill: {name}", f"{count:.0f}") for name, count in found.prompts.items()),
            ("KV sent to the devices per second", f"{found.moved / 1e9:.0f} GB"),
            ("devices for this KV transfer", f"{found.links:.0f}"),
            ("devices for decoding", f"{found.decoding:.0f}"),
            ("sequences that fit on one device", f"{found.held}"),
        ]
    return [
        f"## On paper: {result['requests_per_second']} requests a second",
        "",
        f"The corpus has {result['corpus_tokens'] / 1e6:.0f} million tokens. Every request has {result['context_tokens']} "
        f"context tokens, {result['question_tokens']} question tokens and {result['answer_tokens']} answer tokens. A device "
        f"is one {device['name']}: {device['flops'] / 1e12:.0f} TFLOP/s at {device['compute_used']:.0%} utilization, "
        f"{device['bytes_per_second'] / 1e12:.1f} TB/s of memory bandwidth at {device['bandwidth_used']:.0%} utilization, and "
        f"{device['link_bytes_per_second'] / 1e9:.0f} GB/s from the host. Nothing was measured on such a device. Only the "
        f"share of full prefill's time was measured, with another model on a CPU: {ways['kvmem, blended']:.2f} blended and "
        f"{ways['kvmem, exact']:.2f} exact, in {result['measured']}.",
        "",
        *table(("", "needed"), rows),
        "",
        "Prefill: requests x (2 x parameters x tokens + 2 x layers x width x tokens²) / (TFLOP/s used) x share. Transfer: "
        "requests x context x bytes per token / link. Decoding: requests x answer x (prompt + answer / 2) x bytes per token / "
        "memory bandwidth used; the weights are left out, because they are read once for all sequences of a device. The "
        "blended rows require an engine that blends as kvmem does. vLLM's prefix cache corresponds to the full prefill row, "
        "minus the prefix that prompts share.",
    ]
