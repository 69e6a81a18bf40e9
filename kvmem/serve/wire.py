"""Request models: OpenAI's requests, and kvmem's additions to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from kvmem.engine import KVMem
from kvmem.errors import InputError
from kvmem.prompt.layout import REASONING
from kvmem.text.document import Document, as_document


class _Open(BaseModel):
    """Ignores unknown fields, as other OpenAI-compatible servers do; clients send many."""

    model_config = ConfigDict(extra="ignore")


class ContextText(BaseModel):
    """A text for this prompt only, or the id of a stored document."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = Field(default=None, min_length=1)
    text: str | None = None
    metadata: dict[str, Any] | None = None


# Validation stops at the first mistake in a list; otherwise a client could exhaust memory with error reports.
FirstMistake: Any = Field(fail_fast=True)


def check_unicode(request: BaseModel) -> None:
    """Raise ValueError if any text contains a lone surrogate."""
    try:
        request.model_dump_json()
    except ValueError:
        raise ValueError("a text is not valid Unicode") from None


class KVMemOptions(BaseModel):
    """kvmem's extension of a request.

    context: texts to answer from, or "documents" for all documents of the namespace; if they do not fit, the best
        chunks are retrieved. namespace: the tenant. blend: see `BlendSettings`. thread: the name to store the
        conversation under.
    """

    model_config = ConfigDict(extra="forbid")

    context: Literal["documents"] | Annotated[list[str | ContextText], FirstMistake] | None = None
    namespace: str | None = Field(default=None, min_length=1, max_length=200)
    blend: str | dict[str, Any] | None = None
    thread: str | None = Field(default=None, min_length=1)

    @field_validator("blend")
    @classmethod
    def _no_check(cls, value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if isinstance(value, dict) and value.get("recompute") == "auto":
            raise ValueError("recompute must be a number; 'auto' is not available over HTTP")
        return value

    def texts(self, mem: KVMem) -> Sequence[Document] | None:
        """The context in the form that `KVMem.chat` takes. Raises InputError, UnknownDocumentError."""
        if self.context is None:
            return None
        if isinstance(self.context, str):
            return mem.list()
        return [_document(item, mem) for item in self.context]


def _document(item: str | ContextText, mem: KVMem) -> Document:
    if isinstance(item, str):
        return as_document(item)
    if item.text is not None:
        return as_document(item.text, item.id, item.metadata)
    if item.id is None:
        raise InputError("An item of kvmem.context has neither a text nor an id. Give one of the two.")
    return mem.get(item.id)


class StreamOptions(_Open):
    include_usage: bool = False


class _Sampled(_Open):
    """Fields that chat and completion requests share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: str | Annotated[list[str], Field(max_length=16), FirstMistake] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = None
    logit_bias: dict[str, float] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    kvmem: KVMemOptions = Field(default_factory=KVMemOptions)

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and not all([value] if isinstance(value, str) else value):
            raise ValueError("a stop string is empty")
        return value

    @model_validator(mode="after")
    def _supported(self) -> _Sampled:
        if self.n not in (None, 1):
            raise ValueError("n must be 1; only one answer per request is supported")
        for name in ("logit_bias", "frequency_penalty", "presence_penalty"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported")
        check_unicode(self)
        return self

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, limit: int) -> dict[str, Any]:
        """Sampling options for `KVMem.chat`. Raises InputError if max_tokens exceeds the server's limit."""
        if self.max_tokens is not None and self.max_tokens > limit:
            raise InputError(f"max_tokens={self.max_tokens} is more than this server allows. Give {limit} or less.")
        names = ("max_tokens", "temperature", "top_p", "stop", "seed")
        return {name: getattr(self, name) for name in names}


class Function(_Open):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Open):
    type: Literal["function"] = "function"
    function: Function


class CalledFunction(_Open):
    name: str
    arguments: str = "{}"


class Called(_Open):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(_Open):
    type: Literal["text"]
    text: str


class ChatMessage(_Open):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], FirstMistake] | None = None
    name: str | None = None
    tool_calls: Annotated[list[Called], FirstMistake] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """The message in the form that `KVMem.chat` takes. Raises InputError."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        for name in ("name", "tool_call_id", REASONING):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls:
            message["tool_calls"] = [_called(call) for call in self.tool_calls]
        return message


def _called(call: Called) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InputError(
            f"The arguments of the call to {call.function.name!r} are not a JSON object. Send them back unchanged."
        )
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class JsonSchema(_Open):
    name: str | None = None
    schema_: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")


class ResponseFormat(_Open):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @property
    def wanted(self) -> Mapping[str, Any] | None:
        """The JSON schema that the answer must match, or None."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema is not None else {"type": "object"}


class ChatRequest(_Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000), FirstMistake]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=1000), FirstMistake] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    logprobs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _chat_supported(self) -> ChatRequest:
        if self.logprobs:
            raise ValueError("logprobs is not supported")
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens
        return self

    def options(self, limit: int) -> dict[str, Any]:
        """All options for `KVMem.chat` except the context. Raises InputError."""
        choice = self.tool_choice.function.name if isinstance(self.tool_choice, Tool) else self.tool_choice
        return {
            **self.sampling(limit),
            "schema": self.response_format.wanted if self.response_format is not None else None,
            "tools": [tool.model_dump(exclude_none=True) for tool in self.tools or ()] or None,
            "tool_choice": choice or "auto",
            "thread": self.kvmem.thread,
            "chat_template_kwargs": self.chat_template_kwargs,
            "blend": self.kvmem.blend,
        }


_PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "minItems": 1, "maxItems": 1},
    ]
}


class CompletionRequest(_Sampled):
    """`POST /v1/completions`."""

    prompt: Annotated[str | list[Any], WithJsonSchema(_PROMPT)]
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: int | None = None

    @model_validator(mode="after")
    def _completion_supported(self) -> CompletionRequest:
        for name in ("echo", "suffix", "logprobs"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported")
        if self.best_of not in (None, 1):
            raise ValueError("best_of must be 1")
        if self.kvmem.context is not None or self.kvmem.thread is not None:
            raise ValueError("kvmem.context and kvmem.library.threads are only supported for chats")
        return self

    def one_prompt(self) -> str | list[int]:
        """The prompt: a text, or token ids (not validated here). Raises InputError if there are several prompts."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int)):
            if len(prompt) != 1 or not isinstance(prompt[0], (str, list)):
                raise InputError(f"The request has {len(prompt)} prompts. Send one text or one list of token ids.")
            prompt = prompt[0]
        return prompt  # type: ignore[no-any-return]


class DocumentRequest(BaseModel):
    """`POST /v1/documents`. The id defaults to a hash of the text."""

    model_config = ConfigDict(extra="forbid")

    text: str
    id: str | None = Field(default=None, min_length=1)
    metadata: dict[str, Any] | None = None
    namespace: str | None = Field(default=None, min_length=1, max_length=200)

    @model_validator(mode="after")
    def _readable(self) -> DocumentRequest:
        check_unicode(self)
        return self
