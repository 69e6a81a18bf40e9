"""kvmem's types as LlamaIndex's."""

from __future__ import annotations

from collections.abc import Iterable

from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode

from kvmem import Source


def to_nodes(sources: Iterable[Source]) -> list[NodeWithScore]:
    """Sources as nodes that name their document; the score is None when nothing was retrieved."""
    nodes = []
    for source in sources:
        origin = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=source.document_id)}
        node = TextNode(
            id_=f"{source.document_id}:{source.index}",
            text=source.text,
            metadata=dict(source.metadata),
            relationships=origin,
        )
        nodes.append(NodeWithScore(node=node, score=source.score))
    return nodes
