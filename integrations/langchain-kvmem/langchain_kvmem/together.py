"""Answers that were decoded together, until LangChain asks for each of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from contextvars import ContextVar

from langchain_core.messages import BaseMessage

from kvmem import Answer
from langchain_kvmem.convert import to_messages


class Answers:
    """Answers that were decoded together, by prompt; each is used once."""

    def __init__(self, model: object, pairs: Iterable[tuple[str, Answer]]) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._more: dict[str, list[Answer]] = {}
        for key, answer in pairs:
            self._more.setdefault(key, []).append(answer)

    def take(self, model: object, messages: Sequence[BaseMessage]) -> Answer | None:
        if model is not self._model:
            return None
        with self._lock:
            left = self._more.get(key_of(messages))
            return left.pop() if left else None


ANSWERS: ContextVar[Answers | None] = ContextVar("kvmem_answers", default=None)


def key_of(messages: Sequence[BaseMessage]) -> str:
    return json.dumps(to_messages(messages), default=repr)
