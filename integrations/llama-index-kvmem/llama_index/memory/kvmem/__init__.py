"""KVMemMemoryBlock under LlamaIndex's own import path for memory."""

from llama_index_kvmem.memory import KVMemMemoryBlock

__all__ = ["KVMemMemoryBlock"]
