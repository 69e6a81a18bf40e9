from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scale import kv_bytes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [page for page in PAGES if page.name != "benchmarks.md"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation; a warning is an error."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return target


def test_the_site_builds_and_loads_nothing_from_elsewhere(site: Path) -> None:
    """Every page of the navigation is there; scripts, styles, fonts and images are the site's own."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= 15
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preconnect|icon)\"[^>]*href=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]*href=\"([^\"]+)\"[^>]*rel=\"(?:stylesheet|preconnect|icon)\"", text)
        assert [link for link in loaded if re.match(r"(https?:)?//", link)] == []


def test_the_api_reference_shows_public_names_with_their_docstrings(site: Path) -> None:
    """Signatures and docstrings are read from the code."""
    text = re.sub(r"<[^>]+>", "", (site / "api" / "index.html").read_text())
    for words in ("ask", "Answer a question from the documents", "ChatKVMem", "KVMemQueryEngine", "PromptTooLongError"):
        assert words in text


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_measured_figures_stand_in_the_rendered_page_only(page: Path) -> None:
    """No percentage or speed-up is typed by hand; code, and what a setting is, may have numbers."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
    assert re.findall(r"\d[\d.,]*\s?(?:%|×|percent\b|times (?:faster|less|as))", text) == []


def test_links_of_the_readme_lead_somewhere() -> None:
    """Files exist, and so do the headings that are linked to; the site's own pages are checked by its build."""
    page = ROOT / "README.md"
    for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_sizes_follow_from_the_shapes() -> None:
    """SmolLM2-135M, whose real cache the model tests measure: 30 layers, 3 KV heads of 64, in bfloat16."""
    assert kv_bytes({"layers": 30, "kv_heads": 3, "head_dim": 64}) == 23_040
