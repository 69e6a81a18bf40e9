"""Load files as text: plain text and Markdown unchanged, HTML and PDF converted with established libraries."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from kvmem.errors import EmptyInputError, InputError, first_line

SUFFIXES = (".txt", ".md", ".markdown", ".rst", ".html", ".htm", ".pdf")
_MISSING = "Reading {path} needs {package}: pip install 'kvmem[files]'."


def read_file(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file and its metadata: `source`, and `title` if the file has one.

    HTML is converted to Markdown, which keeps its headings; the pages of a PDF are joined by blank lines; any other
    file is read as UTF-8. Raises InputError if it cannot be read, EmptyInputError for a PDF that has only images.
    """
    suffix = path.suffix.lower()
    if suffix == ".pdf":
        text, title = _read_pdf(path)
    elif suffix in (".html", ".htm"):
        text, title = _read_html(path)
    else:
        text, title = _read_text(path), None
    return text, {"source": str(path)} | ({"title": title} if title else {})


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}. Give a text file.") from error
    if "\0" in text:
        raise InputError(f"{path} contains binary data. Give a text file.")
    return text


def _read_html(path: Path) -> tuple[str, str | None]:
    try:
        from bs4 import BeautifulSoup
        from markdownify import MarkdownConverter
    except ImportError as error:
        raise InputError(_MISSING.format(path=path, package="markdownify")) from error
    soup = BeautifulSoup(_read_text(path), "html.parser")
    title = soup.title.get_text(strip=True) if soup.title else None
    for tag in soup(["script", "style", "title", "meta", "link", "nav"]):
        tag.decompose()
    return str(MarkdownConverter(heading_style="ATX").convert_soup(soup)).strip(), title


def _read_pdf(path: Path) -> tuple[str, str | None]:
    try:
        import pypdf
    except ImportError as error:
        raise InputError(_MISSING.format(path=path, package="pypdf")) from error
    logging.getLogger("pypdf").setLevel(logging.ERROR)
    try:
        reader = pypdf.PdfReader(path)
        pages = [page.extract_text() for page in reader.pages]
        title = reader.metadata.title if reader.metadata is not None else None
    except Exception as error:  # a malformed PDF can make the parser raise any exception
        raise InputError(f"{path} cannot be read as PDF: {first_line(error)}. Give a text file.") from error
    text = "\n\n".join(page.strip() for page in pages if page.strip())
    if not text:
        raise EmptyInputError(f"{path} contains only images, no text. Run text recognition (OCR) on it first.")
    return text, title
