from __future__ import annotations

from typing import Any

import pytest
from llama_index.core import Document, MockEmbedding
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore

from kvmem import KVMem
from llama_index_kvmem import KVMemQueryEngine, KVMemTransform


def text(name: str, sentences: int = 12) -> str:
    return " ".join(f"The {name} has fact number {n}, which is {n * 37 % 101}." for n in range(sentences))


@pytest.fixture
def pipeline(mem: KVMem) -> IngestionPipeline:
    docstore = SimpleDocumentStore()
    splitter = SentenceSplitter(chunk_size=60, chunk_overlap=0, tokenizer=str.split)
    return IngestionPipeline(
        transformations=[splitter, MockEmbedding(embed_dim=3), KVMemTransform(mem, docstore)],
        docstore=docstore,
        vector_store=SimpleVectorStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )


def ids(mem: KVMem) -> set[str]:
    return {document.metadata["_cut_from"] for document in mem.list()}


def test_nodes_are_read_as_they_are_ingested(mem: KVMem, pipeline: IngestionPipeline) -> None:
    """The pipeline's nodes are the engine's documents, read: the first query computes little else than itself."""
    nodes = pipeline.run(documents=[Document(text=text("ferry"), id_="f"), Document(text=text("tram"), id_="t")])
    assert [document.text for document in mem.list()] == [node.get_content() for node in nodes]
    response = KVMemQueryEngine(mem, max_tokens=2).query("How many?")
    metadata: dict[str, Any] = response.metadata or {}
    assert metadata["usage"]["computed"] < 60
    assert metadata["usage"]["reused"] == 0


def test_upserts_and_deletes_are_mirrored(mem: KVMem, pipeline: IngestionPipeline) -> None:
    """A changed document takes its old nodes' place, a missing one goes; what was added otherwise stays."""
    mem.add("Something else, from elsewhere.", id="other")
    first = [Document(text=text("ferry"), id_="f"), Document(text=text("tram"), id_="t")]
    pipeline.run(documents=first)
    before = {document.id for document in mem.list()}
    pipeline.run(documents=first)
    assert {document.id for document in mem.list()} == before
    pipeline.run(documents=[Document(text=text("ferry") + " It is new.", id_="f"), first[1]])
    texts = " ".join(document.text for document in mem.list())
    assert texts.count("The ferry has fact number 3,") == 1
    assert "It is new." in texts
    pipeline.run(documents=[first[1]])
    assert [d.id for d in mem.list() if "ferry" in d.text] == []
    assert any("tram" in document.text for document in mem.list())
    assert mem.get("other").text.startswith("Something else")


def test_documents_of_others_are_left_alone(mem: KVMem) -> None:
    """Another index, another pipeline, or the same with a new docstore after a restart: nothing of them is removed."""
    mem.add("The tram is late.")
    for name in ("monday", "tuesday"):
        docstore = SimpleDocumentStore()
        made = IngestionPipeline(transformations=[KVMemTransform(mem, docstore)], docstore=docstore)
        made.run(documents=[Document(text=f"The file of {name}.", id_=name)])
    assert [document.text for document in mem.list()] == [
        "The tram is late.",
        "The file of monday.",
        "The file of tuesday.",
    ]


def test_the_same_content_with_new_random_ids_is_the_same(mem: KVMem) -> None:
    """An index that is built again on every start does not pile up."""
    kept = []
    for _ in range(3):
        nodes = SentenceSplitter(chunk_size=60, chunk_overlap=0, tokenizer=str.split)([Document(text=text("ferry"))])
        engine = KVMemQueryEngine.from_documents(nodes, mem, max_tokens=2)
        found = engine.query("How many?").source_nodes
        assert [n.node.node_id for n in found] == [node.node_id for node in nodes]
        kept.append(mem.stats().store.entries)
    assert len(set(kept)) == 1


async def test_async_runs_and_refuses_other_processes(mem: KVMem, pipeline: IngestionPipeline) -> None:
    """arun reads as run does; a pipeline over several processes is told why it cannot."""
    await pipeline.arun(documents=[Document(text=text("ferry"), id_="f")])
    assert ids(mem) == {"f"}
    with pytest.raises(ValueError, match="num_workers"):
        pipeline.transformations[-1].__getstate__()


def test_without_a_docstore_nothing_is_removed(mem: KVMem) -> None:
    """`sync` has nothing to compare with, and empty nodes are passed on."""
    transform = KVMemTransform(mem)
    nodes = [Document(text="The ferry leaves at nine."), Document(text=" ")]
    assert transform(nodes) == nodes
    assert transform.sync() == 0
    assert len(mem.list()) == 1


def test_documents_that_no_splitter_cut_are_mirrored_too(mem: KVMem) -> None:
    """kvmem cuts them; one that the docstore loses goes, and what was added otherwise stays."""
    mem.add("Something else, from elsewhere.", id="other")
    docstore = SimpleDocumentStore()
    pipeline = IngestionPipeline(transformations=[KVMemTransform(mem, docstore)], docstore=docstore)
    pipeline.run(documents=[Document(text=text(name), id_=name) for name in ("ferry", "tram")])
    assert {document.id for document in mem.list()} == {"ferry", "tram", "other"}
    docstore.delete_document("ferry")
    assert pipeline.transformations[0].sync() == 1
    assert {document.id for document in mem.list()} == {"tram", "other"}
