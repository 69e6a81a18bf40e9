from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmem import Cancellation, ClosedError, KVMem, LanguageModel
from kvmem.settings import SplitSettings
from kvmem.text.chunking import KnownTexts, headings, split

SIZES = SplitSettings(minimum=10, target=30, maximum=40)


def size(text: str) -> int:
    return max(1, len(text.split()), len(text) // 8)


def words(texts: Sequence[str]) -> list[int]:
    return [size(text) for text in texts]


@settings(max_examples=200)
@given(st.text(alphabet=st.sampled_from("ab. \n#。,é漢"), max_size=600))
def test_splitting_loses_nothing_and_keeps_its_bounds(text: str) -> None:
    """Chunks concatenate to the text, and none is longer than the maximum."""
    chunks = split(text, words, SIZES)
    assert "".join(chunks) == text
    assert all(chunks)
    assert all(size(chunk) <= SIZES.maximum + 5 for chunk in chunks)


def test_one_endless_line_is_cut() -> None:
    """Text without any natural end is cut all the same."""
    chunks = split("x" * 5000, words, SIZES)
    assert "".join(chunks) == "x" * 5000
    assert max(map(len, chunks)) <= 8 * 41


def test_cuts_are_made_at_headings_before_lines_before_sentences() -> None:
    """The strongest end is taken, and what has no strong one is left whole up to the maximum."""
    text = "One sentence of six words here. " * 3 + "\n## Next part\n" + "Another sentence of six words. " * 6
    first, *_ = split(text, words, SIZES)
    assert first.endswith("\n")
    assert "Next part" not in first
    assert len(split("Word " * 35, words, SIZES)) == 1


KINDS = {
    "prose": "\n\n".join(
        f"Paragraph {n} is about {n * 37 % 101}. It goes on for a while, with {n} words and more. It ends here."
        for n in range(120)
    ),
    "markdown": "\n".join(f"## Part {n}\n\nText of part {n}.\n\n- first {n}\n- second {n * 7}\n" for n in range(120)),
    "code": "\n\n".join(
        f"def function_{n}(x):\n    y = x + {n}\n    if y > {n * 3}:\n        return {n}\n    return y"
        for n in range(120)
    ),
    "csv": "\n".join(f"{n},{n * 17 % 113},name {n},{n * 3.5}" for n in range(700)),
    "chinese": "".join(f"第{n}段讲的是第{n * 31 % 97}个问题。它很短。\n" for n in range(500)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", ["insert", "delete", "change"])
def test_an_edit_anywhere_changes_two_chunks_at_most(kind: str, edit: str) -> None:
    """In prose, Markdown, code, CSV and Chinese: nearly always one chunk or two, wherever the line stands."""
    sizes = SplitSettings(minimum=64, target=160, maximum=256)
    before = set(split(KINDS[kind], words, sizes))
    lines = KINDS[kind].split("\n")
    draw = random.Random(0)
    changed = []
    for place in [0, len(lines) // 2, len(lines) - 1, *(draw.randrange(len(lines)) for _ in range(60))]:
        edited = list(lines)
        if edit == "insert":
            edited.insert(place, "An entirely new line, 4711.")
        elif edit == "delete":
            del edited[place]
        else:
            edited[place] += " And 4711."
        text = "\n".join(edited)
        after = split(text, words, sizes)
        assert "".join(after) == text
        changed.append(len(set(after) - before))
    assert sum(count <= 2 for count in changed) >= 0.9 * len(changed)
    assert max(changed) <= 4


def test_line_ends_of_windows_are_line_ends() -> None:
    """A text is cut at its blank lines whatever they are made of."""
    unix = split(KINDS["prose"], words, SIZES)
    windows = split(KINDS["prose"].replace("\n", "\r\n"), words, SIZES)
    assert [chunk.replace("\r", "") for chunk in windows] == list(unix)


def test_chunks_carry_the_headings_they_continue_under() -> None:
    """Title and heading path, but not what the chunk says itself; code is no heading."""
    chunks = [
        "# Lease\n\nIntro.\n\n",
        "## Rent\n\nIt is due.\n\n",
        "It is late.\n```\n# no\n```\n",
        "## Keys\n\nTwo.\n",
    ]
    assert headings(chunks, None) == ["", "Lease\n\n", "Lease > Rent\n\n", "Lease\n\n"]
    assert headings(chunks, "Harbour Road") == [
        "Harbour Road\n\n",
        "Harbour Road > Lease\n\n",
        "Harbour Road > Lease > Rent\n\n",
        "Harbour Road > Lease\n\n",
    ]
    assert headings(["plain\n", "text\n"], None) == ["", ""]
    assert headings(["The Lease\n", "text\n"], "Lease") == ["", "Lease\n\n"]


@pytest.mark.parametrize("markup", [True, False])
def test_many_texts_are_tokenised_as_each_alone(model: LanguageModel, markup: bool) -> None:
    """More than the tokenizer gets in one call; empty ones and markup among them."""
    texts = [f"Pump {n} ran." for n in range(600)] + ["", "<|im_end|>", "\n\n"] * 2
    together = model.tokenize_all(texts, markup=markup)
    assert together == [model.tokenize(text, markup=markup) for text in texts]
    assert model.count_all(texts) == [model.count_tokens(text) for text in texts]
    assert model.tokenize_all([], markup=markup) == []
    assert (len(together[-2]) == 1) == markup


def test_cutting_a_large_document_can_be_given_up(mem: KVMem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model runs, and before all of it is tokenised; the corpus is unchanged."""
    mem.add("The ferry leaves at nine.", id="ferry")
    monkeypatch.setattr(type(mem.model), "_run", lambda *_: pytest.fail("the model ran"))
    tokenised = []
    real, cancellation = mem.model.tokenizer, Cancellation()

    def tokenize(texts: list[str], **options: Any) -> Any:
        tokenised.extend(texts)
        cancellation.cancel()
        return real(texts, **options)

    monkeypatch.setattr(mem.model, "tokenizer", tokenize)
    text = " ".join(f"Pump {n} ran for {n * 7} minutes." for n in range(4000))
    with pytest.raises(ClosedError):
        mem.add(text, id="log", cancellation=cancellation)
    assert 0 < len(tokenised) < 2000
    assert [document.id for document in mem.list()] == ["ferry"]


def test_what_was_cut_last_is_not_cut_again(mem: KVMem, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context that is asked about again is not tokenised; neither long, old nor forgotten texts are kept."""
    asked: list[str] = []
    known = KnownTexts(lambda text, _: (asked.append(text) or text,), lambda *_: [], texts=2, characters=5)
    for text in ("one", "one", "two", "one", "three", "two", "longer", "longer"):
        assert known(text) == (text,)
    assert asked == ["one", "two", "three", "two", "longer", "longer"]
    known.clear()
    known("two")
    assert len(asked) == 7

    mem.ask("What?", context=["The ferry leaves at nine."])
    counted: list[str] = []
    real = mem.model.tokenize_all
    monkeypatch.setattr(
        mem.model, "tokenize_all", lambda texts, **options: counted.extend(texts) or real(texts, **options)
    )
    mem.plan("What?", context=["The ferry leaves at nine."])
    assert counted == []
    mem.forget_user()
    mem.plan("What?", context=["The ferry leaves at nine."])
    assert {"The ferry leaves at nine.", "What?"} <= set(counted)
