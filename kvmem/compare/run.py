"""Runs a comparison: asks every question with every method, using one model.

Methods:
- `rag` retrieves the k best chunks and prefills them with the question.
- `full` prefills the whole prompt that kvmem used (all documents, if they fit).
- `warm` is kvmem in the process that has read the documents.
- `restart` is kvmem reopened for every question, with only the store on disk.
- `cached` is kvmem on the chunks that `rag` retrieves.
- `cold` is kvmem's first question, including the time to read all documents.

`rag` and `full` use `model.generate` with transformers' own cache.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from kvmem.compare.full import generate_fully, logits_along
from kvmem.compare.questions import Question
from kvmem.compare.questions import generate as make_questions
from kvmem.compare.score import contains, f1, missing
from kvmem.compare.summary import break_even, summarise
from kvmem.engine import KVMem
from kvmem.errors import InputError, PromptTooLongError
from kvmem.library.request import Request
from kvmem.measure import agreement, along, describe, track
from kvmem.model.local import LanguageModel
from kvmem.results import Answer, Prefill, Source

T = TypeVar("T")
WAYS = {
    "rag": "RAG, top {k}",
    "full": "Full prefill",
    "warm": "kvmem, warm",
    "restart": "kvmem, after a restart",
    "cached": "kvmem, RAG's chunks",
}
_FIRST = "What are these texts about?"
_NOTHING = "(Nothing was found.)"


def run(
    model: LanguageModel,
    documents: Sequence[Any],
    questions: Sequence[Question] | None = None,
    *,
    k: int = 4,
    count: int = 12,
    max_tokens: int = 32,
    seed: int = 0,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Compare all methods on `documents` (as `KVMem.add_all` takes them) and `questions`.

    All times are in seconds, from the call.

    Args:
        model: The model that answers.
        documents: What to answer from.
        questions: What to ask; None lets the model write `count` questions.
        k: Number of chunks that RAG retrieves.
        count: Number of questions to generate.
        max_tokens: Maximum answer length in tokens.
        seed: Seed for the order of the methods and for the chunks of generated questions.
        scratch: Directory for a temporary store; None uses the system's temporary directory.

    Returns:
        The result, as a JSON-compatible dictionary.

    Raises:
        InputError, EmptyInputError: The input cannot be used; raised before anything is measured.
    """
    if questions is not None and not questions:
        raise InputError("There are no questions. Give some, or None to let the model write them.")
    with TemporaryDirectory(dir=scratch) as directory:
        store = Path(directory)
        generate_fully(model, torch.arange(16), 2)
        with (
            KVMem(model, store, max_tokens=max_tokens) as mem,
            KVMem(model, store, max_tokens=max_tokens) as side,
            KVMem(model, store, max_tokens=max_tokens) as judge,
        ):
            read, reading = _timed(lambda: mem.add_all(documents))
            first = mem.ask(_FIRST).timings
            _, indexing = _timed(lambda: mem.retrieve(_FIRST, k))
            asked = make_questions(model, read, count, seed) if questions is None else list(questions)
            case = _Case(mem, side, judge, store, k, max_tokens)
            case.check(asked)
            # Warm-up: the first forward pass of this size is slower than later ones.
            generate_fully(model, torch.tensor(case.request(asked[0].text).prompt.token_ids), 2)
            rows = [case.ask(question, seed + n) for n, question in enumerate(track(asked, "compare"))]
            kept = mem.stats()
    return {
        "benchmark": "compare",
        **describe(model, k=k, max_tokens=max_tokens, seed=seed, questions=len(asked)),
        "generated": questions is None,
        "documents": len(read),
        "chunks": kept.chunks,
        "tokens": kept.tokens,
        "window": model.window,
        "fits": all(row["plan"]["mode"] == "whole" for row in rows),
        "not_blendable": None if model.blendable else model.anatomy.reason,
        "reading": reading,
        "indexing": indexing,
        "cold": {"first_token": reading + first.first_token, "total": reading + first.total},
        "disk_bytes": kept.store.bytes,
        "bytes_per_token": model.bytes_per_token,
        "ways": {name: label.format(k=k) for name, label in WAYS.items()},
        **_conclusion(rows, reading, seed),
        "rows": rows,
    }


@dataclass(frozen=True)
class _Case:
    """The engines and settings of a run.

    mem has read the documents, side answers from retrieved chunks, and judge is never timed. Each has its own buffer.
    """

    mem: KVMem
    side: KVMem
    judge: KVMem
    store: Path
    k: int
    max_tokens: int

    def check(self, questions: Sequence[Question]) -> None:
        """Raise InputError for a question that some method cannot answer."""
        for number, question in enumerate(questions, 1):
            try:
                self.request(question.text)
                chunks = self.mem.retrieve(question.text, self.k)
                plan = self.mem.plan(question.text, context=chunks or [_NOTHING])
            except (InputError, PromptTooLongError) as error:
                raise InputError(f"Question {number}, {question.text[:60]!r}: {error}") from error
            if plan.mode != "whole":
                raise InputError(
                    f"The {self.k} chunks that RAG retrieves for question {number}, {question.text[:60]!r}, do not "
                    f"fit the model's window of {self.mem.local_model.window} tokens. Give a smaller -k."
                )

    def request(self, question: str, context: Sequence[Any] | None = None) -> Request:
        """The planned prompt of a question."""
        return self.mem.build_prompt(question, context=context, max_tokens=self.max_tokens)

    def ask(self, question: Question, seed: int) -> dict[str, Any]:
        """Ask a question with every method, in random order."""
        text, order = question.text, list(WAYS)
        random.Random(seed).shuffle(order)
        measured = {name: getattr(self, f"_{name}")(text) for name in order}
        rag, full = measured["rag"], measured["full"]
        whole = self.judge.prefill(text)
        measured["warm"] |= self._agree(full, whole)
        measured["cached"] |= self._agree(rag, self.judge.prefill(text, context=self._chunks(text)))
        corpus = [chunk for document in self.mem.list() for chunk in document.chunks]
        return {
            "question": text,
            "answers": list(question.answers),
            "plan": {"mode": whole.plan.mode, "reason": whole.plan.reason},
            "ways": {name: _row(measured[name], question, full["text"], corpus) for name in WAYS},
        }

    def _chunks(self, question: str) -> Sequence[Source | str]:
        return self.mem.retrieve(question, self.k) or (_NOTHING,)

    def _rag(self, question: str) -> dict[str, Any]:
        began = time.perf_counter()
        return self._read(began, question, self._chunks(question))

    def _full(self, question: str) -> dict[str, Any]:
        return self._read(time.perf_counter(), question, None)

    def _read(self, began: float, question: str, context: Sequence[Any] | None) -> dict[str, Any]:
        request = self.request(question, context)
        ids = torch.tensor(request.prompt.token_ids)
        prepared = time.perf_counter() - began
        found = generate_fully(self.mem.local_model, ids, self.max_tokens)
        return found | {
            "first_token": prepared + found["first_token"],
            "total": prepared + found["total"],
            "ids": ids,
            "prompt": len(ids),
            "computed": len(ids),
            "texts": _texts(request.sources),
        }

    def _warm(self, question: str) -> dict[str, Any]:
        return _of(self.mem.ask(question), self.mem.local_model.depth)

    def _restart(self, question: str) -> dict[str, Any]:
        began = time.perf_counter()
        with KVMem(self.mem.local_model, self.store, max_tokens=self.max_tokens) as mem:
            opened = time.perf_counter() - began
            return _of(mem.ask(question), mem.local_model.depth, opened)

    def _cached(self, question: str) -> dict[str, Any]:
        began = time.perf_counter()
        chunks = self._chunks(question)
        retrieved = time.perf_counter() - began
        return _of(self.side.ask(question, context=chunks), self.side.local_model.depth, retrieved)

    def _agree(self, read: dict[str, Any], state: Prefill) -> dict[str, float]:
        """Compare `state` with full prefill of the same prompt, along full prefill's answer."""
        answer, truth = read["token_ids"], read["log_probs"]
        if state.token_ids.tolist() != read["ids"].tolist():
            # Retrieved chunks may be in a different order; prefill the prompt in this order instead.
            truth = logits_along(self.mem.local_model, state.token_ids, answer)
        return agreement(truth, along(self.mem.local_model, state, answer))


def _conclusion(rows: list[dict[str, Any]], reading: float, seed: int) -> dict[str, Any]:
    return {
        "summary": {name: summarise(rows, name) for name in WAYS},
        "break_even": {way: break_even(rows, way, "warm", reading, seed) for way in ("full", "rag")},
    }


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def _texts(sources: Sequence[Source]) -> list[str]:
    return [source.text for source in sources if source.text != _NOTHING]


def _of(answer: Answer, depth: int, before: float = 0.0) -> dict[str, Any]:
    """The measurements of an answer. before: seconds that passed before the engine was called."""
    return {
        "text": answer.text,
        "first_token": before + answer.timings.first_token,
        "total": before + answer.timings.total,
        "generated": answer.usage.generated,
        "prompt": answer.usage.prompt,
        "computed": round(answer.usage.token_layers / depth),
        "usage": vars(answer.usage),
        "texts": _texts(answer.sources),
    }


def _row(found: dict[str, Any], question: Question, reference: str, corpus: Sequence[str]) -> dict[str, Any]:
    """The reported fields of one answer. `missing` is None if it is unknown what the prompt should contain."""
    kept = ("text", "first_token", "total", "generated", "prompt", "computed")
    right = question.answers
    return {key: found[key] for key in kept} | {
        "chunks": len(found["texts"]),
        "usage": found.get("usage"),
        "kl": found.get("kl"),
        "top1": found.get("top1"),
        "f1": f1(found["text"], right) if right else None,
        "contains": contains(found["text"], right) if right else None,
        "agrees": f1(found["text"], [reference]),
        "missing": missing(question, found["texts"], corpus),
    }
