"""kvmem's types as LlamaIndex's, and the other way round."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.schema import BaseNode, NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from llama_index.core.schema import Document as LlamaDocument

from kvmem import Document, Plan, Source, Usage
from kvmem.document import as_document

logger = logging.getLogger("kvmem")
# In the metadata of documents that are nodes: the document that the node was cut from, and the node's own id.
CUT_FROM, NODE = "_cut_from", "_node"


def to_document(node: BaseNode) -> Document:
    """A document as one that kvmem cuts; a node as one that is cut already.

    Ids that LlamaIndex draws at random are not kept, since the same content would pile up: the content names it then.
    """
    document = as_document(node)
    if isinstance(node, LlamaDocument):
        return document
    metadata = {**document.metadata, CUT_FROM: node.ref_doc_id or node.node_id, NODE: node.node_id}
    identity = document.id
    if identity != node.node_id:
        content = json.dumps([document.text, document.metadata], sort_keys=True)
        identity = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Document(identity, document.text, metadata, (document.text,))


def to_documents(nodes: Iterable[BaseNode]) -> list[Document]:
    """Documents of those that have text; those that have none, as empty pages, are logged."""
    given = list(nodes)
    kept = [node for node in given if node.get_content().strip()]
    if len(kept) < len(given):
        logger.warning("kvmem: %d of %d documents have no text, and are left out", len(given) - len(kept), len(given))
    return [to_document(node) for node in kept]


def to_nodes(sources: Iterable[Source]) -> list[NodeWithScore]:
    """Sources as nodes that name their document; the score is None when nothing was retrieved."""
    nodes = []
    for source in sources:
        metadata = dict(source.metadata)
        cut_from, own = metadata.pop(CUT_FROM, None), metadata.pop(NODE, None)
        identity = f"{source.document_id}:{source.index}" if own is None else own
        origin = RelatedNodeInfo(node_id=source.document_id if cut_from is None else cut_from)
        relationships: Any = {NodeRelationship.SOURCE: origin}
        node = TextNode(id_=identity, text=source.text, metadata=metadata, relationships=relationships)
        nodes.append(NodeWithScore(node=node, score=source.score))
    return nodes


def describe(plan: Plan) -> dict[str, Any]:
    return {"mode": plan.mode, "reason": plan.reason, "prompt_tokens": plan.prompt_tokens, "over": plan.over}


def count(usage: Usage) -> dict[str, int]:
    return {**vars(usage), "prompt": usage.prompt}


def said(role: MessageRole, text: str) -> ChatMessage:
    return ChatMessage(role=role, content=text)
