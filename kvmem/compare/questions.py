"""The questions of a comparison: loaded from a file, or generated from the documents."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmem.engine import KVMem
from kvmem.errors import InputError
from kvmem.model.local import LanguageModel
from kvmem.text.document import Document

_ASKING = "You write quiz questions. Reply with one short question that the text answers, and nothing else."
_TASK = "Which question does the text answer?"


@dataclass(frozen=True)
class Question:
    """A question.

    answers: accepted answers, any of which is correct; empty if unknown.
    evidence: texts that must all be in the prompt to answer the question; empty if unknown.
    """

    text: str
    answers: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()


def load(path: Path) -> list[Question]:
    """Load questions: one per line, or JSON (Lines) objects `{"question", "answers": [...], "evidence": [...]}`.

    In JSON, a plain string is a question without answers. Raises InputError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The questions cannot be read: {error}. Give a text, .json or .jsonl file.") from error
    try:
        if path.suffix.lower() == ".json":
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise TypeError("it is not a list")
        elif path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = [line.strip() for line in text.splitlines() if line.strip()]
        questions = [_parse(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path} does not hold questions: {error!r}. Give one per line, or JSON such as [{{"question": "…", '
            '"answers": ["…"]}].'
        ) from error
    if not questions:
        raise InputError(f"{path} contains no questions. Give one per line, or omit the file to generate questions.")
    return questions


def _parse(row: Any) -> Question:
    if isinstance(row, str):
        row = {"question": row}
    if not isinstance(row, Mapping) or not isinstance(row["question"], str) or not row["question"].strip():
        raise TypeError(f"{row!r} is not a question")
    return Question(row["question"].strip(), _texts(row, "answers"), _texts(row, "evidence"))


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = row.get(name) or ()
    values = (values,) if isinstance(values, str) else values
    if not isinstance(values, Iterable) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} of {row['question']!r} is not a list of texts")
    return tuple(value for value in values if value.strip())


def generate(model: LanguageModel, documents: Sequence[Document], count: int, seed: int) -> list[Question]:
    """Let the model write up to `count` questions about chunks of the documents, sampled with `seed`.

    Each question has its chunk as evidence and no answers. Raises InputError if the model writes no question.
    """
    chunks = [chunk for document in documents for chunk in document.chunks]
    random.Random(seed).shuffle(chunks)
    questions: dict[str, Question] = {}
    with KVMem(model) as mem:
        for chunk in chunks[: 3 * count]:
            if len(questions) == count:
                break
            answer = mem.ask(_TASK, context=[chunk], system=_ASKING, max_tokens=40)
            if asked := _first_question(answer.text):
                questions.setdefault(asked, Question(asked, (), (chunk,)))
    if not questions:
        raise InputError("The model wrote no questions about these documents. Give your own with --questions.")
    return list(questions.values())


def _first_question(text: str) -> str:
    """The line with the first question mark, up to that mark; empty if it is too short."""
    found = re.match(r"[^?？]*[?？]", text.strip())
    line = found[0].splitlines()[-1].strip() if found else ""
    return line if len(line) > 8 else ""
