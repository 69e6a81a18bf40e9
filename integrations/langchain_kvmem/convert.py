"""kvmem's types as LangChain's."""

from __future__ import annotations

from collections.abc import Iterable

from langchain_core.documents import Document

from kvmem import Source


def to_documents(sources: Iterable[Source]) -> list[Document]:
    """Sources as documents; the metadata gains `document_id`, and `score` where a retriever chose them."""
    documents = []
    for source in sources:
        metadata = {**source.metadata, "document_id": source.document_id}
        if source.score is not None:
            metadata["score"] = source.score
        documents.append(Document(page_content=source.text, metadata=metadata))
    return documents
