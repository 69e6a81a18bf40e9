"""ChatKVMem: a local chat model that does not read the same text twice."""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter
from types import TracebackType
from typing import Any
from uuid import uuid4

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import OutputParserException
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from kvmem import Answer, AnswerStream, AnswerTimeoutError, BlendSettings, InputError, KVMem, KVMemError, Settings
from kvmem.library.request import Request
from kvmem.model.local import glance
from kvmem.model.locate import is_remote
from kvmem.options import OPTION_NAMES
from kvmem.prompt.tools import Toolbox
from kvmem.settings import EngineOptions
from kvmem.sharing import SharedEngine
from langchain_kvmem.convert import to_messages, to_metadata, to_usage
from langchain_kvmem.errors import as_langchain

_SAMPLED = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_CALL_NAMES = frozenset(
    ("context", "collection", "documents", "retriever", "thread", "tools", "tool_choice", "generate_kwargs")
)
# Arguments of a call that name documents or a conversation, which change while the prompt stays the same.
_CHANGING = frozenset(("collection", "documents", "retriever", "thread"))


@dataclass(frozen=True)
class Prepared:
    """A prompt that a chain has built for the next answer of its own model; other models have nothing to do with it."""

    model: ChatKVMem
    request: Request


PREPARED: ContextVar[Prepared | None] = ContextVar("kvmem_prepared", default=None)
# What other packages call an argument, and what it is here.
_HINTS = {
    "max_new_tokens": "Use max_tokens.",
    "num_predict": "Use max_tokens.",
    "num_ctx": "The model's own window is used. Limit documents with model_kwargs={'context_tokens': ...}.",
    "model_id": "Use model.",
    "model_path": "Use model.",
    "repeat_penalty": "Use repetition_penalty.",
}


class ChatKVMem(BaseChatModel):
    """A chat model over `KVMem`: text it has seen, in any prompt and at any position, is not computed again.

    Models that name the same model, store and settings share one engine in a process; so do copies. Close it with
    `close()` or `with`.

    `.bind(context=[...])` puts texts or documents into the system message, cached one by one.

    Example:
        ```python
        from langchain_kvmem import ChatKVMem

        model = ChatKVMem(model="smollm2", store="./kv", max_tokens=32)
        print(model.invoke("What is the capital of France?").content)
        ```
    """

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True, extra="forbid")

    model_name: str = Field(default="smollm2", alias="model")
    """A hub id, a local directory, a GGUF file, or "smollm2"; or the address of a vLLM server."""
    store: str | None = None
    """Directory for the caches. None keeps them in memory."""
    temperature: float | None = Field(default=None, ge=0)
    """Sampling temperature. None or 0 is greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus sampling: the smallest set of tokens with this probability."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample among this many tokens only."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Leave out tokens less likely than this share of the likeliest one."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """Above 1 makes tokens that were used less likely."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The longest answer, in tokens."""
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    """An answer ends before any of these. A single string may be given."""
    seed: int | None = None
    """Makes sampled answers repeatable."""
    timeout: float | None = Field(default=None, alias="request_timeout", gt=0)
    """Seconds from a call to the end of its answer."""
    streaming: bool = False
    """Whether `invoke` streams, too, for callbacks that want tokens."""
    max_retries: int | None = Field(default=None, ge=0)
    """Attempts at a call to a vLLM server; a local model has none to make."""
    device: str | None = None
    """"auto" (CUDA if there is one, else the CPU), or a device of torch."""
    dtype: str | None = None
    """"auto" (as the checkpoint), "bfloat16", "float16" or "float32"."""
    blend: Any = None
    """How composed caches are blended; see `kvmem.BlendSettings`."""
    namespace: str = "default"
    """Isolates documents, memories and caches, for example by user."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More arguments of `KVMem`."""
    generate_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More arguments of transformers' `generate`."""
    mem: KVMem | None = Field(default=None, exclude=True, repr=False)
    """An open engine to use instead of `model` and `store`. Closing it is up to you."""
    _share: SharedEngine | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """Move settings of `KVMem` to model_kwargs, with a warning, and reject what does not exist."""
        if not isinstance(values, dict):
            return values
        known = {*cls.model_fields, *(field.alias for field in cls.model_fields.values() if field.alias)}
        values, extra = dict(values), dict(values.get("model_kwargs") or {})
        for name in [name for name in values if name not in known]:
            if name not in EngineOptions.__annotations__:
                hint = _HINTS.get(name, "Arguments of transformers' generate go into generate_kwargs.")
                raise InputError(f"ChatKVMem has no argument {name!r}. {hint}")
            warnings.warn(f"{name} is a setting of KVMem; it was moved to model_kwargs.", stacklevel=2)
            extra[name] = values.pop(name)
        if unknown := extra.keys() - {*EngineOptions.__annotations__, "tokenizer", "retriever", "settings"}:
            raise InputError(f"model_kwargs has {min(unknown)!r}, which KVMem does not know.")
        for name in ("stop", "stop_sequences"):
            if isinstance(values.get(name), str):
                values[name] = [values[name]]
        if values.get("blend") is not None:
            BlendSettings.parse(values["blend"])
        _check_beside(values.get("mem"), {**values, **({"model_kwargs": extra} if extra else {})})
        return {**values, **({"model_kwargs": extra} if extra else {})}

    @property
    def engine(self) -> KVMem:
        """The engine; opened by the first call."""
        if self.mem is not None:
            return self.mem
        return self._shared().open()

    def _shared(self) -> SharedEngine:
        options = {"namespace": self.namespace, **self.model_kwargs}
        named = {"device": self.device, "dtype": self.dtype, "retries": self.max_retries}
        options |= {name: value for name, value in named.items() if value is not None}
        wanted = SharedEngine(self.model_name, self.store, options)
        if self._share is None or self._share != wanted:
            self._share = wanted
        return self._share

    @property
    def _opened(self) -> KVMem | None:
        return self.mem if self.mem is not None else self._shared().opened

    def close(self) -> None:
        """Give up the engine; it is closed if no other component uses it. An engine given as `mem` stays open."""
        if self._share is not None:
            self._share.close()

    def __copy__(self) -> ChatKVMem:
        copied = super().__copy__()
        # A share of its own, so that closing one leaves the other open.
        copied._share = copy(self._share)
        return copied

    def __enter__(self) -> ChatKVMem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _ready(self) -> None:
        """Open the engine without blocking the event loop."""
        if self._opened is None:
            await asyncio.to_thread(lambda: self.engine)

    # LangChain asks for the parameters of a call before it makes it, and they need the engine.

    async def agenerate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> LLMResult:
        await self._ready()
        return await super().agenerate(messages, *args, **kwargs)

    async def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[AIMessageChunk]:
        await self._ready()
        async with aclosing(super().astream(*args, **kwargs)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk

    @property
    def _llm_type(self) -> str:
        return "kvmem"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What answers depend on, so that LangChain's cache of answers never gives those of another model."""
        engine = self.engine
        return {
            "model_name": engine.model.name,
            "fingerprint": engine.model.fingerprint,
            "blend": json.dumps(self.blend, default=str) if self.blend else engine.settings.blend.model_dump_json(),
            "namespace": engine.settings.namespace,
            **{name: getattr(self, name) for name in (*_SAMPLED, "stop")},
            "generate_kwargs": self.generate_kwargs,
        }

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The key of LangChain's cache of answers; one of its own where an answer depends on more than the prompt."""
        known: str = super()._get_llm_string(stop, **kwargs)
        return f"{known}{uuid4()}" if any(kwargs.get(name) is not None for name in _CHANGING) else known

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="kvmem",
            ls_model_type="chat",
            ls_model_name=kwargs.get("model") or (self.mem.model.name if self.mem is not None else self.model_name),
            ls_temperature=kwargs.get("temperature", self.temperature) or 0.0,
        )
        max_tokens = kwargs.get("max_tokens", self.max_tokens)
        if max_tokens is not None:
            params["ls_max_tokens"] = max_tokens
        if stop or self.stop:
            params["ls_stop"] = stop or self.stop or []
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        """Read from the model's config and tokenizer; its weights are not loaded."""
        if (opened := self._opened) is not None:
            window, tools = opened.model.window, opened.model.knows_tools
        elif is_remote(self.model_name):
            return None
        else:
            found = glance(self.model_name)
            window, tools = found.window, found.knows_tools
        answer = min(window, self.max_tokens or Settings().max_tokens)
        return ModelProfile(
            max_input_tokens=window - answer,
            max_output_tokens=answer,
            text_inputs=True,
            text_outputs=True,
            tool_calling=tools,
            structured_output=True,
        )

    def get_token_ids(self, text: str) -> list[int]:
        return list(self.engine.model.tokenize(text, markup=False))

    # Answers

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with as_langchain():
            prepared = _ANSWERS.get()
            found = None if prepared is None else prepared.take(self, messages)
            return self._result(self._open(messages, stop, kwargs).answer if found is None else found)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        await self._ready()
        with as_langchain():
            return self._result(await self._open(messages, stop, kwargs).wait())

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with_tools = bool(kwargs.get("tools"))
        with as_langchain(), self._open(messages, stop, kwargs) as stream:
            for piece in stream:
                if not with_tools:
                    chunk = _chunk(piece)
                    if run_manager:
                        run_manager.on_llm_new_token(piece, chunk=chunk)
                    yield chunk
            yield self._last_chunk(stream.answer, with_tools)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        await self._ready()
        with_tools = bool(kwargs.get("tools"))
        with as_langchain(), self._open(messages, stop, kwargs) as stream:
            async for piece in stream:
                if not with_tools:
                    chunk = _chunk(piece)
                    if run_manager:
                        await run_manager.on_llm_new_token(piece, chunk=chunk)
                    yield chunk
            yield self._last_chunk(await stream.wait(), with_tools)

    def _open(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> AnswerStream:
        """Begin an answer; arguments of the call win over the model's."""
        given = self._options(stop, kwargs)
        if (prepared := self._prepared) is not None:
            return self.engine.stream_prompt(prepared, **given)
        return self.engine.stream_chat(to_messages(messages), **given)

    @property
    def _prepared(self) -> Request | None:
        prepared = PREPARED.get()
        return None if prepared is None or prepared.model is not self else prepared.request

    def _options(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `KVMem.stream_chat` for a call. Raises InputError."""
        given = {name: getattr(self, name) for name in (*_SAMPLED, "timeout", "blend")}
        given |= {"stop": stop or self.stop, **kwargs}
        for internal in ("ls_structured_output_format", "parallel_tool_calls", "strict"):
            given.pop(internal, None)
        if given.pop("model", self.model_name) not in (self.model_name, self.engine.model.name):
            raise InputError(f"This ChatKVMem runs {self.engine.model.name!r}. Create another one for another model.")
        wanted = given.pop("response_format", None)
        if wanted is not None and given.get("schema") is None:
            given["schema"] = _schema_of(wanted)
        given["tool_choice"] = given.get("tool_choice") or "auto"
        more = {name: given.pop(name) for name in [*given] if name not in OPTION_NAMES | _CALL_NAMES}
        given["generate_kwargs"] = {**self.generate_kwargs, **(given.get("generate_kwargs") or {}), **more}
        if self._prepared is not None:
            given = {name: value for name, value in given.items() if name in OPTION_NAMES}
        return given

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer several prompts; those that differ in their last part only are decoded together."""
        try:
            together = self._answer_together(inputs, kwargs)
        except AnswerTimeoutError as error:
            if return_exceptions:
                return [error for _ in inputs]  # type: ignore[misc]
            raise
        token = _ANSWERS.set(together)
        try:
            # Runnable.batch runs each prompt in a copy of this context.
            return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        finally:
            _ANSWERS.reset(token)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Like `batch`, without blocking the event loop."""
        await self._ready()
        try:
            together = await asyncio.to_thread(self._answer_together, inputs, kwargs)
        except AnswerTimeoutError as error:
            if return_exceptions:
                return [error for _ in inputs]  # type: ignore[misc]
            raise
        token = _ANSWERS.set(together)
        try:
            return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        finally:
            _ANSWERS.reset(token)

    def _answer_together(self, inputs: list[LanguageModelInput], kwargs: dict[str, Any]) -> _Answers | None:
        """Answers by prompt; None where prompts have to be answered one by one, or one of them is in error."""
        given = {**kwargs}
        if len(inputs) < 2 or given.keys() & {"tools", "schema", "response_format", "thread"} or get_llm_cache():
            return None
        prompts = [self._convert_input(item).to_messages() for item in inputs]
        options = self._options(given.pop("stop", None), given)
        options.pop("tool_choice")
        try:
            found = self.engine.batch([to_messages(messages) for messages in prompts], **options)
        except AnswerTimeoutError:
            raise
        except KVMemError:
            return None  # each prompt raises its own error, and the others are answered
        return _Answers(self, zip(map(_key_of, prompts), found, strict=True))

    def _result(self, answer: Answer) -> ChatResult:
        message = AIMessage(
            content=answer.text,
            tool_calls=[
                {"name": c.name, "args": dict(c.arguments), "id": c.id, "type": "tool_call"} for c in answer.tool_calls
            ],
            usage_metadata=to_usage(answer.usage),
            response_metadata=to_metadata(answer, self.engine.model.name),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _last_chunk(self, answer: Answer, with_tools: bool) -> ChatGenerationChunk:
        """Usage, metadata, and all that a model with tools said: whether text is a call is known at its end."""
        calls = [
            tool_call_chunk(name=c.name, args=json.dumps(c.arguments), id=c.id, index=i)
            for i, c in enumerate(answer.tool_calls)
        ]
        message = AIMessageChunk(
            content=answer.text if with_tools else "",
            tool_call_chunks=calls,
            usage_metadata=to_usage(answer.usage),
            response_metadata=to_metadata(answer, self.engine.model.name),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

    # Tools and structured output

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call `tools`.

        tool_choice: None or "auto" leaves it to the model; "any", "required", True or a tool's name force a call,
            whose JSON then follows the tool's schema token by token. So does every answer of a model whose chat
            template does not know tools: it is a call of one of them, or of `answer`, whose text becomes the message's.
        """
        converted = [convert_to_openai_tool(tool) for tool in tools]
        choice: str | None
        if isinstance(tool_choice, dict):
            choice = tool_choice.get("function", tool_choice).get("name") or tool_choice.get("type")
        elif isinstance(tool_choice, bool):
            choice = "any" if tool_choice else None
        else:
            choice = tool_choice
        Toolbox(tuple(converted), choice or "auto", native=False)
        return self.bind(tools=converted, tool_choice=choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: str = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers as instances of `schema` (a pydantic class), or as mappings (a TypedDict or JSON schema).

        Tokens that would leave the schema are never drawn, so every `method` ("json_schema", "function_calling",
        "json_mode") gives the same. Raises InputError for a schema that is none.
        """
        if kwargs:
            raise InputError(f"with_structured_output does not take {min(kwargs)}. Bind it to the model instead.")
        if method not in ("json_schema", "function_calling", "json_mode"):
            raise InputError(f"method={method!r} is not known. Leave it out.")
        if isinstance(schema, type) and issubclass(schema, Enum):
            raise InputError(
                f"{schema.__name__} is an Enum, not an object. Use a pydantic model with a field of it, or the JSON "
                "schema {'enum': [...]}."
            )
        plain_schema = isinstance(schema, dict) and schema.get("type") not in (None, "function")
        # LangChain's conversion knows objects only, and drops the rest of any other schema.
        json_schema = dict(schema) if plain_schema else convert_to_json_schema(schema)  # type: ignore[arg-type]
        internal = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": json_schema}}
        model = self.bind(schema=json_schema, **internal)
        parser: Any = (
            PydanticOutputParser(pydantic_object=schema)
            if isinstance(schema, type) and is_basemodel_subclass(schema)
            else JsonOutputParser()
        )
        parser = RunnablePassthrough(_check_complete) | parser
        if not include_raw:
            plain: Runnable[LanguageModelInput, Any] = model | parser
            return plain
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        both: Runnable[LanguageModelInput, Any] = RunnableMap(raw=model) | parsed.with_fallbacks(
            [failed], exception_key="parsing_error"
        )
        return both


def _check_beside(mem: KVMem | None, values: dict[str, Any]) -> None:
    """Raise InputError for what an open engine has decided already."""
    if mem is None:
        return
    settled: dict[str, Any] = {"store": None, "device": None, "dtype": None, "max_retries": None, "model_kwargs": {}}
    given = [name for name, default in settled.items() if values.get(name) not in (None, default)]
    if values.get("namespace") not in (None, "default", mem.settings.namespace):
        given.append("namespace")
    names = (None, "smollm2", mem.model.name)
    given += [name for name in ("model", "model_name") if values.get(name) not in names]
    if given:
        raise InputError(f"mem has its own {given[0]}. Give it to KVMem, or leave mem out.")


def _schema_of(response_format: Any) -> dict[str, Any] | None:
    """The JSON schema that OpenAI's `response_format` asks for. Raises InputError."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema" and isinstance(response_format.get("json_schema"), dict):
        return dict(response_format["json_schema"].get("schema") or {"type": "object"})
    raise InputError(f"response_format={response_format!r} is not known. Give OpenAI's, or a schema.")


def _check_complete(message: BaseMessage) -> None:
    """LangChain's parsers close JSON that was cut off; an answer that lacks its end is an error."""
    try:
        json.loads(str(message.content))
    except ValueError as error:
        raise OutputParserException(
            f"The answer ends before its JSON does: {str(message.content)[-200:]!r}. Raise max_tokens.",
            llm_output=str(message.content),
        ) from error


def _chunk(piece: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=piece))


class _Answers:
    """Answers that were decoded together, by prompt; each is used once."""

    def __init__(self, model: ChatKVMem, pairs: Iterable[tuple[str, Answer]]) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._more: dict[str, list[Answer]] = {}
        for key, answer in pairs:
            self._more.setdefault(key, []).append(answer)

    def take(self, model: ChatKVMem, messages: Sequence[BaseMessage]) -> Answer | None:
        if model is not self._model:
            return None
        with self._lock:
            left = self._more.get(_key_of(messages))
            return left.pop() if left else None


_ANSWERS: ContextVar[_Answers | None] = ContextVar("kvmem_answers", default=None)


def _key_of(messages: Sequence[BaseMessage]) -> str:
    return json.dumps(to_messages(messages), default=repr)
