"""FsspecDatabase: records as objects on any file system that fsspec knows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import xxhash

from kvmem.errors import StoreError
from kvmem.store.base import Problem
from kvmem.store.records import Head, Record, checksum, in_order, next_revision, parse_row
from kvmem.store.remote_files import files_below

# Kinds are names of ours and short; namespaces and keys are users', of any length and characters, and are hashed.


class FsspecDatabase:
    """One object per record: `root/<namespace hash>/<kind>/<key hash>-<position>-<revision>.json`.

    Position and revision are in the name, so that one listing tells what has changed. An object is written under a new
    name before the old one is removed: readers see one of the two. Transactions exclude threads of this process, and
    nothing else: let one process at a time change a namespace, or put records on a file system of one machine.
    """

    transactional = False

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root
        self.lock = threading.RLock()
        self._last = 0

    def records(self, namespace: str, kind: str) -> FsspecRecords:
        return FsspecRecords(self, namespace, kind)

    def kinds(self, namespace: str, prefix: str = "") -> list[str]:
        below = f"{self.root}/{hashed(namespace)}/"
        with explained("listed"):
            self.fs.invalidate_cache()
            paths = files_below(self.fs, below.rstrip("/"))
        found = {path[path.index(below) + len(below) :].split("/")[0] for path in paths if path.endswith(".json")}
        return sorted(kind for kind in map(_kind_of, found) if kind.startswith(prefix))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self.lock:
            yield

    def forget(self, namespace: str) -> None:
        with explained("removed"), suppress(FileNotFoundError):
            self.fs.rm(f"{self.root}/{hashed(namespace)}", recursive=True)

    def check(self, fix: bool = False) -> list[Problem]:
        problems = []
        with explained("checked"):
            self.fs.invalidate_cache()
            for path in files_below(self.fs, self.root):
                what = "temporary" if path.endswith(".part") else ""
                if path.endswith(".json") and _read(self.fs, path) is None:
                    what = "damaged record"
                if what:
                    problems.append(Problem(what, path, fix))
                    if fix:
                        self.fs.mv(path, f"{path}.damaged") if path.endswith(".json") else self.fs.rm(path)
        return problems

    def shrink(self) -> None:
        """Removed objects are gone, as far as the file system says so."""

    def close(self) -> None:
        """Nothing is held open."""

    def next_revision(self, newest: int) -> int:
        """One that is above `newest`, the last that was listed: clocks of machines differ."""
        with self.lock:
            self._last = next_revision(max(self._last, newest))
            return self._last


class FsspecRecords:
    """See `kvmem.store.records.Records`."""

    def __init__(self, database: FsspecDatabase, namespace: str, kind: str) -> None:
        self._database, self._namespace, self._kind = database, namespace, kind
        self._place = f"{database.root}/{hashed(namespace)}/{_directory(kind)}"

    def get(self, key: str) -> Record | None:
        with explained("read"):
            names = [name for name in self._names() if name.hash == hashed(key)]
            return self._load(max(names, key=lambda name: name.revision)) if names else None

    def scan(self, prefix: str = "") -> list[Record]:
        return self._chosen(lambda _: True, prefix)

    def keys(self, prefix: str = "") -> list[str]:
        return [record.key for record in self.scan(prefix)]

    def since(self, revision: int) -> list[Record]:
        return self._chosen(lambda name: name.revision > revision)

    def _chosen(self, wanted: Callable[[_Name], bool], prefix: str = "") -> list[Record]:
        with explained("read"):
            found = (self._load(name) for name in self._newest() if wanted(name))
            return in_order([record for record in found if record is not None and record.key.startswith(prefix)])

    def head(self) -> Head:
        with explained("listed"):
            names = self._newest()
        return Head(max((name.revision for name in names), default=0), len(names))

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(dict(value))
        database, namespace, kind = self._database, self._namespace, self._kind
        with database.lock, explained("written"):
            names = self._names()
            old = [name for name in names if name.hash == hashed(key)]
            revision = database.next_revision(max((name.revision for name in names), default=0))
            position = old[0].position if old else revision
            path = f"{self._place}/{hashed(key)}-{position}-{revision}.json"
            body = {"namespace": namespace, "kind": kind, "key": key, "value": text}
            body["checksum"] = checksum(namespace, kind, key, text)
            database.fs.makedirs(self._place, exist_ok=True)
            database.fs.pipe_file(f"{path}.part", json.dumps(body).encode())
            database.fs.mv(f"{path}.part", path)
            for name in old:
                self._remove(name)

    def delete(self, key: str) -> bool:
        with self._database.lock, explained("removed"):
            names = [name for name in self._names() if name.hash == hashed(key)]
            return sum(self._remove(name) for name in names) > 0

    def clear(self, prefix: str = "") -> int:
        keys = self.keys(prefix)
        return sum(self.delete(key) for key in keys)

    def _names(self) -> list[_Name]:
        self._database.fs.invalidate_cache()
        paths = files_below(self._database.fs, self._place)
        return [_Name(path) for path in paths if path.endswith(".json")]

    def _newest(self) -> list[_Name]:
        """One name for each key: a writer that was killed may have left the one before."""
        newest: dict[str, _Name] = {}
        for name in sorted(self._names(), key=lambda name: name.revision):
            newest[name.hash] = name
        return list(newest.values())

    def _load(self, name: _Name) -> Record | None:
        body = _read(self._database.fs, name.path)
        if body is None:
            return None
        return Record(body["key"], body["value"], name.position, name.revision)

    def _remove(self, name: _Name) -> bool:
        try:
            self._database.fs.rm(name.path)
        except FileNotFoundError:
            return False
        return True


class _Name:
    """What the name of an object tells."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.hash, position, revision = path.rsplit("/", 1)[-1].removesuffix(".json").split("-")
        self.position, self.revision = int(position), int(revision)


def _read(fs: Any, path: str) -> dict[str, Any] | None:
    """The body of an object, with its value parsed; None if it is gone or damaged."""
    try:
        data: bytes = fs.cat_file(path)
    except FileNotFoundError:
        return None
    try:
        body = json.loads(data)
        fields = body["namespace"], body["kind"], body["key"]
        value = parse_row(*fields, body["value"], body["checksum"])
    except (ValueError, KeyError, TypeError):
        value = parse_row("?", "record", path, None, None)
    return None if value is None else {**body, "value": value}


def hashed(text: str) -> str:
    return str(xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass")))


def _directory(kind: str) -> str:
    """A kind as the name of a directory, from which it can be read back."""
    return kind.encode().hex()


def _kind_of(directory: str) -> str:
    return bytes.fromhex(directory).decode()


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raises StoreError for whatever the file system raises."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # every file system has errors of its own
        raise StoreError(f"Records could not be {what}: {error}. Check that the store can be reached.") from error
