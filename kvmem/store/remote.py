"""FsspecStore: entries as objects on any file system that fsspec knows (NFS, S3, memory://), shared by many machines.

There is no index. An object's path tells its tokens' group, its key's digest, and the size and checksum of its bytes,
so that any reader can verify it; everything else is in the object's header.
"""

from __future__ import annotations

import base64
import logging
import os
import secrets
import tempfile
import threading
from collections import Counter
from collections.abc import ItemsView, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from kvmem.entry import FORMAT_VERSION, EntryInfo, EntryKey, KVEntry
from kvmem.errors import StoreError
from kvmem.store.base import Problem, StoreStats
from kvmem.store.codec import DamagedEntryError, KVDtype, check_kv_dtype, decode, encode

logger = logging.getLogger("kvmem")
# File systems take 255 bytes, and one more marks a directory.
_LONGEST = 200


class FsspecStore:
    """Entries under `url`, for example "s3://bucket/kv", "file:///mnt/nfs/kv" or "memory://kv".

    options: handed to fsspec's file system, credentials for example. kv_dtype: as in `DiskStore`.
    An object becomes visible whole or not at all where the file system moves objects in one step, as S3 and local
    ones do. There is no budget: use the bucket's own lifecycle rules, and put a `TieredStore` with a `MemoryStore`
    or a `DiskStore` in front. Raises StoreError when the place cannot be reached at construction.
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
            self._fs.makedirs(f"{self._root}/documents", exist_ok=True)
        except Exception as error:  # every file system has errors of its own
            raise StoreError(
                f"The store {url!r} cannot be reached: {error}. Check the address, the credentials, and that "
                "fsspec's package for it is installed."
            ) from error

    @property
    def documents(self) -> MutableMapping[str, str]:
        return _Documents(self._fs, f"{self._root}/documents")

    def _group(self, namespace: str, group: str) -> str:
        # The namespace is a directory, hashed, so that it can be listed and cleared without reading objects.
        return f"{self._root}/entries/{_hash(namespace)}/{group[:2]}/{group}"

    def _objects(self, directory: str) -> list[str]:
        """Paths of the objects below a directory, as they are now; none, and a warning, when it cannot be listed."""
        try:
            return [path for path in self._files(directory) if path.endswith(".safetensors")]
        except Exception as error:  # every file system has errors of its own
            self._failed("listed", error)
            return []

    def _files(self, directory: str) -> list[str]:
        """Every file below a directory. Raises what the file system does."""
        self._fs.invalidate_cache()
        return _files_below(self._fs, directory)

    def _failed(self, what: str, error: Exception) -> None:
        logger.warning("kvmem: the store at %s cannot be %s (%s); texts are read anew", self._root, what, error)

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
            logger.warning("kvmem: %s is not usable (%s); it is removed and will be computed again", path, error)
            with suppress(Exception):
                self._fs.rm(path)
        except Exception as error:  # every file system has errors of its own; a failing one is a miss
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
        except Exception as error:  # every file system has errors of its own; the answer does not depend on it
            logger.warning("kvmem: an entry could not be stored at %s (%s)", self._root, error)
            return False
        return True

    def delete(self, key: EntryKey) -> bool:
        path = self._locate(key)
        return path is not None and self._removed(path)

    def _removed(self, path: str) -> bool:
        """Remove a file, or a directory and all below it; whether that succeeded."""
        try:
            self._fs.rm(path, recursive=True)
        except FileNotFoundError:
            return False
        except Exception as error:  # every file system has errors of its own
            logger.warning("kvmem: %s cannot be removed (%s)", path, error)
            return False
        return True

    def clear(self, namespace: str) -> int:
        directory = f"{self._root}/entries/{_hash(namespace)}"
        count = len(self._objects(directory))
        return count if self._removed(directory) else 0

    def scrub(self, namespace: str) -> None:
        """Removed objects are gone, as far as the file system says so."""
        try:
            left = len(self._files(f"{self._root}/entries/{_hash(namespace)}"))
        except Exception as error:  # every file system has errors of its own
            raise StoreError(f"The store at {self._root!r} cannot be listed: {error}. Try again.") from error
        if left:
            raise StoreError(f"{left} files at {self._root!r} could not be removed. See the log, and try again.")

    def pin(self, key: EntryKey, pinned: bool = True) -> bool:
        """Nothing is evicted here; True when the entry exists."""
        return self.contains(key)

    def contains(self, key: EntryKey) -> bool:
        return self._locate(key) is not None

    def find(self, key: EntryKey) -> list[EntryInfo]:
        found = (self._describe(path) for path in self._objects(self._group(key.namespace, key.group)))
        return [info for info in found if info is not None]

    def _describe(self, path: str) -> EntryInfo | None:
        try:
            return _decode(self._read(path), None).info
        except Exception as error:  # damaged, gone by now, or a file system's own
            logger.warning("kvmem: %s is not usable (%s)", path, error)
            return None

    def keys(self, namespace: str | None = None) -> Iterator[EntryKey]:
        below = "" if namespace is None else f"/{_hash(namespace)}"
        found = (self._describe(path) for path in self._objects(f"{self._root}/entries{below}"))
        return (info.key for info in found if info is not None)

    def stats(self, namespace: str | None = None) -> StoreStats:
        below = "" if namespace is None else f"/{_hash(namespace)}"
        sizes = [int(_name(path).split("-")[1]) for path in self._objects(f"{self._root}/entries{below}")]
        hits = self._hits.total() if namespace is None else self._hits[namespace]
        misses = self._misses.total() if namespace is None else self._misses[namespace]
        return StoreStats(len(sizes), sum(sizes), hits, misses)

    def check(self, fix: bool = False) -> list[Problem]:
        problems = []
        self._fs.invalidate_cache()
        unfinished = [path for path in _files_below(self._fs, f"{self._root}/documents") if path.endswith(".part")]
        for path in [*_files_below(self._fs, f"{self._root}/entries"), *unfinished]:
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
        return problems

    def close(self) -> None:
        """Nothing is held open."""


def _files_below(fs: Any, directory: str) -> list[str]:
    """Every file below a directory; none where there is no such directory. Raises what the file system does: fsspec's
    own `find` leaves out what cannot be listed on local ones."""
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


def _hash(text: str) -> str:
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".safetensors")


def _decode(data: bytes, key: EntryKey | None) -> KVEntry:
    """The entry in `data`; safetensors reads files, so it passes through a temporary one."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(data)
        file.flush()
        return decode(Path(file.name), key)


class _Documents(MutableMapping[str, str]):
    """Texts by name, an object each. Raises StoreError where the file system fails."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs, self._root = fs, root

    def _path(self, name: str) -> str:
        """The name in base64; a long one takes several directories, whose names no object has."""
        encoded = base64.urlsafe_b64encode(name.encode()).decode()
        parts = [encoded[start : start + _LONGEST] for start in range(0, len(encoded), _LONGEST)]
        return "/".join([self._root, *(f"{part}~" for part in parts[:-1]), *parts[-1:]])

    def _named(self, path: str) -> str:
        encoded = path[path.rindex("/documents/") + len("/documents/") :].replace("~/", "")
        return base64.urlsafe_b64decode(encoded).decode()

    def __getitem__(self, name: str) -> str:
        with _told("read"):
            try:
                data: bytes = self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                raise KeyError(name) from None
        return data.decode()

    def __setitem__(self, name: str, text: str) -> None:
        path = self._path(name)
        scratch = f"{path}.{secrets.token_hex(4)}.part"
        with _told("kept"):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(scratch, text.encode())
            self._fs.mv(scratch, path)

    def __delitem__(self, name: str) -> None:
        with _told("removed"):
            try:
                self._fs.rm(self._path(name))
            except FileNotFoundError:
                raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        with _told("listed"):
            self._fs.invalidate_cache()
            paths = _files_below(self._fs, self._root)
            return iter([self._named(path) for path in paths if not path.endswith(".part")])

    def items(self) -> ItemsView[str, str]:
        """Those that are still there when they are read."""
        found = ((name, self.get(name)) for name in self)
        return {name: text for name, text in found if text is not None}.items()

    def __len__(self) -> int:
        return len(list(iter(self)))


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, StoreError):
        raise
    except Exception as error:  # every file system has errors of its own
        raise StoreError(f"Documents could not be {what}: {error}. Check that the store can be reached.") from error
