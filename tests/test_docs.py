"""Every snippet of the README and every example runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from kvmem.cli.main import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    line.removeprefix("$ ").split("#")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.py") if p.name != "demo.py")

WRITTEN = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "integrations").glob("*/README.md")]
PAGES = sorted(str(p.relative_to(ROOT)) for p in WRITTEN if "```python" in p.read_text())

pytestmark = pytest.mark.model


ARGUMENTS = {"retrieval_miss.py": ["--limit", "1"]}

# Imports everything once; every program then runs in a fork of its own, before which nothing was computed.
_HOST = """
import json, os, runpy, sys, traceback
import torch, transformers, kvmem.engine, langchain_kvmem, llama_index_kvmem
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdin.close()
            with open(job["output"], "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.chdir(job["directory"])
                sys.argv = [job["file"], *job["arguments"]]
                runpy.run_path(job["file"], run_name="__main__")
                code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Host:
    """Runs programs one after the other, each in a process of its own."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._count = scratch, 0
        command = [sys.executable, "-c", _HOST]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, file: Path, directory: Path, arguments: Sequence[str] = ()) -> str:
        """What the program prints; its failure is a failure."""
        self._count += 1
        output = self._scratch / f"{self._count}.txt"
        job = {"file": str(file), "directory": str(directory), "arguments": list(arguments), "output": str(output)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code = self._process.stdout.readline().strip()
        assert code == "0", output.read_text()
        return output.read_text()

    def run_code(self, code: str, directory: Path) -> str:
        file = self._scratch / f"code{self._count}.py"
        file.write_text(code)
        return self.run(file, directory)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    started = Host(tmp_path_factory.mktemp("host"))
    yield started
    started.close()


def run(command: list[str], directory: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_program_that_fails_is_a_failure(host: Host, tmp_path: Path) -> None:
    """An exception, an exit code and a failed assertion are told; what one program leaves, the next does not see."""
    for code in ("raise ValueError('broken')", "import sys; sys.exit('broken')", "assert False, 'broken'"):
        with pytest.raises(AssertionError):
            host.run_code(code, tmp_path)
    assert host.run_code("import sys, os; sys.left = 1; print(os.getcwd())", tmp_path).strip() == str(tmp_path)
    assert host.run_code("import sys; print(hasattr(sys, 'left'))", tmp_path).strip() == "False"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_readme_python_runs(code: str, host: Host, shared: Path) -> None:
    """Pasted into a file, it runs without an error, in the directory that the blocks before it have used."""
    host.run_code(code, shared)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_the_docs_runs_from_top_to_bottom(page: str, host: Host, tmp_path: Path) -> None:
    """Its blocks, one after the other in one program, as a reader would paste them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    host.run_code("\n".join(blocks), tmp_path)


def test_readme_commands_run(tmp_path: Path) -> None:
    """The kvmem commands run one after the other, as a reader would type them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    output = [run(shlex.split(line), tmp_path) for line in COMMANDS if line.startswith("kvmem ")]
    assert len(output) == 8
    assert "prompt tokens" in output[1]


PAGES_WITH_COMMANDS = sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md") if re.search(r"^\$ kvmem ", p.read_text(), re.M)
)


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_commands_of_the_docs_are_understood(page: str) -> None:
    """Names and options exist; the README's, which are the same commands, are run, and others by their own tests."""
    others = {"serve", "export", "import"}
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    for line in re.findall(r"^\$ kvmem (.*)$", (ROOT / page).read_text(), re.M):
        name, *arguments = shlex.split(line)
        assert name in {*others, *(command.split()[1] for command in COMMANDS if command.startswith("kvmem "))}
        group.commands[name].make_context(name, arguments)


def test_the_readme_names_make_targets_that_exist() -> None:
    """`make demo` and `make test` are in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, host: Host, tmp_path: Path) -> None:
    """Each example runs to its end and prints something."""
    assert host.run(ROOT / "examples" / name, tmp_path, ARGUMENTS.get(name, ())).strip()
