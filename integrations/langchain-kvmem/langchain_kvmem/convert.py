"""LangChain's types as kvmem's, and back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import UsageMetadata

from kvmem import Answer, InputError, Source, Usage
from kvmem import Document as KVMemDocument
from kvmem.prompt.layout import REASONING
from kvmem.text.document import as_document

logger = logging.getLogger("kvmem")


def to_documents(sources: Iterable[Source]) -> list[Document]:
    """Sources as documents. The metadata gains `document_id`, and `score` if there is one."""
    documents = []
    for source in sources:
        metadata = {**source.metadata, "document_id": source.document_id}
        if source.score is not None:
            metadata["score"] = source.score
        documents.append(Document(id=source.document_id, page_content=source.text, metadata=metadata))
    return documents


def from_document(document: Document) -> KVMemDocument:
    """A document whose text stands in the prompt as it is, without titles or headings of kvmem's. Raises InputError."""
    return replace(as_document(document), heading="")


def from_documents(documents: Iterable[Document]) -> list[KVMemDocument]:
    """Documents that have text; those that have none are logged and left out."""
    given = list(documents)
    kept = [document for document in given if document.page_content.strip()]
    if len(kept) < len(given):
        logger.warning("kvmem: %d of %d documents have no text and are left out", len(given) - len(kept), len(given))
    return [from_document(document) for document in kept]


def to_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages as `KVMem.chat` takes them, and the chat templates of Hugging Face. Raises InputError."""
    return [_to_message(message) for message in messages]


def _to_message(message: BaseMessage) -> dict[str, Any]:
    content = _to_content(message.content)
    if isinstance(message, SystemMessage):
        return {"role": "system", "content": content}
    if isinstance(message, HumanMessage):
        return {"role": "user", "content": content}
    if isinstance(message, AIMessage):
        calls = [
            {"type": "function", "id": call["id"], "function": {"name": call["name"], "arguments": call["args"]}}
            for call in message.tool_calls
        ]
        thoughts = _thoughts(message)
        return {
            **{"role": "assistant", "content": content},
            **({REASONING: thoughts} if thoughts else {}),
            **({"tool_calls": calls} if calls else {}),
        }
    if isinstance(message, ToolMessage):
        return {"role": "tool", "content": content, "tool_call_id": message.tool_call_id, "name": message.name or ""}
    if isinstance(message, FunctionMessage):
        return {"role": "tool", "content": content, "name": message.name}
    if isinstance(message, ChatMessage):
        return {"role": message.role, "content": content}
    raise InputError(f"A {type(message).__name__} cannot be sent to a model. Give a system, human, AI or tool message.")


def _thoughts(message: AIMessage) -> str:
    """What the model thought, which its chat template may show it again."""
    thoughts = message.additional_kwargs.get(REASONING)
    if isinstance(thoughts, str):
        return thoughts
    blocks = message.content if isinstance(message.content, list) else []
    found = [block.get("reasoning") or block.get("thinking") for block in blocks if isinstance(block, dict)]
    return "\n".join(text for text in found if isinstance(text, str))


def _to_content(content: str | list[str | dict[Any, Any]]) -> list[str]:
    """Texts of a message; a block of type `text-plain` is a document, which is cached by itself."""
    if isinstance(content, str):
        return [content]
    texts: list[str] = []
    for block in content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") in ("text", "text-plain") and isinstance(block.get("text"), str):
            texts.append(block["text"] if block["type"] == "text" else f"\n\n{block['text'].strip()}\n\n")
        elif block.get("type") in ("tool_use", "tool_call", "server_tool_call", "reasoning", "thinking"):
            continue  # calls are in message.tool_calls, thoughts beside the content
        elif block.get("type") == "tool_result":
            inner = block.get("content")
            texts += _to_content(inner if isinstance(inner, (str, list)) else json.dumps(inner))
        else:
            raise InputError(
                f"A message holds content of type {block.get('type')!r}; this model reads text. Give text."
            )
    return texts


def to_usage(usage: Usage) -> UsageMetadata:
    """Token counts. `cache_read` were reused, `cache_creation` read now, `recomputed` reused and computed again; the
    three add up to the input."""
    details: Any = {
        "cache_read": usage.exact + usage.reused,
        "cache_creation": usage.computed,
        "recomputed": usage.recomputed,
    }
    return UsageMetadata(
        input_tokens=usage.prompt,
        output_tokens=usage.generated,
        total_tokens=usage.prompt + usage.generated,
        input_token_details=details,
    )


def to_metadata(answer: Answer, model: str) -> dict[str, Any]:
    """What an answer says about itself, as response metadata."""
    return {
        "model_name": model,
        "model_provider": "kvmem",
        "finish_reason": answer.finish_reason,
        "plan": answer.plan.as_dict(),
        "timings": vars(answer.timings),
        "usage": answer.usage.as_dict(),
    }
