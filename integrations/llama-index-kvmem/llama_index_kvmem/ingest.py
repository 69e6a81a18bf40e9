"""KVMemTransform: reads nodes into an engine as an IngestionPipeline ingests them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.core.storage.docstore.types import BaseDocumentStore

from kvmem import InputError, KVMem
from llama_index_kvmem.convert import CUT_FROM, to_kept, with_text


class KVMemTransform(TransformComponent):
    """The last of a pipeline's transformations: every node is read into `mem`, as it is cut, and handed on unchanged.

    Nodes of a document that was ingested before take the place of its old ones. With the pipeline's `docstore`,
    documents that were in it, now or when this was made, and are deleted from it later, are removed from the engine as
    well, at the next run or by `sync`. What the docstore never had is left alone.
    """

    docstore: Any = Field(default=None, exclude=True)
    _mem: KVMem = PrivateAttr()
    _held: set[str] = PrivateAttr(default_factory=set)

    def __init__(self, mem: KVMem, docstore: BaseDocumentStore | None = None, **fields: Any) -> None:
        super().__init__(**fields)
        self.docstore = docstore
        self._mem = mem
        self._held = self._in_docstore()

    @classmethod
    def class_name(cls) -> str:
        return "KVMemTransform"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Never the same twice: a pipeline's cache would skip it, and what it does is not in its result."""
        return {"class_name": self.class_name(), "run": uuid4().hex}

    def __getstate__(self) -> dict[str, Any]:
        raise InputError(
            "KVMemTransform runs in the process that holds the model. Run the pipeline without num_workers."
        )

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        new = [to_kept(node) for node in with_text(nodes)]
        added = {document.id for document in self._mem.add_all(new)}
        replaced = {document.metadata.get(CUT_FROM, document.id) for document in new}
        for document in self._mem.list():
            if document.id not in added and document.metadata.get(CUT_FROM) in replaced:
                self._mem.remove(document.id)
        self.sync(keep=replaced)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        return await asyncio.to_thread(self, nodes, **kwargs)

    def sync(self, keep: set[str] | None = None) -> int:
        """Remove from the engine the nodes of documents that the docstore no longer has; how many.

        keep: documents that stay although the docstore does not have them yet.
        """
        if self.docstore is None:
            return 0
        there = self._in_docstore() | (keep or set())
        missing, self._held = self._held - there, self._held | there
        gone = [document.id for document in self._mem.list() if document.metadata.get(CUT_FROM, document.id) in missing]
        for identity in gone:
            self._mem.remove(identity)
        return len(gone)

    def _in_docstore(self) -> set[str]:
        if self.docstore is None:
            return set()
        return {*self.docstore.get_all_document_hashes().values(), *self.docstore.docs}
