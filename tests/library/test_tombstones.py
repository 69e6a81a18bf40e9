from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import open_mem
from typer.testing import CliRunner

from kvmem import KVMem, LanguageModel, Memory
from kvmem.backends.local import LocalBackend
from kvmem.cli.main import app
from kvmem.library.tombstones import KIND, Tombstones
from kvmem.store import DiskStore, Store
from kvmem.store.memory_records import MemoryDatabase

GONE = "The launch code of the harbour crane is zanzibar, and nobody else may know it at all. "
OTHER = "The ferry leaves at nine in the evening and reaches the other harbour at dawn. "
TALK = [{"role": "user", "content": GONE * 2}]


class KilledError(BaseException):
    """Stands for a process that is killed."""


def holds_secret(store: Store, model: LanguageModel) -> bool:
    """Whether any entry has the text that was removed."""
    keys = list(store.keys())
    found = [store.get(key) for key in keys]
    return any("zanzibar" in model.decode(list(entry.token_ids)) for entry in found if entry is not None)


REMOVALS: dict[str, tuple[Callable[[KVMem], Any], Callable[[KVMem], Any]]] = {
    "remove": (lambda mem: mem.add(GONE, id="s"), lambda mem: mem.remove("s")),
    "replace": (lambda mem: mem.add(GONE, id="s"), lambda mem: mem.add(OTHER, id="s")),
    "clear": (
        lambda mem: mem.collection("c").add(GONE, id="s"),
        lambda mem: mem.collection("c").clear(),
    ),
    "forget": (lambda mem: Memory(mem).remember(GONE, id="s"), lambda mem: Memory(mem).forget("s")),
    "update": (lambda mem: Memory(mem).remember(GONE, id="s"), lambda mem: Memory(mem).update("s", text=OTHER)),
    "clear memories": (lambda mem: Memory(mem).remember(GONE, id="s"), lambda mem: Memory(mem).clear()),
    "forget_thread": (
        lambda mem: mem.chat(TALK, thread="t", max_tokens=2),
        lambda mem: mem.forget_thread("t"),
    ),
}


@pytest.mark.parametrize(("make", "remove"), REMOVALS.values(), ids=REMOVALS.keys())
def test_removed_text_goes_even_if_the_process_is_killed_at_once(
    model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[KVMem], Any],
    remove: Callable[[KVMem], Any],
) -> None:
    """Between the removal of a row and that of its caches; `kvmem doctor` finds them, and the next opening ends it."""
    with open_mem(model, tmp_path / "kv") as mem:
        make(mem)
        assert holds_secret(mem.store, model)
        with monkeypatch.context() as patch:

            def killed(*args: Any) -> None:
                raise KilledError

            patch.setattr(LocalBackend, "forget", killed)
            patch.setattr(LocalBackend, "release", killed)
            with pytest.raises(KilledError):
                remove(mem)
        assert holds_secret(mem.store, model)
    found = CliRunner().invoke(app, ["doctor", "--store", str(tmp_path / "kv")])
    assert (found.exit_code, "removed text" in found.output) == (1, True)
    with open_mem(model, tmp_path / "kv") as mem:
        assert not holds_secret(mem.store, model)
    assert CliRunner().invoke(app, ["doctor", "--store", str(tmp_path / "kv")]).exit_code == 0


def test_the_doctor_deletes_the_caches_of_removed_text(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no model for it."""
    with open_mem(model, tmp_path / "kv") as mem, monkeypatch.context() as patch:
        mem.add(GONE, id="s")
        patch.setattr(LocalBackend, "forget", lambda *args: None)
        mem.remove("s")
    assert CliRunner().invoke(app, ["doctor", "--fix", "--store", str(tmp_path / "kv")]).exit_code == 0
    store = DiskStore(tmp_path / "kv")
    assert not holds_secret(store, model)
    store.close()


def test_a_late_writer_is_noticed_at_the_next_opening(model: LanguageModel, tmp_path: Path) -> None:
    """Another process may still store what it was reading when the document was removed."""
    with open_mem(model, tmp_path / "kv") as mem:
        mem.add(GONE, id="s")
        mem.remove("s")
        assert not holds_secret(mem.store, model)
        mem.ask("What?", context=[GONE])  # as another process would that had listed it before
        assert holds_secret(mem.store, model)
    with open_mem(model, tmp_path / "kv") as mem:
        assert not holds_secret(mem.store, model)


def test_text_that_is_there_again_keeps_its_caches(model: LanguageModel, tmp_path: Path) -> None:
    """A document that was removed and added once more is not read again at the next opening."""
    with open_mem(model, tmp_path / "kv") as mem:
        mem.add(GONE, id="s")
        mem.remove("s")
        mem.add(GONE, id="s")
    with open_mem(model, tmp_path / "kv") as mem:
        assert holds_secret(mem.store, model)
        assert mem.ask("What?", max_tokens=1).usage.exact > 50


def test_tombstones_hold_no_text_and_do_not_pile_up() -> None:
    """They are deleted once no process can still write such caches."""
    now = [1000.0]
    database = MemoryDatabase()
    tombstones = Tombstones(database, "ns", lambda: now[0])
    tombstones.put({"model": ["b", "a", "a"], "other": []})
    tombstones.put({"model": []})
    (record,) = database.records("ns", KIND).scan()
    assert record.value["spans"] == {"model": ["a", "b"], "other": []}
    deleted: list[Any] = []
    tombstones.settle(deleted.append)
    now[0] += 3600
    tombstones.settle(deleted.append)
    tombstones.settle(deleted.append)
    assert deleted == [record.value["spans"]] * 2


def test_the_doctor_does_not_report_text_that_is_in_use(model: LanguageModel, tmp_path: Path) -> None:
    """Text that was added again, that another memory has, or that an edited document kept."""
    talk = [{"role": "user", "content": OTHER * 3}]
    with open_mem(model, tmp_path / "kv") as mem:
        mem.add(GONE, id="s")
        mem.remove("s")
        mem.add(GONE, id="again")
        mem.add(f"{OTHER * 2}\n\n{GONE * 2}", id="edited")
        mem.add(f"{OTHER * 2}\n\nShort.", id="edited")
        memories = [Memory(mem, space) for space in ("one", "two")]
        for memory in memories:
            memory.remember("The user has seen a whale at the pier. " * 2, id="m")
        memories[0].forget("m")
        mem.chat(talk, thread="t", max_tokens=2)
        mem.forget_thread("t")
        mem.chat(talk, thread="t", max_tokens=2)
        entries = mem.stats().store.entries
    found = CliRunner().invoke(app, ["doctor", "--fix", "--store", str(tmp_path / "kv")])
    assert (found.exit_code, "No problems" in found.output) == (0, True), found.output
    with open_mem(model, tmp_path / "kv") as mem:
        assert mem.stats().store.entries == entries
