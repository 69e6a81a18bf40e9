"""KVMemLLM under LlamaIndex's own import path for LLMs."""

from llama_index_kvmem.llm import KVMemLLM

__all__ = ["KVMemLLM"]
