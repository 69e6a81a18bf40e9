"""Shared code of the benchmarks: questions, machine information, statistics, JSON."""

from __future__ import annotations

import json
import platform
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from kvmem.answer import Prefill
from kvmem.errors import InputError
from kvmem.model import LanguageModel
from kvmem.settings import BlendSettings


@dataclass(frozen=True)
class Question:
    """A question with its passages, in the order of the file."""

    question: str
    passages: tuple[str, ...]
    answers: tuple[str, ...]


def load_questions(path: Path) -> list[Question]:
    """Load questions in MuSiQue's format: `[{"ctxs": [{"title", "text"}], "question", "answers"}]`.

    Raises InputError.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        questions = []
        for row in rows:
            passages = [f"{c.get('title', '')}\n{c['text']}".strip() for c in row["ctxs"]]
            questions.append(Question(row["question"], tuple(passages), tuple(row.get("answers", ()))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f'{path} does not hold questions: {error!r}. Give JSON such as [{{"ctxs": [{{"title": "", "text": "…"}}], '
            '"question": "…", "answers": ["…"]}].'
        ) from error
    return questions


def describe(model: LanguageModel, **settings: Any) -> dict[str, Any]:
    """The provenance of a result: model, machine, versions and settings."""
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
        "default_recompute": BlendSettings().share,
        "settings": settings,
    }


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


class PeakMemory:
    """Context manager that watches this process's private memory, without file pages. Linux only.

    taken: peak growth in bytes; None if it cannot be read.
    """

    def __init__(self) -> None:
        self.taken: int | None = None
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._before = _private_bytes()
        self._peak = self._before
        if self._before is not None:
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._before is not None and self._peak is not None:
            self._watcher.join()
            self.taken = self._peak - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak or 0, _private_bytes() or 0)


def _private_bytes() -> int | None:
    try:
        _, _, rest = Path("/proc/self/status").read_text().partition("RssAnon:")
    except OSError:
        return None
    return int(rest.split()[0]) * 1024 if rest else None


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
