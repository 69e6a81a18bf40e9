from __future__ import annotations

from typing import Any

from kvmem import KVMem, LanguageModel


def open_mem(model: LanguageModel, store: Any, **settings: Any) -> KVMem:
    """A KVMem with small chunks and short answers."""
    return KVMem(model, store, **{"max_tokens": 8, "split": {"minimum": 20, "maximum": 80}, **settings})
