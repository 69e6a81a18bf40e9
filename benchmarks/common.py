"""Questions of the benchmarks, and peak memory."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

from kvmem.errors import InputError


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
