"""The `kvmem compare` command."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import typer

from kvmem import KVMemError, LanguageModel, ModelSettings
from kvmem.cli.console import Model, Threads, errors, expand, out


def compare(
    docs: Annotated[list[Path], typer.Option(help="Files or directories of documents; can be repeated.")],
    questions: Annotated[
        Path | None,
        typer.Option(
            help="File with one question per line, or JSON (Lines) with answers; default: the model writes some."
        ),
    ] = None,
    model: Model = "smollm2",
    k: Annotated[int, typer.Option("-k", min=1, help="Number of chunks that RAG retrieves.")] = 4,
    count: Annotated[int, typer.Option(min=1, help="Number of questions to generate if none are given.")] = 12,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of questions to ask.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length in tokens.")] = 32,
    seed: Annotated[
        int, typer.Option(help="Random seed: order of the methods, and chunks for generated questions.")
    ] = 0,
    threads: Threads = None,
    output: Annotated[Path, typer.Option(help="Output directory for the report and JSON.")] = Path("kvmem-compare"),
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Compare RAG, full prefill and kvmem on your documents. Writes an HTML report and JSON."""
    with errors():
        from kvmem.compare import report
        from kvmem.compare.questions import load
        from kvmem.compare.run import run
        from kvmem.compare.summary import notices, table, verdict
        from kvmem.measure import write_json

        report.check_installed()
        _check_writable(output)
        left_out = {output.resolve(), *([questions.resolve()] if questions is not None else [])}
        files = [f for path in docs for f in expand(path) if left_out.isdisjoint([f.resolve(), *f.resolve().parents])]
        if not files:
            where = ", ".join(map(str, docs))
            raise KVMemError(f"There are no documents in {where}. Give text, Markdown, HTML or PDF files.")
        asked = None if questions is None else load(questions)[:limit]
        loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        wanted = min(count, limit or count)
        result = run(loaded, files, asked, k=k, count=wanted, max_tokens=max_tokens, seed=seed, scratch=output)
        write_json(output / "compare.json", result)
        page = output / "compare.html"
        report.write(result, page)
        out.print(table(result))
        for text in (*notices(result), verdict(result)):
            out.print(text, highlight=False, markup=False, soft_wrap=True)
        out.print(f"Wrote {page} and {output / 'compare.json'}", highlight=False, markup=False, soft_wrap=True)
        if open_report and typer.launch(str(page.resolve())):
            raise KVMemError(f"Could not start a browser. Open {page.resolve()} manually.")


def _check_writable(directory: Path) -> None:
    """Raise KVMemError early if results could not be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise KVMemError(f"Cannot write to {directory}: {error}. Give another --output.") from error
