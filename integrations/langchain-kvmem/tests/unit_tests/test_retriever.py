from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import FACTS as COMPANIES
from helpers import embed, facts_corpus, open_mem
from langchain_core.documents import Document as LangChainDocument
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests

from kvmem import KVMem
from kvmem.testing import tiny_model
from langchain_kvmem import KVMemRetriever
from langchain_kvmem.turn import TurnBuilder

FACTS = [f"Fact {n}: the keeper of lighthouse number {n} has {n + 3} lamps and a dog." for n in range(6)]


class TestKVMemRetriever(RetrieversIntegrationTests):
    """LangChain's own suite."""

    mem: KVMem

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def opened(cls) -> Iterator[None]:
        with KVMem(tiny_model(), None) as mem:
            for number, fact in enumerate(FACTS):
                mem.add(fact, id=str(number), metadata={"number": number})
            cls.mem = mem
            yield

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return KVMemRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"mem": self.mem}

    @property
    def retriever_query_example(self) -> str:
        return "How many lamps has the keeper of the lighthouse?"

    def test_the_best_chunk_comes_first_with_its_metadata(self) -> None:
        """Scores fall, and what shares no word with the question is left out."""
        found = KVMemRetriever(mem=self.mem, k=3).invoke("lighthouse number 4")
        assert found[0].page_content == FACTS[4]
        assert found[0].metadata["document_id"] == "4"
        assert found[0].metadata["number"] == 4
        scores = [document.metadata["score"] for document in found]
        assert scores == sorted(scores, reverse=True)
        assert KVMemRetriever(mem=self.mem).invoke("Zanzibar") == []


def test_a_retriever_of_a_user_finds_the_right_document() -> None:
    """A corpus of ten windows, fifty questions, a vector store of LangChain: the right one is nearly always there."""
    documents = facts_corpus()
    vectors = InMemoryVectorStore(HashedWords())
    vectors.add_documents([LangChainDocument(page_content=d.text, id=d.id) for d in documents])
    retriever = vectors.as_retriever(search_kwargs={"k": 4})
    model = tiny_model(max_position_embeddings=8192)
    with open_mem(model, None, split={"minimum": 128, "target": 320, "maximum": 512}) as mem:
        for document in documents:
            mem.add(document, read=False)
        builder = TurnBuilder(mem, None, retriever, None)
        found = 0
        draw = random.Random(2)
        for _ in range(50):
            name, _n = draw.choice(COMPANIES)
            question = f"How many people does {name} employ and when was {name} founded?"
            assert builder.build({"input": question}, {}, None) is None
            turn = builder.build({"input": question}, {}, retriever.invoke(question))
            assert turn is not None
            assert turn.request.plan.prompt_tokens + 8 <= model.window
            found += name in {source.document_id for source in turn.request.sources}
        assert found >= 45


class HashedWords(Embeddings):
    """Texts as counts of hashed words."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return embed(texts)

    def embed_query(self, text: str) -> list[float]:
        return embed([text])[0]
