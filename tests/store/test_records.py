from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvmem import ClosedError, KVMem, LanguageModel, Memory, StoreError
from kvmem.library.threads import Threads, Turn
from kvmem.store import DiskStore, FsspecStore, MemoryStore, Store
from kvmem.store.records import list_key, list_prefix
from kvmem.store.view import RecordView
from kvmem.testing import tiny_model
from langchain_kvmem import KVMemStore

OLD = Path(__file__).parent / "data" / "store-0.1.0.sql"


@pytest.fixture(params=["memory", "disk", "fsspec"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return MemoryStore()
    return DiskStore(tmp_path / "kv") if request.param == "disk" else FsspecStore(f"file://{tmp_path}/kv")


def test_keys_of_several_parts_have_exact_prefixes() -> None:
    """No text in a part reaches over its end."""
    parts = ["a", 'a", "b', "a\\", "[", "ü\n\0", ""]
    for first in parts:
        for second in parts:
            assert list_key(first, 1).startswith(list_prefix(second)) == (first == second)
            assert json.loads(list_key(first, second)) == [first, second]


def test_a_view_follows_changes(store: Store) -> None:
    """Puts, replacements and deletions by whoever; what did not change is not parsed again."""
    records = store.database.records("ns", "kind")
    parsed: list[str] = []
    changes: list[tuple[Any, Any]] = []

    def parse(record: Any) -> int:
        parsed.append(record.key)
        return int(record.value["n"])

    view = RecordView(store.database, "ns", "kind", parse, lambda old, new: changes.append((old, new)))
    for n, key in enumerate(("b", "a", "c")):
        records.put(key, {"n": n})
    assert view.all() == [0, 1, 2]
    assert view.all() is view.all()
    records.put("a", {"n": 9})
    records.delete("b")
    records.put("d", {"n": 4})
    assert view.all() == [9, 2, 4]
    assert (view.get("a"), view.get("b")) == (9, None)
    assert parsed == ["b", "a", "c", "a", "d"]
    assert changes[3:] == [(1, 9), (None, 4), (0, None)]
    store.database.forget("ns")
    assert view.all() == []
    records.put("b", {"n": 7})
    assert view.all() == [7]


def test_a_view_deletes_without_looking_at_other_records(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless someone else changed records meanwhile; a key that is not there undoes the rest."""
    database = store.database
    records = database.records("ns", "kind")
    changes: list[tuple[Any, Any]] = []
    view = RecordView(database, "ns", "kind", lambda r: int(r.value["n"]), lambda old, new: changes.append((old, new)))
    for n in range(6):
        records.put(str(n), {"n": n})
    assert view.all() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(KeyError, match="'9'"):
        view.delete(["1", "9"])
    left = [0, 1, 2, 3, 4, 5] if database.transactional else [0, 2, 3, 4, 5]
    assert view.all() == left
    listed: list[str] = []
    keys = type(records).keys
    monkeypatch.setattr(type(records), "keys", lambda self, prefix="": listed.append(prefix) or keys(self, prefix))
    view.delete(["2", "4"])
    assert view.all() == [n for n in left if n not in (2, 4)]
    assert view.get("2") is None
    assert (2, None) in changes
    assert listed == [] or not database.transactional

    real, heads = type(records).head, iter([True])

    def head(self: Any) -> Any:
        """Another process deletes a record behind the first look."""
        found = real(self)
        if next(heads, False):
            records.delete("5")
        return found

    monkeypatch.setattr(type(records), "head", head)
    view.delete(["3"])
    assert view.all() == [n for n in left if n in (0, 1)]


def test_a_store_of_an_earlier_version_is_migrated(tmp_path: Path) -> None:
    """Documents, memories, conversations and items of every namespace, once; nothing stays in the old table."""
    root = tmp_path / "kv" / "v1"
    root.mkdir(parents=True)
    old = sqlite3.connect(root / "index.sqlite")
    old.executescript(OLD.read_text())
    old.execute("INSERT INTO documents VALUES ('nonsense', '{')")
    old.commit()
    old.close()
    for namespace in ("default", "anna", "default"):
        with KVMem(tiny_model(), tmp_path / "kv", namespace=namespace, max_tokens=4) as mem:
            ferry, tram = mem.list()
            assert (ferry.id, ferry.text, ferry.metadata) == ("ferry", "The ferry leaves at ten.", {"title": "Ferry"})
            assert (tram.id, len(tram.chunks)) == ('tram "q" ü', 2)
            (tea,) = Memory(mem).list()
            assert (tea.text, tea.importance) == ("Anna likes tea.", 0.9)
            assert Memory(mem, "agent").get("u").pinned
            assert mem.threads() == ["t/1"]
            history = mem.history("t/1")
            assert [message["role"] for message in history] == ["user", "assistant"] * 2
            again = mem.chat([*history[:2], {"role": "user", "content": "Else?"}], thread="t/1")
            assert again.text is not None
            item = KVMemStore(mem).get(("users", "x"), "k")
            assert item is not None
            assert item.value == {"text": "An item."}
    left = sqlite3.connect(root / "index.sqlite").execute("SELECT name FROM documents").fetchall()
    assert left == [("nonsense",)]


_APPENDING = """
import sys
from kvmem.store import DiskStore
from kvmem.library.threads import Threads, Turn
who, directory, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = DiskStore(directory)
threads = Threads(store.database, "default")
records = store.database.records("default", "memory:default")
for n in range(times):
    if n % 5 == 0:
        history = threads.messages("t") if "t" in threads.names() else []
        begun = threads.begin("t", "model")
        said = [{"role": "user", "content": f"{who}{n}"}, {"role": "assistant", "content": "yes"}]
        assert threads.keep(begun, "model", Turn(None, frozenset({f"{who}{n}"})), [*history, *said])
    with store.database.transaction():
        count = records.get("m").value["metadata"]["count"]
        records.put("m", {**records.get("m").value, "metadata": {"count": count + 1}})
store.close()
"""


def test_two_processes_that_append_to_one_thread_lose_nothing(tmp_path: Path) -> None:
    """Nor when they count in one memory, five hundred times each."""
    with closing(DiskStore(tmp_path / "kv")) as store:
        item = {"id": "m", "text": "x", "metadata": {"count": 0}, "importance": 0.5, "pinned": False}
        store.database.records("default", "memory:default").put("m", {**item, "created": 0.0, "updated": 0.0})
    times = 500
    processes = [
        subprocess.Popen([sys.executable, "-c", _APPENDING, who, str(tmp_path / "kv"), str(times)]) for who in "ab"
    ]
    assert [process.wait() for process in processes] == [0, 0]
    with closing(DiskStore(tmp_path / "kv")) as store:
        threads = Threads(store.database, "default")
        said = [message["content"] for message in threads.messages("t") if message["role"] == "user"]
        assert sorted(said) == sorted(f"{who}{n}" for who in "ab" for n in range(0, times, 5))
        for who in "ab":
            assert [text for text in said if text[0] == who] == [f"{who}{n}" for n in range(0, times, 5)]
        found = store.database.records("default", "memory:default").get("m")
        assert found is not None
        assert found.value["metadata"]["count"] == 2 * times
        assert len(threads.remove("t")["model"]) == 2 * times // 5


def test_an_edit_replaces_and_another_processes_turn_is_kept(store: Store) -> None:
    """What this process has seen may be edited; what it has not seen stays, and the new turn follows it."""
    ours, theirs = (Threads(store.database, "ns") for _ in range(2))

    def say(threads: Threads, messages: list[str]) -> None:
        begun = threads.begin("t", "m")
        assert threads.keep(begun, "m", Turn(None, frozenset()), [{"role": "user", "content": m} for m in messages])

    def texts() -> list[str]:
        return [message["content"] for message in Threads(store.database, "ns").messages("t")]

    say(ours, ["one", "two"])
    say(ours, ["one", "edited"])
    assert texts() == ["one", "edited"]
    theirs.messages("t")
    say(theirs, ["one", "edited", "theirs"])
    say(ours, ["one", "edited", "ours"])
    assert texts() == ["one", "edited", "theirs", "ours"]
    begun = ours.begin("t", "m")
    theirs.remove("t")
    assert not ours.keep(begun, "m", Turn(None, frozenset()), [{"role": "user", "content": "late"}])
    assert ours.names() == []


def test_a_damaged_record_is_named_and_set_aside(model: LanguageModel, tmp_path: Path, caplog: Any) -> None:
    """A changed figure is not served, and the other documents are; doctor moves it away."""
    with KVMem(model, tmp_path / "kv", max_tokens=2) as mem:
        for n in range(3):
            mem.add(f"The rent is {n}200 euros.", id=str(n))
    rows = sqlite3.connect(tmp_path / "kv" / "records.sqlite")
    rows.execute("UPDATE records SET value = replace(value, '1200', '9200') WHERE key = '1'")
    rows.execute("UPDATE records SET value = '{' WHERE key = '2'")
    rows.commit()
    rows.close()
    with KVMem(model, tmp_path / "kv", max_tokens=2) as mem:
        assert [document.id for document in mem.list()] == ["0"]
        assert "damaged" in caplog.text
        assert mem.ask("What is the rent?").sources[0].text == "The rent is 0200 euros."
        mem.add("The rent is 1200 euros.", id="1")
        assert [document.id for document in mem.list()] == ["0", "1"]
        problems = mem.store.check(fix=True)
        assert [problem.what for problem in problems] == ["damaged record"]
        assert "'2'" in problems[0].where
        assert mem.store.check() == []
        assert len(mem.list()) == 2


def test_a_failing_database_changes_nothing_and_says_so(tmp_path: Path) -> None:
    """A file that is no database."""
    store = DiskStore(tmp_path / "kv")
    store.database.records("ns", "kind").put("a", {})
    store.close()
    for name in ("records.sqlite-wal", "records.sqlite-shm"):
        (tmp_path / "kv" / name).unlink(missing_ok=True)
    (tmp_path / "kv" / "records.sqlite").write_bytes(b"scribble" * 2000)
    with pytest.raises(StoreError, match="damaged"):
        DiskStore(tmp_path / "kv")


def test_records_outlive_the_format_of_caches(model: LanguageModel, tmp_path: Path, monkeypatch: Any) -> None:
    """A new format discards caches only."""
    with KVMem(model, tmp_path / "kv", max_tokens=2) as mem:
        mem.add("The ferry leaves at nine.", id="ferry")
        mem.chat([{"role": "user", "content": "Hello"}], thread="t")
    (tmp_path / "kv" / "v1").rename(tmp_path / "kv" / "v0")
    with KVMem(model, tmp_path / "kv", max_tokens=2) as mem:
        assert mem.get("ferry").text == "The ferry leaves at nine."
        assert mem.threads() == ["t"]
        assert mem.ask("When?").usage.computed > 20
    with pytest.raises(ClosedError):
        mem.threads()
