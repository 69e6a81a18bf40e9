"""Components over one store see what the frameworks' own components would show the model, whatever happens between."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import embed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document as LangChainDocument
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from kvmem import Answer, KVMem, LanguageModel, Timings, Usage
from kvmem.backends.local import LocalBackend
from langchain_kvmem import CachedContextChain
from llama_index_kvmem import KVMemLLM, KVMemQueryEngine

WORDS = ["Alder", "Brook", "Cedar", "Dover", "Elm", "Fir"]


class Words(BaseEmbedding):
    def _get_text_embedding(self, text: str) -> list[float]:
        return embed([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return embed([query])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embed([query])[0]


class Redact(BaseNodePostprocessor):
    word: str

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None) -> Any:
        for found in nodes:
            found.node.set_content(found.node.get_content().replace(self.word, "[hidden]"))  # type: ignore[attr-defined]
        return nodes


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts as text; the model is not run, since texts are all that counts here."""
    found: list[str] = []

    def answer(self: LocalBackend, request: Any, *_: Any, **__: Any) -> Any:
        found.append(str(self.local_model.tokenizer.decode(request.prompt.token_ids)))
        nothing, no_time = Usage(0, 0, 0, len(request.prompt.token_ids), 1, 0), Timings(0.0, 0.0, 0.0, 0.0, 0.0)
        return Answer("x", request.sources, nothing, request.plan, no_time, "stop"), None

    monkeypatch.setattr(LocalBackend, "answer", answer)
    monkeypatch.setattr(LocalBackend, "read", lambda *_, **__: None)
    return found


@dataclass
class World:
    """Three components over one store, and what each was given."""

    model: LanguageModel
    directory: Path
    indexes: list[VectorStoreIndex]
    kwargs: list[dict[str, Any]]
    postprocessors: list[list[BaseNodePostprocessor]]
    documents: list[LangChainDocument]
    mem: KVMem = field(init=False)

    def open(self) -> None:
        self.mem = KVMem(self.model, self.directory / "kv", max_tokens=2)
        self.mem.add("A stranger tells of Zebra.", id="0")
        options: Any = [{"node_postprocessors": list(p)} for p in self.postprocessors]
        pairs = zip(self.indexes, self.kwargs, options, strict=True)
        self.ours = [KVMemQueryEngine.from_index(i, self.mem, retriever_kwargs=k, **o) for i, k, o in pairs]
        self.chain = CachedContextChain.from_documents(self.documents, self.mem)

    def check(self, seen: list[str], question: str) -> None:
        llm = KVMemLLM(mem=self.mem, max_new_tokens=2)
        for number, (index, kwargs) in enumerate(zip(self.indexes, self.kwargs, strict=True)):
            retriever = index.as_retriever(**kwargs)
            theirs = RetrieverQueryEngine.from_args(
                retriever, llm=llm, node_postprocessors=list(self.postprocessors[number])
            )
            mine = KVMemQueryEngine.from_args(retriever, llm, node_postprocessors=list(self.postprocessors[number]))
            shown = []
            for engine in (theirs, self.ours[number], mine):
                seen.clear()
                response = str(engine.query(question))
                shown.append(Counter(p for text in seen for p in paragraphs(text)) if seen else response)
            assert shown[0] == shown[1] == shown[2]
        seen.clear()
        if self.documents:
            self.chain.invoke({"input": question})
            expected = [document.page_content for document in self.documents]
            assert all(text in seen[0] for text in expected)
            assert not any(f"T{n}." in seen[0] for n in range(100) if not any(f"T{n}." in text for text in expected))


def paragraphs(prompt: str) -> list[str]:
    """What stands in the place of the context in LlamaIndex's template."""
    _, _, rest = prompt.partition("---------------------\n")
    context, _, _ = rest.partition("---------------------\n")
    return [part.strip() for part in context.split("\n\n") if part.strip()]


number = st.integers(0, 40)
word = st.sampled_from(WORDS)
nodes = st.lists(st.tuples(number, word, st.integers(0, 5)), min_size=1, max_size=5, unique_by=lambda row: row[0])
filters = st.one_of(
    st.none(),
    word.map(lambda w: [MetadataFilter(key="word", value=w)]),
    st.lists(word, min_size=1, max_size=3).map(
        lambda w: [MetadataFilter(key="word", value=w, operator=FilterOperator.IN)]
    ),
    st.integers(0, 5).map(lambda n: [MetadataFilter(key="n", value=n, operator=FilterOperator.GTE)]),
    st.tuples(word, st.integers(0, 5)).map(
        lambda pair: [
            MetadataFilter(key="word", value=pair[0]),
            MetadataFilter(key="n", value=pair[1], operator=FilterOperator.LT),
        ]
    ),
)
postprocessors = st.lists(
    st.one_of(
        word.map(lambda w: Redact(word=w)),
        st.floats(0.1, 0.9).map(lambda cut: SimilarityPostprocessor(similarity_cutoff=cut)),
        st.just(None),
    ),
    max_size=2,
).map(lambda found: [one for one in found if one is not None])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("delete"), st.integers(0, 1), number),
        st.tuples(st.just("update"), st.integers(0, 1), number),
        st.tuples(st.just("insert"), st.integers(0, 1), number),
        st.tuples(st.just("restart"), st.just(0), st.just(0)),
    ),
    max_size=3,
)


def text(n: int, w: str, version: int = 0) -> str:
    return f"{w} tells of T{n}. Version V{version}."


def make_node(row: tuple[int, str, int], version: int = 0) -> TextNode:
    n, w, size = row
    return TextNode(text=text(n, w, version), id_=str(n), metadata={"word": w, "n": size})


def change(world: World, step: tuple[str, int, int], version: int) -> None:
    what, place, n = step
    index = world.indexes[place]
    there = str(n) in index.index_struct.nodes_dict.values() and str(n) in index.vector_store.data.embedding_dict
    if what == "restart":
        world.mem.close()
        world.open()
    elif what == "delete" and there:
        index.delete_nodes([str(n)], delete_from_docstore=True)
    elif what == "update" and there:
        index.delete_nodes([str(n)], delete_from_docstore=True)
        index.insert_nodes([make_node((n, WORDS[n % 6], version), version)])
    elif what == "insert" and not there:
        index.insert_nodes([make_node((n, WORDS[n % 6], n % 5), version)])


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=st.tuples(nodes, nodes),
    chosen=st.tuples(filters, filters),
    condition=st.sampled_from([FilterCondition.AND, FilterCondition.OR]),
    changes=st.tuples(postprocessors, postprocessors),
    own=nodes,
    script=steps,
    question=word,
)
def test_prompts_have_the_texts_that_the_frameworks_would_show(
    model: LanguageModel,
    seen: list[str],
    rows: tuple[Any, Any],
    chosen: tuple[Any, Any],
    condition: FilterCondition,
    changes: tuple[Any, Any],
    own: Any,
    script: Any,
    question: str,
) -> None:
    """Random nodes, filters, postprocessors, deletions, updates and restarts; the store holds other texts as well."""
    with tempfile.TemporaryDirectory() as directory:
        kwargs: list[dict[str, Any]] = []
        for one in chosen:
            given_filters = None if one is None else MetadataFilters(filters=one, condition=condition)
            kwargs.append({"similarity_top_k": 50} | ({"filters": given_filters} if given_filters else {}))
        world = World(
            model=model,
            directory=Path(directory),
            indexes=[VectorStoreIndex([make_node(row) for row in part], embed_model=Words()) for part in rows],
            kwargs=kwargs,
            postprocessors=[list(part) for part in changes],
            documents=[LangChainDocument(page_content=text(n, w), id=str(n)) for n, w, _ in own],
        )
        world.open()
        try:
            world.check(seen, f"What of {question}?")
            for version, step in enumerate(script, 1):
                change(world, step, version)
            world.check(seen, f"What of {question}?")
        finally:
            world.mem.close()
