"""Whether answers stay right when they hang on what stands before a chunk.

Every case is two profiles of two chunks each. The second chunk of a profile says only "the company"; which company it
is stands in the first. Every chunk is read alone, and the question is about one of the two companies: nothing in the
two second chunks, as they were read, tells them apart but the order in which they stand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from kvmem.bench.common import bootstrap, describe, track
from kvmem.document import Document
from kvmem.engine import KVMem
from kvmem.model import LanguageModel
from kvmem.settings import BlendSettings

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"selector": "none"},
    "deviation 15%": {"selector": "deviation", "recompute": 0.15},
    "query 5%": {"selector": "query", "recompute": 0.05},
    "query 7%": {"selector": "query", "recompute": 0.07},
    "query 10%": {"selector": "query", "recompute": 0.10},
    "query 20%": {"selector": "query", "recompute": 0.20},
    "all": {"selector": "all"},
}
_FIRST = ("Alder", "Brook", "Cedar", "Dover", "Elm", "Fern", "Grove", "Heath", "Iris", "Juniper", "Larch", "Maple")
_SECOND = ("Freight", "Textiles", "Dairy", "Printing", "Optics", "Timber", "Ceramics", "Bakery", "Brewing", "Tools")
_GOODS = ("grain", "paper", "machine parts", "wool", "bottles", "furniture", "seeds", "paint")
_FOUNDERS = ("two brothers", "a widow", "three friends", "a doctor", "its workers", "an engineer")


@dataclass(frozen=True)
class Case:
    """chunks: four, each to be read alone. titles: of their documents. right, wrong: how many people the asked company
    employs, and the other."""

    chunks: tuple[str, ...]
    titles: tuple[str, ...]
    question: str
    right: str
    wrong: str


def make_cases(count: int, seed: int) -> list[Case]:
    """Half of them ask for the first company, half for the second."""
    draw = random.Random(seed)
    cases = []
    for number in range(count):
        firsts, seconds = draw.sample(_FIRST, 2), draw.sample(_SECOND, 2)
        names = [f"{a} {b}" for a, b in zip(firsts, seconds, strict=True)]
        people = [str(n) for n in draw.sample(range(14, 99), 2)]
        chunks = [
            text for name, number_of in zip(names, people, strict=True) for text in _profile(name, number_of, draw)
        ]
        asked = number % 2
        question = f"How many people does {names[asked]} employ? Answer with the number only."
        titles = tuple(f"Profile of {name}" for name in names for _ in range(2))
        cases.append(Case(tuple(chunks), titles, question, people[asked], people[1 - asked]))
    return cases


def _profile(name: str, people: str, draw: random.Random) -> tuple[str, str]:
    opening = (
        f"Profile of {name}. {name} makes {draw.choice(_GOODS)} and sells it. "
        f"In the following lines, the company means {name}."
    )
    facts = f"The company employs {people} people. The company was founded by {draw.choice(_FOUNDERS)}."
    return opening, facts


def run(
    model: LanguageModel, count: int, *, seed: int = 0, variants: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The share of `count` cases in which the right number is more likely than the other company's."""
    variants = VARIANTS if variants is None else variants
    rows = [_measure(model, case, variants) for case in track(make_cases(count, seed), "cases")]
    return {
        "benchmark": "task",
        **describe(model, cases=count, seed=seed, variants=variants),
        "prompt_tokens": float(np.mean([row["prompt_tokens"] for row in rows])),
        "summary": {
            name + suffix: _summarise(rows, name + suffix, FULL + suffix, seed)
            for suffix in SUFFIXES
            for name in (FULL, *variants)
        },
        "examples": rows,
    }


FULL = "full prefill"
# Of the names of variants whose chunks begin with a title or not.
SUFFIXES = {"": False, ", with titles": True}


def _measure(model: LanguageModel, case: Case, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    right, wrong = (model.tokenize(text, markup=False) for text in (case.right, case.wrong))
    found = {}
    for suffix, titled in SUFFIXES.items():
        pairs = zip(case.chunks, case.titles, strict=True)
        context = [Document(text, text, {"title": title} if titled else {}) for text, title in pairs]
        with KVMem(model, None, max_tokens=8) as mem:
            for document in context:
                mem.prefill(case.question, context=[document])
            # "all" comes last: it makes every entry exact.
            for name, blend in sorted(variants.items(), key=lambda item: item[1]["selector"] == "all"):
                margins = []
                for answer in (right, wrong):
                    state = mem.prefill(case.question, context=context, blend=BlendSettings.parse(blend))
                    margins.append(_likelihood(model, state.logits, answer, state.cache))
                found[name + suffix] = margins[0] - margins[1]
        ids = state.token_ids.to(model.device)
        with torch.no_grad():
            margins = []
            for answer in (right, wrong):
                out = model.hf(ids[None], use_cache=True)
                margins.append(_likelihood(model, out.logits[0, -1].float(), answer, out.past_key_values))
        found[FULL + suffix] = margins[0] - margins[1]
    return {"prompt_tokens": len(ids), "margins": found}


@torch.no_grad()
def _likelihood(model: LanguageModel, logits: torch.Tensor, answer: Sequence[int], cache: Any) -> float:
    """Log-probability of `answer` after a state; the state is continued."""
    rows = [logits[None].to(model.device)]
    if len(answer) > 1:
        ids = torch.tensor([answer[:-1]], device=model.device)
        rows.append(model.hf(ids, past_key_values=cache, use_cache=True).logits[0].float())
    return float(torch.cat(rows).log_softmax(-1)[range(len(answer)), list(answer)].sum())


def _summarise(rows: Sequence[dict[str, Any]], name: str, full: str, seed: int) -> dict[str, Any]:
    right = [float(row["margins"][name] > 0) for row in rows]
    low, high = bootstrap(right, lambda x: float(np.mean(x)), seed)
    agree = [float((row["margins"][name] > 0) == (row["margins"][full] > 0)) for row in rows]
    return {"accuracy": float(np.mean(right)), "interval": [low, high], "agreement": float(np.mean(agree))}


def table(result: dict[str, Any]) -> Table:
    """The summary, for a terminal."""
    title = f"{result['model']}: two companies, told apart by what stands before, {result['settings']['cases']} cases"
    shown = Table("", "right [95%]", "as full prefill", title=title)
    for name, row in result["summary"].items():
        low, high = row["interval"]
        shown.add_row(name, f"{row['accuracy']:.2f} [{low:.2f}, {high:.2f}]", f"{row['agreement']:.2f}")
    return shown
