from __future__ import annotations

import os
import pickle
import random
import shutil
import sqlite3
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from helpers import entries_index, open_mem

from kvmem import InputError, LanguageModel, StoreError
from kvmem.kv.entry import Context, EntryKey
from kvmem.store import DiskStore, FsspecStore, MemoryStore, Store, TieredStore
from kvmem.store.codec import KVDtype, encode
from kvmem.store.files import EntryFiles
from kvmem.testing import check_store, make_entry, same_entry


def test_every_store_passes_the_conformance_suite(tmp_path: Path) -> None:
    """MemoryStore, DiskStore and TieredStore behave alike."""
    numbers = iter(range(100))
    check_store(MemoryStore, limited=True)
    check_store(lambda **limits: DiskStore(tmp_path / str(next(numbers)), **limits), limited=True)
    check_store(lambda: TieredStore(MemoryStore(10_000), DiskStore(tmp_path / str(next(numbers)))))
    check_store(lambda: FsspecStore(f"file://{tmp_path}/{next(numbers)}"))
    check_store(lambda: FsspecStore(f"memory://{tmp_path}/{next(numbers)}"))


def test_the_suite_finds_a_store_that_forgets() -> None:
    """check_store is no rubber stamp."""

    class Forgetful(MemoryStore):
        def get(self, key: EntryKey) -> None:
            return None

    with pytest.raises(AssertionError, match="bit for bit"):
        check_store(Forgetful)


def test_entries_survive_reopening(tmp_path: Path) -> None:
    """What put has returned for is there for the next process."""
    entries = [make_entry(seed=n) for n in range(5)]
    store = DiskStore(tmp_path)
    for entry in entries:
        assert store.put(entry)
    store.close()
    again = DiskStore(tmp_path)
    for entry in entries:
        found = again.get(entry.key)
        assert found is not None
        assert same_entry(found, entry)
    assert again.stats().hits == 5
    assert again.check() == []


def test_every_flipped_byte_is_detected(tmp_path: Path, model: LanguageModel) -> None:
    """At 600 random places over header and payload: a miss, and the file is removed; never another entry."""
    entry = make_entry(tokens=20)
    store = DiskStore(tmp_path, verify="always")
    store.put(entry)
    generator = random.Random(0)
    for _ in range(600):
        (file,) = tmp_path.rglob("*.safetensors")
        damaged = bytearray(file.read_bytes())
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        assert [problem.what for problem in store.check()] == ["damaged"]
        assert store.get(entry.key) is None
        assert not file.exists()
        store.put(entry)
    assert store.check() == []


def test_every_truncation_is_detected(tmp_path: Path) -> None:
    """However much is missing, and also in a process that verified the file when it was whole."""
    entry = make_entry(tokens=20)
    store = DiskStore(tmp_path)
    for size in (0, 1, 7, 8, 100, 1000, 2000, -1):
        store.put(entry)
        assert store.get(entry.key) is not None
        (file,) = tmp_path.rglob("*.safetensors")
        os.truncate(file, size if size >= 0 else file.stat().st_size - 1)
        assert DiskStore(tmp_path).get(entry.key) is None
    store.put(entry)
    (file,) = tmp_path.rglob("*.safetensors")
    os.truncate(file, 500)
    assert store.get(entry.key) is None


def test_a_missing_file_is_a_miss(tmp_path: Path) -> None:
    """A file that somebody deleted is computed again, not an error."""
    entry = make_entry()
    store = DiskStore(tmp_path)
    store.put(entry)
    (file,) = tmp_path.rglob("*.safetensors")
    file.unlink()
    assert [problem.what for problem in store.check()] == ["missing"]
    assert store.get(entry.key) is None
    assert store.check() == []


def test_check_mends_orphans_and_temporary_files(tmp_path: Path) -> None:
    """Files without a row, and rests of a killed writer, are reported and removed on request."""
    store = DiskStore(tmp_path)
    store.put(make_entry())
    (tmp_path / "v1" / "entries" / "zz").mkdir()
    (tmp_path / "v1" / "entries" / "zz" / "stray.safetensors").write_bytes(b"x")
    (tmp_path / "v1" / "tmp" / "half").write_bytes(b"x")
    rows = sqlite3.connect(tmp_path / "v1" / "index.sqlite")
    rows.execute("INSERT INTO pending VALUES ('half-written', 'n', 9, 4194000, 0)")
    rows.commit()
    rows.close()
    assert sorted(p.what for p in store.check()) == ["orphan", "orphan", "temporary"]
    assert all(problem.fixed for problem in store.check(fix=True))
    assert store.check() == []
    assert store.stats().entries == 1


def test_a_planted_pickle_is_never_loaded(tmp_path: Path) -> None:
    """A file or a row that holds a pickle is not executed."""
    bomb = pickle.dumps(Bomb())
    store = DiskStore(tmp_path, verify="never")
    entry = make_entry()
    store.put(entry)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(bomb)
    assert store.get(entry.key) is None
    store.put(entry)
    rows = sqlite3.connect(tmp_path / "v1" / "index.sqlite")
    rows.execute("UPDATE entries SET checksum = ?, spans = ?", (bomb, bomb))
    rows.commit()
    rows.close()
    store.get(entry.key)
    records = store.database.records("default", "document")
    records.put("d", {"text": "A text."})
    rows = sqlite3.connect(tmp_path / "records.sqlite")
    rows.execute("UPDATE records SET value = ?", (bomb,))
    rows.commit()
    rows.close()
    assert records.get("d") is None
    assert not Bomb.exploded


class Bomb:
    exploded = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Bomb, "exploded", True)


def test_no_name_leaves_the_directory(tmp_path: Path) -> None:
    """Namespaces and fingerprints are hashed into file names, whatever they contain."""
    store = DiskStore(tmp_path / "kv")
    for name in ("../../x", "/etc/passwd", "a\0b", "CON", "ü" * 300):
        entry = make_entry(namespace=name, fingerprint=name)
        assert store.put(entry)
        found = store.get(entry.key)
        assert found is not None
        assert same_entry(found, entry)
    assert [p.name for p in tmp_path.iterdir()] == ["kv"]


def test_key_fields_cannot_be_shifted_into_each_other() -> None:
    """Different keys have different digests, also when their fields concatenate to the same text."""
    assert EntryKey("ab", "c", "", "t").digest != EntryKey("a", "bc", "", "t").digest
    assert EntryKey("a", "", "c", "t").digest != EntryKey("a", "c", "", "t").digest


def test_a_context_is_what_stands_before_however_it_is_cut() -> None:
    """The digest of a context depends on its tokens only."""
    one, two = Context(), Context()
    one.extend((1, 2, 3), "x")
    two.extend((1,), "y")
    two.extend((2, 3), "z")
    assert one.digest == two.digest
    assert one.length == two.length == 3
    branch = two.copy()
    branch.extend((4,), "w")
    assert two.digest == one.digest != branch.digest


def test_memory_stays_within_its_budget() -> None:
    """The least recently used entries go first; one larger than the budget is refused."""
    entries = [make_entry(seed=n) for n in range(4)]
    store = MemoryStore(3 * entries[0].nbytes)
    for entry in entries[:3]:
        store.put(entry)
    store.get(entries[0].key)
    store.put(entries[3])
    assert store.stats().bytes <= 3 * entries[0].nbytes
    assert store.get(entries[1].key) is None
    assert store.get(entries[0].key) is not None
    assert not store.put(make_entry(tokens=100))
    assert store.check() == []


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails, put is False, and neither a file nor a row is left."""
    store = DiskStore(tmp_path)
    monkeypatch.setattr("kvmem.store.files.os.fsync", _no_space)
    assert not store.put(make_entry())
    monkeypatch.undo()
    assert store.check() == []
    assert store.stats().entries == 0
    assert store.put(make_entry())


def test_threads_share_a_store(tmp_path: Path) -> None:
    """Concurrent puts, gets and deletes leave a consistent store."""
    store: Store = TieredStore(MemoryStore(50_000), DiskStore(tmp_path))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(15):
                entry = make_entry(seed=(seed + n) % 6)
                store.put(entry)
                found = store.get(entry.key)
                assert found is None or same_entry(found, entry)
                if n % 4 == seed % 4:
                    store.delete(entry.key)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.check() == []


def test_an_entry_of_another_format_version_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older and newer stores in the same directory are left alone, and never crash this one."""
    entry = make_entry()
    for version in (0, 2):
        for module in ("disk", "codec"):
            monkeypatch.setattr(f"kvmem.store.{module}.FORMAT_VERSION", version)
        other = DiskStore(tmp_path)
        other.put(entry)
        other.close()
    monkeypatch.undo()
    store = DiskStore(tmp_path)
    assert store.get(entry.key) is None
    assert store.put(entry)
    (file,) = (tmp_path / "v1").rglob("*.safetensors")
    file.write_bytes(next((tmp_path / "v2").rglob("*.safetensors")).read_bytes())
    assert DiskStore(tmp_path, verify="never").get(entry.key) is None
    assert len(list((tmp_path / "v2").rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_packed_entries_are_half_as_large_and_nearly_equal(tmp_path: Path, kv_dtype: KVDtype) -> None:
    """8 bits per number and its scales: about half of bfloat16; the error stays within a step."""
    entry = make_entry(tokens=400)
    native, packed = DiskStore(tmp_path / "native"), DiskStore(tmp_path / "packed", kv_dtype=kv_dtype)
    native.put(entry)
    packed.put(entry)
    assert packed.stats().bytes < 0.57 * native.stats().bytes
    found = packed.get(entry.key)
    assert found is not None
    assert found.keys[0].dtype == torch.bfloat16
    steps = 1 / 127 if kv_dtype == "int8" else 1 / 14
    for mine, original, axis in ((found.keys[0], entry.keys[0], -2), (found.values[0], entry.values[0], -1)):
        largest = original.float().abs().amax(axis, keepdim=True)
        assert ((mine.float() - original.float()).abs() <= steps * largest).all()
        assert not torch.equal(mine, original)


def test_numbers_that_overflow_float16_survive_packing(tmp_path: Path) -> None:
    """bfloat16 reaches 3e38: nothing becomes infinite."""
    entry = make_entry(tokens=20)
    entry.values[0][0, 0, 3] = 1e30
    store = DiskStore(tmp_path, kv_dtype="int8")
    store.put(entry)
    found = store.get(entry.key)
    assert found is not None
    assert found.values[0].isfinite().all()
    assert float(found.values[0][0, 0, 3, 0]) == pytest.approx(1e30, rel=0.02)


def test_a_file_system_that_fails_is_told_once_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While writing fails, put is False with one warning; when it works again, so does the store."""
    store = DiskStore(tmp_path / "kv")
    monkeypatch.setattr("kvmem.store.files.os.fsync", _no_space)
    assert not any(store.put(make_entry(seed=n)) for n in range(5))
    assert len(caplog.records) == 1
    monkeypatch.undo()
    assert store.put(make_entry())
    shutil.rmtree(tmp_path / "kv")
    assert store.get(make_entry().key) is None
    store.put(make_entry(seed=1))
    assert store.put(make_entry(seed=2))
    assert store.get(make_entry(seed=2).key) is not None


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_in_mid_write(tmp_path: Path, model: LanguageModel) -> None:
    """On a real file system of 300 kB, the answer is right, and nothing corrupt stays."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        texts = [f"Text {n} says: " + "word " * 30 for n in range(6)]
        with open_mem(model, None) as unlimited, open_mem(model, tmp_path / "kv") as mem:
            expected = unlimited.ask("What?", context=texts)
            answer = mem.ask("What?", context=texts)
            assert answer.text == expected.text
            assert mem.ask("What?", context=texts).text == expected.text
            assert mem.stats().store.entries < unlimited.stats().store.entries
            assert mem.store.check() == []
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_opening_ten_thousand_entries_takes_no_time(tmp_path: Path) -> None:
    """The index is not read at opening: the statements it needs touch few rows."""
    store = DiskStore(tmp_path)
    entry = make_entry()
    store.put(entry)
    with entries_index(tmp_path) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(entries)")]
        row = connection.execute("SELECT * FROM entries").fetchone()
        at = columns.index("digest")
        rows = [(*row[:at], f"{n:064x}", *row[at + 1 :]) for n in range(10_000)]
        connection.executemany(f"INSERT INTO entries VALUES ({','.join('?' * len(columns))})", rows)  # noqa: S608
    store.close()
    began = time.perf_counter()
    again = DiskStore(tmp_path)
    assert again.get(entry.key) is not None
    assert time.perf_counter() - began < 1.0
    assert again.stats().entries == 10_001


def test_machines_share_an_object_store(tmp_path: Path, model: LanguageModel) -> None:
    """Two engines over one fsspec store: what one has read, the other reuses; damage is noticed."""
    url = f"file://{tmp_path}/shared"
    with open_mem(model, FsspecStore(url)) as first:
        first.add("A text that two machines read.", id="a")
        expected = first.ask("What?").text
    store = FsspecStore(url)
    with open_mem(model, store) as second:
        answer = second.ask("What?")
        assert answer.text == expected
        assert answer.usage.exact == answer.usage.prompt - answer.usage.computed > 0
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert len(store.check()) == 2
    with open_mem(model, store) as third:
        assert third.ask("What?").text == expected
    assert store.check() == []


def test_an_object_store_that_fails_later_costs_time_only(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With an error of the file system's own, everything is a miss, and answers are as without; what was to be removed
    to the last byte is the exception."""
    store = FsspecStore("memory://fails-later")
    entry = make_entry()
    assert store.put(entry)

    class ServiceError(Exception):
        pass

    def fail(*_: Any, **__: Any) -> None:
        raise ServiceError("slow down")

    for name in ("find", "cat_file", "rm", "pipe_file"):
        monkeypatch.setattr(MemoryFileSystem, name, fail)
    assert store.get(entry.key) is None
    assert not store.contains(entry.key)
    assert store.find(entry.key) == [] == list(store.keys())
    assert not store.delete(entry.key)
    assert store.clear(entry.key.namespace) == 0
    assert store.stats().entries == 0
    assert "slow down" in caplog.text
    with pytest.raises(StoreError, match="slow down"):
        store.scrub(entry.key.namespace)
    with open_mem(model, None) as without, open_mem(model, store) as mem:
        assert mem.ask("What?", context=["A text."]).text == without.ask("What?", context=["A text."]).text
        records = store.database.records("default", "document")
        for use in (mem.list, lambda: mem.add("A text."), mem.forget_user, lambda: records.delete("a")):
            with pytest.raises(StoreError, match="slow down"):
                use()


def test_what_cannot_be_listed_is_not_taken_for_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of a network file system that this machine may not read: nobody is told that all is forgotten."""
    store = FsspecStore(f"file://{tmp_path}/kv")
    entry = make_entry()
    assert store.put(entry)
    records = store.database.records("default", "document")
    records.put("a", {})
    (file,) = (tmp_path / "kv" / "records").rglob("*.json")
    real = os.scandir

    def unreadable(path: str) -> Any:
        if str(path).endswith((file.parent.name, entry.key.group)):
            raise PermissionError("not yours")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", unreadable)
        with pytest.raises(StoreError, match="not yours"):
            records.keys()
        with pytest.raises(StoreError, match="not yours"):
            store.scrub(entry.key.namespace)
        assert list(store.keys()) == []
    assert records.keys() == ["a"]
    assert list(store.keys()) == [entry.key]


def test_a_record_in_an_object_store_is_replaced_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write keeps the old record, and a check finds what is left of the new one."""
    store = FsspecStore(f"file://{tmp_path}/kv")
    records = store.database.records("default", "document")
    records.put("a", {"text": "old"})
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "mv", lambda *_: 1 / 0)
        with pytest.raises(StoreError):
            records.put("a", {"text": "new"})
    assert [dict(record.value) for record in records.scan()] == [{"text": "old"}]
    assert [problem.what for problem in store.check(fix=True)] == ["temporary"]
    assert store.check() == []


def test_what_cannot_be_removed_from_an_object_store_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing works, removing does not."""
    store = FsspecStore("memory://keeps-all")
    entry = make_entry()
    assert store.put(entry)

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "rm", fail)
        assert not store.delete(entry.key)
        assert store.clear(entry.key.namespace) == 0
        with pytest.raises(StoreError, match="1 files"):
            store.scrub(entry.key.namespace)
    assert store.clear(entry.key.namespace) == 1
    store.scrub(entry.key.namespace)


def test_time_to_live_counts_from_when_an_entry_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not anew when it comes from disk into memory, nor because it is used."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    entry = make_entry()
    DiskStore(tmp_path, ttl=100).put(entry)
    store = TieredStore(MemoryStore(ttl=100), DiskStore(tmp_path, ttl=100))
    for age, there in ((90, True), (99, True), (101, False)):
        monkeypatch.setattr(time, "time", lambda age=age: now + age)
        assert (store.get(entry.key) is not None) == there
        assert store.contains(entry.key) == there
        assert len(store.find(entry.key)) == there


@pytest.mark.parametrize("left_by", ["a dead process", "an eviction"])
def test_files_that_cannot_be_removed_hold_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, left_by: str
) -> None:
    """They stay counted, are told of once, and go when they can."""
    first, second, third = (make_entry(seed=n) for n in range(3))
    size = len(encode(first))
    store = DiskStore(tmp_path, max_bytes=int(2.5 * size))
    assert store.put(first)
    with monkeypatch.context() as patch:
        patch.setattr(EntryFiles, "remove", lambda *_: False)
        if left_by == "a dead process":
            store.delete(first.key)
            with entries_index(tmp_path) as connection:
                connection.execute("UPDATE pending SET since = 0")
            assert [store.put(entry) for entry in (second, third)] == [True, False]
        else:
            assert [store.put(entry) for entry in (second, third)] == [True, False]
        assert caplog.text.count("cannot be removed") >= 1
        warned = len(caplog.records)
        assert [problem.fixed for problem in store.check(fix=True) if problem.what == "temporary"] == [False] * (
            left_by == "a dead process"
        )
        assert len(caplog.records) == warned
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    with entries_index(tmp_path) as connection:
        connection.execute("UPDATE pending SET since = 0")
    DiskStore(tmp_path).check(fix=True)
    assert len(list(tmp_path.rglob("*.safetensors"))) == (left_by == "an eviction")
    assert DiskStore(tmp_path, max_bytes=int(2.5 * size)).put(third)


def test_an_object_store_that_cannot_be_reached_says_so() -> None:
    """An unknown protocol is a StoreError."""
    with pytest.raises(StoreError, match="cannot be reached"):
        FsspecStore("nonsense://x")


def test_an_entry_larger_than_the_budget_is_told_and_the_answer_is_right(
    tmp_path: Path, model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    """With a budget smaller than one entry, nothing is kept on disk, and answers are as without."""
    with open_mem(model, None) as unlimited, open_mem(model, tmp_path / "kv", disk_bytes=2000) as mem:
        assert mem.ask("What?", context=["A text."]).text == unlimited.ask("What?", context=["A text."]).text
        assert mem.stats().store.entries == 0
    assert any("exceeds the store's limit" in record.message for record in caplog.records)


def test_a_budget_on_disk_holds_and_the_corpus_survives_it(tmp_path: Path, model: LanguageModel) -> None:
    """Documents are not evicted, only their KV; what was evicted is read again."""
    texts = [f"Text {n}: " + "word " * 12 for n in range(8)]
    with open_mem(model, tmp_path / "kv", disk_bytes=150_000, memory_bytes=0) as mem:
        for n, text in enumerate(texts):
            mem.add(text, id=str(n))
        assert mem.stats().store.bytes <= 150_000
        assert mem.stats().documents == 8
        assert mem.ask("What?").usage.prompt > 500
        mem.clear()
        assert mem.stats().documents == mem.stats().store.entries == 0


def test_the_hit_rate_survives_a_restart(tmp_path: Path) -> None:
    """Hits and misses are counted on, by namespace."""
    for _ in range(2):
        store = DiskStore(tmp_path)
        store.put(make_entry())
        store.get(make_entry().key)
        store.get(make_entry(seed=9, namespace="b").key)
        store.close()
    stats = DiskStore(tmp_path).stats("default")
    assert (stats.hits, stats.misses, stats.hit_rate) == (2, 0, 1.0)
    assert DiskStore(tmp_path).stats().misses == 2


def test_limits_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    """Negative budgets, unknown policies, dtypes and ways to verify."""
    wrong: list[dict[str, Any]] = [
        {"max_bytes": -1},
        {"ttl": -1.0},
        {"policy": "fifo"},
        {"kv_dtype": "float16"},
        {"verify": "often"},
    ]
    for options in wrong:
        with pytest.raises(InputError, match=next(iter(options))):
            DiskStore(tmp_path, **options)
