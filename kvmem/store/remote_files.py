"""Listing files of an fsspec file system."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def files_below(fs: Any, directory: str) -> list[str]:
    """Every file below a directory; none where there is no such directory. Raises what the file system does.

    On local file systems fsspec's own `find` leaves out what cannot be listed.
    """
    from fsspec.implementations.local import LocalFileSystem

    if not isinstance(fs, LocalFileSystem):
        try:
            return list(fs.find(directory))
        except FileNotFoundError:
            return []

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    below = os.walk(directory, onerror=unless_gone)
    return [Path(place, name).as_posix() for place, _, names in below for name in names]
