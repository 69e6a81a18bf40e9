from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from kvmem import Document, KVMem, LanguageModel
from kvmem.backends.local import LocalBackend
from kvmem.runtime.worker import turns_of
from kvmem.testing import tiny_model


def open_mem(model: LanguageModel, store: Any, **settings: Any) -> KVMem:
    """A KVMem with small chunks and short answers."""
    return KVMem(model, store, **{"max_tokens": 8, "split": {"minimum": 20, "maximum": 80}, **settings})


def gaps_while_busy(model: LanguageModel, calls: list[Callable[[], Coroutine[Any, Any, Any]]]) -> list[float]:
    """Seconds between the turns of an event loop in which `calls` wait for a model that another thread holds for half
    a second. The calls then finish."""
    taken = threading.Event()

    def hold() -> None:
        with turns_of(model).lock:
            taken.set()
            time.sleep(0.5)

    async def main() -> list[float]:
        gaps: list[float] = []
        holder = threading.Thread(target=hold)

        async def tick() -> None:
            while holder.is_alive():
                began = time.perf_counter()
                await asyncio.sleep(0.001)
                gaps.append(time.perf_counter() - began)

        holder.start()
        taken.wait()
        await asyncio.gather(tick(), *(call() for call in calls))
        return gaps

    return asyncio.run(main())


@contextmanager
def entries_index(directory: Path) -> Iterator[sqlite3.Connection]:
    """One transaction in a disk store's index, as another process would make it."""
    with closing(sqlite3.connect(directory / "v1" / "index.sqlite")) as connection, connection:
        yield connection


@contextmanager
def prompts() -> Iterator[list[str]]:
    """Every prompt that an engine runs in this process while this is open, as text."""
    seen: list[str] = []
    real = LocalBackend.answer

    def answer(self: LocalBackend, request: Any, *args: Any, **options: Any) -> Any:
        seen.append(str(self.local_model.tokenizer.decode(request.prompt.token_ids)))
        return real(self, request, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalBackend, "answer", answer)
        yield seen


FACTS = [
    (f"{a} {b}", n)
    for n, (a, b) in enumerate(
        (a, b)
        for a in ["Alder", "Brook", "Cedar", "Dover", "Elm"]
        for b in ["Mills", "Works", "Foundry", "Dairy", "Press", "Quarry", "Docks", "Yard"]
    )
]


def facts_corpus() -> list[Document]:
    """Forty documents, each about a company of its own, with the same words around the facts."""
    draw = random.Random(0)
    filler = "The yearly report was read and nothing was found that had to be told to the public."
    documents = []
    for name, n in FACTS:
        parts = [f"{filler} It was signed by clerk {draw.randrange(1000)}." for _ in range(12)]
        parts.insert(draw.randrange(12), f"{name} employs {n + 14} people and was founded in {1800 + n}.")
        documents.append(Document(name, f"# {name}\n\n" + "\n\n".join(parts)))
    return documents


def embed(texts: list[str]) -> list[list[float]]:
    """Texts as counts of hashed names: what an embedding model would see in them."""
    names = [[word.strip(".?#") for word in text.split() if word[0].isupper()] for text in texts]
    return [[0.01 + sum(hash_of(name) == i for name in found) for i in range(256)] for found in names]


def hash_of(word: str) -> int:
    return sum(ord(c) * (i + 1) for i, c in enumerate(word)) % 256


def agent_model(template: str | None = None) -> LanguageModel:
    """A tiny model whose template shows tools, calls in tags, and thoughts if `enable_thinking` is not False."""
    model = tiny_model()
    model.tokenizer.chat_template = template or AGENT_TEMPLATE
    return model


AGENT_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}{% endif %}"
)


class Says(LogitsProcessor):
    """Makes a model write a text. end: whether the answer ends behind it."""

    def __init__(self, model: LanguageModel, text: str, end: bool = True) -> None:
        self._ids = [*model.tokenize(text, markup=True), *([model.tokenizer.eos_token_id] if end else [])]
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._start = input_ids.shape[1] if self._start is None else self._start
        number = input_ids.shape[1] - self._start
        if number >= len(self._ids):
            return scores
        forced = torch.full_like(scores, float("-inf"))
        forced[..., self._ids[number]] = 0.0
        return forced


def says(model: LanguageModel, *answers: str, end: bool = True) -> LanguageModel:
    """`model`, whose next answers are these, whatever it is asked."""
    real, left = model.hf.generate, [*answers]

    def generate(**arguments: Any) -> Any:
        own = arguments.pop("logits_processor", ())
        processors = LogitsProcessorList([Says(model, left.pop(0), end), *own])
        return real(**arguments, logits_processor=processors)

    model.hf.generate = generate
    return model
