"""KVMemStore: LangGraph's store over an engine's, so that what an agent remembers is kept and read once."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from weakref import WeakKeyDictionary

from langgraph.store.base import (
    BaseStore,
    GetOp,
    Item,
    ListNamespacesOp,
    MatchCondition,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    TTLConfig,
    ensure_embeddings,
    get_text_at_path,
    tokenize_path,
)

from kvmem import InputError, KVMem, KVMemError
from kvmem.document import Chunk, Document
from kvmem.retrieve import BM25Retriever, HybridRetriever, Retriever
from kvmem.store import Store

logger = logging.getLogger("kvmem")
# Stores over one engine's store take turns.
_LOCKS: WeakKeyDictionary[Store, threading.RLock] = WeakKeyDictionary()
_GUARD = threading.Lock()
_Row = dict[str, Any]
_Place = tuple[tuple[str, ...], str]
_Found = tuple[tuple[str, ...], str, _Row]


class KVMemStore(BaseStore):
    """Items by namespace and key, kept in the store of `mem`, within its namespace (its tenant).

    mem: the engine. prefill: read an item at `put`, so that a prompt with its text as context finds it read: its
        `text` or `content`, or else what is searched.
    index: LangGraph's: `fields`, the paths of a value that are searched ("$", all of it, by default), and `embed`, an
        embedding model that is then joined with BM25 (`kvmem.HybridRetriever`). retriever: scores items instead.
    ttl: as in LangGraph, in minutes. What has expired is not found any more; it is removed by `sweep_ttl`, which runs
        every `sweep_interval_minutes` if that is given, as part of an operation.
    Items live in the engine's store for as long as it does, and `KVMem.forget_user` removes them.
    """

    supports_ttl = True
    __slots__ = ("_fields", "_lock", "_mem", "_prefill", "_retriever", "_swept", "ttl_config")

    def __init__(
        self,
        mem: KVMem,
        *,
        prefill: bool = True,
        index: Mapping[str, Any] | None = None,
        retriever: Retriever | None = None,
        ttl: TTLConfig | None = None,
    ) -> None:
        self._mem, self._prefill = mem, prefill
        self._fields = list((index or {}).get("fields") or ["$"])
        if unknown := (index or {}).keys() - {"dims", "embed", "fields"}:
            raise InputError(f"index has {min(unknown)!r}, which is not known. Known are: dims, embed, fields.")
        embed = ensure_embeddings(index["embed"]) if index and index.get("embed") else None
        self._retriever: Retriever = retriever or (BM25Retriever() if embed is None else HybridRetriever(embed))
        self.ttl_config = ttl
        self._swept = time.time()
        with _GUARD:
            self._lock = _LOCKS.setdefault(mem.store, threading.RLock())

    # Operations

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Run operations as LangGraph's stores do: reads see what was before the batch; of two writes to one key the
        later counts."""
        results: list[Result] = []
        puts: dict[_Place, PutOp] = {}
        searches: list[tuple[int, SearchOp, list[_Found]]] = []
        with self._lock:
            for op in ops:
                if isinstance(op, PutOp):
                    _check(op)
                    puts[op.namespace, op.key] = op
                    results.append(None)
                elif isinstance(op, GetOp):
                    results.append(self._get(op))
                elif isinstance(op, SearchOp):
                    searches.append((len(results), op, self._candidates(op)))
                    results.append(None)
                elif isinstance(op, ListNamespacesOp):
                    results.append(self._list_namespaces(op))
                else:
                    raise ValueError(f"Unknown operation type: {type(op)}")
        for place, search, candidates in searches:
            results[place] = self._best(search, candidates)
        with self._lock:
            changes = [self._put(op) for op in puts.values()]
        for old, new in changes:
            self._follow(old, new)
        interval = (self.ttl_config or {}).get("sweep_interval_minutes")
        if interval and time.time() - self._swept > 60 * interval:
            self.sweep_ttl()
        return results

    def _follow(self, old: str | None, new: str | None) -> None:
        """Bring the caches in line with what was written. The texts are safe by now: what cannot be read is logged."""
        if not self._prefill or old == new:
            return
        try:
            if old:
                self._mem.forget_text(Document("item", old))
            if new:
                self._mem.read([new])
        except KVMemError as error:
            logger.warning("kvmem: an item is kept, but not read: %s", error)

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        return await asyncio.to_thread(self.batch, list(ops))

    def _name(self, namespace: tuple[str, ...], key: str) -> str:
        return "item:" + json.dumps([self._mem.settings.namespace, list(namespace), key])

    def _put(self, op: PutOp) -> tuple[str | None, str | None]:
        """Write or delete; the text that was read before, and that is to be read now."""
        rows = self._mem.store.documents
        name = self._name(op.namespace, op.key)
        raw = rows.get(name)
        old_row = None if raw is None else json.loads(raw)
        old = None if old_row is None else str(old_row["read"])
        if op.value is None:
            rows.pop(name, None)
            return old, None
        now = time.time()
        # What has expired is not there.
        created = old_row["created"] if old_row is not None and not _expired(old_row, now) else now
        fields = self._fields if op.index is None else op.index or []
        text = _text(op.value, fields)
        row = {
            "value": dict(op.value),
            "created": created,
            "order": created if old_row is None else old_row["order"],
            "updated": now,
            "ttl": op.ttl,
            "expires": None if op.ttl is None else now + 60 * op.ttl,
            "text": text,
            "read": next((v for n in ("text", "content") if isinstance(v := op.value.get(n), str)), text).strip(),
        }
        rows[name] = json.dumps(row)
        return old, str(row["read"])

    def _get(self, op: GetOp) -> Item | None:
        raw = self._mem.store.documents.get(self._name(op.namespace, op.key))
        if raw is None:
            return None
        row = json.loads(raw)
        if _expired(row, time.time()):
            return None
        if op.refresh_ttl:
            self._refresh(op.namespace, op.key)
        return Item(value=row["value"], key=op.key, namespace=op.namespace, **_times(row))

    def _refresh(self, namespace: tuple[str, ...], key: str) -> None:
        """Begin an item's time to live anew, as it is by now."""
        rows, name = self._mem.store.documents, self._name(namespace, key)
        with self._lock:
            row = json.loads(rows.get(name) or "null")
            if row is not None and row["ttl"] is not None:
                rows[name] = json.dumps({**row, "expires": time.time() + 60 * row["ttl"]})

    def _rows(self) -> Iterator[_Found]:
        """Items that have not expired, in the order they were first put."""
        start = "item:" + json.dumps([self._mem.settings.namespace])[:-1] + ","
        now = time.time()
        found = []
        for name, raw in self._mem.store.documents.items():
            if name.startswith(start):
                _, namespace, key = json.loads(name.removeprefix("item:"))
                row = json.loads(raw)
                if not _expired(row, now):
                    found.append((tuple(namespace), key, row))
        return iter(sorted(found, key=lambda item: item[2]["order"]))

    def _candidates(self, op: SearchOp) -> list[_Found]:
        depth = len(op.namespace_prefix)
        return [
            (namespace, key, row)
            for namespace, key, row in self._rows()
            if namespace[:depth] == op.namespace_prefix and _matches(row["value"], op.filter)
        ]

    def _best(self, op: SearchOp, wanted: list[_Found]) -> list[SearchItem]:
        """What was asked for of the candidates, best first; scoring takes time, and holds no lock."""
        scores: list[float | None] = [None] * len(wanted)
        if op.query:
            chunks = [Chunk(row["text"], key, 0, {}) for _, key, row in wanted]
            scores = list(self._retriever.score(op.query, chunks))
            order = sorted(range(len(wanted)), key=lambda i: (-(scores[i] or 0.0), wanted[i][2]["order"]))
        else:
            order = list(range(len(wanted)))
        found = []
        for i in order[op.offset : op.offset + op.limit]:
            namespace, key, row = wanted[i]
            if op.refresh_ttl:
                self._refresh(namespace, key)
            found.append(SearchItem(namespace, key, row["value"], **_times(row), score=scores[i]))
        return found

    def _list_namespaces(self, op: ListNamespacesOp) -> list[tuple[str, ...]]:
        found = {namespace for namespace, _, _ in self._rows()}
        kept = [ns for ns in found if all(_fits(condition, ns) for condition in op.match_conditions or ())]
        cut = sorted({ns if op.max_depth is None else ns[: op.max_depth] for ns in kept})
        return cut[op.offset : op.offset + op.limit]

    def sweep_ttl(self) -> int:
        """Remove what has expired; how many."""
        start = "item:" + json.dumps([self._mem.settings.namespace])[:-1] + ","
        rows, now = self._mem.store.documents, time.time()
        with self._lock:
            found = {name: json.loads(raw) for name, raw in rows.items() if name.startswith(start)}
            gone = {name: row for name, row in found.items() if _expired(row, now)}
            for name in gone:
                rows.pop(name, None)
            self._swept = now
        for row in gone.values():
            self._follow(row["read"], None)
        return len(gone)


def _check(op: PutOp) -> None:
    """Raises InputError before anything of a batch is written."""
    try:
        json.dumps(op.value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The value of {op.key!r} is not JSON: {error}. Use text, numbers, lists and mappings."
        ) from None


def _text(value: Mapping[str, Any], fields: list[str]) -> str:
    """What is searched of a value."""
    found = [
        text for field in fields for text in get_text_at_path(value, field if field == "$" else tokenize_path(field))
    ]
    return "\n".join(found).strip()


def _times(row: _Row) -> dict[str, Any]:
    return {f"{name}_at": datetime.fromtimestamp(row[name], UTC) for name in ("created", "updated")}


def _expired(row: _Row, now: float) -> bool:
    return row["expires"] is not None and row["expires"] <= now


def _fits(condition: MatchCondition, namespace: tuple[str, ...]) -> bool:
    """Whether a namespace begins or ends as the condition says; "*" is any one label."""
    path = condition.path
    if len(namespace) < len(path):
        return False
    part = namespace[: len(path)] if condition.match_type == "prefix" else namespace[len(namespace) - len(path) :]
    return all(wanted in ("*", label) for label, wanted in zip(part, path, strict=True))


def _matches(value: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> bool:
    return all(_equals(value.get(name), expected) for name, expected in (wanted or {}).items())


def _equals(value: Any, wanted: Any) -> bool:
    """As LangGraph's stores compare: nested, and by operators such as {"$gt": 3}."""
    if isinstance(wanted, Mapping):
        if any(name.startswith("$") for name in wanted):
            return all(_compares(value, operator, operand) for operator, operand in wanted.items())
        return isinstance(value, Mapping) and all(_equals(value.get(name), part) for name, part in wanted.items())
    if isinstance(wanted, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(wanted)
            and all(_equals(one, other) for one, other in zip(value, wanted, strict=True))
        )
    return bool(value == wanted)


def _compares(value: Any, operator: str, operand: Any) -> bool:
    if operator == "$eq":
        return bool(value == operand)
    if operator == "$ne":
        return bool(value != operand)
    order = {"$gt": float.__gt__, "$gte": float.__ge__, "$lt": float.__lt__, "$lte": float.__le__}.get(operator)
    if order is None:
        raise ValueError(f"Unsupported operator: {operator}")
    return value is not None and bool(order(float(value), float(operand)))
