"""Writes a comparison as one self-contained HTML file: tables, SVG plots, all questions and answers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kvmem.compare.summary import headline, notices, verdict
from kvmem.errors import KVMemError

COLOURS = {
    "rag": "#b45309",
    "full": "#64748b",
    "warm": "#0f766e",
    "restart": "#2563eb",
    "cached": "#be185d",
    "cold": "#7c3aed",
}
_STYLE: Any = {
    "font.size": 11,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.edgecolor": "#94a3b8",
    "text.color": "#0f172a",
    "axes.labelcolor": "#0f172a",
    "xtick.color": "#334155",
    "ytick.color": "#334155",
}


def check_installed() -> None:
    """Raise KVMemError if a package for the report is missing."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise KVMemError(f"The report needs {' and '.join(missing)}: pip install 'kvmem[bench]'.")


def write(result: dict[str, Any], path: Path) -> None:
    """Write the report. Needs matplotlib and jinja2."""
    import jinja2
    import matplotlib

    matplotlib.use("Agg")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvmem.compare", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    plots = {name: _svg(draw, result) for name, draw in _PLOTS.items()}
    text = environment.get_template("report.html.j2").render(
        result=result,
        headline=headline(result),
        notices=notices(result),
        verdict=verdict(result),
        plots=plots,
        colours=COLOURS,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _svg(draw: Callable[[Any, dict[str, Any]], None], result: dict[str, Any]) -> str:
    import matplotlib.pyplot as plt

    with plt.rc_context({**_STYLE, "svg.hashsalt": draw.__name__}):
        figure, axes = plt.subplots(figsize=(5.2, 3.3), layout="constrained")
        draw(axes, result)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = file.getvalue()
    # Group ids would repeat in every plot of the page; ids must be unique.
    text = re.sub(r' id="[a-z][\w.]*_\d+"', "", text[text.index("<svg") :])
    return text.replace("<svg", f'<svg role="img" aria-label="{draw.__doc__}"', 1)


def _first(axes: Any, result: dict[str, Any]) -> None:
    """Time to the first token. Each dot is a question, the bar is the median."""
    labels = {**result["ways"], "cold": "kvmem, cold"}
    for place, name in enumerate(reversed(labels)):
        if name == "cold":
            values = [result["cold"]["first_token"]]
        else:
            values = [row["ways"][name]["first_token"] for row in result["rows"]]
        spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [0.0]
        axes.plot(values, place + np.asarray(spread), "o", ms=4.5, alpha=0.7, color=COLOURS[name], mec="none")
        axes.plot([np.median(values)] * 2, [place - 0.36, place + 0.36], lw=2.5, color=COLOURS[name])
    _log(axes)
    axes.set_yticks(range(len(labels)), list(reversed(labels.values())))
    axes.set_xlabel("seconds to the first token (log)")
    axes.grid(axis="y", visible=False)


def _cost(axes: Any, result: dict[str, Any]) -> None:
    """Total seconds waited for first tokens by number of questions, and where reading once breaks even."""
    last = _horizon(result)
    _accumulate(axes, result, "first_token", result["reading"], last)
    for way, found in result["break_even"].items():
        low, queries, high = found["low"], found["queries"], found["high"]
        if queries is not None and queries <= last:
            axes.axvspan(low, min(high or last, last), color=COLOURS[way], alpha=0.12, lw=0)
            axes.axvline(queries, color=COLOURS[way], lw=1.2, ls=":")
    axes.set_ylabel("seconds waited")


def _work(axes: Any, result: dict[str, Any]) -> None:
    """Total tokens computed before first tokens, by number of questions."""
    _accumulate(axes, result, "computed", result["tokens"], _horizon(result))
    axes.set_ylabel("tokens computed")
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _horizon(result: dict[str, Any]) -> int:
    """The number of questions that the cost plots cover."""
    found = [even["queries"] for even in result["break_even"].values()]
    known = [queries for queries in found if queries is not None and queries < 500]
    return max(2 * len(result["rows"]), *(int(1.5 * queries) + 1 for queries in [0.0, *known]))


def _accumulate(axes: Any, result: dict[str, Any], key: str, reading: float, last: int) -> None:
    """Plot measured totals as a solid line, extrapolated with the mean as a dashed line."""
    measured = len(result["rows"])
    for name, start in {"rag": 0.0, "full": 0.0, "warm": reading, "cached": reading}.items():
        each = [row["ways"][name][key] for row in result["rows"]]
        spent = start + np.concatenate([[0.0], np.cumsum(each)])
        label = "kvmem, including reading" if name == "warm" else result["ways"][name]
        axes.plot(range(measured + 1), spent, lw=2.2, color=COLOURS[name], label=label)
        expected = spent[-1] + np.mean(each) * (last - measured)
        axes.plot([measured, last], [spent[-1], expected], "--", color=COLOURS[name])
    axes.set_xlabel("questions asked")
    axes.set_xlim(0, last)
    axes.set_ylim(0)
    axes.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none", fontsize=10)


def _log(axes: Any) -> None:
    """Use a logarithmic x axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low < 300 else (1.0,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _fidelity(axes: Any, result: dict[str, Any]) -> None:
    """KL divergence from full prefill of the same prompt. Each dot is a question, the bar is the median."""
    names = ["warm", "cached"]
    for place, name in enumerate(reversed(names)):
        values = np.maximum([row["ways"][name]["kl"] for row in result["rows"]], 1e-6)
        spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [0.0]
        axes.plot(values, place + np.asarray(spread), "o", ms=4.5, alpha=0.7, color=COLOURS[name], mec="none")
        axes.plot([np.median(values)] * 2, [place - 0.36, place + 0.36], lw=2.5, color=COLOURS[name])
    _log(axes)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_yticks(range(len(names)), [result["ways"][name] for name in reversed(names)])
    axes.set_xlabel("KL to full prefill of the same prompt, nats (log)")
    axes.grid(axis="y", visible=False)


_PLOTS = {"first": _first, "cost": _cost, "work": _work, "fidelity": _fidelity}
