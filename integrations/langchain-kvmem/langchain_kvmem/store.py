"""KVMemStore: LangGraph's store over an engine's, so that what an agent remembers is kept, and read once."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from langchain_core.embeddings import Embeddings
from langgraph.store.base import (
    BaseStore,
    GetOp,
    Item,
    ListNamespacesOp,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    TTLConfig,
    ensure_embeddings,
)

from kvmem import Chunk, Document, InputError, KVMem, KVMemError
from kvmem.store.records import list_key
from kvmem.text.filters import matches
from kvmem.text.retrieval import BM25Retriever, Retriever
from langchain_kvmem.items import Batch, Found, Vectors, fits_condition, is_expired, item_of, texts_at, times_of
from langchain_kvmem.sweeper import Sweeper

logger = logging.getLogger("kvmem")


class KVMemStore(BaseStore):
    """Items by namespace and key, kept in the store of an engine, within its namespace (its tenant).

    Items live as long as the engine's store, and `KVMem.forget_user` removes them. Several processes may use them.

    Args:
        mem: the engine.
        prefill: compute the caches of an item's text (its `text` or `content`, or else what is searched) at `put`, so
            that a prompt with that text as context reuses them.
        index: LangGraph's: `fields`, the paths of a value that are searched (all of it by default), and `embed`, an
            embedding model. With `embed`, an item's score is the cosine similarity of its most similar field; items
            without a searched text come last, without a score. Without it, search is by words (BM25).
        retriever: scores items instead, `kvmem.HybridRetriever` for example.
        ttl: as in LangGraph, in minutes. Expired items are no longer found; `sweep_ttl` removes them, and runs every
            `sweep_interval_minutes`, if given, as part of an operation.

    Raises:
        InputError: for an index that is not known.

    Example:
        ```python
        from kvmem import KVMem
        from langchain_kvmem import KVMemStore

        with KVMem("smollm2", store="./kv") as mem:
            store = KVMemStore(mem)
            store.put(("users", "anna"), "tea", {"text": "Anna likes tea."})
            print(store.search(("users", "anna"), query="What does Anna drink?")[0].value)
        ```
    """

    supports_ttl = True
    __slots__ = (
        "_fields",
        "_mem",
        "_prefill",
        "_retriever",
        "_sweeper",
        "_swept",
        "_vectors",
        "_words",
        "embeddings",
        "index_config",
        "ttl_config",
    )

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
        if unknown := (index or {}).keys() - {"dims", "embed", "fields"}:
            raise InputError(f"index has {min(unknown)!r}, which is not known. Use dims, embed and fields.")
        self.index_config: dict[str, Any] | None = dict(index) if index else None
        fields = (index or {}).get("fields")
        self._fields = [fields] if isinstance(fields, str) else list(fields or ["$"])
        embed = (index or {}).get("embed")
        self.embeddings: Embeddings | None = None if embed is None else ensure_embeddings(embed)
        self._vectors = Vectors()
        self._words, self._retriever = BM25Retriever(), retriever
        self.ttl_config = ttl
        self._swept = time.time()
        self._sweeper = Sweeper(self.sweep_ttl)

    # Operations

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Run operations as LangGraph's stores do: reads see what was before the batch; of two writes to one key the
        later counts."""
        batch = self._read(ops)
        texts, queries = self._to_embed(batch)
        if self.embeddings is not None and (texts or queries):
            self._vectors.keep(texts, self.embeddings.embed_documents(texts) if texts else [])
            self._vectors.keep(queries, [self.embeddings.embed_query(query) for query in queries])
        return self._finish(batch)

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Like `batch`; texts are embedded by the asynchronous methods of the embedding model."""
        batch = await asyncio.to_thread(self._read, list(ops))
        texts, queries = self._to_embed(batch)
        if self.embeddings is not None and (texts or queries):
            self._vectors.keep(texts, await self.embeddings.aembed_documents(texts) if texts else [])
            self._vectors.keep(queries, await asyncio.gather(*map(self.embeddings.aembed_query, queries)))
        return await asyncio.to_thread(self._finish, batch)

    def _read(self, ops: Iterable[Op]) -> Batch:
        """Everything that is read, and the rows to write; bad values raise before anything is written."""
        batch = Batch()
        with self._database.transaction():
            for op in ops:
                if isinstance(op, PutOp):
                    batch.puts[op.namespace, op.key] = op, self._row(op)
                    batch.results.append(None)
                elif isinstance(op, GetOp):
                    batch.results.append(self._get(op))
                elif isinstance(op, SearchOp):
                    batch.searches.append((len(batch.results), op, self._candidates(op)))
                    batch.results.append(None)
                elif isinstance(op, ListNamespacesOp):
                    batch.results.append(self._list_namespaces(op))
                else:
                    raise ValueError(f"Unknown operation type: {type(op)}")
        return batch

    def _to_embed(self, batch: Batch) -> tuple[list[str], list[str]]:
        """Texts of items and queries that have no vector yet."""
        asked = [(op.query, found) for _, op, found in batch.searches if op.query and self._retriever is None]
        texts = [text for _, found in asked for item in found for text in item.texts]
        return self._vectors.missing(texts), self._vectors.missing([query for query, _ in asked])

    def _finish(self, batch: Batch) -> list[Result]:
        for place, search, candidates in batch.searches:
            batch.results[place] = self._best(search, candidates)
        changes = []
        with self._database.transaction():
            for op, row in batch.puts.values():
                changes.append(self._write(op, row))
        for old, new in changes:
            self._follow(old, new)
        interval = (self.ttl_config or {}).get("sweep_interval_minutes")
        if interval and time.time() - self._swept > 60 * interval:
            self.sweep_ttl()
        return batch.results

    @property
    def _database(self) -> Any:
        return self._mem.store.database

    @property
    def _records(self) -> Any:
        return self._database.records(self._mem.settings.namespace, "item")

    def _row(self, op: PutOp) -> dict[str, Any] | None:
        """What is written of a value. Raises InputError."""
        if op.value is None:
            return None
        try:
            json.dumps(op.value, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"The value of {op.key!r} is not JSON: {error}. Use text, numbers, lists and mappings with text keys."
            ) from None
        fields = self._fields if op.index is None else op.index or []
        texts = [text.strip() for one in fields for text in texts_at(op.value, one) if text.strip()]
        text = "\n".join(texts)
        read = next((v for n in ("text", "content") if isinstance(v := op.value.get(n), str)), text).strip()
        return {"value": dict(op.value), "ttl": op.ttl, "texts": texts, "text": text, "read": read}

    def _write(self, op: PutOp, row: dict[str, Any] | None) -> tuple[str | None, str | None]:
        """Write or delete; the text that was computed before, and that is to be computed now."""
        key = list_key(list(op.namespace), op.key)
        record = self._records.get(key)
        old = None if record is None else record.value
        was_read = None if old is None else str(old["read"])
        if row is None:
            self._records.delete(key)
            return was_read, None
        now = time.time()
        # What has expired is not there.
        created = old["created"] if old is not None and not is_expired(old, now) else now
        times = {"created": created, "updated": now, "order": created if old is None else old["order"]}
        expires = None if op.ttl is None else now + 60 * op.ttl
        self._records.put(key, {**row, **times, "expires": expires})
        return was_read, str(row["read"])

    def _follow(self, old: str | None, new: str | None) -> None:
        """Bring the caches in line with what was written. The item is safe by now, so failures are logged only."""
        if not self._prefill or old == new:
            return
        try:
            if old:
                self._mem.forget_text(Document("item", old))
            if new:
                self._mem.read([new])
        except KVMemError as error:
            logger.warning("kvmem: an item is kept, but its caches are not computed: %s", error)

    def _get(self, op: GetOp) -> Item | None:
        record = self._records.get(list_key(list(op.namespace), op.key))
        if record is None or is_expired(record.value, time.time()):
            return None
        if op.refresh_ttl:
            self._refresh(op.namespace, op.key)
        row = record.value
        return Item(value=dict(row["value"]), key=op.key, namespace=op.namespace, **times_of(row))

    def _refresh(self, namespace: tuple[str, ...], key: str) -> None:
        """Restart an item's time to live, as it is by now."""
        name = list_key(list(namespace), key)
        with self._database.transaction():
            record = self._records.get(name)
            if record is not None and record.value["ttl"] is not None:
                self._records.put(name, {**record.value, "expires": time.time() + 60 * record.value["ttl"]})

    def _items(self, prefix: Sequence[str] = ()) -> list[Found]:
        """Items below a namespace that have not expired, in the order they were first put."""
        start, now = json.dumps([list(prefix)], ensure_ascii=False)[:-2], time.time()
        found = [item_of(record) for record in self._records.scan(start) if not is_expired(record.value, now)]
        return sorted(found, key=lambda item: item.row["order"])

    def _candidates(self, op: SearchOp) -> list[Found]:
        return [item for item in self._items(op.namespace_prefix) if matches(item.row["value"], op.filter)]

    def _best(self, op: SearchOp, wanted: list[Found]) -> list[SearchItem]:
        """The candidates asked for, best first; scoring takes time, and holds no lock."""
        ranked: list[tuple[Found, float | None]] = [(item, None) for item in wanted]
        if op.query:
            ranked = self._ranked(op.query, [item for item in wanted if item.texts])
            ranked += [(item, None) for item in wanted if not item.texts]
        found = []
        for item, score in ranked[op.offset : op.offset + op.limit]:
            if op.refresh_ttl:
                self._refresh(item.namespace, item.key)
            value = dict(item.row["value"])
            found.append(SearchItem(item.namespace, item.key, value, **times_of(item.row), score=score))
        return found

    def _ranked(self, query: str, items: list[Found]) -> list[tuple[Found, float | None]]:
        if not items:
            return []
        chunks = [Chunk("\n".join(item.texts), item.key, 0, {}) for item in items]
        by_words: Any = (self._retriever or self._words).score(query, chunks)
        scores = by_words
        if self.embeddings is not None and self._retriever is None:
            asked = self._vectors.of(query)
            scores = [max(float(self._vectors.of(text) @ asked) for text in item.texts) for item in items]
        best = sorted(range(len(items)), key=lambda i: (-scores[i], -by_words[i], items[i].row["order"]))
        return [(items[i], float(scores[i])) for i in best]

    def _list_namespaces(self, op: ListNamespacesOp) -> list[tuple[str, ...]]:
        found = {item.namespace for item in self._items()}
        kept = [ns for ns in found if all(fits_condition(condition, ns) for condition in op.match_conditions or ())]
        cut = sorted({ns if op.max_depth is None else ns[: op.max_depth] for ns in kept})
        return cut[op.offset : op.offset + op.limit]

    # Expiry

    def sweep_ttl(self) -> int:
        """Remove what has expired; returns how many items."""
        now = time.time()
        with self._database.transaction():
            gone = [record for record in self._records.scan() if is_expired(record.value, now)]
            for record in gone:
                self._records.delete(record.key)
            self._swept = now
        for record in gone:
            self._follow(record.value["read"], None)
        return len(gone)

    def start_ttl_sweeper(self, sweep_interval_minutes: float | None = None) -> Future[None]:
        """Sweep in a thread until `stop_ttl_sweeper`, every so many minutes (5 by default). Starting twice is once."""
        interval = sweep_interval_minutes or (self.ttl_config or {}).get("sweep_interval_minutes") or 5
        return self._sweeper.start(60 * interval)

    def stop_ttl_sweeper(self, timeout: float | None = None) -> bool:
        """Stop the sweeper; whether it ended within `timeout` seconds."""
        return self._sweeper.stop(timeout)
