"""A vLLM server as the backend, a drop-in replacement for a local model."""

from __future__ import annotations

from kvmem.backends.vllm.backend import VLLMBackend
from kvmem.backends.vllm.model import VLLMModel

__all__ = ["VLLMBackend", "VLLMModel"]
