"""FsspecStore: entries as objects on any file system that fsspec supports (NFS, S3, memory://), for many machines.

There is no index. An object's path contains the group of its tokens, the digest of its key, and the size and checksum
of its bytes, so that any reader can verify it. Everything else is in the object's header.
"""

from __future__ import annotations

import base64
import logging
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from kvmem.errors import StoreError
from kvmem.kv.entry import FORMAT_VERSION, EntryInfo, EntryKey, KVEntry
from kvmem.store.base import Problem, StoreStats
from kvmem.store.codec import DamagedEntryError, KVDtype, check_kv_dtype, decode, encode
from kvmem.store.migrate import migrate
from kvmem.store.remote_files import files_below
from kvmem.store.remote_records import FsspecDatabase, hashed

logger = logging.getLogger("kvmem")


class FsspecStore:
    """Keeps entries on a remote or shared file system, through fsspec.

    Writes are atomic if the file system moves objects in one step, as S3 and local file systems do. There are no size
    limits: use the bucket's lifecycle rules. For speed, put it behind a `MemoryStore` or `DiskStore` with
    `TieredStore`.

    Args:
        url: Where entries and documents are kept: "s3://bucket/kv", "file:///mnt/nfs/kv" or "memory://kv".
        kv_dtype: How keys and values are stored: "native" (as computed), "int8" or "fp8".
        options: Passed to fsspec's file system, such as credentials.

    Raises:
        StoreError: The file system cannot be reached.
        InputError: kv_dtype is not supported.

    Example:
        ```python
        store = TieredStore(MemoryStore(max_bytes=1 << 30), FsspecStore("s3://bucket/kv"))
        with KVMem("smollm2", store) as mem:
            mem.add("The rent is 3,200 euros a month.", id="lease")
            print(mem.ask("What is the rent?").text)
        ```
    """

    def __init__(self, url: str, *, kv_dtype: KVDtype = "native", **options: Any) -> None:
        import fsspec

        self.kv_dtype = check_kv_dtype(kv_dtype)
        self._hits: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._lock = threading.Lock()
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **options)
            self._root = f"{root.rstrip('/')}/v{FORMAT_VERSION}"
            self._fs.makedirs(f"{self._root}/entries", exist_ok=True)
            self._database = FsspecDatabase(self._fs, f"{root.rstrip('/')}/records")
            self._migrate()
        except Exception as error:  # each file system raises its own errors
            raise StoreError(
                f"The store {url!r} cannot be reached: {error}. Check the address and the credentials, and "
                "that the package fsspec needs for this file system is installed."
            ) from error

    @property
    def database(self) -> FsspecDatabase:
        return self._database

    def _migrate(self) -> None:
        """Migrate the records of kvmem 0.1: one text object per record, named by its name in base64."""
        directory = f"{self._root}/documents"
        paths = {path: _old_name(path) for path in files_below(self._fs, directory) if not path.endswith(".part")}
        if not paths:
            return
        rows = [(name, self._fs.cat_file(path).decode()) for path, name in paths.items()]
        understood = set(migrate(rows, self._database))
        for path, name in paths.items():
            if name in understood:
                self._fs.rm(path)

    def _group(self, namespace: str, group: str) -> str:
        # Each namespace is a directory (hashed), so that it can be listed and cleared without reading objects.
        return f"{self._root}/entries/{hashed(namespace)}/{group[:2]}/{group}"

    def _objects(self, directory: str) -> list[str]:
        """Current paths of the objects below a directory; empty, with a warning, if it cannot be listed."""
        try:
            return [path for path in self._files(directory) if path.endswith(".safetensors")]
        except Exception as error:  # each file system raises its own errors
            self._failed("listed", error)
            return []

    def _files(self, directory: str) -> list[str]:
        """All files below a directory. Raises the file system's own errors."""
        self._fs.invalidate_cache()
        return files_below(self._fs, directory)

    def _failed(self, what: str, error: Exception) -> None:
        logger.warning("kvmem: the store at %s cannot be %s (%s); texts are recomputed", self._root, what, error)

    def _locate(self, key: EntryKey) -> str | None:
        paths = self._objects(self._group(key.namespace, key.group))
        return next((path for path in sorted(paths) if _name(path).startswith(key.digest)), None)

    def get(self, key: EntryKey) -> KVEntry | None:
        entry = self._load(key)
        with self._lock:
            (self._misses if entry is None else self._hits)[key.namespace] += 1
        return entry

    def _load(self, key: EntryKey) -> KVEntry | None:
        path = None
        try:
            path = self._locate(key)
            return None if path is None else _decode(self._read(path), key)
        except DamagedEntryError as error:
            logger.warning("kvmem: %s is damaged (%s); it was removed and will be recomputed", path, error)
            with suppress(Exception):
                self._fs.rm(path)
        except Exception as error:  # each file system raises its own errors; a failure is a miss
            self._failed("read", error)
        return None

    def _read(self, path: str) -> bytes:
        data: bytes = self._fs.cat_file(path)
        _, size, checksum = _name(path).split("-")
        if len(data) != int(size) or xxhash.xxh3_128_hexdigest(data) != checksum:
            raise DamagedEntryError("its size or checksum is wrong")
        return data

    def put(self, entry: KVEntry) -> bool:
        try:
            if self._locate(entry.key) is not None:
                return True
            data = encode(entry, self.kv_dtype)
            directory = self._group(entry.key.namespace, entry.key.group)
            name = f"{entry.key.digest}-{len(data)}-{xxhash.xxh3_128_hexdigest(data)}"
            self._fs.makedirs(directory, exist_ok=True)
            self._fs.pipe_file(f"{directory}/{name}.part", data)
            self._fs.mv(f"{directory}/{name}.part", f"{directory}/{name}.safetensors")
        except Exception as error:  # each file system raises its own errors; answers do not depend on storing
            logger.warning("kvmem: an entry could not be stored at %s (%s)", self._root, error)
            return False
        return True

    def delete(self, key: EntryKey) -> bool:
        path = self._locate(key)
        return path is not None and self._removed(path)

    def _removed(self, path: str) -> bool:
        """Remove a file, or a directory with its contents. Returns whether that succeeded."""
        try:
            self._fs.rm(path, recursive=True)
        except FileNotFoundError:
            return False
        except Exception as error:  # each file system raises its own errors
            logger.warning("kvmem: %s cannot be removed (%s)", path, error)
            return False
        return True

    def clear(self, namespace: str) -> int:
        directory = f"{self._root}/entries/{hashed(namespace)}"
        count = len(self._objects(directory))
        return count if self._removed(directory) else 0

    def scrub(self, namespace: str) -> None:
        """Check that no file of the namespace is left, as far as the file system reports it."""
        try:
            left = len(self._files(f"{self._root}/entries/{hashed(namespace)}"))
        except Exception as error:  # each file system raises its own errors
            raise StoreError(f"The store at {self._root!r} cannot be listed: {error}. Try again.") from error
        if left:
            raise StoreError(f"{left} files at {self._root!r} could not be removed. Check the log, then try again.")

    def pin(self, key: EntryKey, pinned: bool = True) -> bool:
        """Do nothing, because nothing is evicted. Returns whether the entry exists."""
        return self.contains(key)

    def contains(self, key: EntryKey) -> bool:
        return self._locate(key) is not None

    def find(self, key: EntryKey) -> list[EntryInfo]:
        found = (self._describe(path) for path in self._objects(self._group(key.namespace, key.group)))
        return [info for info in found if info is not None]

    def _describe(self, path: str) -> EntryInfo | None:
        try:
            return _decode(self._read(path), None).info
        except Exception as error:  # damaged, removed in the meantime, or the file system failed
            logger.warning("kvmem: %s cannot be used (%s)", path, error)
            return None

    def keys(self, namespace: str | None = None) -> Iterator[EntryKey]:
        below = "" if namespace is None else f"/{hashed(namespace)}"
        found = (self._describe(path) for path in self._objects(f"{self._root}/entries{below}"))
        return (info.key for info in found if info is not None)

    def stats(self, namespace: str | None = None) -> StoreStats:
        below = "" if namespace is None else f"/{hashed(namespace)}"
        sizes = [int(_name(path).split("-")[1]) for path in self._objects(f"{self._root}/entries{below}")]
        hits = self._hits.total() if namespace is None else self._hits[namespace]
        misses = self._misses.total() if namespace is None else self._misses[namespace]
        return StoreStats(len(sizes), sum(sizes), hits, misses)

    def check(self, fix: bool = False) -> list[Problem]:
        problems = []
        self._fs.invalidate_cache()
        for path in files_below(self._fs, f"{self._root}/entries"):
            what = ""
            try:
                if path.endswith(".safetensors"):
                    _decode(self._read(path), None)
                else:
                    what = "temporary"
            except (DamagedEntryError, ValueError) as error:
                what = f"damaged ({error})"
            if what:
                problems.append(Problem(what, path, fix))
                if fix:
                    self._fs.rm(path)
        return [*problems, *self._database.check(fix)]

    def close(self) -> None:
        """Do nothing; no resources are held open."""


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".safetensors")


def _decode(data: bytes, key: EntryKey | None) -> KVEntry:
    """Decode the entry in `data`, through a temporary file because safetensors maps files."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(data)
        file.flush()
        return decode(Path(file.name), key)


def _old_name(path: str) -> str:
    encoded = path[path.rindex("/documents/") + len("/documents/") :].replace("~/", "")
    return base64.urlsafe_b64decode(encoded).decode()
