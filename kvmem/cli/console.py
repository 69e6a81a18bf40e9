"""Shared parts of the `kvmem` commands: consoles, options and error output."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvmem import KVMemError
from kvmem.text.loaders import SUFFIXES

out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Option(envvar="KVMEM_MODEL", help="Hub id, directory, GGUF file or 'smollm2'.")]
StorePath = Annotated[Path, typer.Option("--store", envvar="KVMEM_STORE", help="Directory of the store.")]
DEFAULT_STORE = Path(".kvmem")
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's default.")]


@contextmanager
def errors() -> Iterator[None]:
    """Print a KVMemError as one line instead of a traceback, and hide transformers' progress bars."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.disable_progress_bar()
    try:
        yield
    except KVMemError as error:
        err.print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def expand(path: Path) -> list[Path]:
    """The supported files in a directory, or the file itself."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return [path]
