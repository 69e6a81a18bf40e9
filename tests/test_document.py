from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmem import EmptyInputError, InputError
from kvmem.document import as_document, split
from kvmem.settings import SplitSettings

SIZES = SplitSettings(minimum=10, maximum=40)


def words(text: str) -> int:
    return max(1, len(text.split()), len(text) // 8)


@settings(max_examples=200)
@given(st.text(alphabet=st.sampled_from("ab. \n#。,é漢"), max_size=600))
def test_splitting_loses_nothing_and_keeps_its_bounds(text: str) -> None:
    """Chunks concatenate to the text, and none is longer than the maximum."""
    chunks = split(text, words, SIZES)
    assert "".join(chunks) == text
    assert all(chunks)
    assert all(words(chunk) <= SIZES.maximum + 5 for chunk in chunks)


def test_one_endless_line_is_cut() -> None:
    """Text without any natural end is cut all the same."""
    chunks = split("x" * 5000, words, SIZES)
    assert "".join(chunks) == "x" * 5000
    assert max(map(len, chunks)) <= 8 * 41


def test_cuts_are_made_at_headings_before_lines_before_sentences() -> None:
    """The strongest end between the bounds is taken."""
    text = "One sentence of six words here. " * 3 + "\n## Next part\n" + "Another sentence of six words. " * 6
    first, *_ = split(text, words, SIZES)
    assert first.endswith("\n")
    assert "Next part" not in first


def test_an_edit_changes_only_the_chunks_around_it() -> None:
    """Cuts far behind an edit are the same as before."""
    paragraphs = [f"Paragraph {n} says something of its own about topic {n * 7 % 31}.\n\n" for n in range(80)]
    before = split("".join(paragraphs), words, SIZES)
    paragraphs[10] = "An entirely new paragraph, which is a good deal longer than the one it replaces.\n\n"
    after = split("".join(paragraphs), words, SIZES)
    assert len(set(after) - set(before)) <= 3


def test_documents_are_made_from_what_users_have(tmp_path: Path) -> None:
    """Text, path, and the documents of both frameworks by their shape."""

    class LangChainLike:
        page_content, metadata, id = "body", {"a": 1}, "x"

    class LlamaIndexLike:
        metadata, id_ = {"b": 2}, "y"

        def get_content(self) -> str:
            return "body"

    file = tmp_path / "note.md"
    file.write_text("body")
    assert as_document("body").id == as_document("body").id != as_document("other").id
    assert as_document(file).id == file.as_posix()
    assert as_document(file).metadata == {"source": str(file)}
    assert (as_document(LangChainLike()).id, as_document(LlamaIndexLike()).id) == ("x", "y")
    assert as_document(LangChainLike(), id="z", metadata={"c": 3}).metadata == {"a": 1, "c": 3}


def test_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    """Binary data and other encodings are an error that names the file."""
    file = tmp_path / "x.bin"
    for data in (b"\xff\xfe\x00", b"a\x00b"):
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"x\.bin"):
            as_document(file)
    with pytest.raises(EmptyInputError):
        as_document("\n\t ")
    with pytest.raises(InputError, match="id="):
        as_document("text", id="")
