"""The benchmarks, run from a clone: `python -m benchmarks --help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvmem import LanguageModel, ModelSettings
from kvmem.cli.console import Model, Threads, errors, out

app = typer.Typer(help="Run benchmarks. Each writes JSON and prints a table.", no_args_is_help=True)

Data = Annotated[Path, typer.Option(help="JSON file of questions and passages in MuSiQue's format.")]
Output = Annotated[Path, typer.Option(help="Output directory for JSON and plots.")]
RESULTS = Path("bench-results")


@app.command()
def fidelity(
    data: Data,
    model: Model = "smollm2",
    passages: Annotated[list[int] | None, typer.Option(help="Passages per prompt; can be repeated.")] = None,
    examples: Annotated[int, typer.Option(min=1)] = 40,
    offset: Annotated[int, typer.Option(min=0, help="Number of questions to skip.")] = 0,
    seed: int = 0,
    threads: Threads = None,
    output: Output = RESULTS,
) -> None:
    """Measure how close each blend setting comes to full prefill."""
    with errors():
        from benchmarks import fidelity as benchmark
        from benchmarks.common import load_questions
        from kvmem.measure import write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        questions = load_questions(data)[offset : offset + examples]
        results = []
        for count in passages or [4, 8]:
            results.append(benchmark.run(loaded, questions, count, seed=seed))
            write_json(output / f"fidelity-{Path(model).stem}-{count}.json", results[-1])
            out.print(benchmark.table(results[-1]))
        benchmark.plot(results, output / f"fidelity-{Path(model).stem}.png")


@app.command()
def speed(
    data: Data,
    model: Model = "smollm2",
    size: Annotated[list[int] | None, typer.Option(help="Approximate prompt tokens; can be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    output: Output = RESULTS,
) -> None:
    """Measure time to the first token and decoding speed relative to plain transformers in the same process."""
    with errors():
        from benchmarks import speed as benchmark
        from benchmarks.common import load_questions
        from kvmem.measure import write_json

        result = benchmark.run(model, load_questions(data), size or [2500, 7000], threads=threads, repeats=repeats)
        write_json(output / f"speed-{Path(model).stem}.json", result)
        out.print(benchmark.table(result))


@app.command()
def library(
    size: Annotated[list[int] | None, typer.Option(help="Number of documents; can be repeated.")] = None,
    others: Annotated[int, typer.Option(min=0, help="Records of other namespaces in the store.")] = 50_000,
    samples: Annotated[int, typer.Option(min=1)] = 20,
    seed: int = 0,
    output: Output = RESULTS,
) -> None:
    """Measure how the cost of each operation grows with the number of documents, with a tiny random model."""
    with errors():
        from benchmarks import library as benchmark
        from kvmem.measure import write_json

        result = benchmark.run(size or [1_000, 5_000, 20_000], others, samples, seed)
        write_json(output / "library.json", result)
        out.print(benchmark.table(result))


@app.command()
def agents(
    model: Annotated[
        str | None, typer.Option(help="A model that calls tools; default: the one of `make models`.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, max=10)] = 10,
    dtype: Annotated[str, typer.Option(help="float32 makes equal mean equal.")] = "float32",
    threads: Threads = None,
    output: Output = RESULTS,
) -> None:
    """Run agents of LangChain and LlamaIndex on tasks of two steps, beside transformers' own generate."""
    with errors():
        from benchmarks import agents as benchmark
        from benchmarks.models import qwen_path
        from kvmem.measure import write_json

        loaded = LanguageModel.load(model or str(qwen_path()), ModelSettings(threads=threads, dtype=dtype))
        loaded.name = Path(loaded.name).stem
        result = benchmark.run(loaded, tasks)
        write_json(output / f"agents-{loaded.name}.json", result)
        out.print(benchmark.table(result))


@app.command()
def task(
    model: Model = "smollm2",
    cases: Annotated[int, typer.Option(min=1)] = 80,
    seed: int = 0,
    threads: Threads = None,
    output: Output = RESULTS,
) -> None:
    """Measure accuracy on questions whose answer depends on the text before a chunk."""
    with errors():
        from benchmarks import task as benchmark
        from kvmem.measure import write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        result = benchmark.run(loaded, cases, seed=seed)
        write_json(output / f"task-{Path(model).stem}.json", result)
        out.print(benchmark.table(result))


@app.command("batch")
def bench_batch(
    data: Data,
    model: Model = "smollm2",
    size: Annotated[int, typer.Option(min=1, help="Approximate prompt tokens.")] = 4000,
    batch: Annotated[int, typer.Option(min=2, help="Questions per batch.")] = 8,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Threads = None,
    output: Output = RESULTS,
) -> None:
    """Compare a batch of questions with the same questions asked one by one."""
    with errors():
        from benchmarks import batch as benchmark
        from benchmarks.common import load_questions
        from kvmem.measure import write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        result = benchmark.run(loaded, load_questions(data), size=size, batch=batch, repeats=repeats)
        write_json(output / f"batch-{Path(model).stem}.json", result)
        out.print(benchmark.table(result))


@app.command()
def frameworks(
    data: Data,
    model: Model = "smollm2",
    examples: Annotated[int, typer.Option(min=1)] = 8,
    k: Annotated[int, typer.Option(min=1, help="Passages to retrieve per question.")] = 4,
    passes: Annotated[int, typer.Option(min=1)] = 2,
    threads: Threads = None,
    output: Output = RESULTS,
) -> None:
    """Compare RAG in LangChain and LlamaIndex: their Hugging Face models and kvmem, with the same weights."""
    with errors():
        from benchmarks import frameworks as benchmark
        from benchmarks.common import load_questions
        from kvmem.measure import write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        result = benchmark.run(loaded, load_questions(data)[:examples], k=k, passes=passes)
        write_json(output / f"frameworks-{Path(model).stem}.json", result)
        out.print(benchmark.table(result))


@app.command()
def conversation(
    data: Data,
    model: Model = "smollm2",
    turns: Annotated[int, typer.Option(min=2)] = 20,
    seed: int = 0,
    threads: Threads = None,
    output: Output = RESULTS,
) -> None:
    """Measure a conversation whose memories and documents change every turn, against full prefill."""
    with errors():
        from benchmarks import conversation as benchmark
        from benchmarks.common import load_questions
        from kvmem.measure import write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        result = benchmark.run(loaded, load_questions(data), turns=turns, seed=seed)
        write_json(output / f"conversation-{Path(model).stem}.json", result)
        benchmark.plot(result, output / f"conversation-{Path(model).stem}.png")
        out.print(benchmark.table(result))


@app.command("store")
def bench_store(
    data: Data,
    model: Model = "smollm2",
    examples: Annotated[int, typer.Option(min=1)] = 12,
    threads: Threads = None,
    output: Output = RESULTS,
) -> None:
    """Measure how fast entries load from disk, and what packing them to 8 bits costs."""
    with errors():
        from benchmarks import store as benchmark
        from benchmarks.common import load_questions
        from kvmem.measure import write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        result = benchmark.run(loaded, load_questions(data)[:examples])
        write_json(output / f"store-{Path(model).stem}.json", result)
        for part in benchmark.table(result):
            out.print(part)


@app.command("serve")
def bench_serve(
    model: Model = "smollm2",
    seconds: Annotated[float, typer.Option(min=1, help="Duration of the load test.")] = 60.0,
    clients: Annotated[int, typer.Option(min=1)] = 16,
    leaving: Annotated[int, typer.Option(min=1, help="Number of clients that disconnect early.")] = 50,
    threads: Threads = None,
    output: Output = RESULTS,
) -> None:
    """Test a server: a coding agent, concurrent clients, disconnecting clients, and a full queue."""
    with errors():
        from benchmarks import serve as benchmark
        from kvmem.measure import write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        result = benchmark.run(loaded, model, seconds=seconds, clients=clients, leaving=leaving)
        write_json(output / f"serve-{Path(model).stem}.json", result)
        out.print(benchmark.table(result))


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Directory of JSON results.")] = Path("docs/benchmarks"),
    output: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("docs/benchmarks.md"),
) -> None:
    """Render results as Markdown."""
    from benchmarks.report import render

    output.write_text(render(results), encoding="utf-8")
    out.print(f"Wrote {output}", highlight=False, markup=False)


if __name__ == "__main__":
    app()
