"""Throughput of several questions over one corpus, asked one by one and as a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.common import Question
from kvmem.engine import KVMem
from kvmem.measure import describe, track
from kvmem.model.local import LanguageModel


def run(
    model: LanguageModel, questions: Sequence[Question], *, size: int = 4000, batch: int = 8, repeats: int = 3
) -> dict[str, Any]:
    """Ask `batch` questions over passages of about `size` tokens, one by one and as a batch, `repeats` times.

    Entries are warm. Measured with answers of up to 32 tokens and with answers of exactly 32 tokens.
    """
    passages: list[str] = []
    for question in questions:
        for passage in question.passages:
            if sum(model.count_tokens(text) for text in passages) < size:
                passages.append(passage)
    asked = [question.question for question in questions[:batch]]
    rows = []
    with KVMem(model, None) as mem:
        mem.add_all(passages)
        mem.batch(asked, max_tokens=2)
        for number, fixed in track([(n, fixed) for n in range(repeats) for fixed in (True, False)], "batch"):
            options: dict[str, Any] = {"max_tokens": 32}
            if fixed:
                options["min_new_tokens"] = 32
            began = time.perf_counter()
            single = [mem.ask(question, **options) for question in asked]
            between = time.perf_counter()
            together = mem.batch(asked, **options)
            ended = time.perf_counter()
            tokens = [sum(answer.usage.generated for answer in answers) for answers in (single, together)]
            rows.append(
                {
                    "repeat": number,
                    "fixed": fixed,
                    "single_seconds": between - began,
                    "batch_seconds": ended - between,
                    "single_tokens": tokens[0],
                    "batch_tokens": tokens[1],
                    "speedup": (tokens[1] / (ended - between)) / (tokens[0] / (between - began)),
                    "equal": sum(a.text == b.text for a, b in zip(single, together, strict=True)),
                    "prompt_tokens": single[0].usage.prompt,
                }
            )
    return {"benchmark": "batch", **describe(model, size=size, batch=batch, repeats=repeats), "rows": rows}


def table(result: dict[str, Any]) -> Table:
    """All measurements as a terminal table."""
    title = f"{result['model']}: {result['settings']['batch']} questions over one prefix, tokens per second"
    shown = Table("answers", "one by one", "batch", "ratio", "equal answers", title=title)
    for row in result["rows"]:
        shown.add_row(
            "32 tokens each" if row["fixed"] else "up to 32 tokens",
            f"{row['single_tokens'] / row['single_seconds']:.1f}",
            f"{row['batch_tokens'] / row['batch_seconds']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['equal']} of {result['settings']['batch']}",
        )
    return shown
