"""Renders docs/benchmarks.md from the JSON results next to it, so that no number is typed by hand."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale import kv_bytes, need


def render(directory: Path) -> str:
    """Render all results in `directory` as Markdown, sorted by file name."""
    lines = [
        "# Benchmarks",
        "",
        "Rendered by `python -m benchmarks report` from the JSON files in `docs/benchmarks/`, which contain all settings, seeds and",
        "machines. All numbers are ratios within one run, or divergences that do not depend on the machine.",
    ]
    for path in sorted(directory.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        kind = result["benchmark"]
        lines += ["", *(_scale(result, directory) if kind == "scale" else _SECTIONS[kind](result))]
        if "machine" in result:
            lines += ["", _provenance(path, result)]
    for path in sorted(directory.glob("*.png")):
        lines += ["", f"![{_PLOTS[path.stem.split('-')[0]]}: {path.stem}](benchmarks/{path.name})"]
    return "\n".join(lines) + "\n"


def _provenance(path: Path, result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = result["machine"]
    with_bfloat16 = f" with {machine['bfloat16']} for bfloat16" if "bfloat16" in machine else ""
    where = f"{machine['cpu'] or 'unknown CPU'}{with_bfloat16}, {machine['cores']} cores, {result['threads']} thread(s)"
    blend = f", default recompute {result['default_recompute']:.0%}" if "default_recompute" in result else ""
    return f"*{path.name}: {result['dtype']} on {result['device']}, {where}{blend}; {versions}.*"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return head + ["| " + " | ".join(row) + " |" for row in rows]


def _store(result: dict[str, Any]) -> list[str]:
    loading = [(r["way"], f"{r['ratio_to_copy']:.2f}") for r in result["loading"]]
    native = result["packing"][0]["bytes"]
    packing = [
        (r["kv_dtype"], f"{r['bytes'] / native:.2f}", *(f"{r[k]:.5f}" for k in ("kl_mean", "kl_median", "kl_p90")))
        for r in result["packing"]
    ]
    settings = result["settings"]
    return [
        f"## Store: {result['model']}",
        "",
        "Loading an entry of 100 MB from the page cache into a buffer: the time of a plain copy divided by the time of the",
        "load (1 is as fast as copying), by `verify` and `kv_dtype`:",
        "",
        *_table(("", "copy ÷ load"), loading),
        "",
        f"What packing costs: KL of the next token to full prefill, for {settings['questions']} prompts of "
        f"{settings['passages']} passages where every entry is an exact hit. Native is not 0, because bfloat16 rounds "
        "differently when a prompt is prefilled in pieces.",
        "",
        *_table(("kv_dtype", "bytes ÷ native", "KL mean", "median", "p90"), packing),
    ]


def _library(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    rows = [
        (name, *(f"{1000 * row['seconds'][name]:.1f} ms" for row in result["rows"]), f"{exponent:.2f}")
        for name, exponent in result["exponents"].items()
    ]
    return [
        "## Many documents",
        "",
        f"One namespace of short documents beside {settings['others']:,} records of others, on disk. Medians of "
        f"{settings['samples']} calls, without the time that the model computes. The exponent is the slope of log(time) "
        "over log(documents): 0 is independent of the number of documents, 1 is linear. The namespace has "
        f"{settings['samples']} memories at every size, so Memory.forget does not show how forgetting grows with memories.",
        "",
        *_table(("", *(f"{row['documents']:,}" for row in result["rows"]), "exponent"), rows),
    ]


def _fidelity(result: dict[str, Any]) -> list[str]:
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
        *_table(("", "KL mean", "median", "p90", "top-1", "first token", "ratio"), rows),
    ]


def _speed(result: dict[str, Any]) -> list[str]:
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
    decoding = [
        (
            f"{row['prompt_tokens']:.0f}",
            f"{against} weights",
            f"{found[against]:.2f}",
            _spread(found[f"{against}_single"]),
        )
        for row in result["summary"]
        if (found := row["decoding"]) is not None
        for against in ("plain", "packed")
    ]
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
        *_table(names, rows),
        "",
        "Decoding: time per token after the first on a cache blended with the default settings, divided by that of "
        "transformers on its own cache, with plain weights (as it loads them) and with weights packed like kvmem's. Ratio "
        "is the best of all processes divided by the best; median is the median and range of the single ratios.",
        "",
        *_table(("tokens", "transformers with", "ratio", "median"), decoding),
        "",
        "The effect of packed weights alone: time of a forward pass with packed weights, divided by one with plain weights.",
        "",
        *_table(
            ("tokens", "packed ÷ plain"), [(str(row["tokens"]), f"{row['ratio']:.2f}") for row in result["packing"]]
        ),
    ]


def _task(result: dict[str, Any]) -> list[str]:
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
        *_table(("", "accuracy", "agrees with full prefill"), rows),
    ]


def _tried(result: dict[str, Any]) -> list[str]:
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
        lines += _table(("", *models), rows)
    return lines


def _spread(ratios: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def _batch(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    rows = []
    for fixed, name in ((True, "32 tokens each"), (False, "up to 32 tokens")):
        found = sorted((row for row in result["rows"] if row["fixed"] == fixed), key=lambda row: row["speedup"])
        equal = ", ".join(str(row["equal"]) for row in found)
        rows.append((name, _spread([row["speedup"] for row in found]), f"{equal} of {settings['batch']}"))
    return [
        f"## Batch: {result['model']}",
        "",
        f"{settings['batch']} questions over one corpus with {result['rows'][0]['prompt_tokens']} prompt tokens; all "
        "entries are in memory and exact. The ratio is tokens per second as a batch divided by tokens per second one by "
        f"one (median and range of {settings['repeats']} runs). Greedy answers differ where bfloat16 rounds a near tie "
        "differently; in float32 they are equal, which a test checks.",
        "",
        *_table(("answers", "batch ÷ one by one", "equal answers"), rows),
    ]


def _frameworks(result: dict[str, Any]) -> list[str]:
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
        *_table(("", "pass", "first token", "whole answer"), rows),
    ]


def _conversation(result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    shown = [row for row in rows if row["turn"] in (1, 2, 5, 10, 11, 15, len(rows))]
    return [
        f"## Conversation: {result['model']}",
        "",
        f"{len(rows)} turns. Every turn uses two of eight passages and two of six memories, chosen at random, and the engine "
        f"is closed and reopened before turn {result['restart_before_turn']}. Computed is the model's work before the first "
        "token, in tokens through all layers, including blending. Full prefill computes the whole prompt.",
        "",
        *_table(
            ("turn", "prompt tokens", "computed", "first token ÷ full prefill"),
            [(str(r["turn"]), str(r["prompt_tokens"]), f"{r['work']:.0f}", f"{r['ratio']:.2f}") for r in shown],
        ),
    ]


def _compare(result: dict[str, Any]) -> list[str]:
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
        *_table((*columns, "contains", "missing"), rows),
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


def _retrieval_miss(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    of = settings["questions"]
    rows = [(f"top {k} of {settings['chunks']} chunks", f"{count} of {of}") for k, count in result["missed"].items()]
    answers = result["answers"]
    return [
        f"## What retrieval misses: {result['model']}",
        "",
        f"`examples/retrieval_miss.py`: {of} questions that need two distant parts of the documents, with BM25 over chunks.",
        "",
        *_table(
            ("in the prompt", "a part is missing"), [*rows, ("all documents", f"{result['missed_whole']} of {of}")]
        ),
        "",
        f"Right answers: {answers['rag']} with the top {settings['k']} chunks, {answers['full']} with full prefill of all "
        f"documents, {answers['warm']} with kvmem, and {answers['cached']} with kvmem on the retrieved chunks. Having both "
        "parts in the prompt does not guarantee that a small model combines them.",
    ]


def _sizing(result: dict[str, Any]) -> list[str]:
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
        *_table(("model", "per token", "10,000 tokens", "1 million tokens"), rows),
    ]


def _serve(result: dict[str, Any]) -> list[str]:
    settings, crowd, left, full = result["settings"], result["crowd"], result["leaving"], result["full"]
    agent = [
        (str(row["turn"]), str(row["prompt"]), f"{row['reused'] / row['prompt']:.2f}", str(row["usage"]["recomputed"]))
        for row in result["agent"]
    ]
    grown = crowd["memory_at_the_end"] / crowd["memory_after_a_third"] - 1
    found = [
        ("answers, errors", f"{crowd['answers']}, {crowd['errors']}"),
        ("answers per client, fewest and most", f"{crowd['fewest']}, {crowd['most']}"),
        ("growth of the server's memory, from the end of the first third to the end", f"{grown:+.1%}"),
        (
            f"{left['clients']} clients that disconnected early: server idle after at most",
            f"{left['free_highest']:.2f} s",
        ),
        (f"{full['requests']} concurrent requests with a queue of {settings['queue']}: refused", str(full["refused"])),
        ("refused after at most", f"{full['refused_after_highest']:.2f} s"),
    ]
    return [
        f"## kvmem serve: {result['model']}",
        "",
        "A coding agent sends five files of this package and the conversation so far in every turn; one line of one file "
        "is edited between turns. The share reused is the share of exact and reused tokens:",
        "",
        *_table(("turn", "prompt", "share reused", "recomputed"), agent),
        "",
        f"{settings['clients']} clients in another process ask and read streamed answers for {settings['seconds']:.0f} s:",
        "",
        *_table(("", "result"), found),
    ]


def _scale(result: dict[str, Any], directory: Path) -> list[str]:
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
        *_table(("", "needed"), rows),
        "",
        "Prefill: requests x (2 x parameters x tokens + 2 x layers x width x tokens²) / (TFLOP/s used) x share. Transfer: "
        "requests x context x bytes per token / link. Decoding: requests x answer x (prompt + answer / 2) x bytes per token / "
        "memory bandwidth used; the weights are left out, because they are read once for all sequences of a device. The "
        "blended rows require an engine that blends as kvmem does. vLLM's prefix cache corresponds to the full prefill row, "
        "minus the prefix that prompts share.",
    ]


_PLOTS = {
    "fidelity": "Mean KL to full prefill against the recomputed share",
    "conversation": "Tokens computed and time to the first token, by turn",
}
_SECTIONS = {
    "tried": _tried,
    "store": _store,
    "library": _library,
    "fidelity": _fidelity,
    "speed": _speed,
    "task": _task,
    "batch": _batch,
    "frameworks": _frameworks,
    "conversation": _conversation,
    "compare": _compare,
    "retrieval-miss": _retrieval_miss,
    "sizing": _sizing,
    "serve": _serve,
}
