from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvmem.cli.main import app


def run(saved_model: str, store: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments, "--model", saved_model, "--store", str(store)])
    return result.exit_code, result.output


def run_doctor(store: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", "--store", str(store), *arguments])
    return result.exit_code, result.output.strip()


def deny(*_: Any, **__: Any) -> None:
    raise PermissionError("not yours")


def test_add_ask_stats_remove(saved_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The four commands in the order of a first session, each its own process as far as the store knows."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Rent\n\nThe rent is due on Monday.")
    (tmp_path / "docs" / "b.txt").write_text("Boilers make steam.")
    (tmp_path / "docs" / "c.png").write_bytes(b"\x89PNG")
    store = tmp_path / "kv"
    code, output = run(saved_model, store, "add", str(tmp_path / "docs"))
    assert code == 0, output
    assert "a.md  1 chunks" in output.replace("\n", "")
    assert "c.png" not in output
    code, output = run(saved_model, store, "ask", "When is the rent due?", "--max-tokens", "4")
    assert code == 0, output
    assert "a.md" in output
    assert " exact" in output
    assert "first token after" in output
    code, output = run(saved_model, store, "stats")
    assert code == 0
    assert "MB" in output
    assert "hit rate" in output
    code, output = run_doctor(store)
    assert code == 0
    assert output.startswith("namespace default: 3 entries")
    assert output.endswith("No problems.")
    (store / "v1" / "tmp" / "left").write_bytes(b"x")
    assert run_doctor(store)[0] == 1
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", deny)
        assert run_doctor(store, "--fix")[0] == 1
    assert run_doctor(store, "--fix")[0] == 0
    assert run_doctor(store)[0] == 0
    assert run_doctor(tmp_path / "nowhere")[0] == 1
    document = str(tmp_path / "docs" / "a.md")
    assert run(saved_model, store, "remove", document)[0] == 0
    code, output = run(saved_model, store, "stats")
    assert "a.md" not in output
    assert "b.txt" in output


def test_check_reports_as_a_table_and_as_json(
    saved_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kvmem check` exits with 0 for a model that blends, and its JSON can be read."""
    monkeypatch.setattr("kvmem.backends.calibrate.default_cache_dir", lambda: tmp_path)
    monkeypatch.setattr("kvmem.backends.calibrate.BUDGETS", (0.5,))
    result = CliRunner().invoke(app, ["check", saved_model])
    assert result.exit_code == 0, result.output
    assert "50% recomputed" in result.output
    assert "template does not show" in result.output
    result = CliRunner().invoke(app, ["check", saved_model, "--json"])
    report = json.loads(result.output[result.output.index("{") :])
    assert (report["blendable"], [*report["tool_calls"]]) == (True, ["format"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "What?"], "add()"),
        (["remove", "nothing"], "Known ids"),
        (["add", "missing.txt"], "missing.txt"),
        (["ask", "What?", "--blend", "best"], "selector"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_1(
    saved_model: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """No traceback: the error's message, which says what to do."""
    code, output = run(saved_model, tmp_path / "kv", *arguments)
    assert code == 1
    assert "Error:" in output
    assert message in output
    assert "Traceback" not in output
