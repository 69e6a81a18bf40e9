"""Provenance, agreement with full prefill, and statistics of measurements; for `kvmem compare` and the benchmarks."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from kvmem.model.local import LanguageModel
from kvmem.results import Prefill
from kvmem.settings import BlendSettings


def describe(model: LanguageModel, **settings: Any) -> dict[str, Any]:
    """The provenance of a result: model, machine, versions, commit and settings."""
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "machine": {
            "cpu": _cpu(),
            "bfloat16": _bfloat16(),
            "cores": torch.multiprocessing.cpu_count(),
            "system": platform.system(),
        },
        "versions": {name: version(name) for name in ("kvmem", "torch", "transformers")},
        "python": platform.python_version(),
        "commit": _commit(),
        "default_recompute": BlendSettings().share,
        "settings": settings,
    }


def _commit() -> str | None:
    """The commit of the clone that this code runs from; None outside of a clone, or without git."""
    clone = Path(__file__).parents[1]
    git = shutil.which("git")
    if git is None or not (clone / ".git").exists():
        return None
    command = [git, "-C", str(clone), "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return found.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _bfloat16() -> str:
    """The CPU's instruction set for bfloat16 matrix products."""
    found = {"AMX": "_is_amx_tile_supported", "AVX-512": "_is_avx512_bf16_supported"}
    checks = ((name, getattr(torch.cpu, check, None)) for name, check in found.items())
    return next((name for name, check in checks if check is not None and check()), "none")


class Clock(BaseStreamer):
    """A streamer for transformers' `generate` that records when the prompt and each answer token arrive."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: Any) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def along(model: LanguageModel, state: Prefill, answer: Sequence[int]) -> Tensor:
    """Log-probabilities along `answer`, float32 [answer, vocab]. Modifies the state's cache."""
    rows = [state.logits[None].to(model.device)]
    if len(answer) > 1:
        ids = torch.tensor([answer[:-1]], device=model.device)
        rows.append(model.hf(ids, past_key_values=state.cache, use_cache=True).logits[0].float())
    return torch.cat(rows).log_softmax(-1)


def agreement(truth: Tensor, found: Tensor) -> dict[str, float]:
    """Compare log-probabilities `found` with `truth`, both [answer, vocab].

    kl: mean KL divergence in nats. top1: share of tokens with the same top choice. first: the same for the first
    token only.
    """
    divergence = (truth.exp() * (truth - found)).sum(-1)
    same = truth.argmax(-1) == found.argmax(-1)
    return {"kl": float(divergence.mean()), "top1": float(same.float().mean()), "first": float(same[0])}


def bootstrap(
    values: Sequence[float], statistic: Callable[[np.ndarray[Any, Any]], float], seed: int, rounds: int = 10_000
) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of `statistic` over examples (Efron, 1979)."""
    array = np.asarray(values)
    draws = np.random.default_rng(seed).integers(0, len(array), (rounds, len(array)))
    found = [statistic(array[draw]) for draw in draws]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def track(items: Sequence[Any], description: str) -> Iterable[Any]:
    """`items` with a progress bar on stderr."""
    from rich.console import Console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        yield from progress.track(items, description=description)


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
