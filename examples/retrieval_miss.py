"""Shows what top-k retrieval misses when an answer needs two distant parts, such as a clause and a definition.

Run `python examples/retrieval_miss.py [--limit N] [--output FILE.json]`. All numbers are measured in this run, on
SmolLM2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvmem import KVMem, LanguageModel
from kvmem.compare.questions import load
from kvmem.compare.run import run
from kvmem.compare.score import missing
from kvmem.measure import describe, write_json

HERE = Path(__file__).parent
DOCUMENTS = sorted((HERE / "documents").glob("*.md"))
RETRIEVED = (1, 2, 3, 4, 6)
K = 2


def show(compared: dict[str, Any], missed: dict[int, int], whole: int, chunks: int, answers: dict[str, int]) -> None:
    """Print what retrieval missed, and the answers."""
    asked = len(compared["rows"])
    console = Console()
    table = Table("in the prompt", "a part is missing", title=f"{asked} questions that need two distant parts")
    for k, count in missed.items():
        table.add_row(f"top {k} of {chunks} chunks", f"{count} of {asked}")
    table.add_row("all documents, cached", f"{whole} of {asked}")
    console.print(table)
    shown = Table("", f"RAG, top {K}", "kvmem, all documents", title="Answers of SmolLM2-135M")
    for row in compared["rows"]:
        cells = []
        for name in ("rag", "warm"):
            cell = row["ways"][name]
            cells.append(f"[{'green' if cell['contains'] else 'red'}]{escape(' '.join(cell['text'].split()))}")
        shown.add_row(f"{escape(row['question'])} [dim]({escape(row['answers'][0])})", *cells)
    console.print(shown)
    console.print(
        f"Right answers, of {asked}: RAG {answers['rag']}, full prefill {answers['full']}, kvmem "
        f"{answers['warm']}, kvmem on RAG's chunks {answers['cached']}. kvmem gets both parts into the prompt; "
        "combining them is up to the model, and this one has only 135 million parameters."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--limit", type=int, help="maximum number of questions")
    arguments = parser.parse_args()
    questions = [question for question in load(HERE / "questions.jsonl") if len(question.evidence) > 1]
    questions = questions[: arguments.limit]
    model = LanguageModel.load("smollm2")

    with KVMem(model) as mem:
        mem.add_all(DOCUMENTS)
        corpus = [chunk for document in mem.list() for chunk in document.chunks]
        missed = {
            k: sum(bool(missing(q, [s.text for s in mem.retrieve(q.text, k)], corpus)) for q in questions)
            for k in RETRIEVED
        }
        whole = 0
        for question in questions:
            taken = [corpus[index] for index in mem.plan(question.text).chunks]
            whole += bool(missing(question, taken, corpus))

    compared = run(model, DOCUMENTS, questions, k=K, max_tokens=32)
    ways = ("rag", "full", "warm", "cached")
    answers = {name: sum(row["ways"][name]["contains"] for row in compared["rows"]) for name in ways}

    show(compared, missed, whole, len(corpus), answers)
    if arguments.output:
        settings = {"questions": len(questions), "chunks": len(corpus), "k": K}
        result = {"missed": {str(k): count for k, count in missed.items()}, "missed_whole": whole, "answers": answers}
        write_json(arguments.output, {"benchmark": "retrieval-miss", **describe(model, **settings), **result})
        print(f"Wrote {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
