"""A vLLM server as the backend, a drop-in replacement for a local model."""

from __future__ import annotations

from kvmem.vllm.backend import VLLMBackend
from kvmem.vllm.model import VLLMModel

__all__ = ["VLLMBackend", "VLLMModel"]
