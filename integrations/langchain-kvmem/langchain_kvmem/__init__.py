"""LangChain and LangGraph components over kvmem."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from langchain_kvmem.chain import CachedContextChain
from langchain_kvmem.chat_model import ChatKVMem
from langchain_kvmem.convert import to_documents
from langchain_kvmem.retriever import KVMemRetriever

if TYPE_CHECKING:
    from langchain_kvmem.middleware import KVMemMiddleware
    from langchain_kvmem.store import KVMemStore

# These need langgraph and langchain, which chains do not.
_HOME = {"KVMemMiddleware": "langchain_kvmem.middleware", "KVMemStore": "langchain_kvmem.store"}

__all__ = [
    "CachedContextChain",
    "ChatKVMem",
    "KVMemMiddleware",
    "KVMemRetriever",
    "KVMemStore",
    "to_documents",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'langchain_kvmem' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ImportError as error:
        raise ImportError(
            f"{name} needs langgraph and langchain: pip install 'langchain-kvmem[agents]'. ({error})"
        ) from error
