"""Measures whether answers stay correct when they depend on the text before a chunk.

Every case has two company profiles of two chunks each. The second chunk says only "the company"; the first chunk names
it. Every chunk is read alone, and the question asks about one of the two companies. So the entries of the two second
chunks do not say which company they describe; only their order in the prompt does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from kvmem.engine import KVMem
from kvmem.measure import bootstrap, describe, track
from kvmem.model.local import LanguageModel
from kvmem.settings import BlendSettings
from kvmem.text.document import Document

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
    """One case.

    chunks: four texts, each read alone. titles: the titles of their documents. right, wrong: number of employees of
    the company asked about, and of the other company.
    """

    chunks: tuple[str, ...]
    titles: tuple[str, ...]
    question: str
    right: str
    wrong: str


def make_cases(count: int, seed: int) -> list[Case]:
    """Make cases; half ask about the first company, half about the second."""
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
    """Measure in how many of `count` cases the right number is more likely than the other company's."""
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
# Suffix of a variant's name -> whether its chunks start with a title.
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
            # "all" comes last, because it replaces every entry with an exact one.
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
    """Log-probability of `answer` after a state. Modifies the state's cache."""
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
    """The summary as a terminal table."""
    title = f"{result['model']}: two companies, identified by the preceding chunk, {result['settings']['cases']} cases"
    shown = Table("", "accuracy [95%]", "agrees with full", title=title)
    for name, row in result["summary"].items():
        low, high = row["interval"]
        shown.add_row(name, f"{row['accuracy']:.2f} [{low:.2f}, {high:.2f}]", f"{row['agreement']:.2f}")
    return shown
