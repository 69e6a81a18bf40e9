from __future__ import annotations

import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvmem import InputError, KVMem, LanguageModel, Memory, StoreError
from kvmem.cli.main import app
from kvmem.store import DiskStore
from kvmem.store.memory_records import MemoryDatabase
from kvmem.store.transfer import export_records, import_records

TEXT = "The tenant of house {} pays {} euros on the first day of each month, by bank transfer. "


def filled(model: LanguageModel, directory: Path) -> int:
    """A store with documents, a memory and a conversation. Returns its number of entries."""
    with KVMem(model, directory, max_tokens=2) as mem:
        mem.add_all([TEXT.format(n, 100 * n) for n in range(12)])
        Memory(mem).remember("The user likes tea.")
        mem.chat([{"role": "user", "content": "Hello."}], thread="t")
        return mem.stats().store.entries


def index_of(directory: Path) -> Path:
    return directory / "v1" / "index.sqlite"


def doctor(directory: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", "--store", str(directory), *options])
    return result.exit_code, result.output


def lose(directory: Path) -> None:
    for path in index_of(directory).parent.glob("index.sqlite*"):
        path.unlink()


@pytest.mark.parametrize("how", ["deleted", "scribbled", "truncated"])
def test_an_index_that_is_lost_is_rebuilt_from_the_files(
    model: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Nothing is deleted before that, and nothing has to be computed again after it."""
    entries = filled(model, tmp_path)
    if how == "deleted":
        lose(tmp_path)
        with caplog.at_level(logging.WARNING), KVMem(model, tmp_path, max_tokens=2) as mem:
            assert len(mem.list()) == 12
        assert "--rebuild" in caplog.text
        code, output = doctor(tmp_path, "--fix")
        assert (code, "--rebuild" in output) == (1, True)
    else:
        data = index_of(tmp_path).read_bytes()
        (index_of(tmp_path).parent / "index.sqlite-wal").unlink(missing_ok=True)
        index_of(tmp_path).write_bytes(data[:5000] if how == "truncated" else data[:100] + b"x" * 8000 + data[8100:])
        with pytest.raises(StoreError, match="--rebuild"):
            DiskStore(tmp_path)
    code, output = doctor(tmp_path, "--rebuild")
    assert (code, f"{entries} entries are listed again" in " ".join(output.split())) == (0, True)
    with KVMem(model, tmp_path, max_tokens=2) as mem:
        assert mem.stats().store.entries == entries
        usage = mem.ask("Who pays?").usage
        assert usage.exact > 0.9 * (usage.prompt - usage.computed)
    assert doctor(tmp_path, "--rebuild")[0] == 0


def test_damaged_files_are_not_listed_again(model: LanguageModel, tmp_path: Path) -> None:
    """They are counted, and go with --fix."""
    entries = filled(model, tmp_path)
    lose(tmp_path)
    victim = next((tmp_path / "v1" / "entries").rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-10])
    _, output = doctor(tmp_path, "--rebuild", "--fix")
    assert f"{entries - 1} entries are listed again; 1 files are damaged" in " ".join(output.split())
    assert not victim.exists()


def test_removed_text_does_not_come_back_with_a_rebuilt_index(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that could not be unlinked when its document was removed."""
    filled(model, tmp_path)
    monkeypatch.setattr("kvmem.store.files.EntryFiles.remove", lambda self, name: False)
    with KVMem(model, tmp_path) as mem:
        mem.remove(mem.list()[0].id)
        left = mem.stats().store.entries
    monkeypatch.undo()
    lose(tmp_path)
    doctor(tmp_path, "--rebuild", "--fix")
    with KVMem(model, tmp_path) as mem:
        assert mem.stats().store.entries == left


def test_records_that_are_damaged_say_how_they_are_restored(model: LanguageModel, tmp_path: Path) -> None:
    """Documents are not in the entry files."""
    filled(model, tmp_path)
    (tmp_path / "records.sqlite-wal").unlink(missing_ok=True)
    data = (tmp_path / "records.sqlite").read_bytes()
    (tmp_path / "records.sqlite").write_bytes(b"x" * 4000 + data[4000:])
    with pytest.raises(StoreError, match="kvmem import"):
        DiskStore(tmp_path)


def test_records_are_exported_and_imported(model: LanguageModel, tmp_path: Path) -> None:
    """Documents, memories and conversations, into another store or another namespace."""
    filled(model, tmp_path / "a")
    file = tmp_path / "all.jsonl"
    runner = CliRunner()
    assert runner.invoke(app, ["export", "--store", str(tmp_path / "a"), "--output", str(file)]).exit_code == 0
    printed = runner.invoke(app, ["export", "--store", str(tmp_path / "a")]).output
    assert printed == file.read_text()
    assert runner.invoke(app, ["import", str(file), "--store", str(tmp_path / "b")]).exit_code == 0
    options = ["import", str(file), "--store", str(tmp_path / "b"), "--namespace", "other"]
    assert runner.invoke(app, options).exit_code == 0
    with KVMem(model, tmp_path / "a", max_tokens=2) as first:
        for namespace in ("default", "other"):
            with KVMem(model, tmp_path / "b", namespace=namespace, max_tokens=2) as mem:
                assert mem.list() == first.list()
                assert [item.text for item in Memory(mem).list()] == ["The user likes tea."]
                assert mem.history("t") == first.history("t")
                assert mem.ask("Who pays?").text == first.ask("Who pays?").text
                mem.forget_thread("t")
    assert runner.invoke(app, ["import", str(tmp_path / "none.jsonl")]).exit_code == 1


@pytest.mark.parametrize(
    "wrong", ['{"format": "other"}', "not JSON", '{"format": "kvmem-export/1"}\n[]', '{"format": "kvmem-export/1"}\n{}']
)
def test_what_is_not_an_export_changes_nothing(wrong: str) -> None:
    """The error names the line."""
    database = MemoryDatabase()
    database.records("default", "document").put("a", {"text": "x"})
    before = list(export_records(database, ["default"]))
    good = before[1]
    with pytest.raises(InputError, match=r"[Ll]ine"):
        import_records(database, [*wrong.split("\n"), good], "other")
    assert list(export_records(database, ["default", "other"])) == before
