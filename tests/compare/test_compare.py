from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvmem import Document, InputError, LanguageModel
from kvmem.cli.main import app
from kvmem.compare import report, summary
from kvmem.compare.questions import Question, generate, load
from kvmem.compare.run import run
from kvmem.compare.score import contains, f1, missing, normalise
from kvmem.testing import tiny_model

DOCUMENTS = [
    Document("rent", "The rent is 3,200 euros a month. " * 3, {}),
    Document("pets", "Pets are allowed if they are quiet. <script>alert('x')</script> " * 3, {}),
]
QUESTIONS = [
    Question("How much is the rent?", ("3,200 euros",)),
    Question("Are <b>pets</b> allowed?", ("yes",), ("Pets are allowed", "The rent is 3,200 euros")),
    Question("Who is the king?", ("Olaf",)),
]


@pytest.fixture(scope="module")
def result(model: LanguageModel) -> dict[str, Any]:
    return run(model, DOCUMENTS, QUESTIONS, k=1, max_tokens=6)


def test_answers_are_compared_as_squad_does() -> None:
    """Case, punctuation and articles do not count; words shared do; a number is not found inside another."""
    assert normalise("The  Rent, is: 3,200!") == "rent is 3200"
    assert f1("the rent is high", ["Rent is low", "no"]) == pytest.approx(2 * 2 / (3 + 3))
    assert normalise("2.4 litres at 02:00, Feb.") == "2.4 litres at 02:00 feb"
    assert f1("something else", ["rent"]) == 0.0
    assert contains("It costs 3,200 euros.", ["3200 Euros"])
    assert not contains("It costs 13,200 euros.", ["3,200 euros"])
    assert not contains("anything", ["", "..."])


def test_a_prompt_is_incomplete_when_any_evidence_or_every_answer_is_missing() -> None:
    """Evidence counts before answers; without either being in the corpus, nobody can say."""
    corpus = ["The rent is high.", "Rent means money."]
    both = Question("?", ("high",), ("rent is high", "means money"))
    assert missing(both, corpus, corpus) is False
    assert missing(both, corpus[:1], corpus) is True
    assert missing(Question("?", ("high", "low")), corpus[:1], corpus) is False
    assert missing(Question("?", ("money",)), corpus[:1], corpus) is True
    assert missing(Question("?", ("a duck",)), corpus, corpus) is None
    assert missing(Question("?"), corpus, corpus) is None
    assert missing(Question("?", (), ("rent is high", "nowhere to be found")), corpus, corpus) is None


def test_questions_are_read_from_lines_json_and_json_lines(tmp_path: Path) -> None:
    """All three kinds of file, strings and objects mixed."""
    (tmp_path / "q.txt").write_text("Who?\n\n  What? \n")
    assert load(tmp_path / "q.txt") == [Question("Who?"), Question("What?")]
    rows = ["Who?", {"question": "What?", "answers": "this", "evidence": ["that", " "]}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = [Question("Who?"), Question("What?", ("this",), ("that",))]
    assert load(tmp_path / "q.json") == expected
    assert load(tmp_path / "q.jsonl") == expected


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("q.json", '{"question": "Who?"}', "not a list"),
        ("q.json", "[{}]", "does not hold questions"),
        ("q.json", '[{"question": "Who?", "answers": [1]}]', "not a list of texts"),
        ("q.jsonl", "Who?", "does not hold questions"),
        ("q.txt", "\n", "contains no questions"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path: Path, name: str, text: str, hint: str) -> None:
    """The error names the file and says what to give."""
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=hint):
        load(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "none.txt")


def test_every_way_answers_every_question_and_warm_is_full_prefill(result: dict[str, Any]) -> None:
    """Documents fit: kvmem's answers and distributions are full prefill's, from memory and from disk, for less work; on
    RAG's chunks they are near RAG's."""
    assert result["fits"]
    assert result["documents"] == 2
    assert result["disk_bytes"] > result["tokens"] * result["bytes_per_token"]
    for number, row in enumerate(result["rows"]):
        ways = row["ways"]
        assert set(ways) == set(result["ways"])
        assert ways["warm"]["text"] == ways["restart"]["text"] == ways["full"]["text"]
        assert ways["warm"]["agrees"] == 1.0
        assert ways["warm"]["kl"] < 1e-5
        assert ways["warm"]["top1"] == 1.0
        assert abs(ways["cached"]["kl"]) < 0.1
        assert ways["rag"]["kl"] is ways["full"]["kl"] is ways["restart"]["kl"] is None
        assert ways["cached"]["prompt"] == ways["rag"]["prompt"] < ways["full"]["prompt"] == ways["warm"]["prompt"]
        assert 0 < ways["warm"]["computed"] < ways["rag"]["computed"] < ways["full"]["computed"]
        # What the question and the last one have in common is in the buffer, and not on disk.
        assert number == 0 or ways["warm"]["usage"]["exact"] > ways["restart"]["usage"]["exact"]
        for cell in ways.values():
            assert 0 < cell["first_token"] <= cell["total"]
    assert [row["ways"]["rag"]["missing"] for row in result["rows"]] == [False, True, None]
    assert [row["ways"]["warm"]["missing"] for row in result["rows"]] == [False, False, None]
    assert result["summary"]["rag"]["missing"] == 0.5
    assert result["summary"]["rag"]["judged"] == 2
    assert result["cold"]["first_token"] > result["reading"] > 0
    assert json.loads(json.dumps(result)) == result


def test_a_question_without_any_word_of_the_documents_is_asked_without_chunks(result: dict[str, Any]) -> None:
    """Retrieval finds nothing, and says so, instead of ending the comparison."""
    ways = result["rows"][2]["ways"]
    assert ways["rag"]["chunks"] == ways["cached"]["chunks"] == 0
    assert ways["full"]["chunks"] == 2


def test_a_question_or_chunks_beyond_the_window_are_named_before_anything_is_measured(model: LanguageModel) -> None:
    """The error says which question, or that -k is too large."""
    long = Question("word " * 5000)
    with pytest.raises(InputError, match="Question 2, 'word"):
        run(model, DOCUMENTS, [QUESTIONS[0], long], max_tokens=4)
    many = [Document(str(n), f"Room {n} is number {n * n}. " * 40, {}) for n in range(40)]
    with pytest.raises(InputError, match="Give a smaller -k"):
        run(model, many, [Question("Which room is a number?")], k=40, max_tokens=4)
    with pytest.raises(InputError, match="no questions"):
        run(model, DOCUMENTS, [], max_tokens=4)


def test_a_model_that_cannot_be_blended_is_compared_and_named() -> None:
    """GPT-2: exact reuse only; the notice says why."""
    found = run(tiny_model("gpt2"), DOCUMENTS, QUESTIONS[:1], k=1, max_tokens=4)
    assert found["rows"][0]["ways"]["warm"]["kl"] < 1e-5
    assert any("cannot be reused at other positions" in text for text in summary.notices(found))


def test_a_corpus_beyond_the_window_is_compared_on_the_prompt_that_kvmem_uses(model: LanguageModel) -> None:
    """The plan says that it was retrieved; full prefill reads no more than the window."""
    many = [Document(str(n), f"Room {n} is number {n * n}. " * 40, {}) for n in range(40)]
    found = run(model, many, [Question("What is number 49?", ("49",))], k=1, max_tokens=4)
    row = found["rows"][0]
    assert not found["fits"]
    assert row["plan"]["mode"] in ("route", "retrieve")
    assert row["ways"]["full"]["computed"] < found["window"] < found["tokens"]
    assert row["ways"]["warm"]["kl"] < 0.1
    assert any("do not all fit" in text for text in summary.notices(found))


def test_break_even_is_the_reading_divided_by_what_a_question_saves() -> None:
    """With an interval over questions; open above when the saving may be none, and never when there is none."""

    def rows(*saved: float) -> list[dict[str, Any]]:
        return [{"ways": {"rag": {"first_token": 1.0 + s}, "warm": {"first_token": 1.0}}} for s in saved]

    sure = summary.break_even(rows(2.0, 4.0, 3.0, 3.0), "rag", "warm", 12.0, 0)
    assert sure["queries"] == pytest.approx(4.0)
    assert sure["low"] is not None
    assert sure["high"] is not None
    assert 3.0 <= sure["low"] < 4.0 < sure["high"] <= 6.0
    unsure = summary.break_even(rows(-2.0, 4.0, -1.0, 3.0), "rag", "warm", 12.0, 0)
    assert unsure["queries"] == pytest.approx(12.0)
    assert unsure["high"] is None
    assert summary.break_even(rows(-1.0, -1.0), "rag", "warm", 12.0, 0)["queries"] is None


def test_the_table_and_the_verdict_say_what_the_figures_say(result: dict[str, Any]) -> None:
    """Shares, misses and break-even are computed, in words too."""
    changed = json.loads(json.dumps(result))
    for name, seconds in {"rag": 2.0, "full": 10.0, "warm": 1.0, "restart": 3.0, "cached": 1.5}.items():
        changed["summary"][name]["first_token_median"] = seconds
    changed["reading"] = 12.0
    changed["break_even"] = {
        "full": {"queries": 1.2, "low": 1.1, "high": 2.5},
        "rag": {"queries": None, "low": None, "high": None},
    }
    text = summary.verdict(changed)
    assert "Warm, the first token took 10% of full prefill's time and 50% of RAG's" in text
    assert "After a restart, the first token took 30% of full" in text
    assert "On RAG's chunks, kvmem's first token took 75% of RAG's time" in text
    assert "pays off after 2 questions against full prefill (95% interval: 2 to 3)" in text
    assert "never pays off against RAG" in text
    assert "missing from RAG's prompt in 50% of 2 questions and from kvmem's in 0%" in text
    assert "RAG in 0%, full prefill in 0%, kvmem in 0%, kvmem on RAG's chunks in 0% of 3 questions" in text
    changed["break_even"]["rag"] = {"queries": 20.0, "low": 5.0, "high": None}
    assert "too few questions to tell" in summary.verdict(changed)
    assert summary.table(changed).row_count == 6


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_report_is_one_file_that_fetches_and_runs_nothing(result: dict[str, Any], tmp_path: Path) -> None:
    """Four plots, every question, markup of questions and answers shown as text; no reference leaves the page."""
    changed = json.loads(json.dumps(result))
    changed["rows"][0]["ways"]["rag"]["text"] = "<script>alert(1)</script>"
    path = tmp_path / "out" / "r.html"
    report.write(changed, path)
    text = path.read_text()
    links = _Links()
    links.feed(text)
    assert links.scripts == 0
    assert all(link.startswith(("#", "data:")) for link in links.found)
    assert not re.search(r"url\((?!#)|@import", text)
    assert text.count("<svg") == 4
    assert "Are &lt;b&gt;pets&lt;/b&gt; allowed?" in text
    assert text.count("<details") == 3
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    assert text.count('role="img"') == 4
    assert "No questions were given" not in text
    report.write({**changed, "generated": True}, path)
    assert "No questions were given" in path.read_text()


def test_a_missing_library_is_told_before_anything_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without matplotlib: which package to install."""
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "matplotlib" else object())
    outcome = CliRunner().invoke(app, ["compare", "--docs", str(tmp_path)])
    assert outcome.exit_code == 1
    assert "kvmem[bench]" in outcome.output


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_opens_in_a_browser_without_errors(result: dict[str, Any], tmp_path: Path, width: int) -> None:
    """Headless, at the width of a desktop and of a phone; the page itself does not scroll sideways."""
    page = tmp_path / "r.html"
    report.write(result, page)
    # In a frame, since Chromium opens no window that is narrower than 500 pixels.
    measure = "document.title = `width ${contentWindow.innerWidth} of ${contentDocument.documentElement.scrollWidth}`"
    source = escape(page.read_text())
    frame = f'<iframe width="{width}" height="800" style="border: 0" srcdoc="{source}" onload="{measure}">'
    page.write_text(f"<!doctype html><title>none</title>{frame}</iframe>")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    shown = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}", "--window-size=1400,900", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in shown.stderr
    found = re.search(r"<title>width (\d+) of (\d+)</title>", shown.stdout)
    assert found is not None
    assert int(found[2]) <= int(found[1]) == width


def test_questions_are_made_from_the_documents_when_none_are_given(model: LanguageModel, monkeypatch: Any) -> None:
    """Each is about a chunk, which is its evidence; the draw depends on the seed alone; none at all is an error."""
    from kvmem.compare import questions as module

    documents = [Document(str(n), "", {}, (f"Chunk {n} one. ", f"Chunk {n} two. ")) for n in range(4)]
    monkeypatch.setattr(module, "_first_question", lambda text: f"What is {text[:12]!r}?")
    first, again = (generate(model, documents, 3, seed=1) for _ in range(2))
    assert first == again
    assert 1 <= len(first) <= 3
    assert all(question.evidence[0].startswith("Chunk") for question in first)
    monkeypatch.setattr(module, "_first_question", lambda text: "")
    with pytest.raises(InputError, match="--questions"):
        generate(model, documents, 3, seed=1)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("誰が家賃を払いますか？", "誰が家賃を払いますか？"),
        ("Question:\nWho pays the rent? The tenant.", "Who pays the rent?"),
        ("Who?", ""),
        ("There is no question here.", ""),
        ("? and more", ""),
    ],
)
def test_one_question_is_taken_from_what_the_model_writes(text: str, question: str) -> None:
    """Up to the first question mark, on its own line, and long enough to ask something."""
    from kvmem.compare.questions import _first_question

    assert _first_question(text) == question


def test_the_command_writes_a_report_and_json(saved_model: str, tmp_path: Path) -> None:
    """As a user runs it, on a directory of files."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("# Rent\n\nThe rent is due on Monday. " * 5)
    (docs / "q.jsonl").write_text('{"question": "When is the rent due?", "answers": ["Monday"]}\n"Who pays?"\n')
    command = ["compare", "--docs", str(docs), "--questions", str(docs / "q.jsonl"), "--model", saved_model]
    command += ["--output", str(tmp_path / "out"), "--max-tokens", "4", "-k", "1"]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    assert "Reading the documents took" in outcome.output
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written["settings"]["questions"] == 2
    assert (tmp_path / "out" / "compare.html").stat().st_size > 10_000
    (tmp_path / "empty").mkdir()
    outcome = CliRunner().invoke(app, ["compare", "--docs", str(tmp_path / "empty"), "--model", saved_model])
    assert outcome.exit_code == 1
    assert "no documents" in outcome.output
    outcome = CliRunner().invoke(app, [*command[:-6], "--output", str(docs / "a.md")])
    assert outcome.exit_code == 1
    assert "Cannot write to" in outcome.output


def test_reports_and_questions_are_not_read_as_documents(saved_model: str, tmp_path: Path) -> None:
    """`kvmem compare --docs .`, a second time, with everything in one directory."""
    (tmp_path / "a.md").write_text("# Rent\n\nThe rent is due on Monday. " * 5)
    (tmp_path / "q.txt").write_text("When is the rent due?\n")
    out = tmp_path / "kvmem-compare"
    out.mkdir()
    (out / "compare.html").write_text("<p>An earlier report.</p>")
    command = ["compare", "--docs", str(tmp_path), "--questions", str(tmp_path / "q.txt"), "--model", saved_model]
    outcome = CliRunner().invoke(app, [*command, "--output", str(out), "--max-tokens", "2"])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads((out / "compare.json").read_text())["documents"] == 1
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "compare.json"]
