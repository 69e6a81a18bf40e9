"""Measures how close a blended cache is to full prefill.

For every question, the model prefills the full prompt and answers greedily; its next-token distributions along that
answer are the reference. Each blend setting is then compared along the same answer (teacher-forced). The entry of each
passage was computed with only the prompt's prefix as context.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import Question
from kvmem.engine import KVMem
from kvmem.measure import agreement, along, bootstrap, describe, track
from kvmem.model.local import LanguageModel
from kvmem.settings import BlendSettings

BASELINE = "deviation 15%"
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"selector": "none"},
    "first_k 10%": {"selector": "first_k", "recompute": 0.10},
    "deviation 5%": {"selector": "deviation", "recompute": 0.05},
    BASELINE: {"selector": "deviation", "recompute": 0.15},
    "deviation 10% + correction": {"selector": "deviation", "recompute": 0.10, "correction": True},
    "query 10%, no correction": {"selector": "query", "recompute": 0.10, "correction": False},
    "query 5%": {"selector": "query", "recompute": 0.05},
    "query 7%": {"selector": "query", "recompute": 0.07},
    "query 10%": {"selector": "query", "recompute": 0.10},
    "query 20%": {"selector": "query", "recompute": 0.20},
    "all": {"selector": "all"},
}


def run(
    model: LanguageModel,
    questions: Sequence[Question],
    passages: int,
    *,
    tokens: int = 16,
    seed: int = 0,
    variants: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measure every variant on every question, using its first `passages` passages.

    tokens: maximum answer length. seed: for the bootstrap; everything else is deterministic.
    """
    variants = VARIANTS if variants is None else variants
    examples = [_example(model, q, passages, tokens, variants) for q in track(questions, f"{passages} passages")]
    settings = {"passages": passages, "examples": len(examples), "tokens": tokens, "seed": seed, "variants": variants}
    return {
        "benchmark": "fidelity",
        **describe(model, **settings),
        "prompt_tokens": float(np.mean([e["prompt_tokens"] for e in examples])),
        "summary": {name: summarise(examples, name, seed) for name in variants},
        "examples": examples,
    }


def _example(
    model: LanguageModel, question: Question, passages: int, tokens: int, variants: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    context = list(question.passages[:passages])
    with KVMem(model, None, max_tokens=tokens) as mem:
        for passage in context:
            mem.prefill(question.question, context=[passage])
        ids, truth, answer = _full(mem, question.question, context, tokens)
        found = {}
        # "all" comes last, because it replaces every entry with an exact one.
        for name, blend in sorted(variants.items(), key=lambda item: item[1]["selector"] == "all"):
            prefill = mem.prefill(question.question, context=context, blend=BlendSettings.parse(blend))
            found[name] = agreement(truth, along(model, prefill, answer)) | {"recomputed": prefill.usage.recomputed}
    return {"prompt_tokens": len(ids), "answer_tokens": len(answer), "variants": found}


def _full(mem: KVMem, question: str, context: list[str], tokens: int) -> tuple[Tensor, Tensor, list[int]]:
    """The prompt's token ids, and the model's greedy answer with its log-probabilities [answer, vocab]."""
    model = mem.local_model
    ids = mem.prefill(question, context=context, blend="none").token_ids
    output = model.hf.generate(
        ids[None].to(model.device),
        attention_mask=torch.ones_like(ids)[None].to(model.device),
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answer = output.sequences[0, len(ids) :].tolist()
    return ids, torch.stack(output.logits)[:, 0].float().log_softmax(-1), answer


def summarise(examples: Sequence[dict[str, Any]], name: str, seed: int) -> dict[str, Any]:
    """KL (mean, median, p90), agreement, and the paired geometric-mean KL ratio to CacheBlend's rule at 15%."""
    rows = [example["variants"][name] for example in examples]
    kl = np.array([row["kl"] for row in rows])
    result: dict[str, Any] = {
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_p90": float(np.percentile(kl, 90)),
        "top1": float(np.mean([row["top1"] for row in rows])),
        "first": float(np.mean([row["first"] for row in rows])),
        "recomputed": float(np.mean([row["recomputed"] for row in rows])),
    }
    if all(BASELINE in example["variants"] for example in examples):
        base = np.array([example["variants"][BASELINE]["kl"] for example in examples])
        # Values below 1e-6 are rounding; the floor keeps them from dominating the ratio.
        logs = np.log(np.maximum(kl, 1e-6) / np.maximum(base, 1e-6))
        low, high = bootstrap(logs.tolist(), lambda x: float(np.mean(x)), seed)
        result["ratio"] = float(np.exp(logs.mean()))
        result["ratio_interval"] = [float(np.exp(low)), float(np.exp(high))]
    return result


def table(result: dict[str, Any]) -> Table:
    """The summary as a terminal table."""
    title = f"{result['model']}, {result['settings']['passages']} passages, {result['settings']['examples']} questions"
    shown = Table("", "KL mean", "median", "p90", "top-1", "first", f"KL ÷ {BASELINE} [95%]", title=title)
    for name, row in result["summary"].items():
        low, high = row.get("ratio_interval", (float("nan"), float("nan")))
        numbers = [f"{row[key]:.4f}" for key in ("kl_mean", "kl_median", "kl_p90")]
        agreement = [f"{row[key]:.3f}" for key in ("top1", "first")]
        shown.add_row(name, *numbers, *agreement, f"{row.get('ratio', float('nan')):.2f} [{low:.2f}, {high:.2f}]")
    return shown


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot mean KL against the recomputed share: one line per selector, one panel per result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for name, blend in result["settings"]["variants"].items():
            if blend["selector"] in ("none", "all"):
                continue
            corrected = BlendSettings.parse(blend).corrects
            kind = f"{blend['selector']} {'+ correction' if corrected else '(plain)'}"
            lines.setdefault(kind, []).append((100 * blend["recompute"], result["summary"][name]["kl_mean"]))
        for kind, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=kind)
        axis.axhline(result["summary"]["none"]["kl_mean"], color="grey", linestyle=":", label="none recomputed")
        axis.set(xlabel="recomputed, % of chunk tokens", ylabel="mean KL to full prefill", yscale="log")
        axis.set_title(f"{result['model']}, {result['settings']['passages']} passages")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
