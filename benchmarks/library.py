"""How the cost of each operation grows with the number of documents, beside the rows of other namespaces."""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any
from unittest.mock import patch

from rich.table import Table

from kvmem import Document, KVMem, Memory
from kvmem.measure import describe
from kvmem.store import DiskStore
from kvmem.testing import tiny_model

STEMS = ("al", "bre", "ced", "dov", "el", "fen", "gar", "hol")
WORDS = [stem + ending for stem in STEMS for ending in ("der", "ok", "ton", "mere", "by")]
# Other namespaces.
OTHERS = 50
# Tokens of documents in a prompt: four or five texts, so that what grows is the corpus, not the prompt.
CONTEXT = 600


class ModelClock:
    """Adds up the seconds that a model computes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watching(self, module: Any) -> Iterator[None]:
        real = type(module).forward

        def forward(this: Any, *args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(this, *args, **options)
            finally:
                self.seconds += time.perf_counter() - began

        with patch.object(type(module), "forward", forward):
            yield


def run(
    sizes: Sequence[int] = (1_000, 5_000, 20_000), others: int = 50_000, samples: int = 20, seed: int = 0
) -> dict[str, Any]:
    """Measure every operation at each number of documents.

    Args:
        sizes: Numbers of documents in the namespace that is measured.
        others: Records of other namespaces in the same store.
        samples: Calls of each operation; their median counts.
        seed: Seed of the texts and of the model's random weights.

    Returns:
        The result as JSON values. "seconds" are medians of one call, without the time that the model computes.
        "exponents" are the slopes of log(seconds) over log(documents).
    """
    draw = random.Random(seed)
    model = tiny_model(seed=seed)
    clock = ModelClock()
    rows: list[dict[str, Any]] = []
    options: Any = {"namespace": "mine", "max_tokens": 1, "context_tokens": CONTEXT}
    for size in sizes:
        with tempfile.TemporaryDirectory() as directory, closing(DiskStore(directory)) as store:
            _fill_others(store, others, draw)
            with KVMem(model, store, **options) as mem, clock.watching(model.hf.base_model):
                rows.append({"documents": size, "seconds": _measure(mem, size, samples, draw, clock)})
    names: list[str] = list(rows[0]["seconds"])
    points = [math.log(size) for size in sizes]
    exponents = {
        name: statistics.linear_regression(points, [math.log(row["seconds"][name]) for row in rows]).slope
        for name in names
    }
    provenance = describe(model, sizes=list(sizes), others=others, samples=samples, seed=seed)
    return {"benchmark": "library", **provenance, "rows": rows, "exponents": exponents}


def _fill_others(store: DiskStore, count: int, draw: random.Random) -> None:
    with store.database.transaction():
        for number in range(count):
            records = store.database.records(f"other-{number % OTHERS}", "document")
            value: dict[str, Any] = {"id": str(number), "metadata": {}, "chunks": [_text(draw)], "heading": None}
            records.put(str(number), {**value, "scheme": "", "sizes": [9]})


def _measure(mem: KVMem, size: int, samples: int, draw: random.Random, clock: ModelClock) -> dict[str, float]:
    def timed(call: Callable[[int], object]) -> float:
        seconds = []
        for number in range(samples):
            began, computed = time.perf_counter(), clock.seconds
            call(number)
            seconds.append(time.perf_counter() - began - (clock.seconds - computed))
        return statistics.median(seconds)

    began = time.perf_counter()
    mem.add_all([Document(f"d{number}", _text(draw)) for number in range(size)], read=False)
    filled = (time.perf_counter() - began) / size
    memory = Memory(mem)
    ids = [memory.remember(_text(draw)).id for _ in range(samples)]
    questions = [_question(draw) for _ in range(samples)]
    for question in questions:
        mem.ask(question)
    return {
        "add_all, per document": filled,
        "add, not read": timed(lambda n: mem.add(_text(draw), id=f"new{n}", read=False)),
        "add, read": timed(lambda n: mem.add(_text(draw), id=f"read{n}")),
        "ask": timed(lambda n: mem.ask(questions[n])),
        "add, not read, then ask": timed(lambda n: (mem.add(_text(draw), read=False), mem.ask(questions[n]))),
        "retrieve": timed(lambda n: mem.retrieve(questions[n], 4)),
        "list": timed(lambda n: mem.list()),
        "remove": timed(lambda n: mem.remove(f"new{n}")),
        "Memory.forget": timed(lambda n: memory.forget(ids[n])),
    }


def _text(draw: random.Random) -> str:
    return f"{_question(draw)} It was said in {draw.randrange(10_000)}."


def _question(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=12)).capitalize() + "?"


def table(result: dict[str, Any]) -> Table:
    """The medians in milliseconds, and the exponents, as a terminal table."""
    shown = Table("milliseconds", *(f"{row['documents']:,} documents" for row in result["rows"]), "exponent")
    for name, exponent in result["exponents"].items():
        cells = (f"{1000 * row['seconds'][name]:.1f}" for row in result["rows"])
        shown.add_row(name, *cells, f"{exponent:.2f}")
    return shown
