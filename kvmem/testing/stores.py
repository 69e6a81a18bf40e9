"""The conformance suite of stores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvmem.kv.entry import KVEntry
from kvmem.store.base import Store
from kvmem.store.codec import encode
from kvmem.testing.models import make_entry, same_entry


def check_store(make_store: Callable[..., Store], limited: bool = False) -> None:
    """Run the conformance suite on empty stores from `make_store`. Raises AssertionError at the first fault.

    limited: whether `make_store` takes the fields of `kvmem.store.Limits` by name; then budgets are checked too.
    """
    one = make_entry(tokens=200)
    checks: list[tuple[Callable[[Store], None], dict[str, Any]]] = [
        (_check_round_trip, {}),
        (_check_missing, {}),
        (_check_delete, {}),
        (_check_find, {}),
        (_check_records, {}),
        (_check_namespaces, {}),
    ]
    if limited:
        checks += [
            (_check_recency, {"max_bytes": 4 * _file_size(one)}),
            (_check_frequency, {"max_bytes": 3 * _file_size(one), "policy": "lfu"}),
            (_check_pins, {"max_bytes": 3 * _file_size(one)}),
            (_check_too_large, {"max_bytes": 3 * _file_size(one)}),
            (_check_quota, {"max_bytes": 6 * _file_size(one), "namespace_bytes": 3 * _file_size(one)}),
            (_check_fairness, {"max_bytes": 6 * _file_size(one)}),
            (_check_ttl, {"ttl": 0.2}),
        ]
    for check, limits in checks:
        store = make_store(**limits)
        try:
            check(store)
            _expect(store.check() == [], f"{check.__name__}: check() finds problems: {store.check()}")
        finally:
            store.close()


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _check_round_trip(store: Store) -> None:
    entries = [make_entry(seed=n, dtype=d) for n, d in enumerate((torch.bfloat16, torch.float32, torch.float16))]
    for entry in entries:
        _expect(store.put(entry), "put returns True")
        _expect(store.put(entry), "putting again returns True")
    for entry in entries:
        found = store.get(entry.key)
        _expect(found is not None and same_entry(found, entry), "an entry comes back bit for bit")
        _expect(store.contains(entry.key), "contains is True for a kept entry")
    _expect({*store.keys()} == {e.key for e in entries}, "keys lists what was put")
    _expect(store.stats().entries == 3, "stats counts an entry once")


def _check_missing(store: Store) -> None:
    key = make_entry().key
    _expect(store.get(key) is None, "get of an unknown key is None")
    _expect(not store.contains(key), "contains of an unknown key is False")
    _expect(not store.delete(key), "delete of an unknown key is False")
    _expect(store.find(key) == [], "find of unknown tokens is empty")
    _expect(store.stats().misses >= 1, "stats counts the miss")


def _check_delete(store: Store) -> None:
    entry, other = make_entry(seed=1), make_entry(seed=2)
    store.put(entry)
    store.put(other)
    _expect(store.delete(entry.key), "delete of a kept entry is True")
    _expect(store.get(entry.key) is None, "a deleted entry is gone")
    _expect(store.find(entry.key) == [], "a deleted entry is not found by its tokens")
    found = store.get(other.key)
    _expect(found is not None and same_entry(found, other), "other entries stay")


def _check_find(store: Store) -> None:
    first = make_entry(seed=1)
    second = make_entry(seed=1, context=(7, 8))
    strangers = [make_entry(seed=2), make_entry(seed=1, namespace="b"), make_entry(seed=1, fingerprint="x")]
    for entry in (first, second, *strangers):
        store.put(entry)
    found = {info.key: info for info in store.find(first.key)}
    _expect(set(found) == {first.key, second.key}, "find gives all contexts, and no other tenant or model")
    _expect(found[second.key] == second.info, "find describes the entry")


def _file_size(entry: KVEntry) -> int:
    """What any of our stores counts for `entry`, with a few per cent to spare."""
    return int(len(encode(entry)) * 1.05)


def _kept(store: Store, entries: Sequence[KVEntry]) -> list[int]:
    return [number for number, entry in enumerate(entries) if store.contains(entry.key)]


def _check_namespaces(store: Store) -> None:
    mine, theirs = make_entry(namespace="a"), make_entry(namespace="b")
    store.put(mine)
    store.put(theirs)
    _expect(list(store.keys("a")) == [mine.key], "keys of a namespace are its own")
    _expect(store.stats("a").entries == 1, "stats of a namespace count its own")
    _expect(store.stats("c").entries == store.stats("c").bytes == 0, "an unknown namespace is empty")
    store.get(mine.key)
    _expect((store.stats("a").hits, store.stats("b").hits) == (1, 0), "hits are counted by namespace")
    _expect(store.clear("a") == 1, "clear says how many it removed")
    _expect(store.get(mine.key) is None, "clear removes")
    _expect(store.contains(theirs.key), "clear leaves other namespaces alone")


def _fill(store: Store, count: int, namespace: str = "default", seed: int = 0) -> list[KVEntry]:
    entries = [make_entry(seed=seed + n, tokens=200, namespace=namespace) for n in range(count)]
    for entry in entries:
        store.put(entry)
    return entries


def _check_recency(store: Store) -> None:
    entries = _fill(store, 3)
    time.sleep(0.01)
    store.get(entries[0].key)
    more = _fill(store, 2, seed=10)
    _expect(_kept(store, entries) == [0, 2], "the least recently used entry goes first")
    _expect(_kept(store, more) == [0, 1], "new entries are in")


def _check_frequency(store: Store) -> None:
    entries = _fill(store, 3)
    for number, times in ((0, 3), (1, 1), (2, 2)):
        for _ in range(times):
            store.get(entries[number].key)
    _fill(store, 1, seed=10)
    _expect(_kept(store, entries) == [0, 2], "the least frequently used entry goes first")


def _check_pins(store: Store) -> None:
    entries = _fill(store, 3)
    for entry in entries[:2]:
        _expect(store.pin(entry.key), "pin of a kept entry is True")
    _fill(store, 3, seed=10)
    _expect(_kept(store, entries) == [0, 1], "pinned entries stay")
    (last,) = _fill(store, 1, seed=20)
    _expect(store.pin(last.key), "pin")
    _expect(not store.put(make_entry(seed=30, tokens=200)), "with everything pinned, put is False")
    store.pin(entries[0].key, False)
    _expect(store.put(make_entry(seed=30, tokens=200)), "an unpinned entry gives way")
    _expect(not store.pin(entries[0].key), "pin of a missing entry is False")


def _check_too_large(store: Store) -> None:
    entries = _fill(store, 2)
    _expect(not store.put(make_entry(tokens=2000)), "an entry larger than the budget is refused")
    _expect(_kept(store, entries) == [0, 1], "and nothing is evicted for it")


def _check_quota(store: Store) -> None:
    theirs = _fill(store, 2, "b")
    mine = _fill(store, 6, "a")
    _expect(_kept(store, mine) == [3, 4, 5], "a namespace over its quota evicts its own")
    _expect(_kept(store, theirs) == [0, 1], "and nobody else's")


def _check_fairness(store: Store) -> None:
    theirs = _fill(store, 2, "b")
    _fill(store, 20, "a", seed=50)
    _expect(_kept(store, theirs) == [0, 1], "pressure does not evict a tenant that keeps less than its share")
    hog = _fill(store, 6, "b")
    _fill(store, 3, "c", seed=80)
    _expect(len(_kept(store, hog)) < 6, "a tenant that keeps more than its share gives way")
    _expect(store.stats("c").entries == 2, "each of three tenants has a share")


def _check_ttl(store: Store) -> None:
    entry = make_entry()
    store.put(entry)
    _expect(store.get(entry.key) is not None, "a fresh entry is served")
    time.sleep(0.25)
    _expect(store.get(entry.key) is None, "an expired entry is a miss")
    _expect(store.find(entry.key) == [] and not store.contains(entry.key), "and is not found")
    _expect(store.put(entry) and store.get(entry.key) is not None, "it can be put again")


def _check_records(store: Store) -> None:
    database = store.database
    records, others = database.records("a", "document"), database.records("b", "document")
    _expect(records.get("x") is None and not records.delete("x"), "an unknown record is missing")
    _expect(records.head().count == 0 and database.kinds("a") == [], "an unused kind is empty")
    long: dict[str, dict[str, Any]] = {"x" * length: {"n": length} for length in (150, 300, 600)}
    for key, value in {"x": {"text": "eins"}, "../y": {"text": "zwei" * 20_000}, "z\0/ü": {}, **long}.items():
        records.put(key, value)
    others.put("x", {"text": "theirs"})
    before = records.head()
    records.put("x", {"text": "drei"})
    found = records.get("x")
    _expect(found is not None and dict(found.value) == {"text": "drei"}, "a record is replaced")
    keys = ["x", "../y", "z\0/ü", *long]
    _expect(records.keys() == [record.key for record in records.scan()] == keys, "records keep their positions")
    _expect([record.key for record in records.since(before.revision)] == ["x"], "since gives what was put after")
    _expect(records.keys("x") == ["x", *long] and records.keys("z\0") == ["z\0/ü"], "keys are found by prefix")
    _expect(records.head().revision > before.revision, "a change is seen in the head")
    try:
        with database.transaction():
            records.put("new", {})
            records.delete("../y")
            raise _UndoError
    except _UndoError:
        if database.transactional:
            _expect(records.keys() == keys, "a failed transaction changes nothing")
    changed = records.head()
    _expect(records.delete("x") and records.get("x") is None, "a deleted record is gone")
    _expect(records.head() != changed, "a deletion is seen in the head")
    _expect(records.clear("x") == 3, "clear removes by prefix")
    _expect(database.kinds("a", "doc") == ["document"] and database.kinds("a", "thread") == [], "kinds are listed")
    database.forget("a")
    _expect(records.scan() == [] and records.head().count == 0, "forget removes a namespace")
    _expect(others.keys() == ["x"], "and no other")


class _UndoError(Exception):
    pass
