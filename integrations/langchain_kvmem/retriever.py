"""KVMemRetriever over the documents of an engine, and LangChain's retrievers inside the engine."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field

from kvmem import KVMem
from kvmem.document import Chunk
from langchain_kvmem.convert import to_documents


class KVMemRetriever(BaseRetriever):
    """The `k` most relevant chunks of `mem`'s documents, best first, by its retriever; irrelevant ones are left out.

    For chains that want documents of their own; to answer from them, `CachedContextChain` reads nothing twice.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    mem: KVMem = Field(exclude=True)
    k: int = Field(default=4, ge=1)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        return to_documents(self.mem.retrieve(query, self.k if k is None else k))


class RankedBy:
    """A LangChain retriever as kvmem's: chunks that share text with the documents it returns are the relevant ones.

    The retriever has an index of its own, whose documents may be cut at other places than kvmem's chunks; what they
    share is counted in runs of words.
    """

    def __init__(self, retriever: BaseRetriever) -> None:
        self._retriever = retriever

    def score(self, question: str, chunks: Sequence[Chunk]) -> list[float]:
        found = [_shingles(document.page_content) for document in self._retriever.invoke(question)]
        return [
            max((_shared(_shingles(chunk.text), other) / (1 + i) for i, other in enumerate(found)), default=0.0)
            for chunk in chunks
        ]


_RUN = 6


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + _RUN]) for i in range(max(1, len(words) - _RUN + 1))} if words else set()


def _shared(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """The share of the smaller set that is in both; 0 below a tenth, which chance and headings reach."""
    share = len(one & other) / max(1, min(len(one), len(other)))
    return share if share >= 0.1 else 0.0
