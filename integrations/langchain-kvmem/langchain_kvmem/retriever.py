"""KVMemRetriever over the documents of an engine, and what is known of LangChain's retrievers."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStoreRetriever
from pydantic import ConfigDict, Field

from kvmem import Collection, KVMem
from langchain_kvmem.convert import to_documents


class KVMemRetriever(BaseRetriever):
    """The most relevant chunks of an engine's documents, best first; irrelevant ones are left out.

    For chains that work with documents themselves; to answer from documents, use `CachedContextChain`.

    Example:
        ```python
        from kvmem import KVMem
        from langchain_kvmem import KVMemRetriever

        with KVMem("smollm2", store="./kv") as mem:
            mem.add("The rent is 3,200 euros a month.")
            print(KVMemRetriever(mem=mem, k=2).invoke("How much is the rent?"))
        ```
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    mem: KVMem = Field(exclude=True)
    """The engine; its retriever scores chunks, BM25 by default."""
    collection: Collection | str | None = Field(default=None, exclude=True)
    """A collection to search instead of the engine's own documents."""
    documents: Any = None
    """Ids of the documents that count, or a filter over their metadata; see `KVMem.ask`."""
    k: int = Field(default=4, ge=1)
    """How many chunks are returned at most."""

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        wanted = self.k if k is None else k
        found = self.mem.retrieve(query, wanted, collection=self.collection, documents=self.documents)
        return to_documents(found)


# Classes of LangChain that rank whatever they hold, and leave nothing out but what ranks last.
_RANKING = ("BM25Retriever", "KNNRetriever", "SVMRetriever", "TFIDFRetriever")


def only_ranks(retriever: BaseRetriever) -> bool:
    """Whether a retriever is known to leave nothing out on purpose, as a filter or a score threshold would.

    An unknown retriever, or one that wraps others, may leave something out.
    """
    if isinstance(retriever, KVMemRetriever):
        return retriever.collection is None and retriever.documents is None
    if type(retriever) is VectorStoreRetriever:
        plain = retriever.search_kwargs.keys() <= {"k", "fetch_k", "lambda_mult"}
        return plain and retriever.search_type in ("similarity", "mmr")
    return type(retriever).__name__ in _RANKING and type(retriever).__module__.startswith("langchain_community.")
