from __future__ import annotations

import random
from typing import Any

import pytest
from helpers import FACTS, embed, facts_corpus, open_mem, prompts
from llama_index.core import Document, MockEmbedding, QueryBundle, VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.indices.vector_store.retrievers import VectorIndexRetriever
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from llama_index.core.tools import QueryEngineTool

from kvmem import InputError, KVMem, LanguageModel
from kvmem.testing import tiny_model
from llama_index_kvmem import KVMemLLM, KVMemQueryEngine
from llama_index_kvmem.convert import to_document

DOCUMENTS = [
    Document(text="The rent is due on the first day of the month.", metadata={"source": "lease"}, id_="l"),
    Document(text="The machine has two boilers.", metadata={"source": "manual"}, id_="m"),
]


@pytest.fixture
def engine(mem: KVMem) -> KVMemQueryEngine:
    return KVMemQueryEngine.from_documents(DOCUMENTS, mem, max_tokens=12)


def test_query_gives_a_response_with_its_sources(engine: KVMemQueryEngine) -> None:
    """A BaseQueryEngine whose Response names its nodes, their documents, and the plan."""
    assert isinstance(engine, BaseQueryEngine)
    response = engine.query("When is the rent due?")
    assert isinstance(response, Response)
    assert response.response
    assert [n.node.ref_doc_id for n in response.source_nodes] == ["l", "m"]
    assert [n.metadata["source"] for n in response.source_nodes] == ["lease", "manual"]
    metadata: dict[str, Any] = response.metadata or {}
    assert metadata["plan"]["mode"] == "whole"
    assert metadata["usage"]["prompt"] == metadata["plan"]["prompt_tokens"]


async def test_async_and_streaming_give_the_same_text(mem: KVMem, engine: KVMemQueryEngine) -> None:
    """aquery, and both kinds of streams, agree with query."""
    expected = str(engine.query("When?"))
    assert str(await engine.aquery(QueryBundle("When?"))) == expected
    streaming = KVMemQueryEngine.from_documents(DOCUMENTS, mem, streaming=True, max_tokens=12)
    response = streaming.query("When?")
    assert isinstance(response, StreamingResponse)
    assert len(response.source_nodes) == 2
    assert "".join(response.response_gen) == expected
    async_response = await streaming.aquery("When?")
    assert isinstance(async_response, AsyncStreamingResponse)
    pieces = [piece async for piece in async_response.async_response_gen()]
    assert "".join(pieces) == expected


def test_it_serves_as_a_tool(engine: KVMemQueryEngine) -> None:
    """An agent's QueryEngineTool wraps it as any other engine."""
    tool = QueryEngineTool.from_defaults(engine, name="lease", description="about the lease")
    assert tool("When?").content == str(engine.query("When?"))


class Counted(BaseRetriever):
    """Returns the named nodes with falling scores, and counts its calls."""

    def __init__(self, nodes: list[TextNode]) -> None:
        self.nodes, self.calls = nodes, 0
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.calls += 1
        return [NodeWithScore(node=node, score=0.9 - 0.1 * n) for n, node in enumerate(self.nodes)]


NODES = [
    TextNode(id_=f"n{n}", text=f"Fact {n} is told here, and it is the number {n * 7}. " * 3, metadata={"n": n})
    for n in range(20)
]


def test_a_retriever_is_asked_unless_it_ranks_what_fits(mem: KVMem) -> None:
    """One that only ranks is not asked while all documents fit; others always, and their nodes are the sources."""
    index = VectorStoreIndex(NODES[:3], embed_model=MockEmbedding(embed_dim=3))
    plain = index.as_retriever(similarity_top_k=1)
    whole = KVMemQueryEngine.from_documents(NODES[:3], mem, retriever=plain, max_tokens=4)
    assert len(whole.query("Which fact?").source_nodes) == 3
    retriever = Counted(NODES[3:5])
    asked = KVMemQueryEngine.from_documents(NODES[:3], mem, retriever=retriever, max_tokens=4)
    assert [found.node.node_id for found in asked.query("Which fact?").source_nodes] == ["n3", "n4"]
    assert retriever.calls == 1
    chosen = VectorIndexRetriever(index, similarity_top_k=3, node_ids=["n1"])
    scoped = KVMemQueryEngine.from_documents(NODES[:3], mem, retriever=chosen, max_tokens=4)
    assert [found.node.node_id for found in scoped.query("Which fact?").source_nodes] == ["n1"]
    engine = KVMemQueryEngine.from_args(retriever, mem, max_tokens=4)
    with prompts() as seen:
        response = engine.query("Which fact?")
    assert [(n.node.node_id, n.score) for n in response.source_nodes] == [("n3", 0.9), ("n4", 0.8)]
    assert [f"Fact {n} is told" in seen[0] for n in range(5)] == [False, False, False, True, True]
    assert KVMemQueryEngine.from_args(Counted([]), mem).query("?").response == "Empty Response"
    streamed = KVMemQueryEngine.from_args(Counted([]), mem, streaming=True).query("?")
    assert isinstance(streamed, StreamingResponse)
    assert "".join(streamed.response_gen) == "Empty Response"


async def test_on_overflow_the_sources_are_those_of_retriever_query_engine(model: LanguageModel) -> None:
    """The same nodes with the same scores after the same postprocessors, sync and async, from an index."""
    small = tiny_model(max_position_embeddings=1536)
    cut = [SimilarityPostprocessor(similarity_cutoff=0.75)]
    with open_mem(small, None) as mem:
        index = VectorStoreIndex(NODES, embed_model=MockEmbedding(embed_dim=3))
        engine = KVMemQueryEngine.from_index(index, mem, collection="facts", max_tokens=4)
        assert len(mem.collection("facts")) == 20
        response = engine.query("Which fact is 21?")
        assert len(response.source_nodes) == 2
        retriever = Counted(NODES[6:9])
        ours = KVMemQueryEngine(mem, retriever=retriever, node_postprocessors=cut, max_tokens=4)
        theirs = RetrieverQueryEngine.from_args(retriever, llm=MockLLM(), node_postprocessors=cut)
        expected = [(n.node.node_id, n.score) for n in theirs.query("Which?").source_nodes]
        found = [ours.query("Which?"), await ours.aquery("Which?")]
        assert [[(n.node.node_id, n.score) for n in r.source_nodes] for r in found] == [expected, expected]
        assert [n.node.node_id for n in ours.retrieve(QueryBundle("Which?"))] == ["n6", "n7"]
        usage: dict[str, Any] = found[1].metadata or {}
        assert usage["usage"]["computed"] < 200


class HashedWords(BaseEmbedding):
    """Texts as counts of hashed words."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return embed([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return embed([query])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embed([query])[0]


def test_an_index_finds_the_right_document_of_a_corpus_of_ten_windows() -> None:
    """Fifty questions, four nodes each: nearly always, and the prompt is never too long."""
    with open_mem(tiny_model(max_position_embeddings=6144), None, split={"headings": False}) as mem:
        nodes = [TextNode(id_=document.id, text=document.text) for document in facts_corpus()]
        index = VectorStoreIndex(nodes, embed_model=HashedWords())
        engine = KVMemQueryEngine.from_args(index.as_retriever(similarity_top_k=4), mem)
        found = 0
        draw = random.Random(3)
        for _ in range(50):
            name, _n = draw.choice(FACTS)
            query = QueryBundle(f"How many people does {name} employ and when was {name} founded?")
            context = [to_document(node.node) for node in engine.retrieve(query)]
            assert mem.plan(query.query_str, context=context).prompt_tokens + 8 <= mem.model.window
            found += name in {document.id for document in context}
        assert found >= 45


def test_synthesize_answers_from_the_nodes_it_is_given(mem: KVMem) -> None:
    """And names the additional ones as sources."""
    engine = KVMemQueryEngine(mem, max_tokens=4)
    nodes = [NodeWithScore(node=node, score=0.5) for node in NODES[:2]]
    with prompts() as seen:
        response = engine.synthesize(QueryBundle("Which?"), nodes, [NodeWithScore(node=NODES[5])])
    assert [n.node.node_id for n in response.source_nodes] == ["n0", "n1", "n5"]
    assert ["Fact 1 is told" in seen[0], "Fact 5 is told" in seen[0]] == [True, False]


def test_nodes_keep_their_identity_and_are_not_cut(mem: KVMem) -> None:
    """Ids, metadata and the document they were cut from; whole documents are cut by kvmem."""
    node = TextNode(
        id_="n", text="Word. " * 60, relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="whole")}
    )
    engine = KVMemQueryEngine.from_documents([node, Document(text="Other. " * 60, id_="doc")], mem, max_tokens=2)
    found = engine.query("?").source_nodes
    assert (found[0].node.node_id, found[0].node.ref_doc_id) == ("n", "whole")
    assert "_cut_from" not in found[0].node.metadata
    assert len(found) > 2
    assert {n.node.ref_doc_id for n in found[1:]} == {"doc"}


def test_options_nobody_knows_are_refused(mem: KVMem) -> None:
    """A text_qa_template or a misspelling is not dropped in silence; neither is another LLM."""
    with pytest.raises(InputError, match="no_such_template"):
        KVMemQueryEngine.from_args(Counted(NODES), mem, no_such_template="x")
    with pytest.raises(InputError, match="keeps no caches"):
        KVMemQueryEngine.from_args(Counted(NODES), MockLLM())  # type: ignore[arg-type]


def test_it_serves_router_and_sub_question_engines(mem: KVMem) -> None:
    """As any other query engine does."""
    mem.add_all([document.text for document in DOCUMENTS])
    engine = KVMemQueryEngine(mem, max_tokens=4)
    tool = QueryEngineTool.from_defaults(engine, name="lease", description="about the lease")

    class First(BaseSelector):
        def _select(self, choices: Any, query: QueryBundle) -> SelectorResult:
            return SelectorResult(selections=[SingleSelection(index=0, reason="the only one")])

        async def _aselect(self, choices: Any, query: QueryBundle) -> SelectorResult:
            return self._select(choices, query)

        def _get_prompts(self) -> dict[str, Any]:
            return {}

        def _update_prompts(self, prompts: Any) -> None: ...

    router = RouterQueryEngine(First(), [tool], llm=KVMemLLM(mem=mem))
    assert str(router.query("When is it due?")) == str(engine.query("When is it due?"))

    class Ask(BaseQuestionGenerator):
        def generate(self, tools: Any, query: QueryBundle) -> list[SubQuestion]:
            return [SubQuestion(sub_question=q, tool_name="lease") for q in ("When is it due?", "How many boilers?")]

        async def agenerate(self, tools: Any, query: QueryBundle) -> list[SubQuestion]:
            return self.generate(tools, query)

        def _get_prompts(self) -> dict[str, Any]:
            return {}

        def _update_prompts(self, prompts: Any) -> None: ...

    llm = KVMemLLM(mem=mem, max_new_tokens=4)
    both = SubQuestionQueryEngine.from_defaults([tool], llm=llm, question_gen=Ask(), use_async=True)
    response = both.query("Due, and boilers?")
    assert len(response.source_nodes) >= 2
    assert any("How many boilers?" in n.node.get_content() for n in response.source_nodes)


def test_pages_without_text_are_left_out(mem: KVMem, caplog: pytest.LogCaptureFixture) -> None:
    """As loaders of PDF give them; that is logged. Two texts of one id are an error, and not the last of them."""
    pages = [Document(text="The rent is due.", id_="a"), Document(text=" ", id_="b")]
    response = KVMemQueryEngine.from_documents(pages, mem).query("When?")
    assert [found.node.ref_doc_id for found in response.source_nodes] == ["a"]
    assert "1 of 2 documents have no text" in caplog.text
    with pytest.raises(InputError, match="Two different"):
        KVMemQueryEngine.from_documents([Document(text=text, id_="c") for text in ("one", "two")], mem)
