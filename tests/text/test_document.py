from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest

from kvmem import EmptyInputError, InputError
from kvmem.text.document import as_document


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


def test_html_becomes_markdown_with_its_title(tmp_path: Path) -> None:
    """Headings stay headings; scripts and styles are dropped."""
    file = tmp_path / "page.html"
    file.write_text(
        "<html><head><title>The lease</title><style>x{}</style></head><body><h1>Rent</h1>"
        "<p>It is <b>due</b>.</p><script>alert(1)</script></body></html>"
    )
    document = as_document(file)
    assert document.text.startswith("# Rent\n\nIt is **due**.")
    assert "alert" not in document.text
    assert document.metadata == {"source": str(file), "title": "The lease"}


def test_html_that_leaves_out_optional_tags_keeps_its_text(tmp_path: Path) -> None:
    """A head may end without saying so."""
    file = tmp_path / "page.html"
    file.write_text("<!DOCTYPE html><html><head><title>T</title><meta charset=utf-8><body><h1>Hi</h1><p>Text here</p>")
    document = as_document(file)
    assert document.text == "# Hi\n\nText here"
    assert document.metadata["title"] == "T"


def test_broken_pdfs_are_errors_of_ours(tmp_path: Path) -> None:
    """Whatever the parser raises."""
    from fpdf import FPDF

    pdf = FPDF()
    pdf.set_font("helvetica", size=12)
    pdf.add_page()
    pdf.cell(text="The rent is due.")
    whole = bytes(pdf.output())
    file = tmp_path / "x.pdf"
    draw = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(3):
            data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(bytes(data))
        with suppress(InputError):
            as_document(file)


def test_pdf_is_read_page_by_page(tmp_path: Path) -> None:
    """The text of every page, and the title; what is no PDF, or holds images alone, is an error."""
    from fpdf import FPDF

    pdf = FPDF()
    pdf.set_title("The lease")
    pdf.set_font("helvetica", size=12)
    for text in ("The rent is due.", "The keys are two."):
        pdf.add_page()
        pdf.cell(text=text)
    file = tmp_path / "lease.pdf"
    pdf.output(str(file))
    document = as_document(file)
    assert document.text == "The rent is due.\n\nThe keys are two."
    assert document.metadata["title"] == "The lease"
    empty = FPDF()
    empty.add_page()
    empty.output(str(file))
    with pytest.raises(EmptyInputError, match="OCR"):
        as_document(file)
    file.write_bytes(b"no pdf")
    with pytest.raises(InputError, match=r"lease\.pdf"):
        as_document(file)
