"""Renders docs/benchmarks.md from the JSON results next to it, so that no number is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.sections import answers, caches, speed


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
        lines += ["", *(speed.scale(result, directory) if kind == "scale" else _SECTIONS[kind](result))]
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
    commit = f", commit {result['commit']}" if result.get("commit") else ""
    return f"*{path.name}: {result['dtype']} on {result['device']}, {where}{blend}; {versions}{commit}.*"


_PLOTS = {
    "fidelity": "Mean KL to full prefill against the recomputed share",
    "conversation": "Tokens computed and time to the first token, by turn",
}
_SECTIONS = {
    "agents": answers.agents,
    "tried": answers.tried,
    "store": caches.store,
    "library": caches.library,
    "fidelity": answers.fidelity,
    "speed": speed.speed,
    "task": answers.task,
    "batch": caches.batch,
    "frameworks": speed.frameworks,
    "conversation": caches.conversation,
    "compare": answers.compare,
    "retrieval-miss": answers.retrieval_miss,
    "sizing": speed.sizing,
    "serve": caches.serve,
}
