"""The three distributions, built as wheels and installed outside the clone."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT, ROOT / "integrations/langchain-kvmem", ROOT / "integrations/llama-index-kvmem")
NAMES = ("kvmem", "langchain-kvmem", "llama-index-kvmem")

PROGRAM = """
from importlib.metadata import requires
import sys
from langchain_core.documents import Document
from langchain_kvmem import CachedContextChain, ChatKVMem, KVMemMiddleware, KVMemStore
from llama_index.core import Document as Page
from llama_index.llms.kvmem import KVMemLLM
from llama_index.memory.kvmem import KVMemMemoryBlock
from llama_index_kvmem import KVMemQueryEngine
import kvmem, langchain_kvmem, llama_index_kvmem
from kvmem.testing import tiny_model

for module in (kvmem, langchain_kvmem, llama_index_kvmem):
    assert module.__file__.startswith(sys.prefix), module.__file__
for name in ("langchain-kvmem", "llama-index-kvmem"):
    assert any(line.startswith("kvmem") for line in requires(name)), requires(name)
with kvmem.KVMem(tiny_model(), "kv", max_tokens=3) as mem:
    chain = CachedContextChain.from_documents([Document("The tenant pays.")], mem)
    assert chain.invoke({"input": "Who pays?"})["context"]
    assert ChatKVMem(mem=mem).invoke("Who pays?").usage_metadata["input_tokens"]
    engine = KVMemQueryEngine.from_documents([Page(text="The tenant pays.")], KVMemLLM(mem=mem))
    assert engine.query("Who pays?").source_nodes
print("ok")
"""


def run(*command: str | Path, directory: Path) -> str:
    result = subprocess.run([str(part) for part in command], cwd=directory, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the three wheels."""
    directory = tmp_path_factory.mktemp("wheels")
    for source in SOURCES:
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory, directory=source)
    return directory


def test_each_wheel_holds_its_package_and_nothing_else(wheels: Path) -> None:
    """No tests, benchmarks or code of another distribution."""
    expected = [{"kvmem"}, {"langchain_kvmem"}, {"llama_index", "llama_index_kvmem"}]
    for name, packages in zip(NAMES, expected, strict=True):
        (wheel,) = wheels.glob(f"{name.replace('-', '_')}-*.whl")
        held = zipfile.ZipFile(wheel).namelist()
        assert {path.split("/")[0] for path in held if ".dist-info/" not in path} == packages
        assert any(path.endswith("py.typed") for path in held)
        assert any(path.endswith("licenses/LICENSE") for path in held)


def test_the_wheels_install_and_answer_outside_the_clone(wheels: Path, tmp_path: Path) -> None:
    """A fresh environment that sees only the dependencies of this one."""
    run(sys.executable, "-m", "venv", tmp_path / "env", directory=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--find-links",
        wheels,
        *NAMES,
        directory=tmp_path,
    )
    # A path in a .pth file is added without reading the .pth files there, which name the clone.
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")})
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert run(python, "-I", "-c", PROGRAM, directory=tmp_path).strip().endswith("ok")
    assert "Usage" in run(tmp_path / "env" / "bin" / "kvmem", "--help", directory=tmp_path)
