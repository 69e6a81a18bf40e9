"""The `kvmem` command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvmem import Answer, Document, KVMem, LanguageModel, ModelSettings
from kvmem.cli.compare import compare
from kvmem.cli.console import DEFAULT_STORE, Model, StorePath, Threads, err, errors, expand, out
from kvmem.cli.serve import serve
from kvmem.cli.upkeep import doctor, export, import_
from kvmem.text.document import as_document

app = typer.Typer(help="Ask questions about documents that the model reads only once.", no_args_is_help=True)
app.command()(compare)
app.command()(serve)
app.command()(doctor)
app.command("export")(export)
app.command("import")(import_)

Namespace = Annotated[str, typer.Option(envvar="KVMEM_NAMESPACE", help="Namespace (tenant).")]


@contextmanager
def _opened(model: str, store: Path, threads: int | None, namespace: str) -> Iterator[KVMem]:
    """Open an engine and close it at the end."""
    with errors():
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
    """Add documents. A file added before is replaced, and only the changed parts are read."""
    with _opened(model, store, threads, namespace) as mem:
        files = [file for path in paths for file in expand(path)]
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


@app.command()
def ask(
    question: str,
    model: Model = "smollm2",
    store: StorePath = DEFAULT_STORE,
    threads: Threads = None,
    namespace: Namespace = "default",
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length in tokens.")] = 128,
    blend: Annotated[str | None, typer.Option(help="Selector: query, deviation, first_k, none or all.")] = None,
) -> None:
    """Answer a question from the added documents."""
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
    """One line with the token counts by class and the time to the first token."""
    usage = answer.usage
    return (
        f"{usage.prompt} prompt tokens: {usage.exact} exact, {usage.reused} reused, "
        f"{usage.recomputed} recomputed, {usage.computed} computed · "
        f"first token after {answer.timings.first_token:.2f} s"
    )


@app.command()
def chat(
    thread: Annotated[str, typer.Option(help="Name of the conversation; an existing one is continued.")] = "default",
    model: Model = "smollm2",
    store: StorePath = DEFAULT_STORE,
    threads: Threads = None,
    namespace: Namespace = "default",
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length in tokens.")] = 200,
    system: Annotated[str, typer.Option(help="The system prompt.")] = "You are a helpful assistant. Be brief.",
) -> None:
    """Chat with the model. It knows the documents, keeps memories, and continues after a restart."""
    with errors():
        from kvmem.cli.chat import Chat

        with err.status(f"Loading {escape(model)} …"):
            mem = KVMem(model, store, threads=threads, namespace=namespace, max_tokens=max_tokens, system=system)
        with mem:
            Chat(mem, thread, out, input).run()


@app.command()
def stats(
    model: Model = "smollm2",
    store: StorePath = DEFAULT_STORE,
    threads: Threads = None,
    namespace: Namespace = "default",
) -> None:
    """Show what is stored in this namespace, by document and in total."""
    with _opened(model, store, threads, namespace) as mem:
        found = mem.stats()
        for row in found.by_document:
            counts = f"{row.chunks} chunks, {row.tokens} tokens, {row.entries} entries, {row.bytes / 1e6:.1f} MB"
            out.print(f"{row.document_id}  {counts}", highlight=False, markup=False, soft_wrap=True)
        kept, rate = found.store, found.store.hit_rate
        out.print(
            f"In namespace {namespace}: {found.documents} documents, {found.chunks} chunks, {found.tokens} tokens; "
            f"{kept.entries} entries, {kept.bytes / 1e6:.1f} MB stored (including texts that are not documents); "
            f"hit rate {'unknown' if rate is None else format(rate, '.0%')}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


@app.command()
def remove(
    id: Annotated[str, typer.Argument(help="Document id, as shown by `kvmem stats`.")],  # noqa: A002
    model: Model = "smollm2",
    store: StorePath = DEFAULT_STORE,
    threads: Threads = None,
    namespace: Namespace = "default",
) -> None:
    """Remove a document and its entries."""
    with _opened(model, store, threads, namespace) as mem:
        mem.remove(id)
        out.print(f"Removed {id}", highlight=False, markup=False)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Hub id, directory, GGUF file or alias.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    dtype: Annotated[str, typer.Option(help="'auto', 'bfloat16', 'float16' or 'float32'.")] = "auto",
) -> None:
    """Test by running it whether a model's entries can be reused at other positions. Exit code 1 if not."""
    import json
    from dataclasses import asdict

    with errors():
        from kvmem.backends.calibrate import check as run_check

        with err.status(f"Checking {escape(model)} …"):
            loaded = LanguageModel.load(model, ModelSettings(dtype=dtype))
            report, calls = run_check(loaded), loaded.template.describe_calls()
    if json_output:
        out.print_json(json.dumps({**asdict(report), "tool_calls": calls}))
    else:
        table = Table("check", "result", title=escape(report.model), title_justify="left")
        table.add_row("entries can be blended", f"{'yes' if report.blendable else 'no'}: {report.reason}")
        table.add_row("rotated keys, relative error", f"{report.rotation_error}")
        table.add_row("all recomputed, KL to full prefill", f"{report.all_divergence}")
        table.add_row("exact entries, KL to full prefill", f"{report.exact_divergence:.2g}")
        for budget, divergence in report.divergence.items():
            table.add_row(f"{float(budget):.0%} recomputed, KL", f"{divergence:.4f}")
        table.add_row('recompute="auto"', f"{report.recompute}")
        for name, value in calls.items():
            table.add_row(f"tool calls, {name}", escape(value))
        out.print(table)
    raise typer.Exit(0 if report.blendable else 1)


@app.command()
def advise(
    corpus_tokens: Annotated[int, typer.Option(min=1, help="Total tokens in your documents.")],
    queries: Annotated[float, typer.Option(min=0, help="Questions per day.")],
    updates: Annotated[float, typer.Option(min=0, help="Document changes per day.")] = 0.0,
    update_tokens: Annotated[int, typer.Option(min=1, help="Tokens to read again per change.")] = 600,
    rag_tokens: Annotated[int, typer.Option(min=1, help="Tokens that RAG would retrieve per question.")] = 2000,
    model: Model = "smollm2",
    store: StorePath = DEFAULT_STORE,
    threads: Threads = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Estimate whether cached context or RAG is cheaper on this machine, for your workload."""
    import json
    from dataclasses import asdict

    with errors():
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
        f"Measured: prefill {rate:.0f} tokens/s, loading {measured.load_bandwidth / 1e6:.0f} MB/s, "
        f"{measured.bytes_per_token} bytes of KV per token.",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    out.print(f"{advice.reason}.", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
