from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import fidelity, speed, task
from benchmarks.common import load_questions
from benchmarks.report import render
from kvmem import BlendSettings, InputError, KVMemError, LanguageModel
from kvmem.measure import bootstrap, write_json
from kvmem.testing import tiny_model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {
            "ctxs": [{"title": f"Room {n}", "text": f"Room {n} is {colour}. It has a window. " * 3} for n in range(3)],
            "question": f"What is {colour}?",
            "answers": ["a room"],
        }
        for colour in ("red", "green", "blue")
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(rows))
    return path


def test_fidelity_measures_every_variant_and_finds_that_all_is_full_prefill(data: Path, tmp_path: Path) -> None:
    """On a tiny float32 model: `all` diverges by nothing, the default by less than no repair; the rest is described."""
    model: LanguageModel = tiny_model("qwen3")
    variants = {name: fidelity.VARIANTS[name] for name in ("all", "none", fidelity.BASELINE, "query 20%")}
    result = fidelity.run(model, load_questions(data), 3, tokens=4, variants=variants)
    summary = result["summary"]
    assert abs(summary["all"]["kl_mean"]) < 1e-5
    assert summary["all"]["top1"] == 1.0
    assert summary["query 20%"]["kl_mean"] < summary["none"]["kl_mean"]
    assert summary[fidelity.BASELINE]["ratio"] == pytest.approx(1.0)
    assert result["settings"]["examples"] == 3
    assert {"model", "fingerprint", "machine", "versions", "threads"} <= set(result)
    write_json(tmp_path / "r.json", result)
    assert json.loads((tmp_path / "r.json").read_text())["summary"] == summary
    fidelity.plot([result], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert fidelity.table(result).row_count == 4


def test_the_task_counts_right_answers_and_finds_that_all_is_full_prefill() -> None:
    """Every case asks for one of two numbers, each company in turn; `all` decides as full prefill does."""
    cases = task.make_cases(4, seed=1)
    assert len({case.chunks for case in cases}) == 4
    for number, case in enumerate(cases):
        place = 1 + 2 * (number % 2)
        assert case.right in case.chunks[place]
        assert case.wrong in case.chunks[4 - place]
        assert case.right != case.wrong
    result = task.run(tiny_model(), 4, variants={name: task.VARIANTS[name] for name in ("none", "all")})
    for row in result["examples"]:
        assert row["margins"]["all"] == pytest.approx(row["margins"]["full prefill"], abs=1e-3)
    assert result["summary"]["all"]["agreement"] == 1.0
    right = [row["margins"]["none"] > 0 for row in result["examples"]]
    assert result["summary"]["none"]["accuracy"] == sum(right) / 4
    assert task.table(result).row_count == 2 * 3
    titled = [row["margins"]["all, with titles"] for row in result["examples"]]
    assert titled == pytest.approx(
        [row["margins"]["full prefill, with titles"] for row in result["examples"]], abs=1e-3
    )


def test_what_is_measured_as_the_default_is_the_default() -> None:
    """The speed of the default has its share in its name, and its fidelity and its answers are measured too."""
    share = BlendSettings().share
    assert speed.WAYS[f"default, {share:.0%}"][1] == "query"
    for variants in (fidelity.VARIANTS, task.VARIANTS):
        assert BlendSettings.parse(variants[f"query {share:.0%}"]) == BlendSettings()


@pytest.mark.parametrize(("size", "passages"), [(1, 1), (140, 1), (160, 2), (390, 4)])
def test_prompts_whose_speed_is_measured_come_as_near_to_their_size_as_whole_passages_do(
    data: Path, size: int, passages: int
) -> None:
    """Passages of a hundred tokens; the next question's follow when one has no more."""
    questions = load_questions(data)
    model = tiny_model()
    tokens = [len(model.tokenizer(p).input_ids) for q in questions for p in q.passages]
    assert {90 < count < 110 for count in tokens} == {True}, tokens
    text = speed.text_of_size(model, questions, size)
    assert len(text["passages"]) == passages
    assert text["question"] == "What is red?"
    with pytest.raises(KVMemError, match="less than 9000"):
        speed.text_of_size(model, questions, 9000)


def test_speeds_are_the_best_of_all_processes_and_single_ratios_stay_visible() -> None:
    """Of the first token and of decoding; decoding stands in the default's row only."""
    same = {"size": 600, "prompt_tokens": 640, "work": 0.1, "floor": 0.1, "kernels": 0.2}
    seconds = [(1.0, 0.9, 4.0), (2.0, 0.5, 8.0), (1.5, 0.8, 6.0)]
    rows: list[dict[str, Any]] = []
    for way in ("exact", speed.DEFAULT):
        rows += [
            {**same, "way": way, "phase": "measure", "first_token": first, "first_token_again": again, "full": full}
            | {"ratio": first / full}
            for first, again, full in seconds
        ]
        rows.append({**same, "way": way, "phase": "memory", "memory_ratio": 1.1})
    measured = [(3.0, 5.0, 4.0), (2.0, 2.5, 2.5), (4.0, 4.0, 8.0)]
    rows += [
        {**same, "way": speed.DEFAULT, "phase": "decode", "ours": ours, "plain": plain, "packed": packed}
        for ours, plain, packed in measured
    ]
    exact, default = speed.summarise(rows)
    assert (exact["ratio"], exact["ratio_median"], exact["ratio_again"]) == (0.25, 0.25, 0.125)
    assert exact["decoding"] is None
    assert default["decoding"] == {
        "plain": 0.8,
        "plain_single": [0.6, 0.8, 1.0],
        "packed": 0.8,
        "packed_single": [0.5, 0.75, 0.8],
    }


def test_the_speed_of_everything_can_be_read_in_eighty_columns() -> None:
    """No cell of the table of the results beside the page is cut or broken."""
    result = json.loads((Path(__file__).parents[2] / "docs" / "benchmarks" / "speed-smollm2-amx.json").read_text())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(speed.table(result))
    text = console.export_text()
    assert "…" not in text
    for row in result["summary"]:
        assert re.search(
            rf"{row['prompt_tokens']:.0f} +{row['way']} +{row['ratio']:.3f} .*{row['memory_ratio']:.2f}", text
        )


def test_questions_that_cannot_be_read_are_an_error_with_an_example(tmp_path: Path) -> None:
    """A missing file, JSON of another shape."""
    with pytest.raises(InputError, match="ctxs"):
        load_questions(tmp_path / "none.json")
    (tmp_path / "x.json").write_text('[{"question": "?"}]')
    with pytest.raises(InputError, match="ctxs"):
        load_questions(tmp_path / "x.json")


def test_the_benchmarks_page_is_what_its_results_say() -> None:
    """docs/benchmarks.md is rendered from the JSON beside it, to the letter."""
    docs = Path(__file__).parents[2] / "docs"
    assert (docs / "benchmarks.md").read_text() == render(docs / "benchmarks")


def test_the_bootstrap_covers_the_mean() -> None:
    """Its interval lies around the mean, is the same for the same seed, and narrows with more examples."""
    values = np.random.default_rng(0).normal(3.0, 1.0, 100).tolist()

    def mean(x: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        return float(np.mean(x))

    low, high = bootstrap(values, mean, seed=1)
    assert low < float(np.mean(values)) < high
    assert (low, high) == bootstrap(values, mean, seed=1)
    wide = bootstrap(values[:10], mean, seed=1)
    assert high - low < wide[1] - wide[0]
