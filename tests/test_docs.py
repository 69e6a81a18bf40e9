"""Every snippet of the README and every example runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    line.removeprefix("$ ").split("#")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.py") if p.name != "demo.py")

PAGES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md") if "```python" in p.read_text())

pytestmark = pytest.mark.model


def run(command: list[str], directory: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_readme_python_runs(code: str, shared: Path) -> None:
    """Pasted into a file, it runs without an error, in the directory that the blocks before it have used."""
    run([sys.executable, "-c", code], shared)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_the_docs_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    """Its blocks, one after the other in one program, as a reader would paste them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run([sys.executable, "-c", "\n".join(blocks)], tmp_path)


def test_readme_commands_run(tmp_path: Path) -> None:
    """The kvmem commands run one after the other, as a reader would type them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    output = [run(shlex.split(line), tmp_path) for line in COMMANDS if line.startswith("kvmem ")]
    assert len(output) == 7
    assert "prompt tokens" in output[1]


def test_the_readme_names_make_targets_that_exist() -> None:
    """`make demo` and `make test` are in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path) -> None:
    """Each example runs to its end and prints something."""
    assert run([sys.executable, str(ROOT / "examples" / name)], tmp_path).strip()
