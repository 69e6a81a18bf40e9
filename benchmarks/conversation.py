"""An agent conversation whose memories and documents change every turn.

Each prompt consists of the system message, the user's profile, recalled memories, retrieved documents, the history and
the new message. The baseline is full prefill of the same prompt.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from transformers import DynamicCache

from benchmarks.common import Question
from kvmem.engine import KVMem
from kvmem.measure import describe, track
from kvmem.memory import Memory
from kvmem.model.local import LanguageModel
from kvmem.results import Answer

_PROFILE = "The user is Anna, a baker in Port Ellery, who travels by night train, drinks tea, and likes short answers."
_FACTS = (
    "Anna's sister Ida lives on the island and keeps three goats.",
    "Anna opens her bakery at five and closes it at noon, except on Sundays.",
    "Anna is allergic to walnuts and asks about them everywhere.",
    "Anna has a dog named Pickle who is afraid of ferries.",
    "Anna pays for everything in cash and keeps every receipt.",
    "Anna wants to visit every harbour of the north coast before winter.",
)
_WORDS = ("And what of that", "Tell me more about it", "Why is that so", "Say it in other words", "Who else knows that")


def run(
    model: LanguageModel, questions: Sequence[Question], *, turns: int = 20, seed: int = 0, tokens: int = 24
) -> dict[str, Any]:
    """Run the conversation once. After each turn, its prompt is also prefilled in full, for comparison.

    The script, documents and memories are sampled with `seed`. Each turn uses two random passages and two memories.
    The engine is closed and reopened halfway.
    """
    draw = random.Random(seed)
    passages = sorted((text for question in questions[:10] for text in question.passages), key=len)[20:28]
    rows: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []
    with TemporaryDirectory() as scratch:
        store = Path(scratch) / "kv"
        mem = KVMem(model, store, max_tokens=tokens)
        memory = Memory(mem)
        memory.remember(_PROFILE, id="profile", pinned=True)
        for fact in _FACTS:
            memory.remember(fact)
        mem.read(passages)
        try:
            for turn in track(range(turns), "turns"):
                if turn == turns // 2:
                    mem.close()
                    mem = KVMem(model, store, max_tokens=tokens)
                    memory = Memory(mem)
                about = draw.choice(_FACTS)
                context = [*memory.context(about, 2), *draw.sample(passages, 2)]
                messages.append({"role": "user", "content": f"{draw.choice(_WORDS)}? It is question {turn}. {about}"})
                answer = mem.chat(messages, context=context, thread="bench")
                ids = mem.build_prompt(messages, context=context).prompt.token_ids
                rows.append({"turn": turn + 1, **_row(answer, model, _read_anew(model, ids))})
                messages.append({"role": "assistant", "content": answer.text})
        finally:
            mem.close()
    return {
        "benchmark": "conversation",
        **describe(model, turns=turns, seed=seed, tokens=tokens),
        "restart_before_turn": turns // 2 + 1,
        "rows": rows,
    }


def _row(answer: Answer, model: LanguageModel, full: float) -> dict[str, Any]:
    """One turn; full: seconds that full prefill of its prompt takes."""
    return {
        "prompt_tokens": answer.usage.prompt,
        "usage": vars(answer.usage),
        "work": answer.usage.token_layers / model.depth,
        "first_token": answer.timings.first_token,
        "full": full,
        "ratio": answer.timings.first_token / full,
        "dropped": answer.plan.dropped,
    }


def _read_anew(model: LanguageModel, ids: Sequence[int]) -> float:
    """Seconds for full prefill of the prompt by plain transformers; the better of two runs."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        with torch.no_grad():
            cache = DynamicCache(config=model.hf.config.get_text_config())
            prompt = torch.tensor([list(ids)], device=model.device)
            model.hf(prompt, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax().item()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot tokens computed and time to the first token, by turn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    turns = [row["turn"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(turns, [row["prompt_tokens"] for row in rows], label="prompt (computed by full prefill)", color="#888888")
    left.plot(
        turns, [row["work"] for row in rows], label="computed by kvmem", color="#c2410c", marker="o", markersize=3
    )
    left.set(xlabel="turn", ylabel="tokens", ylim=(0, None))
    right.plot(turns, [row["ratio"] for row in rows], color="#c2410c", marker="o", markersize=3)
    right.set(xlabel="turn", ylabel="first token ÷ full prefill", ylim=(0, None))
    for axis in (left, right):
        axis.axvline(result["restart_before_turn"] - 0.5, color="#cccccc", linestyle="--", zorder=0)
        axis.grid(alpha=0.2)
    left.legend(frameon=False)
    figure.suptitle(f"{result['model']}: memories and documents change every turn (dashed: restart)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(result: dict[str, Any]) -> Table:
    """All turns as a terminal table."""
    shown = Table("turn", "prompt", "computed", "first token", "÷ full prefill", title=result["model"])
    for row in result["rows"]:
        shown.add_row(
            str(row["turn"]),
            str(row["prompt_tokens"]),
            f"{row['work']:.0f}",
            f"{row['first_token']:.2f} s",
            f"{row['ratio']:.2f}",
        )
    return shown
