from __future__ import annotations

import json
import pickle
import sqlite3
import threading
from pathlib import Path

import pytest

from kvmem.entry import Context, EntryKey
from kvmem.store import DiskStore, MemoryStore, Store, TieredStore
from kvmem.testing import check_store, make_entry, same_entry


def test_every_store_passes_the_conformance_suite(tmp_path: Path) -> None:
    """MemoryStore, DiskStore and TieredStore behave alike."""
    numbers = iter(range(100))
    check_store(MemoryStore)
    check_store(lambda: DiskStore(tmp_path / str(next(numbers))))
    check_store(lambda: TieredStore(MemoryStore(10_000), DiskStore(tmp_path / str(next(numbers)))))


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


@pytest.mark.parametrize("where", [0, 9, 200, 1500, -1])
def test_a_flipped_byte_is_a_miss_and_is_removed(tmp_path: Path, where: int) -> None:
    """Header or payload: a damaged file never becomes an entry."""
    entry = make_entry(tokens=20)
    store = DiskStore(tmp_path)
    store.put(entry)
    (file,) = (tmp_path / "entries").rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    store.close()
    again = DiskStore(tmp_path)
    assert [problem.what for problem in again.check()] == ["damaged"]
    assert again.get(entry.key) is None
    assert not file.exists()
    assert again.check() == []


@pytest.mark.parametrize("size", [0, 1, 100, 2000])
def test_a_truncated_file_is_a_miss(tmp_path: Path, size: int) -> None:
    """Any truncation is noticed, even in a process that had verified the file when it was whole."""
    entry = make_entry(tokens=20)
    store = DiskStore(tmp_path)
    store.put(entry)
    (file,) = (tmp_path / "entries").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:size])
    assert DiskStore(tmp_path).get(entry.key) is None


def test_a_missing_file_is_a_miss(tmp_path: Path) -> None:
    """A file that somebody deleted is computed again, not an error."""
    entry = make_entry()
    store = DiskStore(tmp_path)
    store.put(entry)
    (file,) = (tmp_path / "entries").rglob("*.safetensors")
    file.unlink()
    assert [problem.what for problem in store.check()] == ["missing"]
    assert store.get(entry.key) is None
    assert store.check() == []


def test_check_mends_orphans_and_temporary_files(tmp_path: Path) -> None:
    """Files without a row, and rests of a killed writer, are reported and removed on request."""
    store = DiskStore(tmp_path)
    store.put(make_entry())
    (tmp_path / "entries" / "zz").mkdir()
    (tmp_path / "entries" / "zz" / "stray.safetensors").write_bytes(b"x")
    (tmp_path / "tmp" / "half").write_bytes(b"x")
    assert sorted(p.what for p in store.check()) == ["orphan", "temporary"]
    assert all(problem.fixed for problem in store.check(fix=True))
    assert store.check() == []
    assert store.stats().entries == 1


def test_a_planted_pickle_is_never_loaded(tmp_path: Path) -> None:
    """A row or file holding a pickle is not executed."""
    bomb = pickle.dumps(Bomb())
    store = DiskStore(tmp_path)
    entry = make_entry()
    store.put(entry)
    store.close()
    rows = sqlite3.connect(tmp_path / "index" / "cache.db")
    rows.execute("UPDATE Cache SET mode = 4, value = ?", (bomb,))
    rows.commit()
    rows.close()
    again = DiskStore(tmp_path)
    assert again.get(entry.key) is None
    assert again.find(entry.key) == []
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
    monkeypatch.setattr("kvmem.store.disk.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
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


def test_the_index_holds_json_only(tmp_path: Path) -> None:
    """Every value in both databases can be read as JSON text."""
    store = DiskStore(tmp_path)
    store.put(make_entry())
    store.documents["d"] = "text"
    store.close()
    for name in ("index", "documents"):
        rows = sqlite3.connect(tmp_path / name / "cache.db").execute("SELECT value FROM Cache").fetchall()
        assert rows
        assert all(json.loads(value) for (value,) in rows)
