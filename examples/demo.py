"""Reads three documents and asks questions, then asks again in a new process that loads everything from disk.

Run `make demo` or `python examples/demo.py [--store DIR]`. All numbers are measured in this run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

DOCUMENTS = Path(__file__).parent / "documents"
QUESTIONS = [
    "What is the Base Rent a year?",
    "When does the lease begin and how long does it run?",
    "Which company owns the premises at 14 Harbour Street?",
    "Who last reviewed the runbook?",
    "Who is the head of platform?",
]
CLASSES = ("exact", "reused", "recomputed", "computed")
console = Console()


def first_process(store: Path) -> dict[str, object]:
    """Read the documents, then ask."""
    from kvmem import KVMem

    with KVMem("smollm2", store, max_tokens=32) as mem:
        began = time.perf_counter()
        for path in sorted(DOCUMENTS.glob("*.md")):
            mem.add(path, id=path.name)
        reading = time.perf_counter() - began
        return {"reading": reading, "answers": [row(mem.ask(question)) for question in QUESTIONS]}


def second_process(store: Path) -> dict[str, object]:
    """Ask again, then with the documents in reverse order, then with full prefill of every prompt."""
    from kvmem import KVMem

    with KVMem("smollm2", store, max_tokens=32) as mem:
        warm = [row(mem.ask(question)) for question in QUESTIONS]
        documents = list(mem.list())[::-1]
        moved = [row(mem.ask(question, context=documents)) for question in QUESTIONS]
        full = [full_prefill(mem, question) for question in QUESTIONS]
        full_moved = [full_prefill(mem, question, documents) for question in QUESTIONS]
    return {"warm": warm, "moved": moved, "full": full, "full_moved": full_moved}


def full_prefill(mem, question: str, context=None) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """The usual way: the whole prompt through `model.generate`, with transformers' own cache."""
    import torch
    from transformers import TextIteratorStreamer

    ids = mem.prefill(question, context=context).token_ids[None]
    stamps: list[float] = []

    class Watch(TextIteratorStreamer):
        def put(self, value: torch.Tensor) -> None:
            stamps.append(time.perf_counter())

    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 2}
    began = time.perf_counter()
    output = mem.local_model.hf.generate(ids, max_new_tokens=32, streamer=Watch(mem.model.tokenizer), **options)
    text = mem.model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    return {"tokens": [0, 0, 0, ids.shape[1]], "first_token": stamps[1] - began, "text": text}


def row(answer) -> dict[str, object]:  # type: ignore[no-untyped-def]
    tokens = [getattr(answer.usage, name) for name in CLASSES]
    return {"tokens": tokens, "first_token": answer.timings.first_token, "text": answer.text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, help="default: a temporary directory")
    parser.add_argument("--phase", choices=["first", "second"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        phase = first_process if arguments.phase == "first" else second_process
        print(json.dumps(phase(arguments.store)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        store = arguments.store or Path(scratch) / "kv"
        with console.status("First process: reading three documents and asking five questions …"):
            first = run("first", store)
        with console.status("Second process: asking again, with kvmem and with full prefill …"):
            second = run("second", store)
    show(first, second)


def run(phase: str, store: Path) -> dict[str, list[dict[str, object]]]:
    command = [sys.executable, __file__, "--phase", phase, "--store", str(store)]
    result = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def show(first, second) -> None:  # type: ignore[no-untyped-def]
    ways = [
        ("full prefill", second["full"]),
        ("first ask", first["answers"]),
        ("warm, new process", second["warm"]),
        ("reordered, full prefill", second["full_moved"]),
        ("reordered, warm", second["moved"]),
    ]
    for number, question in enumerate(QUESTIONS):
        console.print(f"\n[bold]{question}[/bold]")
        table = Table("tokens", *CLASSES, "first token", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        base = second["full"][number]["first_token"]
        for name, rows in ways:
            seconds = rows[number]["first_token"]
            table.add_row(name, *map(str, rows[number]["tokens"]), f"{seconds:.2f} s {seconds / base:4.0%}")
        console.print(table)
        for name, rows in ways:
            console.print(f"  {name}: [italic]{' '.join(rows[number]['text'].split())}[/italic]", highlight=False)
    full = [cell["first_token"] for cell in second["full"]]
    warm = [cell["first_token"] for cell in second["warm"]]
    moved = [cell["first_token"] for cell in second["moved"]]
    full_moved = [cell["first_token"] for cell in second["full_moved"]]
    console.print(
        f"\nReading the documents took {first['reading']:.1f} s, once. Time to the first token, relative to full "
        f"prefill: {warm[0] / full[0]:.1%} for the first question after the restart (everything is loaded from disk), "
        f"{sum(warm[1:]) / sum(full[1:]):.1%} for the others, "
        f"{sum(moved) / sum(full_moved):.1%} with the documents in a different order (blended)."
    )


if __name__ == "__main__":
    main()
