from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda

from kvmem import InputError, KVMem
from kvmem.testing import tiny_model
from langchain_kvmem import CachedContextChain, ChatKVMem

DOCUMENTS = [
    Document(page_content="The rent is due on the first day of the month.", metadata={"source": "lease"}, id="l"),
    Document(page_content="The machine has two boilers.", metadata={"source": "manual"}, id="m"),
]


@pytest.fixture
def chain(mem: KVMem) -> CachedContextChain:
    return CachedContextChain.from_documents(DOCUMENTS, mem, max_tokens=12)


def test_invoke_has_the_contract_of_a_retrieval_chain(chain: CachedContextChain) -> None:
    """The input is passed on, context are documents with their metadata, the answer is text."""
    result = chain.invoke({"input": "When is the rent due?", "other": 1})
    assert list(result) == ["input", "other", "context", "answer", "usage", "plan"]
    assert result["other"] == 1
    assert [d.metadata["source"] for d in result["context"]] == ["lease", "manual"]
    assert result["context"][0].metadata["document_id"] == "l"
    assert result["answer"] == chain.mem.ask("When is the rent due?", collection=chain.collection, max_tokens=12).text
    assert result["usage"]["input_tokens"] == result["plan"]["prompt_tokens"]


def test_streaming_comes_in_order_and_adds_up(chain: CachedContextChain) -> None:
    """Input, then context, then pieces; their sum is what invoke returns."""
    chunks = list(chain.stream({"input": "When?"}))
    assert [next(iter(chunk)) for chunk in chunks[:3]] == ["input", "context", "answer"]
    total: Any = None
    for chunk in chunks:
        total = chunk if total is None else total + chunk
    invoked = chain.invoke({"input": "When?"})
    assert total["answer"] == invoked["answer"]
    assert total["context"] == invoked["context"]


async def test_async_gives_the_same(chain: CachedContextChain) -> None:
    """ainvoke and astream equal their synchronous twins."""
    expected = chain.invoke({"input": "When?"})
    found = await chain.ainvoke({"input": "When?"})
    assert {**found, "usage": None} == {**expected, "usage": None}
    chunks = [chunk async for chunk in chain.astream({"input": "When?"})]
    assert "".join(chunk.get("answer", "") for chunk in chunks) == expected["answer"]
    assert chain.batch([{"input": "When?"}, {"input": "What?"}])[0]["answer"] == expected["answer"]


async def test_the_corpus_is_listed_off_the_event_loop(
    chain: CachedContextChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows lie in a store, which may be slow."""
    threads: list[int] = []
    real = chain.mem.build_prompt
    monkeypatch.setattr(
        chain.mem, "build_prompt", lambda *a, **o: threads.append(threading.get_ident()) or real(*a, **o)
    )
    inputs = {"input": "When?", "chat_history": [("human", "Hi"), ("ai", "Hello")]}
    await chain.ainvoke(inputs)
    assert [chunk async for chunk in chain.astream(inputs)]
    assert len(threads) == 2
    assert threading.get_ident() not in threads


def test_options_of_a_call_win(chain: CachedContextChain) -> None:
    """Keyword arguments of invoke reach the engine."""
    short = chain.invoke({"input": "When?"}, max_tokens=1)["answer"]
    assert len(short) < len(chain.invoke({"input": "When?"})["answer"])


def test_it_composes_and_is_traced_once(chain: CachedContextChain) -> None:
    """In a sequence, callbacks see the chain start and end once."""

    class Seen(BaseCallbackHandler):
        def __init__(self) -> None:
            self.events: list[str] = []

        def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
            self.events.append(f"start {kwargs.get('name')}")

        def on_chain_end(self, *args: Any, **kwargs: Any) -> None:
            self.events.append("end")

    seen = Seen()
    pipeline = chain | RunnableLambda(lambda result: result["answer"].upper())
    assert pipeline.invoke({"input": "When?"}, {"callbacks": [seen]}).isupper()
    assert seen.events.count("start CachedContextChain") == 1
    assert len(seen.events) == 6


def test_wrong_input_is_an_error(chain: CachedContextChain) -> None:
    """The message shows the mapping that is expected."""
    for wrong in ("When?", {"question": "When?"}, {"input": 3}):
        with pytest.raises(InputError, match='"input"'):
            chain.invoke(wrong)  # type: ignore[arg-type]


def test_from_texts(mem: KVMem) -> None:
    """Texts with metadata become documents; a missing metadata is an error."""
    chain = CachedContextChain.from_texts(["one text", "two texts"], mem, metadatas=[{"n": 1}, {"n": 2}])
    assert [d.metadata["n"] for d in chain.invoke({"input": "What?"})["context"]] == [1, 2]
    with pytest.raises(InputError, match="one for each"):
        CachedContextChain.from_texts(["one"], mem, metadatas=[])


def test_a_history_makes_the_question_the_next_turn(chain: CachedContextChain) -> None:
    """Messages or pairs; the documents stay in the prompt, and earlier turns come before the question."""
    plain = chain.invoke({"input": "And then?"})
    history = [("human", "When is the rent due?"), ("ai", "On the first day.")]
    found = chain.invoke({"input": "And then?", "chat_history": history})
    assert [d.page_content for d in found["context"]] == [d.page_content for d in plain["context"]]
    assert found["chat_history"] == history
    messages = [{"role": "user", "content": history[0][1]}, {"role": "assistant", "content": history[1][1]}]
    asked = [*messages, {"role": "user", "content": "And then?"}]
    assert found["answer"] == chain.mem.chat(asked, context=chain.collection.list(), max_tokens=12).text
    assert asyncio.run(chain.ainvoke({"input": "And then?", "chat_history": history}))["answer"] == found["answer"]


def test_documents_are_shown_as_a_prompt_template_says(mem: KVMem) -> None:
    """document_prompt puts metadata into the text the model reads; system_prompt stands before it."""
    template = PromptTemplate.from_template("[{source}] {page_content}")
    chain = CachedContextChain.from_documents(DOCUMENTS, mem, document_prompt=template, system_prompt="Be brief.")
    assert chain.collection is not None
    assert chain.collection.get("l").text == "[lease] The rent is due on the first day of the month."
    assert chain.options == {"system": "Be brief."}


def test_a_retriever_of_langchain_chooses_when_the_window_is_full(tmp_path: Path) -> None:
    """Exactly what it returns is in the prompt, though it cut the documents elsewhere."""
    model = tiny_model(max_position_embeddings=700)
    texts = [f"Fact {n}: " + " ".join(f"{w}{n}" for w in ("alpha", "beta", "gamma", "delta") * 6) for n in range(12)]

    class Seventh(BaseRetriever):
        def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
            return [Document("Something else entirely, in words of its own, here."), Document(texts[7][9:150])]

    with KVMem(model, tmp_path / "kv", max_tokens=4) as mem:
        chain = CachedContextChain.from_texts(texts, mem, retriever=Seventh())
        found = chain.invoke({"input": "Which?"})
    assert [d.page_content for d in found["context"]] == [d.page_content for d in Seventh().invoke("?")]


def test_a_chain_that_only_swaps_its_model_reuses_what_it_retrieves(mem: KVMem) -> None:
    """20 questions, the top 4 of 12 passages in whatever order: from the second pass on, at least 80% is reused."""
    passages = [f"Passage {n} tells of harbour {n * 7}, where {n + 3} boats lie and fish is sold." for n in range(12)]
    prompt = ChatPromptTemplate.from_messages([("system", "Answer briefly."), ("human", "{context}\n\n{question}")])
    chain = prompt | ChatKVMem(mem=mem, max_tokens=1)
    draw = random.Random(0)
    for number in range(2):
        for question in range(20):
            found = draw.sample(passages, 4)
            message = chain.invoke({"context": "\n\n".join(found), "question": f"What of boat {question}?"})
            usage = message.usage_metadata
            assert usage is not None
            context = len("\n\n".join(found))
            if number == 1:
                assert usage["input_token_details"]["cache_read"] >= 0.8 * context


def test_pages_without_text_are_left_out(mem: KVMem, caplog: pytest.LogCaptureFixture) -> None:
    """As loaders of PDF give them; that is logged."""
    pages = [*DOCUMENTS, Document(page_content=" \n", metadata={"page": 3})]
    chain = CachedContextChain.from_documents(pages, mem)
    assert chain.collection is not None
    assert len(chain.collection) == 2
    assert "1 of 3 documents have no text" in caplog.text
