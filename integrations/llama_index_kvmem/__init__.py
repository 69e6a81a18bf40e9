"""LlamaIndex components over kvmem."""

from llama_index_kvmem.convert import to_nodes
from llama_index_kvmem.llm import KVMemLLM
from llama_index_kvmem.query_engine import KVMemQueryEngine

__all__ = ["KVMemLLM", "KVMemQueryEngine", "to_nodes"]
