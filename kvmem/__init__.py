"""kvmem: answer questions over texts, and keep and reuse the KV caches of those texts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmem.cancellation import Cancellation
    from kvmem.collection import Collection
    from kvmem.engine import KVMem
    from kvmem.errors import (
        AnswerTimeoutError,
        ClosedError,
        EmptyInputError,
        InputError,
        KVMemError,
        ModelError,
        ModelNotFoundError,
        PromptTooLongError,
        RefusedError,
        RemoteError,
        StoreError,
        UnknownDocumentError,
        UnknownMemoryError,
        UnknownThreadError,
    )
    from kvmem.library.stats import DocumentStats, Stats
    from kvmem.memory import Memory, MemoryItem, Recalled
    from kvmem.model.local import LanguageModel
    from kvmem.options import AskOptions, GenerateOptions, ScopeOptions
    from kvmem.parsing.parts import CallPart, InvalidCall, TextPart, ThoughtPart, ToolCall
    from kvmem.prompt.plan import Plan
    from kvmem.results import Answer, Prefill, Source, Timings, Usage
    from kvmem.runtime.stream import AnswerStream
    from kvmem.settings import BlendSettings, ModelSettings, RemoteSettings, Settings, SplitSettings, StoreSettings
    from kvmem.text.document import Chunk, Document
    from kvmem.text.retrieval import BM25Retriever, HybridRetriever, Retriever

# Public names by module. They are loaded on first use, so that `import kvmem` loads neither torch nor transformers.
_HOME = {
    "kvmem.cancellation": ("Cancellation",),
    "kvmem.collection": ("Collection",),
    "kvmem.engine": ("KVMem",),
    "kvmem.errors": (
        "AnswerTimeoutError",
        "ClosedError",
        "EmptyInputError",
        "InputError",
        "KVMemError",
        "ModelError",
        "ModelNotFoundError",
        "PromptTooLongError",
        "RefusedError",
        "RemoteError",
        "StoreError",
        "UnknownDocumentError",
        "UnknownMemoryError",
        "UnknownThreadError",
    ),
    "kvmem.library.stats": ("DocumentStats", "Stats"),
    "kvmem.memory": ("Memory", "MemoryItem", "Recalled"),
    "kvmem.model.local": ("LanguageModel",),
    "kvmem.options": ("AskOptions", "GenerateOptions", "ScopeOptions"),
    "kvmem.prompt.plan": ("Plan",),
    "kvmem.parsing.parts": ("CallPart", "InvalidCall", "TextPart", "ThoughtPart", "ToolCall"),
    "kvmem.results": ("Answer", "Prefill", "Source", "Timings", "Usage"),
    "kvmem.runtime.stream": ("AnswerStream",),
    "kvmem.settings": (
        "BlendSettings",
        "ModelSettings",
        "RemoteSettings",
        "Settings",
        "SplitSettings",
        "StoreSettings",
    ),
    "kvmem.text.document": ("Chunk", "Document"),
    "kvmem.text.retrieval": ("BM25Retriever", "HybridRetriever", "Retriever"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "AnswerStream",
    "AnswerTimeoutError",
    "AskOptions",
    "BM25Retriever",
    "BlendSettings",
    "CallPart",
    "Cancellation",
    "Chunk",
    "ClosedError",
    "Collection",
    "Document",
    "DocumentStats",
    "EmptyInputError",
    "GenerateOptions",
    "HybridRetriever",
    "InputError",
    "InvalidCall",
    "KVMem",
    "KVMemError",
    "LanguageModel",
    "Memory",
    "MemoryItem",
    "ModelError",
    "ModelNotFoundError",
    "ModelSettings",
    "Plan",
    "Prefill",
    "PromptTooLongError",
    "Recalled",
    "RefusedError",
    "RemoteError",
    "RemoteSettings",
    "Retriever",
    "ScopeOptions",
    "Settings",
    "Source",
    "SplitSettings",
    "Stats",
    "StoreError",
    "StoreSettings",
    "TextPart",
    "ThoughtPart",
    "Timings",
    "ToolCall",
    "UnknownDocumentError",
    "UnknownMemoryError",
    "UnknownThreadError",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kvmem' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
