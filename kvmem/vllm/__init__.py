"""A vLLM server in place of a model in this process."""

from __future__ import annotations

from kvmem.vllm.backend import VLLMBackend
from kvmem.vllm.model import VLLMModel

__all__ = ["VLLMBackend", "VLLMModel"]
