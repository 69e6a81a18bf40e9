"""Collections: what is in one, while others change it, and while work fails."""

from __future__ import annotations

import gc
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import prompts

from kvmem import ClosedError, Collection, Document, KVMem, LanguageModel, UnknownDocumentError
from kvmem.backends.local import LocalBackend
from kvmem.store import DiskStore, FsspecStore, MemoryStore, Store
from kvmem.store.view import RecordView
from kvmem.testing import tiny_model


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else DiskStore(tmp_path / "kv")


def in_threads(*works: Callable[[], Any]) -> None:
    """Run all at once; a deadlock fails instead of hanging."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert errors == []


def test_documents_are_listed_while_others_are_removed(model: LanguageModel, store: Store) -> None:
    """Readers and writers never wait for each other in a circle."""
    with KVMem(model, store, max_tokens=1) as mem:
        mem.add_all([f"Text number {n}." for n in range(40)], read=False)
        ids = [document.id for document in mem.list()]

        def look() -> None:
            for _ in range(300):
                mem.list()
                mem.chunks()

        def change() -> None:
            for one in ids:
                mem.remove(one)

        in_threads(look, look, change)
        assert mem.list() == ()


def test_two_threads_set_one_collection(model: LanguageModel, store: Store) -> None:
    """Both remove the same documents; the second finds them gone, and says nothing."""
    with KVMem(model, store, max_tokens=1) as mem:
        kept = mem.collection("kept")
        for _ in range(5):
            kept.set_all([f"Text number {n}." for n in range(8)], read=False)
            in_threads(*[lambda: kept.set_all(["Text number 0."], read=False)] * 3)
            assert [document.text for document in kept.list()] == ["Text number 0."]


def test_a_removal_that_fails_removes_nothing(mem: KVMem) -> None:
    """The documents are there afterwards, and in prompts; one that is named twice is removed once."""
    kept = mem.collection("kept")
    kept.add("The ferry leaves at nine.", id="ferry")
    kept.add("The tram leaves at ten.", id="tram")
    with pytest.raises(UnknownDocumentError, match="bus"):
        kept.remove("ferry", "bus")
    assert [document.id for document in kept.list()] == ["ferry", "tram"]
    with prompts() as seen:
        mem.ask("When?", collection=kept)
    assert "nine" in seen[0]
    kept.remove("ferry", "ferry")
    assert [document.id for document in kept.list()] == ["tram"]


def test_a_document_that_is_removed_beside_a_damaged_one_is_gone(model: LanguageModel, tmp_path: Path) -> None:
    """From lists, prompts and caches."""
    with KVMem(model, tmp_path / "kv", max_tokens=1) as mem:
        mem.add("The ferry leaves at nine.", id="ferry")
        mem.add("The tram leaves at ten.", id="tram")
    rows = sqlite3.connect(tmp_path / "kv" / "records.sqlite")
    rows.execute("UPDATE records SET checksum = 'x' WHERE key = 'tram'")
    rows.commit()
    rows.close()
    with KVMem(model, tmp_path / "kv", max_tokens=1) as mem:
        assert [document.id for document in mem.list()] == ["ferry"]
        mem.add("The bus leaves at one.", id="bus")
        mem.remove("ferry")
        assert [document.id for document in mem.list()] == ["bus"]
        with prompts() as seen:
            mem.ask("When?")
        assert "nine" not in seen[0]


@pytest.mark.parametrize("meanwhile", ["replaced", "removed"])
def test_an_interrupted_add_undoes_its_own_change_only(meanwhile: str, tmp_path: Path, monkeypatch: Any) -> None:
    """What another process wrote meanwhile stays, and the reason of the failure is told."""
    ours, theirs = tiny_model(), tiny_model()
    with KVMem(ours, tmp_path / "kv", max_tokens=1) as mem, KVMem(theirs, tmp_path / "kv", max_tokens=1) as other:
        mem.add("First.", id="a")
        read = LocalBackend.read

        def interrupted(self: LocalBackend, *args: Any, **options: Any) -> Any:
            if self.local_model is not ours:
                return read(self, *args, **options)
            if meanwhile == "replaced":
                other.add("Third.", id="a")
            else:
                other.remove("b")
            raise ClosedError("interrupted")

        monkeypatch.setattr(LocalBackend, "read", interrupted)
        with pytest.raises(ClosedError, match="interrupted"):
            mem.add_all(_documents(meanwhile))
        expected = [("a", "Third.")] if meanwhile == "replaced" else [("a", "First.")]
        assert [(document.id, document.text) for document in other.list()] == expected
        assert [(document.id, document.text) for document in mem.list()] == expected


def _documents(meanwhile: str) -> list[Document]:
    return [Document("a", "Second.")] if meanwhile == "replaced" else [Document("b", "New."), Document("c", "Newer.")]


def test_a_collection_that_is_gone_keeps_no_caches(model: LanguageModel, store: Store) -> None:
    """Text of a collection in memory that was dropped goes with the last document that has it."""
    with KVMem(model, store, max_tokens=1) as mem:
        before = mem.stats().store.entries
        dropped: Collection | None = mem.collection(None)
        assert dropped is not None
        dropped.add("The ferry leaves at nine.", id="ferry")
        mem.add("The ferry leaves at nine.", id="ferry")
        dropped = None
        gc.collect()
        mem.remove("ferry")
        prefix = 1
        assert mem.stats().store.entries <= before + prefix


def test_a_change_by_a_machine_whose_clock_is_behind_is_seen(monkeypatch: Any) -> None:
    """Over a shared file system, the newest record wins, whatever the clocks say."""
    stores = [FsspecStore("memory://clocks") for _ in range(2)]
    ahead, behind = (store.database.records("ns", "document") for store in stores)
    view = RecordView(stores[0].database, "ns", "document", lambda record: record.value["n"])
    ahead.put("x", {"n": 1})
    assert view.all() == [1]
    monkeypatch.setattr("kvmem.store.records.time.time_ns", lambda: 5)
    behind.put("x", {"n": 2})
    assert view.all() == [2]
    behind.delete("x")
    behind.put("y", {"n": 3})
    assert view.all() == [3]
