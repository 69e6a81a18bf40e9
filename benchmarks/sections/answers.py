"""Sections on fidelity, tasks and comparisons."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.sections.markdown import table


def fidelity(result: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in result["summary"].items():
        ratio = f"{row['ratio']:.2f} [{row['ratio_interval'][0]:.2f}, {row['ratio_interval'][1]:.2f}]"
        numbers = [f"{row[key]:.4f}" for key in ("kl_mean", "kl_median", "kl_p90")]
        rows.append((name, *numbers, f"{row['top1']:.3f}", f"{row['first']:.3f}", ratio))
    settings = result["settings"]
    return [
        f"## Fidelity: {result['model']}, {settings['passages']} passages",
        "",
        f"{settings['examples']} questions with {result['prompt_tokens']:.0f} prompt tokens on average. KL is measured "
        f"against full prefill, along its own greedy answer of up to {settings['tokens']} tokens. The last column is the "
        "paired geometric-mean KL ratio to CacheBlend's rule at 15%, with its 95% bootstrap interval.",
        "",
        *table(("", "KL mean", "median", "p90", "top-1", "first token", "ratio"), rows),
    ]


def agents(result: dict[str, Any]) -> list[str]:
    rows = []
    for name in dict.fromkeys(row["framework"] for row in result["rows"]):
        found = [row for row in result["rows"] if row["framework"] == name]
        kinds = ("finished", "correct", "equal")
        rows.append((name, *(f"{sum(row[kind] for row in found)} of {len(found)}" for kind in kinds)))
    return [
        f"## Agents: {result['model']}",
        "",
        "Tasks that take two calls, the second with the result of the first, by LangChain's `create_agent` and LlamaIndex's "
        "`FunctionAgent`. The last column is how often transformers' `generate` makes the same calls on the same prompts.",
        "",
        *table(("", "finished", "correct", "as generate"), rows),
        "",
        f"Time to the first text with tools bound, over that without: {result['first_text_ratio']:.2f}.",
    ]


def task(result: dict[str, Any]) -> list[str]:
    rows = [
        (name, f"{row['accuracy']:.2f} [{row['interval'][0]:.2f}, {row['interval'][1]:.2f}]", f"{row['agreement']:.2f}")
        for name, row in result["summary"].items()
    ]
    return [
        f"## Task: {result['model']}",
        "",
        f'{result["settings"]["cases"]} cases of two companies whose second chunks say only "the company". Every chunk is '
        f"read alone; prompts have {result['prompt_tokens']:.0f} tokens on average. Accuracy is how often the right "
        "company's number is more likely than the other's (chance is .50), with its 95% bootstrap interval; the last "
        "column is how often this agrees with full prefill of the same prompt. With titles, every chunk starts with the "
        "title of its document.",
        "",
        *table(("", "accuracy", "agrees with full prefill"), rows),
    ]


def tried(result: dict[str, Any]) -> list[str]:
    lines = [
        "## What was tried for blending",
        "",
        f"Short runs that determined the defaults, on questions that the fidelity runs do not use: {result['passages']} "
        f"passages, {100 * result['recompute']:.0f}% recomputed, compared with {result['baseline']} on the same questions. "
        "Each cell shows the mean KL and the geometric-mean KL ratio to that baseline.",
    ]
    for group in result["groups"]:
        models = list(group["examples"])
        counted = ", ".join(f"{model} n = {count}" for model, count in group["examples"].items())
        rows = [
            (name, *(f"{r[m]['kl_mean']:.4f} · {r[m]['ratio']:.2f}" if m in r else "" for m in models))
            for name, r in group["rows"].items()
        ]
        lines += ["", f"### {group['title']}", "", f"Questions {group['questions']}; {counted}.", ""]
        lines += table(("", *models), rows)
    return lines


def compare(result: dict[str, Any]) -> list[str]:
    full = result["summary"]["full"]
    rows = []
    for name, label in result["ways"].items():
        row = result["summary"][name]
        times = [f"{row[key] / full[key]:.3f}" for key in ("first_token_median", "total_median")]
        keys = ("top1", "agrees", "f1", "contains", "missing")
        shares = ["" if row[key] is None else f"{row[key]:.2f}" for key in keys]
        rows.append((label, *times, f"{row['computed']:.0f}", *shares))
    even = result["break_even"]
    columns = (
        "",
        "first token ÷ full",
        "answer ÷ full",
        "tokens computed",
        "token agreement",
        "overlap with full",
        "F1",
    )
    return [
        f"## kvmem compare: {result['model']}",
        "",
        f"{result['settings']['questions']} questions over {result['documents']} documents of {result['tokens']} tokens. "
        "Times are medians divided by full prefill's. Tokens computed is the model's work before the first token. Token "
        "agreement is the share of tokens of full prefill's answer to the same prompt that kvmem would also have chosen. "
        "Overlap with full is the word F1 with full prefill's answer. Contains is how often the answer contained a right "
        "answer, and missing is how often a text needed for the answer was not in the prompt.",
        "",
        *table((*columns, "contains", "missing"), rows),
        "",
        f"Reading all documents once took {result['reading'] / full['total_median']:.2f} times what full prefill takes "
        f"for one question. The time saved on first tokens makes up for it {_pays(even['full'])} against full prefill "
        f"and {_pays(even['rag'])} against RAG.",
    ]


def _pays(found: dict[str, float | None]) -> str:
    if found["queries"] is None:
        return "never"
    low, high = (math.inf if found[key] is None else found[key] for key in ("low", "high"))
    return f"after {found['queries']:.1f} questions (95% interval {low:.1f} to {high:.1f})"


def retrieval_miss(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    of = settings["questions"]
    rows = [(f"top {k} of {settings['chunks']} chunks", f"{count} of {of}") for k, count in result["missed"].items()]
    answers = result["answers"]
    return [
        f"## What retrieval misses: {result['model']}",
        "",
        f"`examples/retrieval_miss.py`: {of} questions that need two distant parts of the documents, with BM25 over chunks.",
        "",
        *table(("in the prompt", "a part is missing"), [*rows, ("all documents", f"{result['missed_whole']} of {of}")]),
        "",
        f"Right answers: {answers['rag']} with the top {settings['k']} chunks, {answers['full']} with full prefill of all "
        f"documents, {answers['warm']} with kvmem, and {answers['cached']} with kvmem on the retrieved chunks. Having both "
        "parts in the prompt does not guarantee that a small model combines them.",
    ]
