"""KVMemLLM: a local LLM for LlamaIndex that does not read the same text twice."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection

from kvmem import Answer, AnswerStream, Document, InputError, KVMem
from llama_index_kvmem.memory import DOCUMENT

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

_OPENING = threading.Lock()


class KVMemLLM(FunctionCallingLLM):
    """An LLM over `KVMem`: texts it has seen, in any prompt and at any place, are not read again.

    model_name: a hub id, a directory, a GGUF file, "smollm2"; or model and tokenizer, loaded. store: a directory for
    the caches; None keeps them in memory. max_new_tokens, context_window, temperature (0: greedy), stopping_ids,
    device_map, generate_kwargs, model_kwargs: as in `HuggingFaceLLM`; model_kwargs are arguments of `KVMem`. blend,
    namespace: as in `KVMem`. mem: an engine that is open already.

    Arguments of a call (`max_tokens` or `max_new_tokens`, `temperature`, `top_p`, `stop`, `seed`, `context`, `schema`,
    and those of transformers' `generate`) win over these. `raw` of a response has `usage`, `plan` and `timings`.
    """

    model_name: str = Field(default="smollm2")
    store: str | None = Field(default=None)
    max_new_tokens: int = Field(default=256, gt=0)
    temperature: float = Field(default=0.0, ge=0.0)
    blend: Any = Field(default=None)
    namespace: str = Field(default="default")
    generate_kwargs: dict[str, Any] = Field(default_factory=dict)
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    context_window: int | None = Field(default=None, gt=0)
    device_map: Any = Field(default=None)
    stopping_ids: list[int] = Field(default_factory=list)
    _mem: KVMem | None = PrivateAttr(default=None)
    _loaded: tuple[Any, Any] | None = PrivateAttr(default=None)

    def __init__(self, mem: KVMem | None = None, model: Any = None, tokenizer: Any = None, **fields: Any) -> None:
        _check_fields(fields, type(self).model_fields.keys())
        super().__init__(**fields)
        self._loaded = None if model is None else (model, tokenizer)
        if mem is not None and fields.keys() & {"store", "namespace", "model_kwargs"}:
            raise InputError("This engine has a namespace, a store and settings. Give them to KVMem, or no mem here.")
        self._mem = mem
        if mem is not None:
            self.model_name = mem.model.name

    @property
    def engine(self) -> KVMem:
        """The engine; opened by the first call."""
        if self._mem is not None:
            return self._mem
        with _OPENING:
            if self._mem is None:
                options = {**self.model_kwargs, "namespace": self.namespace}
                if self.device_map is not None:
                    options["device_map"] = self.device_map
                if self._loaded is None:
                    self._mem = KVMem(self.model_name, self.store, **options)
                else:
                    model, tokenizer = self._loaded
                    self._mem = KVMem(model, self.store, tokenizer=tokenizer, **options)
                    self.model_name = self._mem.model.name
            return self._mem

    async def _ready(self) -> None:
        """Open the engine without blocking the event loop."""
        if self._mem is None:
            await asyncio.to_thread(lambda: self.engine)

    @classmethod
    def class_name(cls) -> str:
        return "KVMemLLM"

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=min(self.engine.model.window, self.context_window or self.engine.model.window),
            num_output=self.max_new_tokens,
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=self.model_name,
        )

    # Chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return _response(self._open(messages, kwargs).answer)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        await self._ready()
        return _response(await self._open(messages, kwargs).wait())

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        stream, tools = self._open(messages, kwargs), bool(kwargs.get("tools"))

        def pieces() -> ChatResponseGen:
            text = ""
            with stream:
                for piece in stream:
                    if not tools:
                        text += piece
                        yield _partial(text, piece)
                yield _last(stream.answer, tools)

        return pieces()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        await self._ready()
        stream, tools = self._open(messages, kwargs), bool(kwargs.get("tools"))

        async def pieces() -> ChatResponseAsyncGen:
            text = ""
            with stream:
                async for piece in stream:
                    if not tools:
                        text += piece
                        yield _partial(text, piece)
                yield _last(await stream.wait(), tools)

        return pieces()

    # Completion: the prompt is a message of the user

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return _completion(_response(self._open(_said(prompt), kwargs).answer))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        await self._ready()
        return _completion(_response(await self._open(_said(prompt), kwargs).wait()))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        stream = self._open(_said(prompt), kwargs)

        def pieces() -> CompletionResponseGen:
            text = ""
            with stream:
                for piece in stream:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
                yield _completion(_last(stream.answer, tools=False))

        return pieces()

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        await self._ready()
        stream = self._open(_said(prompt), kwargs)

        async def pieces() -> CompletionResponseAsyncGen:
            text = ""
            with stream:
                async for piece in stream:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
                yield _completion(_last(await stream.wait(), tools=False))

        return pieces()

    def _open(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> AnswerStream:
        """Begin an answer; arguments of the call win over those of the LLM."""
        given = {"temperature": self.temperature, "blend": self.blend, **self.generate_kwargs, **kwargs}
        given["max_tokens"] = given.pop("max_new_tokens", None) or given.get("max_tokens") or self.max_new_tokens
        given["tool_choice"] = given.get("tool_choice") or "auto"
        if self.stopping_ids:
            own = self.engine.local_model.hf.generation_config.eos_token_id
            given.setdefault("eos_token_id", [*(own if isinstance(own, list) else [own]), *self.stopping_ids])
        spoken, remembered = without_memories(messages)
        if remembered:
            given["context"] = [*remembered, *(given.get("context") or ())]
        return self.engine.stream_chat([to_message(message) for message in spoken], **given)

    # Function calling

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if user_msg is not None:
            messages.append(
                ChatMessage(role=MessageRole.USER, content=user_msg) if isinstance(user_msg, str) else user_msg
            )
        functions = [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools]
        choice = kwargs.pop("tool_choice", None) or ("required" if tool_required else "auto")
        return {"messages": messages, "tools": functions, "tool_choice": choice, **kwargs}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        calls = response.message.additional_kwargs.get("tool_calls", [])
        if not calls and error_on_no_tool_call:
            cut = (
                " and was cut off; give more max_tokens"
                if (response.raw or {}).get("finish_reason") == "length"
                else ""
            )
            raise ValueError(f"The model called no tool; it said {response.message.content!r}{cut}.")
        return [
            ToolSelection(
                tool_id=call["id"],
                tool_name=call["function"]["name"],
                tool_kwargs=json.loads(call["function"]["arguments"]),
            )
            for call in calls
        ]


def _check_fields(fields: dict[str, Any], known: Collection[str]) -> None:
    """Take out what `HuggingFaceLLM` has and this LLM needs not; raise InputError for what it cannot do."""
    if fields.pop("tokenizer_name", None) not in (None, fields.get("model_name")):
        raise InputError("The tokenizer is the model's own. Give model and tokenizer as objects for another.")
    if not fields.pop("is_chat_model", True):
        raise InputError("Prompts are rendered by the model's chat template. Leave is_chat_model out.")
    if fields.pop("query_wrapper_prompt", None) not in (None, "", "{query_str}"):
        raise InputError("Prompts are rendered by the model's chat template. Leave query_wrapper_prompt out.")
    for name in ("completion_to_prompt", "messages_to_prompt"):
        if fields.pop(name, None) is not None:
            raise InputError(f"Prompts are rendered by the model's chat template. Leave {name} out.")
    if fields.pop("tokenizer_kwargs", None):
        raise InputError("tokenizer_kwargs are not used. Give a tokenizer as an object.")
    fields.pop("tokenizer_outputs_to_remove", None)
    if unknown := fields.keys() - known:
        raise InputError(f"{min(unknown)!r} is not known here. Known are: {', '.join(sorted(known))}.")


def without_memories(messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], list[Document]]:
    """Messages, and apart from them what a memory block recalled: context, each memory with its own cache."""
    spoken = [message for message in messages if DOCUMENT not in message.additional_kwargs]
    recalled = [message for message in messages if DOCUMENT in message.additional_kwargs]
    return spoken, [Document(m.additional_kwargs[DOCUMENT], m.content or "", {}, (m.content or "",)) for m in recalled]


def _said(prompt: str) -> list[ChatMessage]:
    return [ChatMessage(role=MessageRole.USER, content=prompt)]


def to_message(message: ChatMessage) -> dict[str, Any]:
    """A message as `KVMem.chat` takes it. Raises InputError."""
    texts, calls = [], []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolCallBlock):
            calls.append(_call(block.tool_call_id or "", block.tool_name, block.tool_kwargs))
        elif block.block_type != "thinking":
            raise InputError(f"A message holds a {type(block).__name__}; this model reads text. Give text.")
    converted: dict[str, Any] = {"role": message.role.value, "content": texts}
    given = message.additional_kwargs.get("tool_calls") or []
    calls = [_call(c.get("id", ""), c["function"]["name"], c["function"]["arguments"]) for c in given] or calls
    if calls:
        converted["tool_calls"] = calls
    if message.role == MessageRole.TOOL:
        converted["tool_call_id"] = message.additional_kwargs.get("tool_call_id", "")
        converted["name"] = message.additional_kwargs.get("name", "")
    return converted


def _call(identity: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call as chat templates take it: its arguments a mapping."""
    parsed = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": parsed}}


def _partial(text: str, piece: str) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=piece)


def _last(answer: Answer, tools: bool) -> ChatResponse:
    """The end of a stream: nothing new unless there were tools, when all of it comes at once."""
    response = _response(answer)
    response.delta = answer.text if tools else ""
    return response


def _response(answer: Answer) -> ChatResponse:
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": json.dumps(dict(c.arguments))}}
        for c in answer.tool_calls
    ]
    usage = {
        "prompt_tokens": answer.usage.prompt,
        "completion_tokens": answer.usage.generated,
        "total_tokens": answer.usage.prompt + answer.usage.generated,
        **vars(answer.usage),
    }
    plan = {"mode": answer.plan.mode, "reason": answer.plan.reason, "dropped": answer.plan.dropped}
    message = ChatMessage(
        role=MessageRole.ASSISTANT, content=answer.text, additional_kwargs={"tool_calls": calls} if calls else {}
    )
    raw = {"usage": usage, "plan": plan, "timings": dict(vars(answer.timings)), "finish_reason": answer.finish_reason}
    return ChatResponse(message=message, raw=raw)


def _completion(response: ChatResponse) -> CompletionResponse:
    return CompletionResponse(text=response.message.content or "", raw=response.raw, delta=response.delta)
