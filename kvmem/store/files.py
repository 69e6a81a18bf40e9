"""EntryFiles: reads and writes entry files by name, independently of keys and the index."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path

import xxhash

from kvmem.store.codec import DamagedEntryError


class EntryFiles:
    """Files under `root`. Names start with the hexadecimal digest of a key. Raises OSError."""

    def __init__(self, root: Path) -> None:
        self._entries, self._scratch = root / "entries", root / "tmp"

    def create(self) -> None:
        self._entries.mkdir(parents=True, exist_ok=True)
        self._scratch.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self._entries / name[:2] / f"{name}.safetensors"

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically and durably: temporary name, fsync, rename, fsync of the directory."""
        scratch, path = self._scratch / name, self.path(name)
        self.create()
        path.parent.mkdir(exist_ok=True)
        with open(scratch, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, name: str) -> bool:
        """Remove a finished or temporary file. Returns whether it is gone."""
        paths = (self._scratch / name, self.path(name))
        for path in paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        return not any(path.exists() for path in paths)

    def has_any(self) -> bool:
        """Whether there is any finished file."""
        return next(self._entries.rglob("*.safetensors"), None) is not None

    def all(self) -> list[Path]:
        """All files, including temporary ones."""
        return [path for path in (*self._entries.rglob("*"), *self._scratch.rglob("*")) if path.is_file()]


def verify_file(path: Path, size: int, checksum: str) -> None:
    """Raise DamagedEntryError unless the file has this size and checksum."""
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise DamagedEntryError(f"{found} bytes instead of {size}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            if xxhash.xxh3_128_hexdigest(view) != checksum:
                raise DamagedEntryError("its checksum is wrong")
