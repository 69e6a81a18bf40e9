from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import open_mem
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from langgraph.store.base import GetOp, InvalidNamespaceError, ListNamespacesOp, MatchCondition, PutOp, SearchOp
from langgraph.store.memory import InMemoryStore

from kvmem import BM25Retriever, InputError, KVMem, KVMemError, LanguageModel, RemoteError
from kvmem.testing import tiny_model
from langchain_kvmem import KVMemStore

MODEL = tiny_model()
labels = st.sampled_from(["a", "b", "user", "x.y"[:1]])
namespaces = st.lists(labels, min_size=1, max_size=3).map(tuple)
keys = st.sampled_from(["k1", "k2", "k3", "é/ \n"])
values = st.fixed_dictionaries(
    {"text": st.sampled_from(["ferry at nine", "tram at ten", "bread"]), "n": st.integers(0, 5)},
    optional={"deep": st.fixed_dictionaries({"tags": st.lists(st.integers(0, 2), max_size=2)})},
)
filters = st.one_of(
    st.none(),
    st.fixed_dictionaries({"n": st.integers(0, 5)}),
    st.fixed_dictionaries({"n": st.fixed_dictionaries({"$gte": st.integers(0, 5), "$ne": st.integers(0, 5)})}),
    st.fixed_dictionaries({"deep": st.fixed_dictionaries({"tags": st.lists(st.integers(0, 2), max_size=2)})}),
)


class AgainstInMemoryStore(RuleBasedStateMachine):
    """Whatever is done to both, both say the same."""

    def __init__(self) -> None:
        super().__init__()
        self.mem = KVMem(MODEL, None)
        self.ours, self.theirs = KVMemStore(self.mem, prefill=False), InMemoryStore()

    def teardown(self) -> None:
        self.mem.close()

    @rule(namespace=namespaces, key=keys, value=values)
    def put(self, namespace: tuple[str, ...], key: str, value: dict[str, Any]) -> None:
        for store in (self.ours, self.theirs):
            store.put(namespace, key, value)

    @rule(namespace=namespaces, key=keys)
    def delete(self, namespace: tuple[str, ...], key: str) -> None:
        for store in (self.ours, self.theirs):
            store.delete(namespace, key)

    @rule(namespace=namespaces, key=keys)
    def get(self, namespace: tuple[str, ...], key: str) -> None:
        ours, theirs = (store.get(namespace, key) for store in (self.ours, self.theirs))
        assert (ours and (ours.value, ours.key, ours.namespace)) == (
            theirs and (theirs.value, theirs.key, theirs.namespace)
        )

    @rule(prefix=st.lists(labels, max_size=2).map(tuple), wanted=filters)
    def search(self, prefix: tuple[str, ...], wanted: dict[str, Any] | None) -> None:
        found = [
            sorted((i.namespace, i.key, str(i.value)) for i in store.search(prefix, filter=wanted, limit=100))
            for store in (self.ours, self.theirs)
        ]
        assert found[0] == found[1]
        pages = [self.ours.search(prefix, filter=wanted, limit=2, offset=n) for n in range(0, len(found[0]) + 2, 2)]
        assert sorted((i.namespace, i.key, str(i.value)) for page in pages for i in page) == found[0]

    @rule(
        operations=st.lists(
            st.one_of(
                st.tuples(namespaces, keys, st.one_of(st.none(), values)).map(lambda given: PutOp(*given)),
                st.tuples(namespaces, keys).map(lambda given: GetOp(*given)),
                st.tuples(namespaces, filters).map(lambda given: SearchOp(*given, limit=100)),
            ),
            max_size=5,
        )
    )
    def batch(self, operations: list[Any]) -> None:
        def plain(result: Any) -> Any:
            if isinstance(result, list):
                return sorted((i.namespace, i.key, str(i.value)) for i in result)
            return result and (result.namespace, result.key, result.value)

        first, second = (store.batch(operations) for store in (self.ours, self.theirs))
        assert [plain(result) for result in first] == [plain(result) for result in second]

    @rule(depth=st.one_of(st.none(), st.integers(1, 3)), label=labels, kind=st.sampled_from(["prefix", "suffix"]))
    def list_namespaces(self, depth: int | None, label: str, kind: Any) -> None:
        """LangGraph's also names what was once asked for; ours what holds something."""
        holding = {item.namespace for item in self.theirs.search((), limit=1000)}
        condition = MatchCondition(kind, (label,))
        found = self.ours.batch([ListNamespacesOp((condition,), depth)])[0]
        theirs: Any = self.theirs.batch([ListNamespacesOp((condition,), None, 1000)])[0]
        assert found == sorted({ns[:depth] for ns in theirs if ns in holding})


AgainstInMemoryStore.TestCase.settings = settings(max_examples=1000, stateful_step_count=8, deadline=None)
TestAgainstInMemoryStore = AgainstInMemoryStore.TestCase


@pytest.fixture
def store(mem: KVMem) -> KVMemStore:
    return KVMemStore(mem)


def test_search_finds_by_words_with_scores_and_pages(store: KVMemStore, mem: KVMem) -> None:
    """The best first, the rest behind it; an index names the paths that are searched."""
    for number, text in enumerate(("the tram is late", "the ferry leaves at nine", "bread and butter")):
        store.put(("u", "facts"), str(number), {"text": text, "note": "ferry"})
    found = store.search(("u",), query="When does the ferry leave?", limit=2)
    assert len(found) == 2
    narrow = KVMemStore(mem, index={"fields": ["text"]}, prefill=False)
    narrow.put(("n",), "a", {"text": "tram", "note": "ferry"})
    narrow.put(("n",), "b", {"text": "ferry", "note": "tram"})
    best, other = narrow.search(("n",), query="ferry")
    assert (best.key, other.key) == ("b", "a")
    assert best.score is not None
    assert other.score is not None
    assert best.score > other.score
    assert narrow.search(("n",), query="ferry", limit=1, offset=1)[0].key == "a"
    narrow.put(("n",), "c", {"text": "ferry ferry"}, index=False)
    assert narrow.search(("n",), query="ferry", limit=1)[0].key == "b"


def test_items_survive_a_restart_and_stay_with_their_tenant(model: LanguageModel, tmp_path: Path) -> None:
    """Kept on disk; of another tenant's, nothing is seen."""
    with open_mem(model, tmp_path / "kv", namespace="eve") as mem:
        KVMemStore(mem).put(("u",), "k", {"text": "the ferry"})
        created = KVMemStore(mem).get(("u",), "k")
    with open_mem(model, tmp_path / "kv", namespace="eve") as mem:
        assert KVMemStore(mem).get(("u",), "k") == created
        KVMemStore(mem).put(("u",), "k", {"text": "the tram"})
        changed = KVMemStore(mem).get(("u",), "k")
        assert created is not None
        assert changed is not None
        assert changed.created_at == created.created_at < changed.updated_at
    with open_mem(model, tmp_path / "kv", namespace="bob") as mem:
        store = KVMemStore(mem)
        for n in range(60):
            assert store.get(("u",), "k") is None
            assert store.search(("u",), query="ferry tram", offset=n) == []
            assert store.list_namespaces(limit=10, offset=n) == []
            store.delete(("u",), "k")
    with open_mem(model, tmp_path / "kv", namespace="eve") as mem:
        assert KVMemStore(mem).get(("u",), "k") == changed
        mem.forget_user()
        assert KVMemStore(mem).get(("u",), "k") is None


def test_what_is_put_is_read_and_freed(store: KVMemStore, mem: KVMem) -> None:
    """A prompt with the text computes its own message only; deleting frees the caches."""
    text = "The ferry leaves at nine in the evening, from the long pier."
    store.put(("u",), "k", {"text": text})
    answer = mem.chat([{"role": "user", "content": "When?"}], context=[text], max_tokens=1)
    assert answer.usage.computed < 70
    assert mem.stats().store.entries > 0
    store.delete(("u",), "k")
    mem.release()
    again = mem.chat([{"role": "user", "content": "When?"}], context=[text], max_tokens=1)
    assert again.usage.computed > 70


def test_what_cannot_be_read_is_kept_all_the_same(model: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    """Reading is a saving; a text that is too long for it is no reason to lose it."""
    with open_mem(model, None, max_document_chars=20) as mem:
        store = KVMemStore(mem)
        store.put(("u",), "k", {"text": "much longer than twenty characters"})
        assert store.get(("u",), "k") is not None
    assert "not computed" in caplog.text


def test_an_embedding_model_of_the_index_is_used(mem: KVMem) -> None:
    """LangGraph's own configuration; what it does not know is an error."""

    def embed(texts: list[str]) -> list[list[float]]:
        return [[float("cat" in t or "feline" in t), float("train" in t), 0.1] for t in texts]

    store = KVMemStore(mem, prefill=False, index={"dims": 3, "embed": embed, "fields": ["text"]})
    store.put(("u",), "a", {"text": "a night train"})
    store.put(("u",), "b", {"text": "a cat"})
    assert store.search(("u",), query="feline")[0].key == "b"
    with pytest.raises(InputError, match="distance"):
        KVMemStore(mem, index={"distance": "cosine"})


def test_a_search_that_takes_long_keeps_nobody_waiting(mem: KVMem) -> None:
    """Others write while an embedding model is asked; a search that fails writes nothing of its batch."""
    asked, go_on = threading.Event(), threading.Event()

    class Slow:
        def score(self, query: str, chunks: Any) -> list[float]:
            asked.set()
            if not go_on.wait(10):
                raise TimeoutError
            return [1.0] * len(chunks)

    store = KVMemStore(mem, retriever=Slow(), prefill=False)
    store.put(("n",), "a", {"text": "tram"}, ttl=1)
    with ThreadPoolExecutor(1) as pool:
        searching = pool.submit(store.search, ("n",), query="tram")
        assert asked.wait(10)
        store.put(("n",), "a", {"text": "ferry"}, ttl=1)
        go_on.set()
        assert [item.value for item in searching.result()] == [{"text": "tram"}]
    assert store.get(("n",), "a").value == {"text": "ferry"}  # type: ignore[union-attr]

    class Broken(BM25Retriever):
        def score(self, *_: Any) -> list[float]:
            raise ZeroDivisionError

    broken = KVMemStore(mem, retriever=Broken(), prefill=False)
    with pytest.raises(ZeroDivisionError):
        broken.batch([PutOp(("n",), "b", {"text": "x"}), SearchOp(("n",), query="tram")])
    assert store.get(("n",), "b") is None


def test_items_expire(mem: KVMem, monkeypatch: pytest.MonkeyPatch) -> None:
    """After their minutes, unless they are read with refreshing; sweeping removes them."""
    store = KVMemStore(mem, ttl={"default_ttl": 10, "refresh_on_read": True})
    now = time.time()
    monkeypatch.setattr("langchain_kvmem.store.time.time", lambda: now)
    store.put(("u",), "short", {"text": "a"}, ttl=1)
    store.put(("u",), "default", {"text": "b"})
    store.put(("u",), "forever", {"text": "c"}, ttl=None)
    now += 50
    assert store.get(("u",), "short") is not None  # and lives a minute more
    now += 50
    assert store.get(("u",), "short", refresh_ttl=False) is not None
    now += 50
    assert store.get(("u",), "short") is None
    now += 3600
    assert [item.key for item in store.search(("u",))] == ["forever"]
    assert store.sweep_ttl() == 2
    assert store.sweep_ttl() == 0


def test_many_agents_may_share_one_store(store: KVMemStore) -> None:
    """From threads and in async: nothing is lost, nothing is torn."""

    def work(number: int) -> None:
        for n in range(10):
            store.put(("agent", str(number)), str(n), {"text": f"fact {n} of agent {number}"})
            assert store.get(("agent", str(number)), str(n)) is not None

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))

    async def main() -> None:
        await asyncio.gather(*(store.aput(("async",), str(n), {"text": f"{n}"}) for n in range(10)))
        assert len(await store.asearch(("async",), limit=50)) == 10
        await store.adelete(("async",), "3")
        assert await store.aget(("async",), "3") is None

    asyncio.run(main())
    assert len(store.search(("agent",), limit=100)) == 40


def test_bad_items_are_errors(store: KVMemStore) -> None:
    """Namespaces as LangGraph wants them, JSON values, known operations."""
    for namespace in ((), ("",), ("a.b",), ("langgraph",)):
        with pytest.raises(InvalidNamespaceError):
            store.put(namespace, "k", {"text": "a"})
    with pytest.raises(InputError, match="JSON"):
        store.batch([PutOp(("u",), "k", {"text": "a"}), PutOp(("u",), "k2", {"text": object()})])
    assert store.get(("u",), "k") is None
    store.put(("u",), "k", {"n": 1})
    with pytest.raises(ValueError, match="operator"):
        store.search(("u",), filter={"n": {"$like": 1}})
    with pytest.raises(ValueError, match="operation"):
        store.batch(["nonsense"])  # type: ignore[list-item]


@pytest.mark.parametrize("error", [InputError, RemoteError])
def test_what_replaces_a_text_need_not_be_readable(
    mem: KVMem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[KVMemError]
) -> None:
    """Too long, or on a server that is gone: the item is kept, and the caches of its old text go."""
    store = KVMemStore(mem)
    before = mem.stats().store.entries
    store.put(("notes",), "ferry", {"text": "The ferry leaves at nine in the morning."})
    assert mem.stats().store.entries > before

    def fail(_: Any) -> None:
        raise error("cannot be read")

    monkeypatch.setattr(mem, "read", fail)
    store.put(("notes",), "ferry", {"text": "It leaves at ten."})
    item = store.get(("notes",), "ferry")
    assert item is not None
    assert item.value["text"] == "It leaves at ten."
    assert "not computed" in caplog.text
    entries = [mem.store.get(key) for key in mem.store.keys()]  # noqa: SIM118
    read = [mem.model.tokenizer.decode(entry.token_ids) for entry in entries if entry is not None]
    assert not any("at nine" in text for text in read)
