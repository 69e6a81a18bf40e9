"""Look after a store: `kvmem doctor`, `kvmem export` and `kvmem import`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvmem.cli.console import DEFAULT_STORE, StorePath, err, errors, out
from kvmem.errors import InputError, StoreError
from kvmem.store.base import Problem


def doctor(
    store: StorePath = DEFAULT_STORE,
    fix: Annotated[bool, typer.Option("--fix", help="Remove damaged and leftover files.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="List the entry files again, if the index is lost or damaged.")
    ] = False,
) -> None:
    """Check a store for problems and show its size by namespace. Exit code 1 if any problem was not fixed."""
    with errors():
        _check_directory(store)
        from kvmem.library.tombstones import check_removed
        from kvmem.store import DiskStore
        from kvmem.store.rebuild import rebuild_index

        if rebuild:
            added, damaged = rebuild_index(store)
            out.print(f"{added} entries are listed again; {damaged} files are damaged.", highlight=False)
        opened = DiskStore(store)
        problems = opened.check(fix)
        namespaces = sorted({key.namespace for key in opened.keys()})  # noqa: SIM118
        problems += check_removed(opened, namespaces, fix)
        for name in namespaces:
            kept = opened.stats(name)
            line = f"namespace {name}: {kept.entries} entries, {kept.bytes / 1e6:.1f} MB"
            out.print(line, highlight=False, markup=False, soft_wrap=True)
        opened.close()
    _report(problems)


def _report(problems: Sequence[Problem]) -> None:
    for problem in problems:
        mended = " (removed)" if problem.fixed else ""
        out.print(f"{problem.what}: {problem.where}{mended}", highlight=False, markup=False, soft_wrap=True)
    out.print("No problems." if not problems else f"{len(problems)} problem(s).", highlight=False)
    raise typer.Exit(0 if all(problem.fixed for problem in problems) else 1)


def export(
    store: StorePath = DEFAULT_STORE,
    output: Annotated[Path | None, typer.Option(help="File to write; by default, standard output.")] = None,
    namespace: Annotated[list[str] | None, typer.Option(help="Only this namespace; can be repeated.")] = None,
) -> None:
    """Write documents, memories and conversations as JSON lines. Caches are not exported: they are computed again."""
    with errors():
        _check_directory(store)
        from kvmem.store import DiskStore
        from kvmem.store.transfer import export_records

        opened = DiskStore(store)
        try:
            lines = export_records(opened.database, namespace or opened.database.namespaces())
            if output is None:
                sys.stdout.writelines(f"{line}\n" for line in lines)
            else:
                with output.open("w", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
        finally:
            opened.close()


def import_(
    file: Annotated[Path, typer.Argument(help="A file made by `kvmem export`.")],
    store: StorePath = DEFAULT_STORE,
    namespace: Annotated[str | None, typer.Option(help="Put everything into this namespace.")] = None,
) -> None:
    """Put exported documents, memories and conversations into a store. The first question reads the documents."""
    with errors():
        if not file.is_file():
            raise InputError(f"There is no file {str(file)!r}. Give one made by `kvmem export`.")
        from kvmem.store import DiskStore
        from kvmem.store.transfer import import_records

        opened = DiskStore(store)
        try:
            with file.open(encoding="utf-8") as lines:
                count = import_records(opened.database, lines, namespace)
        finally:
            opened.close()
    err.print(f"{count} records imported.", highlight=False)


def _check_directory(store: Path) -> None:
    if not store.is_dir():
        raise StoreError(f"There is no store at {str(store)!r}. Give its directory as --store.")
