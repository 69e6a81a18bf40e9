"""The `kvmem` command."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvmem import Answer, Document, KVMem, KVMemError, LanguageModel, ModelSettings, StoreError
from kvmem.document import as_document
from kvmem.files import SUFFIXES

app = typer.Typer(help="Ask questions over documents that the model has read once.", no_args_is_help=True)
bench = typer.Typer(help="Benchmarks; each writes JSON and prints a table.", no_args_is_help=True)
app.add_typer(bench, name="bench")
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Option(envvar="KVMEM_MODEL", help="Hub id, directory, GGUF file or 'smollm2'.")]
StorePath = Annotated[Path, typer.Option("--store", envvar="KVMEM_STORE", help="Where caches are kept.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")]
Namespace = Annotated[str, typer.Option(envvar="KVMEM_NAMESPACE", help="Whose documents these are.")]
DEFAULT_STORE = Path(".kvmem")


@contextmanager
def _errors() -> Iterator[None]:
    """Errors are told in one line instead of a traceback, and loading shows no bars of its own."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.disable_progress_bar()
    try:
        yield
    except KVMemError as error:
        err.print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


@contextmanager
def _opened(model: str, store: Path, threads: int | None, namespace: str) -> Iterator[KVMem]:
    """An engine, closed in the end."""
    with _errors():
        with err.status(f"Loading {escape(model)} …"):
            mem = KVMem(model, store, threads=threads, namespace=namespace)
        with mem:
            yield mem


@app.command()
def add(
    paths: Annotated[list[Path], typer.Argument(help="Text, Markdown, HTML or PDF files, or directories of them.")],
    model: Model = "smollm2",
    store: StorePath = DEFAULT_STORE,
    threads: Threads = None,
    namespace: Namespace = "default",
) -> None:
    """Read documents, once. A file that was read before is replaced; only what changed is read."""
    with _opened(model, store, threads, namespace) as mem:
        files = [file for path in paths for file in _expand(path)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=err) as progress:
            task = progress.add_task("Reading", total=len(files))
            documents = {}
            for file in files:
                document = as_document(file)
                documents[document.id] = document

            def show(document: Document, number: int, total: int) -> None:
                progress.update(task, completed=number, description=f"Reading {escape(document.id)}")
                out.print(f"{document.id}  {len(document.chunks)} chunks", highlight=False, markup=False)

            mem.add_all(documents.values(), show)


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return [path]


@app.command()
def ask(
    question: str,
    model: Model = "smollm2",
    store: StorePath = DEFAULT_STORE,
    threads: Threads = None,
    namespace: Namespace = "default",
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 128,
    blend: Annotated[str, typer.Option(help="Selector: query, deviation, first_k, none or all.")] = "query",
) -> None:
    """Answer a question from the documents."""
    with _opened(model, store, threads, namespace) as mem:
        stream = mem.stream(question, max_tokens=max_tokens, blend=blend)
        for piece in stream:
            out.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
        out.print()
        answer = stream.answer
        out.print(_sources(answer), style="cyan", highlight=False, markup=False, soft_wrap=True)
        out.print(account(answer), style="dim", highlight=False, markup=False, soft_wrap=True)


def _sources(answer: Answer) -> str:
    names = dict.fromkeys(source.document_id for source in answer.sources)
    kind = "All documents were read" if answer.plan.mode == "whole" else f"Retrieved, as {answer.plan.reason}"
    return f"{kind}: {', '.join(names)}"


def account(answer: Answer) -> str:
    """One line: tokens of each class, and the time to the first token."""
    usage = answer.usage
    return (
        f"{usage.prompt} prompt tokens: {usage.exact} exact, {usage.reused} reused, "
        f"{usage.recomputed} recomputed, {usage.computed} computed · "
        f"first token after {answer.timings.first_token:.2f} s"
    )


@app.command()
def stats(
    model: Model = "smollm2",
    store: StorePath = DEFAULT_STORE,
    threads: Threads = None,
    namespace: Namespace = "default",
) -> None:
    """What is kept of this namespace: by document, and in all."""
    with _opened(model, store, threads, namespace) as mem:
        found = mem.stats()
        for row in found.by_document:
            counts = f"{row.chunks} chunks, {row.tokens} tokens, {row.entries} entries, {row.bytes / 1e6:.1f} MB"
            out.print(f"{row.document_id}  {counts}", highlight=False, markup=False, soft_wrap=True)
        kept, rate = found.store, found.store.hit_rate
        out.print(
            f"In namespace {namespace}: {found.documents} documents, {found.chunks} chunks, {found.tokens} tokens; "
            f"{kept.entries} entries, {kept.bytes / 1e6:.1f} MB kept, other texts that were read included; "
            f"hit rate {'unknown' if rate is None else format(rate, '.0%')}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


@app.command()
def doctor(
    store: StorePath = DEFAULT_STORE,
    fix: Annotated[bool, typer.Option("--fix", help="Remove what is damaged or left over.")] = False,
) -> None:
    """Look for inconsistencies in a store, and count by namespace. Exit code 1 if any were not mended."""
    with _errors():
        if not store.is_dir():
            raise StoreError(f"There is no store at {str(store)!r}. Give the directory that --store named.")
        from kvmem.store import DiskStore

        opened = DiskStore(store)
        problems = opened.check(fix)
        for name in sorted({key.namespace for key in opened.keys()}):  # noqa: SIM118
            kept = opened.stats(name)
            line = f"namespace {name}: {kept.entries} entries, {kept.bytes / 1e6:.1f} MB"
            out.print(line, highlight=False, markup=False, soft_wrap=True)
        opened.close()
    for problem in problems:
        mended = " (removed)" if problem.fixed else ""
        out.print(f"{problem.what}: {problem.where}{mended}", highlight=False, markup=False, soft_wrap=True)
    out.print("No problems." if not problems else f"{len(problems)} problem(s).", highlight=False)
    raise typer.Exit(1 if problems and not fix else 0)


@app.command()
def remove(
    id: Annotated[str, typer.Argument(help="As `kvmem stats` shows it.")],  # noqa: A002
    model: Model = "smollm2",
    store: StorePath = DEFAULT_STORE,
    threads: Threads = None,
    namespace: Namespace = "default",
) -> None:
    """Remove a document and its caches."""
    with _opened(model, store, threads, namespace) as mem:
        mem.remove(id)
        out.print(f"Removed {id}", highlight=False, markup=False)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Hub id, directory, GGUF file or alias.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    dtype: Annotated[str, typer.Option(help="'auto', 'bfloat16', 'float16' or 'float32'.")] = "auto",
) -> None:
    """Find out by running it whether caches of a model can be moved and repaired. Exit code 1 if they cannot."""
    import json
    from dataclasses import asdict

    with _errors():
        from kvmem.check import check as run_check

        with err.status(f"Checking {escape(model)} …"):
            report = run_check(LanguageModel.load(model, ModelSettings(dtype=dtype)))
    if json_output:
        out.print_json(json.dumps(asdict(report)))
    else:
        table = Table("check", "result", title=escape(report.model), title_justify="left")
        table.add_row("caches can be moved and repaired", f"{'yes' if report.blendable else 'no'}: {report.reason}")
        table.add_row("moved keys, relative error", f"{report.rotation_error}")
        table.add_row("all recomputed, KL to full prefill", f"{report.all_divergence}")
        table.add_row("exact reuse, KL to full prefill", f"{report.exact_divergence:.2g}")
        for budget, divergence in report.divergence.items():
            table.add_row(f"{float(budget):.0%} recomputed, KL", f"{divergence:.4f}")
        table.add_row('recompute="auto"', f"{report.recompute}")
        out.print(table)
    raise typer.Exit(0 if report.blendable else 1)


@app.command()
def advise(
    corpus_tokens: Annotated[int, typer.Option(min=1, help="Tokens of all your documents.")],
    queries: Annotated[float, typer.Option(min=0, help="Questions per day.")],
    updates: Annotated[float, typer.Option(min=0, help="Changes of documents per day.")] = 0.0,
    update_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read anew at a change.")] = 600,
    rag_tokens: Annotated[int, typer.Option(min=1, help="Tokens that RAG would retrieve for a question.")] = 2000,
    model: Model = "smollm2",
    store: StorePath = DEFAULT_STORE,
    threads: Threads = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Whether cached context or RAG is less work here: measured on this machine, with your numbers."""
    import json
    from dataclasses import asdict

    with _errors():
        from kvmem import advise as advisor
        from kvmem.store import DiskStore

        with err.status("Measuring …"):
            loaded = LanguageModel.load(model, ModelSettings(threads=threads))
            opened = DiskStore(store)
            measured = advisor.measure(loaded, opened)
            opened.close()
        wanted = advisor.Wanted(corpus_tokens, queries, updates, update_tokens, rag_tokens)
        advice = advisor.advise(measured, wanted)
    if json_output:
        out.print_json(json.dumps({"measured": asdict(measured), "wanted": asdict(wanted), **asdict(advice)}))
        return
    table = Table(
        "", "first token", "once", "per day", "disk", title=f"{corpus_tokens} tokens, {queries:g} queries a day"
    )
    for way in advice.ways:
        disk = f"{way.disk / 1e9:.2f} GB"
        table.add_row(way.name, f"{way.first_token:.2f} s", f"{way.once:.0f} s", f"{way.per_day:.0f} s", disk)
    out.print(table)
    rate = 1 / measured.linear if measured.linear else float("inf")
    out.print(
        f"Measured: {rate:.0f} tokens/s read, {measured.load_bandwidth / 1e6:.0f} MB/s loaded, "
        f"{measured.bytes_per_token} bytes of KV per token.",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    out.print(f"{advice.reason}.", highlight=False, soft_wrap=True)


@bench.command()
def fidelity(
    data: Annotated[Path, typer.Option(help="Questions in MuSiQue's format.")],
    model: Model = "smollm2",
    passages: Annotated[list[int] | None, typer.Option(help="Passages per prompt; may be repeated.")] = None,
    examples: Annotated[int, typer.Option(min=1)] = 40,
    offset: Annotated[int, typer.Option(min=0, help="Questions to skip.")] = 0,
    seed: int = 0,
    threads: Threads = None,
    output: Annotated[Path, typer.Option(help="A directory for JSON and the plot.")] = Path("bench-results"),
) -> None:
    """How close every way of blending comes to full prefill."""
    with _errors():
        from kvmem.bench import fidelity as benchmark
        from kvmem.bench.common import load_questions, write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        questions = load_questions(data)[offset : offset + examples]
        results = []
        for count in passages or [4, 8]:
            results.append(benchmark.run(loaded, questions, count, seed=seed))
            write_json(output / f"fidelity-{Path(model).stem}-{count}.json", results[-1])
            out.print(benchmark.table(results[-1]))
        benchmark.plot(results, output / f"fidelity-{Path(model).stem}.png")


@bench.command()
def speed(
    data: Annotated[Path, typer.Option(help="Questions in MuSiQue's format.")],
    model: Model = "smollm2",
    size: Annotated[list[int] | None, typer.Option(help="Prompt tokens, about; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    output: Annotated[Path, typer.Option(help="A directory for JSON.")] = Path("bench-results"),
) -> None:
    """Time to the first token and decoding speed, as ratios to plain transformers in the same process."""
    with _errors():
        from kvmem.bench import speed as benchmark
        from kvmem.bench.common import load_questions, write_json

        result = benchmark.run(model, load_questions(data), size or [2500, 7000], threads=threads, repeats=repeats)
        write_json(output / f"speed-{Path(model).stem}.json", result)
        out.print(benchmark.table(result))


@bench.command()
def task(
    model: Model = "smollm2",
    cases: Annotated[int, typer.Option(min=1)] = 80,
    seed: int = 0,
    threads: Threads = None,
    output: Annotated[Path, typer.Option(help="A directory for JSON.")] = Path("bench-results"),
) -> None:
    """Whether answers stay right that hang on what stands before a chunk."""
    with _errors():
        from kvmem.bench import task as benchmark
        from kvmem.bench.common import write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        result = benchmark.run(loaded, cases, seed=seed)
        write_json(output / f"task-{Path(model).stem}.json", result)
        out.print(benchmark.table(result))


@bench.command("batch")
def bench_batch(
    data: Annotated[Path, typer.Option(help="Questions in MuSiQue's format.")],
    model: Model = "smollm2",
    size: Annotated[int, typer.Option(min=1, help="Prompt tokens, about.")] = 4000,
    batch: Annotated[int, typer.Option(min=2, help="Questions.")] = 8,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Threads = None,
    output: Annotated[Path, typer.Option(help="A directory for JSON.")] = Path("bench-results"),
) -> None:
    """Questions decoded together against questions asked one after the other."""
    with _errors():
        from kvmem.bench import batch as benchmark
        from kvmem.bench.common import load_questions, write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        result = benchmark.run(loaded, load_questions(data), size=size, batch=batch, repeats=repeats)
        write_json(output / f"batch-{Path(model).stem}.json", result)
        out.print(benchmark.table(result))


@bench.command()
def frameworks(
    data: Annotated[Path, typer.Option(help="Questions in MuSiQue's format.")],
    model: Model = "smollm2",
    examples: Annotated[int, typer.Option(min=1)] = 8,
    k: Annotated[int, typer.Option(min=1, help="Passages retrieved for a question.")] = 8,
    passes: Annotated[int, typer.Option(min=1)] = 2,
    threads: Threads = None,
    output: Annotated[Path, typer.Option(help="A directory for JSON.")] = Path("bench-results"),
) -> None:
    """RAG in LangChain and LlamaIndex: their own Hugging Face models against ours, over the same weights."""
    with _errors():
        from kvmem.bench import frameworks as benchmark
        from kvmem.bench.common import load_questions, write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        result = benchmark.run(loaded, load_questions(data)[:examples], k=k, passes=passes)
        write_json(output / f"frameworks-{Path(model).stem}.json", result)
        out.print(benchmark.table(result))


@bench.command("store")
def bench_store(
    data: Annotated[Path, typer.Option(help="Questions in MuSiQue's format.")],
    model: Model = "smollm2",
    examples: Annotated[int, typer.Option(min=1)] = 12,
    threads: Threads = None,
    output: Annotated[Path, typer.Option(help="A directory for JSON.")] = Path("bench-results"),
) -> None:
    """How fast entries come from disk, and what packing them to 8 bits costs."""
    with _errors():
        from kvmem.bench import store as benchmark
        from kvmem.bench.common import load_questions, write_json

        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        result = benchmark.run(loaded, load_questions(data)[:examples])
        write_json(output / f"store-{Path(model).stem}.json", result)
        for part in benchmark.table(result):
            out.print(part)


@bench.command()
def report(
    results: Annotated[Path, typer.Argument(help="A directory of JSON results.")] = Path("docs/benchmarks"),
    output: Annotated[Path, typer.Option(help="The Markdown file to write.")] = Path("docs/benchmarks.md"),
) -> None:
    """Render results as Markdown."""
    from kvmem.bench.report import render

    output.write_text(render(results), encoding="utf-8")
    out.print(f"Wrote {output}", highlight=False, markup=False)


if __name__ == "__main__":
    app()
