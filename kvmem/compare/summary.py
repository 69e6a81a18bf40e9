"""What a comparison came to: medians, where reading once pays, and the same in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from kvmem.bench.common import bootstrap

_NAMES = {"rag": "RAG", "full": "full prefill", "warm": "kvmem", "cached": "kvmem on RAG's chunks"}


def summarise(rows: Sequence[dict[str, Any]], way: str) -> dict[str, Any]:
    """Medians of times, means of the rest, over the questions it is known for; None where it is known for none.

    judged: of how many questions it is known what should have been in the prompt.
    """
    found = [row["ways"][way] for row in rows]
    seconds = {f"{key}_median": float(median(row[key] for row in found)) for key in ("first_token", "total")}
    seconds["first_token_p90"] = float(np.percentile([row["first_token"] for row in found], 90))
    averages = {}
    for key in ("prompt", "computed", "f1", "contains", "agrees", "kl", "top1", "missing"):
        values = [row[key] for row in found if row[key] is not None]
        averages[key] = mean(values) if values else None
    return seconds | averages | {"judged": sum(row["missing"] is not None for row in found)}


def break_even(
    rows: Sequence[dict[str, Any]], way: str, ours: str, reading: float, seed: int
) -> dict[str, float | None]:
    """After how many questions the waiting for first tokens that `ours` saves over `way` makes up for the reading.

    queries: None if nothing is saved. low, high: its 95% bootstrap interval over questions; high is None where it may
    be never.
    """
    saved = [row["ways"][way]["first_token"] - row["ways"][ours]["first_token"] for row in rows]
    least, most = bootstrap(saved, lambda values: float(values.mean()), seed)

    def queries(saving: float) -> float | None:
        return reading / saving if saving > 0 else None

    return {"queries": queries(mean(saved)), "low": queries(most), "high": queries(least)}


def table(result: dict[str, Any]) -> Table:
    """The summary, for a terminal."""
    names = ("", "first token", "answer", "computed", "as full", "F1", "missing")
    shown = Table(*names, title=escape(headline(result)))
    for column in shown.columns[1:]:
        column.justify = "right"
    cold = result["cold"]
    shown.add_row("kvmem, cold", f"{cold['first_token']:.2f} s", f"{cold['total']:.2f} s", str(result["tokens"]))
    for name, label in result["ways"].items():
        row = result["summary"][name]
        shown.add_row(
            label,
            *(f"{row[key]:.2f} s" for key in ("first_token_median", "total_median")),
            f"{row['computed']:.0f}",
            *("" if row[key] is None else f"{row[key]:.2f}" for key in ("agrees", "f1")),
            "" if row["missing"] is None else f"{row['missing']:.0%}",
        )
    return shown


def headline(result: dict[str, Any]) -> str:
    """What was compared, in a line."""
    counts = ((result["documents"], "document"), (result["tokens"], "token"), (len(result["rows"]), "question"))
    return f"{result['model']}: " + ", ".join(_plural(count, name) for count, name in counts)


def _plural(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def notices(result: dict[str, Any]) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    if result["generated"]:
        found.append(
            "No questions were given: the model wrote these about chunks drawn from the documents "
            f"(seed {result['settings']['seed']}). They have no right answers, and what is missing in a prompt is the "
            "chunk that a question was written about. Give your own with --questions."
        )
    if not result["fits"]:
        found.append(
            f"The documents do not all fit the model's window of {result['window']} tokens. kvmem fell back to "
            "retrieval, as each question's plan says, and full prefill reads the prompt that kvmem would, not all "
            "documents."
        )
    if result["not_blendable"]:
        found.append(
            f"Caches of this model cannot be moved, since {result['not_blendable']}: kvmem reuses exact prefixes only, "
            "and reads what it retrieves anew. Ways share a store, so one may profit from what another read."
        )
    return found


def verdict(result: dict[str, Any]) -> str:
    """What came out, in sentences that are true of these figures."""
    summary = result["summary"]
    full, rag = (summary[name]["first_token_median"] for name in ("full", "rag"))
    warm, restart, cached = (summary[name]["first_token_median"] for name in ("warm", "restart", "cached"))
    parts = [
        f"Reading the documents took {result['reading']:.1f} s, once.",
        f"Warm, the first token came after {warm / full:.0%} of full prefill's time and {warm / rag:.0%} of RAG's.",
        f"After a restart, the first token came after {restart / full:.0%} of full prefill's time.",
        f"On RAG's own chunks, kvmem's first token came after {cached / rag:.0%} of RAG's time.",
    ]
    parts += [_pays(way, result["break_even"][way]) for way in ("full", "rag")]
    if summary["rag"]["contains"] is not None:
        listed = ", ".join(f"{_NAMES[way]} in {summary[way]['contains']:.0%}" for way in _NAMES)
        parts.append(f"A right answer was given by {listed} of {_plural(len(result['rows']), 'question')}.")
    if summary["rag"]["missing"] is not None:
        parts.append(
            f"What the answer needs was missing from RAG's prompt in {summary['rag']['missing']:.0%} of "
            f"{_plural(summary['rag']['judged'], 'question')}, from kvmem's in {summary['warm']['missing']:.0%}."
        )
    return " ".join(parts)


def _pays(way: str, found: dict[str, float | None]) -> str:
    name, queries, high = _NAMES[way], found["queries"], found["high"]
    if queries is None:
        return f"Against {name} the reading does not pay: its first tokens come as early."
    if high is None:
        return f"Whether the reading pays against {name} cannot be told from so few questions."
    low = found["low"] or 0.0
    span = f"{math.ceil(low)} to {math.ceil(high)}"
    return (
        f"The waiting saved makes up for the reading after {_plural(math.ceil(queries), 'question')} against {name} "
        f"(95% interval: {span})."
    )
