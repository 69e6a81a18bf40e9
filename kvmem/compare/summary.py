"""Summarizes a comparison: medians, break-even points, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from kvmem.measure import bootstrap

_NAMES = {"rag": "RAG", "full": "full prefill", "warm": "kvmem", "cached": "kvmem on RAG's chunks"}


def summarise(rows: Sequence[dict[str, Any]], way: str) -> dict[str, Any]:
    """Medians of times and means of other values, over the questions with a known value; None if there are none.

    judged: the number of questions for which it is known what the prompt should contain.
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
    """The number of questions after which the time saved by `ours` over `way` exceeds the reading time.

    Only the time to the first token counts. queries: None if no time is saved. low, high: the 95% bootstrap interval
    over questions; high is None if break-even may never happen.
    """
    saved = [row["ways"][way]["first_token"] - row["ways"][ours]["first_token"] for row in rows]
    least, most = bootstrap(saved, lambda values: float(values.mean()), seed)

    def queries(saving: float) -> float | None:
        return reading / saving if saving > 0 else None

    return {"queries": queries(mean(saved)), "low": queries(most), "high": queries(least)}


def table(result: dict[str, Any]) -> Table:
    """The summary as a terminal table."""
    names = ("", "first token", "answer", "computed", "overlap", "F1", "missing")
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
    """What was compared, in one line."""
    counts = ((result["documents"], "document"), (result["tokens"], "token"), (len(result["rows"]), "question"))
    return f"{result['model']}: " + ", ".join(_plural(count, name) for count, name in counts)


def _plural(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def notices(result: dict[str, Any]) -> list[str]:
    """Caveats to show before the results."""
    found = []
    if result["generated"]:
        found.append(
            "No questions were given, so the model wrote these about randomly chosen chunks "
            f"(seed {result['settings']['seed']}). They have no known right answers; a prompt counts as missing the "
            "answer if it lacks the chunk that the question was written about. Give your own with --questions."
        )
    if not result["fits"]:
        found.append(
            f"The documents do not all fit the model's window of {result['window']} tokens. kvmem fell back to "
            "retrieval, as shown in each question's plan. Full prefill uses the same prompt as kvmem, not all "
            "documents."
        )
    if result["not_blendable"]:
        found.append(
            f"Entries of this model cannot be reused at other positions, because {result['not_blendable']}. kvmem "
            "reuses exact prefixes only and prefills retrieved chunks. The methods share a store, so one may benefit "
            "from entries that another computed."
        )
    return found


def verdict(result: dict[str, Any]) -> str:
    """The results in sentences."""
    summary = result["summary"]
    full, rag = (summary[name]["first_token_median"] for name in ("full", "rag"))
    warm, restart, cached = (summary[name]["first_token_median"] for name in ("warm", "restart", "cached"))
    parts = [
        f"Reading the documents took {result['reading']:.1f} s, once.",
        f"Warm, the first token took {warm / full:.0%} of full prefill's time and {warm / rag:.0%} of RAG's.",
        f"After a restart, the first token took {restart / full:.0%} of full prefill's time.",
        f"On RAG's chunks, kvmem's first token took {cached / rag:.0%} of RAG's time.",
    ]
    parts += [_pays(way, result["break_even"][way]) for way in ("full", "rag")]
    if summary["rag"]["contains"] is not None:
        listed = ", ".join(f"{_NAMES[way]} in {summary[way]['contains']:.0%}" for way in _NAMES)
        parts.append(f"Right answers: {listed} of {_plural(len(result['rows']), 'question')}.")
    if summary["rag"]["missing"] is not None:
        parts.append(
            f"Information needed to answer was missing from RAG's prompt in {summary['rag']['missing']:.0%} of "
            f"{_plural(summary['rag']['judged'], 'question')} and from kvmem's in {summary['warm']['missing']:.0%}."
        )
    return " ".join(parts)


def _pays(way: str, found: dict[str, float | None]) -> str:
    name, queries, high = _NAMES[way], found["queries"], found["high"]
    if queries is None:
        return f"Reading once never pays off against {name}, whose first tokens are as fast or faster."
    if high is None:
        return f"There are too few questions to tell whether reading once pays off against {name}."
    low = found["low"] or 0.0
    span = f"{math.ceil(low)} to {math.ceil(high)}"
    return (
        f"Reading once pays off after {_plural(math.ceil(queries), 'question')} against {name} (95% interval: {span})."
    )
