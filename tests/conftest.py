from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from kvmem import KVMem, LanguageModel
from kvmem.testing import tiny_model


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    """A tiny random Llama in float32."""
    return tiny_model()


@pytest.fixture
def mem(model: LanguageModel, tmp_path: Path) -> Iterator[KVMem]:
    """An empty KVMem over a store on disk, with small chunks and short answers."""
    with open_mem(model, tmp_path / "kv") as opened:
        yield opened


def open_mem(model: LanguageModel, store: object, **settings: object) -> KVMem:
    options = {"max_tokens": 8, "split": {"minimum": 20, "maximum": 80}} | settings
    return KVMem(model, store, **options)  # type: ignore[arg-type]
