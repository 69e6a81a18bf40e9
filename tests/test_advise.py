from __future__ import annotations

import json
import math
from pathlib import Path

from typer.testing import CliRunner

from kvmem import LanguageModel
from kvmem.advise import Measured, Wanted, advise, measure
from kvmem.store import MemoryStore

FAST_DISK = Measured(linear=4e-4, quadratic=4e-8, load_bandwidth=2e9, bytes_per_token=20_000, window=8192)


def test_many_questions_over_a_small_corpus_are_for_cached_context() -> None:
    """The work done once is paid back, after as many queries as it says."""
    advice = advise(FAST_DISK, Wanted(corpus_tokens=6000, queries=1000))
    assert advice.best == "kvmem, whole corpus"
    rag, _, whole = advice.ways
    assert advice.break_even is not None
    assert math.isclose(whole.once, advice.break_even * (rag.per_day - whole.per_day) / 1000)
    assert whole.disk == 6000 * 20_000
    assert "pays back" in advice.reason


def test_many_updates_and_few_questions_are_for_rag() -> None:
    """Reading what nobody asks for is work for nothing."""
    advice = advise(FAST_DISK, Wanted(corpus_tokens=6000, queries=5, updates=500))
    assert advice.best == "RAG"
    assert advice.break_even is None
    assert "RAG needs less work" in advice.reason


def test_a_corpus_beyond_the_window_is_never_whole() -> None:
    """Chunks are retrieved either way, and still need not be read again."""
    advice = advise(FAST_DISK, Wanted(corpus_tokens=100_000, queries=1000))
    assert [way.name for way in advice.ways] == ["RAG", "kvmem, retrieved chunks"]
    assert advice.best == "kvmem, retrieved chunks"
    slow = Measured(4e-4, 4e-8, 1e6, 20_000, 8192)
    assert advise(slow, Wanted(corpus_tokens=100_000, queries=1000)).best == "RAG"


def test_a_machine_is_measured_and_nothing_is_left_behind(model: LanguageModel) -> None:
    """Positive costs, the model's own bytes, and an empty store."""
    store = MemoryStore(1 << 30)
    measured = measure(model, store)
    assert measured.read(100) > 0
    assert measured.read(10, behind=1000) >= measured.read(10) > 0
    assert measured.bytes_per_token == model.bytes_per_token
    assert store.stats().entries == 0


def test_the_command_prints_what_it_measured(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """As a table, and as JSON."""
    from kvmem.cli import main as cli
    from kvmem.testing import tiny_model

    monkeypatch.setattr(cli.LanguageModel, "load", lambda *_: tiny_model())
    arguments = ["advise", "--corpus-tokens", "3000", "--queries", "50", "--store", str(tmp_path / "kv")]
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "kvmem, whole corpus" in shown.output
    found = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)
    assert found["wanted"]["queries"] == 50
    assert len(found["ways"]) == 3
