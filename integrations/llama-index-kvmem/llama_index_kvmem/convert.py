"""kvmem's types as LlamaIndex's, and the other way round."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.schema import BaseNode, MetadataMode, NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from llama_index.core.schema import Document as LlamaDocument

from kvmem import Answer, Chunk, Document, InputError, KVMem, Source
from kvmem.prompt.layout import REASONING
from kvmem.text.document import as_document, chosen_id

logger = logging.getLogger("kvmem")
# In the additional_kwargs of a message that a memory block recalled: the id of the memory.
DOCUMENT = "kvmem_document"
# In the metadata of an engine's documents that are nodes: the document that the node was cut from.
CUT_FROM = "_cut_from"


def to_text(node: BaseNode) -> str:
    """What the model sees of a node: its text with its metadata, as its templates and excluded keys say."""
    return node.get_content(metadata_mode=MetadataMode.LLM)


def to_document(node: BaseNode) -> Document:
    """A node as a document of one chunk, shown as `to_text` has it."""
    text = to_text(node)
    return Document(node.node_id, text, {}, (text,), heading="")


def to_kept(node: BaseNode) -> Document:
    """A node as a document of an engine, with its metadata; a LlamaIndex document as one that kvmem cuts.

    Ids that LlamaIndex draws at random are not kept, since the same content would pile up: the content names it then.
    """
    document = as_document(node)
    if isinstance(node, LlamaDocument):
        return document
    text = to_text(node)
    metadata = {**document.metadata, CUT_FROM: node.ref_doc_id or node.node_id}
    identity = document.id
    if identity != node.node_id:
        content = json.dumps([text, document.metadata], sort_keys=True)
        identity = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Document(identity, text, metadata, (text,), heading="")


def with_text(nodes: Iterable[BaseNode]) -> list[BaseNode]:
    """Nodes that have text; those that have none, such as empty pages, are logged and left out."""
    given = list(nodes)
    kept = [node for node in given if node.get_content().strip()]
    if len(kept) < len(given):
        logger.warning("kvmem: %d of %d documents have no text and are left out", len(given) - len(kept), len(given))
    return kept


def cut(document: LlamaDocument, mem: KVMem) -> list[TextNode]:
    """A document as nodes, cut where kvmem cuts texts, without overlap. They inherit what its own nodes would."""
    chunks = mem.split(document.text)
    # A random id would be another one at every start, and name the same text again.
    identity = chosen_id(document.node_id) or as_document(document.text).id
    ends = list(accumulate(map(len, chunks)))
    origin = RelatedNodeInfo(node_id=document.node_id, metadata=document.metadata)
    return [
        TextNode(
            id_=f"{identity}:{number}" if len(chunks) > 1 else identity,
            text=chunk,
            metadata=dict(document.metadata),
            excluded_llm_metadata_keys=list(document.excluded_llm_metadata_keys),
            excluded_embed_metadata_keys=list(document.excluded_embed_metadata_keys),
            metadata_template=document.metadata_template,
            metadata_separator=document.metadata_separator or "\n",
            text_template=document.text_template,
            start_char_idx=end - len(chunk),
            end_char_idx=end,
            relationships={NodeRelationship.SOURCE: origin},
        )
        for number, (chunk, end) in enumerate(zip(chunks, ends, strict=True))
    ]


def to_leaves(documents: Iterable[BaseNode], mem: KVMem) -> list[BaseNode]:
    """Documents cut into nodes, and nodes as they are. Raises InputError for two different nodes of one id."""
    found: dict[str, BaseNode] = {}
    for item in with_text(documents):
        for node in cut(item, mem) if isinstance(item, LlamaDocument) else [item]:
            if to_text(found.setdefault(node.node_id, node)) != to_text(node):
                raise InputError(f"Two different documents have the id {node.node_id!r}. Give each its own.")
    return list(found.values())


def chunk_nodes(chunks: Iterable[Chunk]) -> list[BaseNode]:
    """Chunks of an engine's own documents as nodes; the model sees them without their metadata, as `ask` shows them."""
    nodes: list[BaseNode] = []
    starts: dict[str, int] = {}
    for chunk in chunks:
        metadata = {name: value for name, value in chunk.metadata.items() if name != CUT_FROM}
        origin = chunk.metadata.get(CUT_FROM, chunk.document_id)
        start = starts.get(chunk.document_id, 0)
        starts[chunk.document_id] = start + len(chunk.text)
        nodes.append(
            TextNode(
                id_=chunk.document_id if CUT_FROM in chunk.metadata else f"{chunk.document_id}:{chunk.index}",
                text=chunk.heading + chunk.text,
                metadata=metadata,
                excluded_llm_metadata_keys=list(metadata),
                excluded_embed_metadata_keys=list(metadata),
                start_char_idx=start,
                end_char_idx=start + len(chunk.text),
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=origin)},
            )
        )
    return nodes


def to_nodes(sources: Iterable[Source]) -> list[NodeWithScore]:
    """Sources as nodes that name their document."""
    nodes = []
    for source in sources:
        origin = RelatedNodeInfo(node_id=source.document_id)
        identity = f"{source.document_id}:{source.index}"
        relationships: Any = {NodeRelationship.SOURCE: origin}
        node = TextNode(id_=identity, text=source.text, metadata=dict(source.metadata), relationships=relationships)
        nodes.append(NodeWithScore(node=node, score=source.score))
    return nodes


def describe(answer: Answer) -> dict[str, Any]:
    """What an answer says about itself, as a response's metadata."""
    return {
        "plan": answer.plan.as_dict(),
        "usage": answer.usage.as_dict(),
        "timings": dict(vars(answer.timings)),
        "finish_reason": answer.finish_reason,
    }


def to_raw(answer: Answer) -> dict[str, Any]:
    """`raw` of a response: `describe`, with usage where LlamaIndex's token counter finds it."""
    usage = {
        "prompt_tokens": answer.usage.prompt,
        "completion_tokens": answer.usage.generated,
        "total_tokens": answer.usage.prompt + answer.usage.generated,
    }
    described = describe(answer)
    return {**described, "usage": usage | described["usage"]}


def to_message(message: ChatMessage) -> dict[str, Any]:
    """A message as `KVMem.chat` takes it. Raises InputError."""
    texts, calls, thoughts = [], [], []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolCallBlock):
            calls.append(_call(block.tool_call_id or "", block.tool_name, block.tool_kwargs))
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.content or "")
        else:
            raise InputError(f"A message holds a {type(block).__name__}; this model reads text. Give text.")
    converted: dict[str, Any] = {"role": message.role.value, "content": texts}
    given = message.additional_kwargs.get("tool_calls") or []
    calls = [_call(c.get("id", ""), c["function"]["name"], c["function"]["arguments"]) for c in given] or calls
    if calls:
        converted["tool_calls"] = calls
    if any(thoughts):
        converted[REASONING] = "\n".join(thoughts)
    if message.role == MessageRole.TOOL:
        converted["tool_call_id"] = message.additional_kwargs.get("tool_call_id", "")
        converted["name"] = message.additional_kwargs.get("name", "")
    return converted


def _call(identity: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call as chat templates take it: its arguments a mapping."""
    parsed: Mapping[str, Any] = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": parsed}}


def to_plain(messages: Sequence[ChatMessage]) -> str:
    """Messages for a base model, as LlamaIndex renders them for one."""
    lines = [f"{message.role.value}: {message.content or ''}" for message in messages]
    return "\n".join([*lines, "assistant: "])


def without_memories(messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], list[Document]]:
    """Messages, and apart from them what a memory block recalled: context, each memory with its own cache."""
    spoken = [message for message in messages if DOCUMENT not in message.additional_kwargs]
    recalled = [message for message in messages if DOCUMENT in message.additional_kwargs]
    return spoken, [Document(m.additional_kwargs[DOCUMENT], m.content or "", {}, (m.content or "",)) for m in recalled]
