"""What a component is given is what the model sees: beside LlamaIndex's own components, on the same nodes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
from helpers import embed, prompts
from llama_index.core import Document, MockEmbedding, PromptTemplate, Settings, StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.node_parser import HierarchicalNodeParser, SentenceWindowNodeParser, get_leaf_nodes
from llama_index.core.postprocessor import MetadataReplacementPostProcessor, SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import QueryEngineTool
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from pydantic import BaseModel

from kvmem import ClosedError, InputError, KVMem, LanguageModel
from kvmem.testing import tiny_model
from llama_index_kvmem import KVMemChatEngine, KVMemLLM, KVMemQueryEngine
from llama_index_kvmem.convert import to_text


class Words(BaseEmbedding):
    """Texts as counts of hashed words."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return embed([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return embed([query])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return embed([query])[0]


def node(text: str, identity: str, **metadata: Any) -> TextNode:
    return TextNode(text=text, id_=identity, metadata=metadata)


def index_of(*nodes: Any) -> VectorStoreIndex:
    return VectorStoreIndex(list(nodes), embed_model=Words())


def asked(engine: Any, question: str = "Who earns what?") -> str:
    """What the model saw."""
    with prompts() as seen:
        response = engine.query(question)
        getattr(response, "get_response", lambda: None)()
    return "\n".join(seen)


@pytest.fixture
def mem(model: LanguageModel) -> Iterator[KVMem]:
    with KVMem(model, None, max_tokens=4) as mem:
        yield mem


ROWS = [("A earns 100.", "a", 1), ("B earns 999.", "b", 2), ("C earns 555.", "c", 3)]
FILTERS: dict[str, tuple[MetadataFilters, str]] = {
    "equal": (MetadataFilters(filters=[MetadataFilter(key="t", value="a")]), "a"),
    "in": (MetadataFilters(filters=[MetadataFilter(key="t", value=["a", "c"], operator=FilterOperator.IN)]), "ac"),
    "range": (MetadataFilters(filters=[MetadataFilter(key="n", value=2, operator=FilterOperator.GTE)]), "bc"),
    "or": (
        MetadataFilters(
            filters=[MetadataFilter(key="t", value="a"), MetadataFilter(key="n", value=3)], condition=FilterCondition.OR
        ),
        "ac",
    ),
    "none": (MetadataFilters(filters=[MetadataFilter(key="t", value="z")]), ""),
}


def rows(filler: str = "") -> list[TextNode]:
    return [node(text + filler, name, t=name, n=n) for text, name, n in ROWS]


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("window", ["whole", "retrieve"])
@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "simple_summarize", "accumulate"])
def test_a_filter_holds_in_every_mode(name: str, window: str, mode: str, model: LanguageModel) -> None:
    """Equality, lists, ranges and conditions, whether or not everything fits: no row of another tenant."""
    wanted, kept = FILTERS[name]
    small = model if window == "whole" else tiny_model(max_position_embeddings=2600)
    filler = "" if window == "whole" else " It is said in many words." * 25
    with KVMem(small, None, max_tokens=4) as mem:
        options = {"filters": wanted, "similarity_top_k": 3}
        engine = KVMemQueryEngine.from_index(index_of(*rows(filler)), mem, retriever_kwargs=options, response_mode=mode)
        seen = asked(engine)
    for text, row, _ in ROWS:
        assert (text in seen) == (row in kept), (row, seen)


def test_two_indexes_with_one_engine_answer_each_from_its_own(mem: KVMem) -> None:
    """Also where ids are the same, and whatever else the engine has read."""
    mem.add("Somebody else earns 1.")
    one, two = index_of(node("A earns 100.", "x")), index_of(node("B earns 999.", "x"))
    llm = KVMemLLM(mem=mem, max_new_tokens=4)
    first, second = KVMemQueryEngine.from_index(one, llm), KVMemQueryEngine.from_index(two, llm)
    for _ in range(2):
        assert ("100" in asked(first), "999" in asked(first)) == (True, False)
        assert ("100" in asked(second), "999" in asked(second)) == (False, True)
        assert "Somebody" not in asked(first) + asked(second)
    documents = KVMemQueryEngine.from_documents([Document(text="C earns 5.")], mem, max_tokens=4)
    assert "C earns 5." in asked(documents)
    assert "100" not in asked(documents)


def test_a_retriever_is_asked_whatever_the_store_holds(mem: KVMem) -> None:
    """from_args answers from the retriever's nodes and nothing else."""
    mem.add("Somebody else earns 1.")
    engine = KVMemQueryEngine.from_args(index_of(*rows()).as_retriever(similarity_top_k=1), mem)
    seen = asked(engine, "B earns?")
    assert "B earns 999." in seen
    assert not any(other in seen for other in ("Somebody", "A earns", "C earns"))


def test_what_leaves_or_changes_in_the_index_does_so_in_the_prompt(model: LanguageModel, tmp_path: Path) -> None:
    """At the next query, and after a restart; nothing of it is left in the store's files."""
    whole = [RelatedNodeInfo(node_id=f"doc-{n}") for n in range(3)]
    nodes = rows()
    for part, origin in zip(nodes, whole, strict=True):
        part.relationships[NodeRelationship.SOURCE] = origin
    index = index_of(*nodes)
    with KVMem(model, tmp_path / "kv", max_tokens=4) as mem:
        engine = KVMemQueryEngine.from_index(index, mem, collection="pay")
        assert "A earns 100." in asked(engine)
        index.delete_ref_doc("doc-0", delete_from_docstore=True)
        assert "A earns 100." not in asked(engine)
        index.docstore.add_documents([node("B earns 777.", "b", t="b", n=2)])
        seen = asked(engine)
        assert ("B earns 999." in seen, "B earns 777." in seen) == (False, True)
    index.delete_nodes(["c"], delete_from_docstore=True)
    with KVMem(model, tmp_path / "kv", max_tokens=4) as mem:
        seen = asked(KVMemQueryEngine.from_index(index, mem, collection="pay"))
        assert [text in seen for text in ("A earns", "B earns 777.", "C earns")] == [False, True, False]
        assert [document.id for document in mem.collection("pay").list()] == ["b"]
        kept = mem.stats().store.entries
        for text in ("A earns 100.", "C earns 555."):
            mem.forget_text(text)
        assert mem.stats().store.entries == kept


def test_an_index_of_hierarchical_nodes_is_read_once(mem: KVMem) -> None:
    """Leaves are in the index; parents in its docstore are not."""
    parser = HierarchicalNodeParser.from_defaults(chunk_sizes=[128, 64, 32], chunk_overlap=0)
    text = " ".join(f"Sentence number {n} tells of boat {n * 7}." for n in range(20))
    nodes = parser.get_nodes_from_documents([Document(text=text, id_="d")])
    storage = StorageContext.from_defaults()
    storage.docstore.add_documents(nodes)
    index = VectorStoreIndex(get_leaf_nodes(nodes), storage_context=storage, embed_model=Words())
    seen = asked(KVMemQueryEngine.from_index(index, mem))
    assert all(seen.count(f"number {n} tells") == 1 for n in range(20))


class Redact(BaseNodePostprocessor):
    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None) -> Any:
        for found in nodes:
            found.node.set_content(found.node.get_content().replace("100", "[hidden]"))  # type: ignore[attr-defined]
        return nodes


def test_postprocessors_run_in_every_mode(mem: KVMem) -> None:
    """Redaction, cut-offs of similarity, and windows of sentences, as RetrieverQueryEngine applies them."""
    index = index_of(*rows())
    engine = KVMemQueryEngine.from_index(index, mem, node_postprocessors=[Redact()])
    for _ in range(2):
        assert ("100" in asked(engine), "[hidden]" in asked(engine)) == (False, True)
    options = {"similarity_top_k": 3}
    cut = [SimilarityPostprocessor(similarity_cutoff=0.5)]
    ours = KVMemQueryEngine.from_index(index, mem, retriever_kwargs=options, node_postprocessors=cut)
    theirs = RetrieverQueryEngine.from_args(
        index.as_retriever(**options), llm=KVMemLLM(mem=mem, max_new_tokens=4), node_postprocessors=cut
    )
    question = "A earns 100."
    pairs = [{(n.node.node_id, n.score) for n in one.query(question).source_nodes} for one in (ours, theirs)]
    assert pairs[0] == pairs[1]
    text = "The sea was flat. The dog slept. The rent is due. The lamps are old. The boat left."
    windows = SentenceWindowNodeParser.from_defaults(window_size=1).get_nodes_from_documents([Document(text=text)])
    swap = [MetadataReplacementPostProcessor(target_metadata_key="window")]
    engine = KVMemQueryEngine.from_index(index_of(*windows), mem, node_postprocessors=swap)
    assert "The dog slept.  The rent is due.  The lamps are old." in asked(engine)


def test_the_model_sees_metadata_as_llama_index_shows_it(mem: KVMem) -> None:
    """Keys, exclusions and templates; a document that is cut shows its metadata with every piece."""
    special = TextNode(
        text="The pump.",
        id_="p",
        metadata={"author": "Okonkwo", "secret": "x9"},
        excluded_llm_metadata_keys=["secret"],
        metadata_template="<{key}={value}>",
        text_template="{content}\nBY {metadata_str}",
    )
    for engine in (
        KVMemQueryEngine.from_index(index_of(special), mem),
        KVMemQueryEngine.from_args(index_of(special).as_retriever(), mem),
        KVMemQueryEngine.from_documents([special], mem),
    ):
        seen = asked(engine)
        assert "The pump.\nBY <author=Okonkwo>" in seen
        assert "x9" not in seen
    long = Document(text="Word. " * 300, metadata={"source": "log.md"}, excluded_llm_metadata_keys=[])
    seen = asked(KVMemQueryEngine.from_documents([long], mem))
    assert seen.count("source: log.md") > 1


def test_the_llm_that_is_given_is_the_one_that_answers(mem: KVMem) -> None:
    """Its length, system prompt and temperature; Settings.llm where none is given; options of the engine win."""
    index = index_of(*rows())
    llm = KVMemLLM(mem=mem, max_new_tokens=3, system_prompt="Speak like a pirate.")
    engine = KVMemQueryEngine.from_index(index, llm)
    assert "Speak like a pirate." in asked(engine)
    assert engine.query("Who?").metadata["usage"]["generated"] == 3  # type: ignore[index]
    shorter = KVMemQueryEngine.from_index(index, llm, max_tokens=2)
    assert shorter.query("Who?").metadata["usage"]["generated"] == 2  # type: ignore[index]
    assert llm.max_new_tokens == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settings, "_llm", llm)
        assert "pirate" in asked(KVMemQueryEngine.from_index(index))
        assert "pirate" in asked(KVMemQueryEngine.from_args(index.as_retriever()))
    with pytest.raises(InputError, match="keeps no caches"):
        KVMemQueryEngine.from_index(index, llama_index.core.llms.MockLLM())  # type: ignore[arg-type]
    for wrong in ({"temperature": -1}, {"blend": "typo"}, {"max_tokens": 0}, {"no_such": 1}):
        with pytest.raises(InputError):
            KVMemQueryEngine.from_index(index, mem, **wrong)


class Events(BaseEventHandler):
    seen: list[str]

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.seen.append(event.class_name())


@contextmanager
def events() -> Iterator[list[str]]:
    handler = Events(seen=[])
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(handler)
    try:
        yield handler.seen
    finally:
        dispatcher.event_handlers.remove(handler)


async def test_observers_see_what_they_see_of_retriever_query_engine(mem: KVMem) -> None:
    """The same events and callbacks, sync, async and streamed; tokens are counted."""
    counter, debug = TokenCountingHandler(), LlamaDebugHandler(print_trace_on_end=False)
    before, Settings.callback_manager = Settings.callback_manager, CallbackManager([counter, debug])
    try:
        retriever = index_of(*rows()).as_retriever(similarity_top_k=3)
        found: list[Any] = []
        for cls in (RetrieverQueryEngine, KVMemQueryEngine):
            engine = cls.from_args(retriever, KVMemLLM(mem=mem, max_new_tokens=3))
            counter.reset_counts()
            debug.flush_event_logs()
            with events() as seen:
                engine.query("Who earns?")
                await engine.aquery("Who earns?")
            logged = debug.get_events()
            told = [(event.event_type.value, sorted(p.value for p in event.payload or {})) for event in logged]
            # LlamaIndex cuts the nodes to size in every query; ours are sized by their caches.
            told = [pair for pair in told if pair[0] != "chunking"]
            found.append((seen, told, counter.total_llm_token_count))
        assert found[0][0] == found[1][0]
        assert found[0][1] == found[1][1]
        assert found[1][2] > 100
        with events() as seen:
            streamed = KVMemQueryEngine.from_args(retriever, KVMemLLM(mem=mem, max_new_tokens=3), streaming=True)
            "".join(streamed.query("Who earns?").response_gen)  # type: ignore[union-attr]
        assert {"QueryStartEvent", "RetrievalEndEvent", "SynthesizeStartEvent", "LLMChatEndEvent"} <= set(seen)
        with events() as seen:
            KVMemChatEngine.from_documents([Document(text="The rent is due.")], mem, max_tokens=3).chat("When?")
        assert {"RetrievalStartEvent", "SynthesizeEndEvent", "LLMChatStartEvent"} <= set(seen)
    finally:
        Settings.callback_manager = before


class Asks(BaseEventHandler):
    """Asks the same LLM whenever an answer begins, as a guard would."""

    llm: Any
    tokens: list[int]
    busy: bool = False

    def handle(self, event: Any, **kwargs: Any) -> None:
        if event.class_name() == "LLMPredictStartEvent" and not self.busy:
            self.busy = True
            self.tokens.append(self.llm.complete("hi").raw["usage"]["prompt"])
            self.busy = False


def test_an_llm_that_an_event_handler_asks_has_a_prompt_of_its_own(mem: KVMem) -> None:
    """And the response tells of its own prompt."""
    llm = KVMemLLM(mem=mem, max_new_tokens=3)
    alone = llm.complete("hi").raw["usage"]["prompt"]  # type: ignore[index]
    engine = KVMemQueryEngine.from_args(index_of(*rows()).as_retriever(similarity_top_k=3), llm)
    expected = (engine.query("Who earns?").metadata or {})["usage"]["prompt"]
    handler, dispatcher = Asks(llm=llm, tokens=[]), get_dispatcher()
    dispatcher.add_event_handler(handler)
    try:
        told = engine.query("Who earns?").metadata or {}
    finally:
        dispatcher.event_handlers.remove(handler)
    assert handler.tokens == [alone]
    assert told["usage"]["prompt"] == expected > alone


def test_a_response_says_nothing_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that failed, or whose text a synthesizer returned by itself."""
    long = [node(f"Row {n}." + " Many words." * 250, str(n)) for n in range(3)]
    with KVMem(tiny_model(max_position_embeddings=2600), None, max_tokens=3) as mem:
        llm = KVMemLLM(mem=mem, max_new_tokens=3)
        short = KVMemQueryEngine.from_args(index_of(*rows()).as_retriever(), llm)
        with monkeypatch.context() as patch:
            patch.setattr(KVMem, "stream_prompt", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("failed")))
            with pytest.raises(RuntimeError, match="failed"):
                short.query("Who?")
        refined = KVMemQueryEngine.from_args(index_of(*long).as_retriever(similarity_top_k=3), llm)
        assert "usage" not in (refined.query("Which row?").metadata or {})


def test_options_are_honoured_or_refused(mem: KVMem) -> None:
    """By every response mode, and beside a synthesizer, an engine or a retriever that was given."""
    index = index_of(*rows())
    retriever = index.as_retriever(similarity_top_k=3)
    for mode in ("compact", "tree_summarize", "accumulate"):
        engine = KVMemQueryEngine.from_args(retriever, mem, response_mode=mode, top_sources=1)
        assert len(engine.query("Who?").source_nodes) == 1
    synthesizer = get_response_synthesizer(llm=KVMemLLM(mem=mem, max_new_tokens=3))
    for option in ({"streaming": True}, {"max_tokens": 1}, {"system": "Be brief."}, {"response_mode": "refine"}):
        with pytest.raises(InputError, match="response_synthesizer has its own"):
            KVMemQueryEngine.from_args(retriever, mem, synthesizer, **option)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="response_synthesizer has its own"):
            KVMemQueryEngine(mem, response_synthesizer=synthesizer, **option)  # type: ignore[arg-type]
    cut = KVMemQueryEngine.from_args(retriever, mem, synthesizer, top_sources=1)
    assert len(cut.query("Who?").source_nodes) == 1
    for beside in ({"model": object()}, {"tokenizer": object()}, {"model_name": "other"}, {"store": "./kv"}):
        with pytest.raises(InputError):
            KVMemLLM(mem, **beside)
    with pytest.raises(InputError, match="tokenizer"):
        KVMemLLM(tokenizer=object())


def test_a_conversation_over_documents_asks_a_retriever_that_may_leave_some_out(mem: KVMem) -> None:
    """One that only ranks is not asked while all fit, and the documents are what is answered from."""
    documents = [Document(text=text, doc_id=name) for text, name, _ in ROWS]
    theirs = index_of(node("D earns 111.", "d"))
    for retriever, expected in ((theirs.as_retriever(), "A earns"), (Fixed(), "F earns")):
        chat = KVMemChatEngine.from_documents(documents, mem, retriever=retriever, max_tokens=3)
        with prompts() as seen:
            chat.chat("Who?")
        assert expected in seen[0]
        assert "D earns" not in seen[0]


class Fixed(BaseRetriever):
    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=node("F earns 5.", "f"), score=1.0)]


class Person(BaseModel):
    name: str
    age: int
    tags: list[str]


def test_streamed_structures_are_always_valid(mem: KVMem) -> None:
    """Sync and async, with whatever seed."""
    llm = KVMemLLM(mem=mem, max_new_tokens=200, temperature=1.0)
    template = PromptTemplate("Who is it? {text}")
    for seed in range(5):
        found = list(llm.stream_structured_predict(Person, template, {"seed": seed}, text="A."))
        assert found
        assert all(isinstance(one, Person) for one in found)
        assert all(one.name is not None and isinstance(one.age, int) for one in found)


async def test_streamed_structures_are_valid_in_async_code(mem: KVMem) -> None:
    """And behind as_structured_llm."""
    llm = KVMemLLM(mem=mem, max_new_tokens=200)
    stream = await llm.astream_structured_predict(Person, PromptTemplate("Who? {text}"), text="A.")
    found = [one async for one in stream]
    assert found
    assert all(isinstance(one, Person) for one in found)
    structured = llm.as_structured_llm(Person)
    engine = KVMemQueryEngine.from_args(index_of(*rows()).as_retriever(), structured)
    assert isinstance(engine.query("Who?").response, Person)


@pytest.fixture
def no_global_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)


@pytest.mark.usefixtures("no_global_tokenizer")
@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "refine"])
def test_llama_index_counts_with_the_models_tokenizer(mode: str) -> None:
    """Texts that take several times more tokens than LlamaIndex's own tokenizer says are cut, and answered from."""
    small = tiny_model(max_position_embeddings=4096)
    texts = ["Маяк светит каждую ночь, и смотритель живёт рядом с ним. " * 12 for _ in range(4)]
    with KVMem(small, None, max_tokens=4) as mem:
        index = index_of(*(node(text + str(n), str(n)) for n, text in enumerate(texts)))
        llm = KVMemLLM(mem=mem, max_new_tokens=4)
        engine = index.as_query_engine(llm=llm, similarity_top_k=4, response_mode=mode)
        with prompts() as seen:
            assert str(engine.query("Кто живёт рядом?")) != "Empty Response"
        assert len(seen) > 1


def test_an_llm_is_copied_pickled_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies share one engine, which is closed with the last of them."""
    opened: list[KVMem] = []

    def opening(*_: Any, **__: Any) -> KVMem:
        opened.append(KVMem(tiny_model(), tmp_path / f"kv{len(opened)}", max_tokens=4))
        return opened[-1]

    monkeypatch.setattr("kvmem.sharing.open_engine", opening)
    cold, hot = KVMemLLM(model_name="x"), KVMemLLM(model_name="x", temperature=0.7)
    copies = [copy.deepcopy(cold), pickle.loads(pickle.dumps(cold)), cold.model_copy(deep=True)]  # noqa: S301
    for llm in (cold, hot, *copies):
        assert llm.complete("Hi").text is not None
    copies.append(copy.deepcopy(cold))
    assert len(opened) == 1
    other = KVMemLLM(model_name="x", namespace="anna")
    assert other.engine is not cold.engine
    for llm in (cold, *copies):
        llm.close()
    assert hot.complete("Hi").text is not None
    hot.close()
    with pytest.raises(ClosedError):
        opened[0].ask("?", context=["x"])
    other.close()


def test_source_nodes_are_the_nodes_themselves(mem: KVMem) -> None:
    """Offsets, exclusions, relationships and scores; the most relevant first when they are cut."""
    source = Document(text="Alpha one. " * 40 + "Beta two. " * 40, id_="doc", excluded_llm_metadata_keys=["k"])
    source.metadata["k"] = "v"
    engine = KVMemQueryEngine.from_documents([source], mem)
    for found in engine.query("Beta?").source_nodes:
        part: Any = found.node
        assert source.text[part.start_char_idx : part.end_char_idx] == part.text
        assert part.excluded_llm_metadata_keys == ["k"]
        assert part.ref_doc_id == "doc"
        assert isinstance(found.score, float)
    one = KVMemQueryEngine.from_documents([source], mem, top_sources=1).query("Beta?").source_nodes
    assert len(one) == 1
    assert "Beta" in to_text(one[0].node)
    linked = node("A earns 100.", "a", t="a")
    linked.relationships[NodeRelationship.NEXT] = RelatedNodeInfo(node_id="b")
    (found,) = KVMemQueryEngine.from_index(index_of(linked), mem).query("Who?").source_nodes
    assert found.node.next_node is not None
    assert found.node.hash == linked.hash


def test_templates_are_honoured(mem: KVMem) -> None:
    """text_qa_template, get_prompts and update_prompts, as in LlamaIndex; the nodes in it are cached."""
    index = index_of(*rows())
    template = PromptTemplate("FACTS\n{context_str}\nEND\nASK {query_str}")
    engine = KVMemQueryEngine.from_index(index, mem, text_qa_template=template)
    assert "FACTS\nt: a\nn: 1\n\nA earns 100." in asked(engine)
    assert engine.query("Who?").metadata["usage"]["exact"] > 60  # type: ignore[index]
    assert engine.get_prompts()["response_synthesizer:text_qa_template"].get_template() == template.get_template()
    engine.update_prompts({"response_synthesizer:text_qa_template": PromptTemplate("NOW {context_str} {query_str}")})
    assert "NOW t: a" in asked(engine)
    assert KVMemQueryEngine.from_index(index, mem).get_prompts().keys() == (
        index.as_query_engine(llm=KVMemLLM(mem=mem)).get_prompts().keys()
    )


def test_base_models_and_own_templates_are_served(mem: KVMem) -> None:
    """query_wrapper_prompt, completion_to_prompt, messages_to_prompt, and no chat template at all."""
    wrapped = KVMemLLM(mem=mem, max_new_tokens=2, query_wrapper_prompt=PromptTemplate("<q>{query_str}</q>"))
    own = KVMemLLM(
        mem=mem,
        max_new_tokens=2,
        messages_to_prompt=lambda messages: "|".join(str(m.content) for m in messages),
        completion_to_prompt=lambda text: f"[{text}]",
    )
    base = KVMemLLM(mem=mem, max_new_tokens=2, is_chat_model=False)
    with prompts() as seen:
        wrapped.complete("Hi")
        own.complete("Hi")
        own.chat([llama_index.core.llms.ChatMessage(content="Yo")])
        base.complete("Once upon a time")
    bos = "<|bos|>"
    assert [text.removeprefix(bos) for text in seen] == ["<q>Hi</q>", "[Hi]", "Yo", "Once upon a time"]
    assert "A earns 100." in asked(KVMemQueryEngine.from_index(index_of(*rows()), base))


def test_import_paths_are_those_of_llama_index() -> None:
    """Beside ours."""
    from llama_index.llms.kvmem import KVMemLLM as Same
    from llama_index.memory.kvmem import KVMemMemoryBlock

    assert Same is KVMemLLM
    assert KVMemMemoryBlock is not None


def test_router_and_sub_questions_answer_each_from_its_own(mem: KVMem) -> None:
    """With a selector that reads the descriptions."""
    from llama_index.core.base.base_selector import SelectorResult, SingleSelection
    from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion

    llm = KVMemLLM(mem=mem, max_new_tokens=4)
    one = KVMemQueryEngine.from_index(index_of(node("The lease begins in April.", "x")), llm)
    two = KVMemQueryEngine.from_index(index_of(node("The tank holds two litres.", "x")), llm)
    tools = [
        QueryEngineTool.from_defaults(one, name="lease", description="the lease and the rent"),
        QueryEngineTool.from_defaults(two, name="manual", description="the machine and its tank"),
    ]

    class ByWords(LLMSingleSelector):
        def _select(self, choices: Any, query: QueryBundle) -> SelectorResult:
            asked = set(query.query_str.lower().strip("?").split())
            best = max(range(len(choices)), key=lambda i: len(asked & set(choices[i].description.split())))
            return SelectorResult(selections=[SingleSelection(index=best, reason="words")])

    router = RouterQueryEngine(ByWords.from_defaults(llm=llm), tools, llm=llm)
    assert "April" in (lease := asked(router, "When does the lease begin?"))
    assert "litres" not in lease
    assert "April" not in asked(router, "How much does the tank hold?")

    class Ask(BaseQuestionGenerator):
        def generate(self, tools: Any, query: QueryBundle) -> list[SubQuestion]:
            return [SubQuestion(sub_question=f"What of the {tool.name}?", tool_name=tool.name) for tool in tools]

        async def agenerate(self, tools: Any, query: QueryBundle) -> list[SubQuestion]:
            return self.generate(tools, query)

        def _get_prompts(self) -> dict[str, Any]:
            return {}

        def _update_prompts(self, prompts: Any) -> None: ...

    both = SubQuestionQueryEngine.from_defaults(tools, llm=llm, question_gen=Ask(), use_async=False)
    with prompts() as seen:
        both.query("Tell me of both.")
    assert [("April" in text, "litres" in text) for text in seen[:2]] == [(True, False), (False, True)]


def test_nothing_to_answer_from_is_the_frameworks_empty_response(mem: KVMem) -> None:
    """An empty index, a filter that matches nothing, nodes without text, an id that was deleted."""
    index = index_of(*rows())
    nothing = {"filters": FILTERS["none"][0]}
    assert str(KVMemQueryEngine.from_index(index_of(), mem).query("?")) == "Empty Response"
    assert str(KVMemQueryEngine.from_index(index, mem, retriever_kwargs=nothing).query("?")) == "Empty Response"
    engine = KVMemQueryEngine.from_index(index, mem)
    index.delete_nodes(["a", "b", "c"])
    assert str(engine.query("?")) == "Empty Response"
    streamed = KVMemQueryEngine.from_index(index_of(), mem, streaming=True).query("?")
    assert "".join(streamed.response_gen) == "Empty Response"  # type: ignore[union-attr]
    blank = KVMemQueryEngine.from_index(index_of(node(" ", "e"), *rows()), mem)
    assert "A earns 100." in asked(blank)
    with pytest.raises(InputError, match="MetadataFilters"):
        KVMemQueryEngine.from_index(index, mem, retriever_kwargs={"filters": {"t": "a"}})


def test_what_does_not_fit_at_all_is_refined_over(model: LanguageModel) -> None:
    """Retrieved nodes beyond the window are all shown, in several prompts, as by LlamaIndex."""
    small = tiny_model(max_position_embeddings=2600)
    with KVMem(small, None, max_tokens=4) as mem:
        nodes = [node(f"Fact {n}: " + f"word{n} " * 120, str(n)) for n in range(4)]
        engine = KVMemQueryEngine.from_args(index_of(*nodes).as_retriever(similarity_top_k=4), mem)
        with prompts() as seen:
            engine.query("Which?")
    assert len(seen) > 1
    assert all(any(f"Fact {n}:" in text for text in seen) for n in range(4))


def test_mock_embeddings_do(mem: KVMem) -> None:
    """An index whose vectors say nothing."""
    index = VectorStoreIndex(rows(), embed_model=MockEmbedding(embed_dim=3))
    assert "C earns 555." in asked(KVMemQueryEngine.from_index(index, mem))
