"""What a component is given is what the model sees, and what LangChain's callers expect of a component."""

from __future__ import annotations

import asyncio
import copy
import math
import pickle
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from helpers import embed, prompts
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.exceptions import ContextOverflowError
from langchain_core.globals import set_llm_cache
from langchain_core.messages import ChatMessage, HumanMessage, SystemMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import BaseModel, ValidationError

from kvmem import AnswerTimeoutError, ClosedError, InputError, KVMem, LanguageModel, PromptTooLongError
from kvmem.testing import tiny_model
from langchain_kvmem import CachedContextChain, ChatKVMem, KVMemRetriever, KVMemStore


class Words(Embeddings):
    """Texts as counts of hashed words."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return embed(texts)

    def embed_query(self, text: str) -> list[float]:
        return embed([text])[0]


@pytest.fixture
def mem(model: LanguageModel) -> Iterator[KVMem]:
    with KVMem(model, None, max_tokens=4) as mem:
        yield mem


ROWS = [
    Document(page_content="A earns 100.", id="a", metadata={"t": "a", "title": "Salaries"}),
    Document(page_content="B earns 999.", id="b", metadata={"t": "b", "title": "Salaries"}),
]


def asked(chain: CachedContextChain, question: str = "Who earns what?", **inputs: Any) -> str:
    """What the model saw."""
    with prompts() as seen:
        chain.invoke({"input": question, **inputs})
    return "\n".join(seen)


def test_a_chain_answers_from_its_own_documents(mem: KVMem) -> None:
    """Whatever the engine or another chain holds, with equal ids too; nothing is added to the text."""
    mem.add("Somebody else earns 1.")
    one = CachedContextChain.from_documents(ROWS[:1], mem)
    two = CachedContextChain.from_documents([Document(page_content="C earns 5.", id="a")], mem)
    for _ in range(2):
        seen = asked(one)
        assert "A earns 100." in seen
        assert not any(other in seen for other in ("Somebody", "C earns", "B earns", "Salaries"))
        assert "A earns 100." not in asked(two)
    history = [("human", "Hi"), ("ai", "Hello")]
    assert "Somebody" not in asked(one, chat_history=history)
    assert "Somebody" in asked(CachedContextChain(mem))
    assert "Somebody" in asked(CachedContextChain(mem), chat_history=history)
    one.add_documents(ROWS[1:])
    assert "B earns 999." in asked(one)


def test_a_named_collection_is_synchronised(model: LanguageModel, tmp_path: Path) -> None:
    """After a restart, what is not given any more is gone from the prompt and from the store."""
    with KVMem(model, tmp_path / "kv", max_tokens=4) as mem:
        CachedContextChain.from_documents(ROWS, mem, collection="pay")
        before = mem.stats().store.entries
    with KVMem(model, tmp_path / "kv", max_tokens=4) as mem:
        changed = Document(page_content="A earns 101.", id="a")
        seen = asked(CachedContextChain.from_documents([changed], mem, collection="pay"))
        assert ("A earns 101." in seen, "A earns 100." in seen, "B earns" in seen) == (True, False, False)
        assert [document.text for document in mem.collection("pay").list()] == ["A earns 101."]
        assert mem.stats().store.entries <= before


@pytest.mark.parametrize("window", ["whole", "retrieve"])
def test_a_filtered_retriever_is_always_asked(window: str, model: LanguageModel) -> None:
    """A row of another tenant is in no prompt, though it was given, and though all fit."""
    filler = "" if window == "whole" else " It is said in many words." * 60
    rows = [row.model_copy(update={"page_content": row.page_content + filler}) for row in ROWS]
    store = InMemoryVectorStore(Words())
    store.add_documents(rows)
    mine = store.as_retriever(search_kwargs={"filter": lambda document: document.metadata["t"] == "a"})
    with KVMem(tiny_model(max_position_embeddings=2600), None, max_tokens=4) as mem:
        chain = CachedContextChain.from_documents(rows, mem, retriever=mine)
        seen = asked(chain)
        assert ("A earns 100." in seen, "B earns 999." in seen) == (True, False)
        alone = CachedContextChain(mem, retriever=store.as_retriever(search_kwargs={"k": 1}))
        assert ("A earns" in asked(alone, "B earns?"), "B earns" in asked(alone, "B earns?")) == (False, True)


class Wrapped(BaseRetriever):
    """Stands for whatever wraps a retriever, or has rules of its own."""

    inner: BaseRetriever

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        return self.inner.invoke(query)


def test_a_retriever_that_may_leave_documents_out_is_always_asked(mem: KVMem) -> None:
    """Wrapped, with a threshold, with a tenant, or of kvmem with a scope; whatever the engine holds."""
    vectors = InMemoryVectorStore(Words())
    vectors.add_documents(ROWS)
    mem.add_all(ROWS)
    mem.collection("mine").add(ROWS[0])
    plain = vectors.as_retriever(search_kwargs={"filter": lambda document: document.metadata["t"] == "a"})
    for retriever in (
        plain,
        Wrapped(inner=plain),
        KVMemRetriever(mem=mem, documents={"t": "a"}),
        KVMemRetriever(mem=mem, collection="mine"),
        vectors.as_retriever(search_kwargs={"k": 1}),
    ):
        kept = CachedContextChain(mem, retriever=retriever)
        seen = asked(kept, "A earns?")
        assert ("A earns 100." in seen, "B earns 999." in seen) == (True, False), retriever
        if retriever.__class__ is not type(plain):
            seen = asked(CachedContextChain.from_documents(ROWS, mem, retriever=retriever), "A earns?")
            assert ("A earns 100." in seen, "B earns 999." in seen) == (True, False), retriever
    whole = CachedContextChain.from_documents(ROWS, mem, retriever=vectors.as_retriever(search_kwargs={"k": 1}))
    assert "B earns 999." in asked(whole, "A earns?")


@pytest.mark.parametrize("wanted", [{"t": "a"}, ["a"]])
def test_a_filter_holds_for_what_a_retriever_returns(wanted: Any) -> None:
    """Where not all fit, too: by metadata and by id; a context that is given is never replaced."""
    rows = [row.model_copy(update={"page_content": row.page_content + " Many words." * 200}) for row in ROWS]
    vectors = InMemoryVectorStore(Words())
    vectors.add_documents(rows)
    with KVMem(tiny_model(max_position_embeddings=2600), None, max_tokens=4) as mem:
        chain = CachedContextChain.from_documents(rows, mem, retriever=vectors.as_retriever(), filter=wanted)
        assert ("A earns" in (seen := asked(chain)), "B earns" in seen) == (True, False)
        chain = CachedContextChain(mem, retriever=Wrapped(inner=vectors.as_retriever()), filter=wanted)
        assert ("A earns" in (seen := asked(chain)), "B earns" in seen) == (True, False)
        chain = CachedContextChain.from_documents(rows, mem, retriever=vectors.as_retriever())
        with prompts() as given:
            chain.invoke({"input": "Who?"}, context=["C earns 555." + " Many words." * 600])
        assert ("C earns" in given[0] or "Many words" in given[0], "A earns" in given[0]) == (True, False)
        with pytest.raises(InputError, match="context and filter"):
            chain.invoke({"input": "Who?"}, context=["C"], filter=wanted)


def test_the_context_is_what_the_prompt_has() -> None:
    """Of retrieved documents that do not fit together, those are shown that the model saw."""
    rows = [Document(page_content=f"Row {n}." + " Many words." * 100, id=str(n)) for n in range(4)]
    vectors = InMemoryVectorStore(Words())
    vectors.add_documents(rows)
    with KVMem(tiny_model(max_position_embeddings=2600), None, max_tokens=4) as mem:
        chain = CachedContextChain(mem, retriever=vectors.as_retriever(search_kwargs={"k": 4}))
        with prompts() as seen:
            result = chain.invoke({"input": "Which row?"})
        assert len(result["context"]) > 0
        assert all(document.page_content.strip() in seen[0] for document in result["context"])
        assert result["plan"]["mode"] != "whole"


class Nested(BaseCallbackHandler):
    """Asks another model whenever one starts or says something, as a guard would."""

    def __init__(self, other: ChatKVMem) -> None:
        self.other, self.tokens = other, list[int]()

    def on_chat_model_start(self, *_: Any, **__: Any) -> None:
        self.tokens.append(self.other.invoke("hi", {"callbacks": []}).usage_metadata["input_tokens"])  # type: ignore[index]


def test_a_model_that_a_callback_asks_has_a_prompt_of_its_own(mem: KVMem) -> None:
    """And so has the chain."""
    chain = CachedContextChain.from_documents(ROWS, mem)
    with KVMem(tiny_model(), None, max_tokens=2) as engine:
        other = ChatKVMem(mem=engine)
        alone = other.invoke("hi").usage_metadata
        handler = Nested(other)
        result = chain.invoke({"input": "Who?"}, {"callbacks": [handler]})
    assert alone is not None
    assert handler.tokens == [alone["input_tokens"]]
    assert result["usage"]["input_tokens"] > alone["input_tokens"]


def test_a_filter_over_metadata_holds(mem: KVMem) -> None:
    """In chains, retrievers and the engine; ids, values, lists and ranges; one that matches nothing says so."""
    chain = CachedContextChain.from_documents(ROWS, mem, filter={"t": "b"})
    assert ("A earns" in (seen := asked(chain)), "B earns" in seen) == (False, True)
    with prompts() as prompt:
        chain.invoke({"input": "Who?"}, filter=["a"])
    assert ("A earns" in prompt[0], "B earns" in prompt[0]) == (True, False)
    mem.add("Old.", id="o", metadata={"year": 2019})
    mem.add("New.", id="n", metadata={"year": 2024})
    found = KVMemRetriever(mem=mem, documents={"year": {"$gte": 2020}}).invoke("New Old")
    assert [document.id for document in found] == ["n"]
    assert [s.document_id for s in mem.ask("?", documents={"year": {"$in": [2019]}}).sources] == ["o"]
    with pytest.raises(InputError, match="no document matches"):
        mem.ask("?", documents={"year": 1})


class Seen(BaseCallbackHandler):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.prompts: list[str] = []
        self.documents: list[Document] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.events.append("chat_model_start")
        self.prompts += [str(message.content) for message in messages[0]]

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.events.append("token")

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.events.append("llm_end")

    def on_retriever_start(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("retriever_start")

    def on_retriever_end(self, documents: Any, **kwargs: Any) -> None:
        self.events.append("retriever_end")
        self.documents += documents


async def test_callbacks_see_a_retriever_and_a_chat_model(mem: KVMem) -> None:
    """Once each, in order, with the documents and the prompt; usage is counted, and the result has it."""
    chain = CachedContextChain.from_documents(ROWS, mem)
    for way in ("invoke", "ainvoke", "stream", "astream"):
        seen = Seen()
        config: Any = {"callbacks": [seen]}
        with get_usage_metadata_callback() as usage:
            if way == "invoke":
                result = chain.invoke({"input": "Who?"}, config)
            elif way == "ainvoke":
                result = await chain.ainvoke({"input": "Who?"}, config)
            else:
                chunks = (
                    list(chain.stream({"input": "Who?"}, config))
                    if way == "stream"
                    else [chunk async for chunk in chain.astream({"input": "Who?"}, config)]
                )
                result = chunks[0]
                for chunk in chunks[1:]:
                    result = result + chunk
        order = [event for event in seen.events if event != "token"]
        assert order == ["retriever_start", "retriever_end", "chat_model_start", "llm_end"], way
        assert {document.id for document in seen.documents} == {"a", "b"}
        assert "A earns 100." in "".join(seen.prompts)
        counted = usage.usage_metadata[mem.model.name]
        assert result["usage"]["input_tokens"] == counted["input_tokens"] == result["plan"]["prompt_tokens"]
        assert result["plan"]["mode"] == "whole"


def test_the_system_prompt_is_a_template_of_the_input(mem: KVMem) -> None:
    """As in create_stuff_documents_chain; what is missing is an error, and doubled braces are text."""
    chain = CachedContextChain.from_documents(ROWS, mem, system_prompt="Answer in {language}. {{json}}")
    assert "Answer in French. {json}\n\nA earns" in asked(chain, language="French")
    with pytest.raises(InputError, match="language"):
        chain.invoke({"input": "Who?"})
    around = CachedContextChain.from_documents(ROWS[:1], mem, system_prompt="FACTS\n{context}END")
    assert "FACTS\nA earns 100.\n\nEND" in asked(around)
    with pytest.raises(InputError, match="template"):
        CachedContextChain(mem, system_prompt="An open { brace")
    with pytest.raises(InputError, match="no_such"):
        CachedContextChain(mem, no_such=1)


def test_sources_are_ranked_and_cut(mem: KVMem) -> None:
    """The most relevant first, with scores; top_sources says how many."""
    documents = [Document(page_content=f"Fact {n} tells of harbour {n * 7}.", id=str(n)) for n in range(9)]
    chain = CachedContextChain.from_documents(documents, mem, top_sources=2)
    context = chain.invoke({"input": "What of harbour 42?"})["context"]
    assert context[0].id == "6"
    assert len(context) == 2
    assert context[0].metadata["score"] > context[1].metadata["score"] >= 0
    answer = mem.ask("What of harbour 42?", collection=chain.collection)
    assert [source.document_id for source in answer.sources] == [str(n) for n in range(9)]
    assert answer.top_sources(1)[0].document_id == "6"


def test_a_prompt_that_is_too_long_is_langchains_error_too() -> None:
    """SummarizationMiddleware and deepagents catch ContextOverflowError only."""
    with KVMem(tiny_model(max_position_embeddings=300), None, max_tokens=4) as mem:
        chat = ChatKVMem(mem=mem)
        for call in (chat.invoke, lambda text: list(chat.stream(text)), lambda text: asyncio.run(chat.ainvoke(text))):
            with pytest.raises(ContextOverflowError) as error:
                call("word " * 400)
            assert isinstance(error.value, PromptTooLongError)


def test_arguments_that_do_not_exist_are_rejected() -> None:
    """With a hint where there is one; settings of KVMem are moved to model_kwargs with a warning."""
    for wrong, hint in (
        ({"max_new_tokens": 5}, "max_tokens"),
        ({"num_ctx": 5}, "window"),
        ({"no_such": 5}, "no_such"),
        ({"temperature": -1}, "temperature"),
        ({"blend": "typo"}, "blend"),
        ({"top_p": 2}, "top_p"),
        ({"model_kwargs": {"no_such": 1}}, "no_such"),
    ):
        with pytest.raises(ValidationError, match=hint):
            ChatKVMem(model="smollm2", **wrong)
    with pytest.warns(UserWarning, match="model_kwargs"):
        assert ChatKVMem(model="smollm2", threads=1).model_kwargs == {"threads": 1}
    chat = ChatKVMem(
        model="smollm2", device="cpu", dtype="float32", top_k=3, min_p=0.1, repetition_penalty=1.1, stop="\n"
    )
    assert (chat.stop, chat.top_k) == (["\n"], 3)


def test_options_reach_the_model(mem: KVMem) -> None:
    """At construction and at a call; unknown ones are transformers', whose error says so."""
    chat = ChatKVMem(mem=mem, temperature=1.0, top_k=1, seed=1, max_tokens=6)
    greedy = ChatKVMem(mem=mem, max_tokens=6)
    assert chat.invoke("Hi").content == greedy.invoke("Hi").content
    with pytest.raises(InputError, match="no_such"):
        greedy.invoke("Hi", no_such=1)
    with pytest.raises(InputError, match="top_p"):
        greedy.invoke("Hi", top_p=3)


def test_a_profile_is_known_before_the_first_call(saved_model: str) -> None:
    """Its window comes from the config; no weights are loaded; tool calling where the template knows tools."""
    chat = ChatKVMem(model=saved_model)
    assert chat.profile is not None
    assert chat.profile["max_input_tokens"] + chat.profile["max_output_tokens"] == 4096
    assert chat.profile["structured_output"] is True
    assert chat.profile["tool_calling"] is False
    from langchain.agents.middleware import SummarizationMiddleware

    assert SummarizationMiddleware(model=chat, trigger=("fraction", 0.8))
    chat.close()


def test_models_are_copied_pickled_shared_and_closed(saved_model: str, tmp_path: Path) -> None:
    """The usual pair of temperatures loads one model; the engine closes with the last."""
    with ChatKVMem(model=saved_model, store=str(tmp_path / "kv"), max_tokens=2) as cold:
        hot = ChatKVMem(model=saved_model, store=str(tmp_path / "kv"), temperature=0.7, max_tokens=2)
        copies = [copy.deepcopy(cold), pickle.loads(pickle.dumps(cold)), cold.model_copy(deep=True)]  # noqa: S301
        for chat in (cold, hot, *copies):
            assert chat.invoke("Hi").usage_metadata
        copies.append(copy.deepcopy(cold))
        engine = cold.engine
        assert all(chat.engine is engine for chat in (hot, *copies))
        anna = ChatKVMem(model=saved_model, namespace="anna", max_tokens=2)
        assert anna.engine is not engine
        assert anna.engine.model is engine.model
        for chat in (hot, *copies):
            chat.close()
        assert cold.invoke("Hi").usage_metadata
    with pytest.raises(ClosedError):
        engine.ask("?", context=["x"])
    anna.close()


def test_closing_a_copy_leaves_the_original_open(saved_model: str) -> None:
    """However it was copied."""
    with ChatKVMem(model=saved_model, max_tokens=2) as first:
        engine = first.engine
        for copied in (first.model_copy(), copy.copy(first), copy.deepcopy(first), first.model_copy(deep=True)):
            assert copied.engine is engine
            copied.close()
            assert not engine.closed
    assert engine.closed


def test_what_an_open_engine_has_decided_is_not_given_again(mem: KVMem) -> None:
    """At construction, and not at the first call; nothing is ignored."""
    for beside in (
        {"model": "something-else"},
        {"store": "./kv"},
        {"device": "cuda:7"},
        {"dtype": "float32"},
        {"max_retries": 9},
        {"namespace": "anna"},
        {"model_kwargs": {"kv_dtype": "int8"}},
    ):
        with pytest.raises((InputError, ValidationError), match="mem has its own"):
            ChatKVMem(mem=mem, **beside)  # type: ignore[arg-type]
    assert ChatKVMem(mem=mem, model=mem.model.name).engine is mem


def test_langchains_cache_gives_no_answer_from_other_documents(mem: KVMem) -> None:
    """Where documents or a conversation are bound; plain prompts are cached."""
    set_llm_cache(InMemoryCache())
    try:
        kept = mem.collection("rows")
        kept.add("A earns 100.", id="a")
        chat = ChatKVMem(mem=mem)
        bound = chat.bind(collection="rows")
        with prompts() as seen:
            bound.invoke("Who?")
            kept.add("A earns 101.", id="a")
            bound.invoke("Who?")
            chat.bind(thread="t").invoke("Hello")
            chat.bind(thread="t").invoke("Hello")
        assert ["100" in seen[0], "101" in seen[1], len(seen)] == [True, True, 4]
        assert len(mem.history("t")) == 2
        with prompts() as seen:
            chat.invoke("Hello")
            chat.invoke("Hello")
        assert len(seen) == 1
    finally:
        set_llm_cache(None)


def test_a_batch_tells_histories_apart(mem: KVMem) -> None:
    """Two that differ in who said something only; a time-out is told once."""
    chat = ChatKVMem(mem=mem, max_tokens=6)
    inputs: list[Any] = [
        [HumanMessage("When?"), ChatMessage("At nine.", role=role), HumanMessage("Sure?")]
        for role in ("assistant", "user")
    ]
    with prompts() as seen:
        alone = [chat.invoke(item).content for item in inputs]
    assert seen[0] != seen[1]
    assert [message.content for message in chat.batch(inputs)] == alone
    slow = ChatKVMem(mem=mem, timeout=1e-9)
    with pytest.raises(AnswerTimeoutError):
        slow.batch(["One?", "Two?"])
    found = slow.batch(["One?", "Two?"], return_exceptions=True)
    assert [type(error) for error in found] == [AnswerTimeoutError] * 2


def test_a_batch_is_decoded_together(mem: KVMem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that differ in their last part, sync and async; with the answers that each has alone."""
    chat = ChatKVMem(mem=mem, max_tokens=6)
    facts = "The ferry leaves at nine and comes back at six in the evening. " * 3
    inputs: list[Any] = [[SystemMessage(facts), HumanMessage(f"What of {n}?")] for n in ("boats", "fish", "rope")]
    alone = [chat.invoke(item).content for item in inputs]
    calls: list[int] = []
    real = mem.batch
    monkeypatch.setattr(mem, "batch", lambda *args, **options: calls.append(len(args[0])) or real(*args, **options))
    seen = Seen()
    assert [message.content for message in chat.batch(inputs, {"callbacks": [seen]})] == alone
    assert seen.events.count("chat_model_start") == seen.events.count("llm_end") == 3
    assert [message.content for message in asyncio.run(chat.abatch(inputs))] == alone
    assert calls == [3, 3]
    found = chat.batch([*inputs, [HumanMessage("")]], return_exceptions=True)
    assert [getattr(item, "content", None) for item in found] == [*alone, None]


def test_numbers_are_finite_and_schemas_are_objects(mem: KVMem) -> None:
    """Whatever a random model writes; an Enum is no object."""

    class Measure(BaseModel):
        value: float

    chat = ChatKVMem(mem=mem, max_tokens=300, temperature=1.0)
    for seed in range(12):
        model = ChatKVMem(mem=mem, max_tokens=300, temperature=1.0, seed=seed).with_structured_output(Measure)
        assert math.isfinite(model.invoke("How much?").value)  # type: ignore[union-attr]

    class Mood(Enum):
        CALM = "calm"

    with pytest.raises(InputError, match="Enum"):
        chat.with_structured_output(Mood)


async def test_scores_of_the_store_are_similarities(mem: KVMem) -> None:
    """With an embedding function, sync or async; several fields count by the best; what has no text comes last."""

    async def only_async(texts: list[str]) -> list[list[float]]:
        return embed(texts)

    store = KVMemStore(mem, index={"dims": 64, "embed": embed, "fields": ["a", "b"]})
    assert store.index_config is not None
    assert store.index_config["dims"] == 64
    store.put(("n",), "one", {"a": "Zebra", "b": "A Long text of Other words"})
    store.put(("n",), "two", {"a": "Something Else"})
    store.put(("n",), "three", {"a": "Zebra"}, index=False)
    found = store.search(("n",), query="Zebra")
    assert [item.key for item in found] == ["one", "two", "three"]
    assert found[0].score == pytest.approx(1.0, abs=1e-3)
    assert found[1].score is not None
    assert -1 <= found[1].score < 0.9
    assert found[2].score is None
    later = KVMemStore(mem, index={"dims": 64, "embed": only_async, "fields": ["a", "b"]})
    await later.aput(("m",), "one", {"a": "Zebra"})
    assert (await later.asearch(("m",), query="Zebra"))[0].score == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(InputError, match="JSON"):
        store.batch([_put(("n",), "good", {"a": "x"}), _put(("n",), "bad", {1: "x", "k": 2})])
    assert store.get(("n",), "good") is None


def _put(namespace: tuple[str, ...], key: str, value: Any) -> Any:
    from langgraph.store.base import PutOp

    return PutOp(namespace, key, value)


class Nothing(BaseRetriever):
    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        return []


def test_a_retriever_that_finds_nothing_leaves_the_context_empty(mem: KVMem) -> None:
    """As with create_retrieval_chain; a chain without documents is an error."""
    result = CachedContextChain(mem, retriever=Nothing()).invoke({"input": "Who?"})
    assert result["context"] == []
    assert isinstance(result["answer"], str)
    with pytest.raises(InputError, match="no documents"):
        CachedContextChain.from_documents([], mem).invoke({"input": "Who?"})
