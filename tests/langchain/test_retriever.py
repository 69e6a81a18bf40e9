from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import RetrieversIntegrationTests

from kvmem import KVMem
from kvmem.testing import tiny_model
from langchain_kvmem import KVMemRetriever

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
