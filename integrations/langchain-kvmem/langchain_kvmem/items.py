"""Items of KVMemStore as records, and what is searched of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from cachetools import LRUCache
from langgraph.store.base import MatchCondition, PutOp, Result, SearchOp, get_text_at_path, tokenize_path

from kvmem.store.records import Record
from kvmem.text.retrieval import as_unit_vectors

_KEPT_VECTORS = 100_000
Row = Mapping[str, Any]
Place = tuple[tuple[str, ...], str]


@dataclass(frozen=True)
class Found:
    """An item. row: its record."""

    namespace: tuple[str, ...]
    key: str
    row: Row

    @property
    def texts(self) -> list[str]:
        """What is searched of it; empty if it is not indexed."""
        texts = self.row.get("texts")
        return list(texts) if texts is not None else [self.row["text"]] if self.row["text"] else []


@dataclass
class Batch:
    """What a batch of operations has read, and what it is going to write."""

    results: list[Result] = field(default_factory=list)
    puts: dict[Place, tuple[PutOp, dict[str, Any] | None]] = field(default_factory=dict)
    searches: list[tuple[int, SearchOp, list[Found]]] = field(default_factory=list)


class Vectors:
    """Unit vectors by text; those used last are kept. For any thread."""

    def __init__(self) -> None:
        self._known: LRUCache[str, np.ndarray] = LRUCache(_KEPT_VECTORS)
        self._lock = threading.Lock()

    def missing(self, texts: Iterable[str]) -> list[str]:
        with self._lock:
            return [text for text in dict.fromkeys(texts) if text not in self._known]

    def keep(self, texts: Sequence[str], vectors: Sequence[Any]) -> None:
        """Raises InputError for what is not one vector for each text."""
        if texts:
            unit = as_unit_vectors(list(vectors), len(texts))
            with self._lock:
                self._known.update(zip(texts, unit, strict=True))

    def of(self, text: str) -> np.ndarray:
        with self._lock:
            return self._known[text]


def texts_at(value: Mapping[str, Any], path: str) -> list[str]:
    """What is searched of a value at a path."""
    return list(get_text_at_path(value, path if path == "$" else tokenize_path(path)))


def item_of(record: Record) -> Found:
    namespace, key = json.loads(record.key)
    return Found(tuple(namespace), key, record.value)


def times_of(row: Row) -> dict[str, Any]:
    return {f"{name}_at": datetime.fromtimestamp(row[name], UTC) for name in ("created", "updated")}


def is_expired(row: Row, now: float) -> bool:
    return row["expires"] is not None and row["expires"] <= now


def fits_condition(condition: MatchCondition, namespace: tuple[str, ...]) -> bool:
    """Whether a namespace begins or ends as the condition says; "*" is any one label."""
    path = condition.path
    if condition.match_type not in ("prefix", "suffix"):
        raise ValueError(f"Unsupported match type: {condition.match_type}")
    if len(namespace) < len(path):
        return False
    part = namespace[: len(path)] if condition.match_type == "prefix" else namespace[len(namespace) - len(path) :]
    return all(wanted in ("*", label) for label, wanted in zip(part, path, strict=True))
