"""LlamaIndex components over kvmem."""

from llama_index_kvmem.chat_engine import KVMemChatEngine
from llama_index_kvmem.convert import to_nodes
from llama_index_kvmem.ingest import KVMemTransform
from llama_index_kvmem.llm import KVMemLLM
from llama_index_kvmem.memory import KVMemMemoryBlock
from llama_index_kvmem.query_engine import KVMemQueryEngine

__all__ = ["KVMemChatEngine", "KVMemLLM", "KVMemMemoryBlock", "KVMemQueryEngine", "KVMemTransform", "to_nodes"]
