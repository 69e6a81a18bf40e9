"""Selection: the chunks that a question is answered from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvmem.text.document import Chunk


@dataclass(frozen=True, eq=False)
class Selection:
    """Chunks to answer from, in order. sizes: tokens of each. complete: whether they are all of a collection."""

    chunks: list[Chunk]
    sizes: list[int]
    complete: bool = False

    @cached_property
    def documents(self) -> list[str]:
        """The id of the document of each chunk."""
        return [chunk.document_id for chunk in self.chunks]
