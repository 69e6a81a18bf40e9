"""ChatKVMem: a local chat model that does not read the same text twice."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from operator import itemgetter
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import ConfigDict, Field

from kvmem import Answer, AnswerStream, InputError, KVMem
from kvmem.tools import Toolbox
from langchain_kvmem.convert import to_messages, to_metadata, to_usage


class _Engines:
    """The engines that a model and its configured copies have opened, by what they were opened with."""

    def __init__(self) -> None:
        self._open: dict[str, KVMem] = {}
        self._opening = threading.Lock()

    def find(self, chat: ChatKVMem) -> KVMem | None:
        return self._open.get(self._key(chat))

    def open(self, chat: ChatKVMem) -> KVMem:
        with self._opening:
            if (found := self.find(chat)) is None:
                found = KVMem(chat.model_name, chat.store, namespace=chat.namespace, **chat.model_kwargs)
                self._open[self._key(chat)] = found
            return found

    def _key(self, chat: ChatKVMem) -> str:
        return json.dumps([chat.model_name, chat.store, chat.namespace, chat.model_kwargs], default=repr)


class ChatKVMem(BaseChatModel):
    """A chat model over `KVMem`: texts it has seen, in any prompt and at any place, are not read again.

    model: a hub id, a directory, a GGUF file, "smollm2". store: a directory for the caches; None keeps them in memory.
    temperature (None: greedy), top_p, max_tokens, stop, seed, timeout (seconds): as elsewhere in LangChain; each may be
    given per call.
    blend, namespace: as in `KVMem`. model_kwargs: more of its arguments. generate_kwargs: for transformers' `generate`.
    mem: an engine that is open already (`KVMem(hf_model, store, tokenizer=tokenizer)` takes a loaded model); model and
    store are not used then.

    `.bind(context=[...])` puts texts or documents into the system message, cached one by one.
    """

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True)

    model_name: str = Field(default="smollm2", alias="model")
    store: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    seed: int | None = None
    timeout: float | None = Field(default=None, alias="request_timeout", gt=0)
    blend: Any = None
    namespace: str = "default"
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    generate_kwargs: dict[str, Any] = Field(default_factory=dict)
    mem: KVMem | None = Field(default=None, exclude=True, repr=False)
    opened: _Engines = Field(default_factory=_Engines, exclude=True, repr=False)

    @property
    def engine(self) -> KVMem:
        """The engine; opened by the first call."""
        if self.mem is not None:
            if self.namespace not in ("default", self.mem.settings.namespace) or self.store or self.model_kwargs:
                raise InputError(
                    "This engine has a namespace, a store and settings. Give them to KVMem, or no mem here."
                )
            return self.mem
        return self.opened.find(self) or self.opened.open(self)

    async def _ready(self) -> None:
        """Open the engine without blocking the event loop."""
        if self.mem is None and self.opened.find(self) is None:
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
            **{name: getattr(self, name) for name in ("temperature", "top_p", "max_tokens", "stop", "seed")},
            "generate_kwargs": self.generate_kwargs,
        }

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
        if self.mem is None and self.opened.find(self) is None:
            return None
        return {"max_input_tokens": self.engine.model.window, "tool_calling": True}

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
        return self._result(self._open(messages, stop, kwargs).answer)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        await self._ready()
        return self._result(await self._open(messages, stop, kwargs).wait())

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with_tools = bool(kwargs.get("tools"))
        with self._open(messages, stop, kwargs) as stream:
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
        with self._open(messages, stop, kwargs) as stream:
            async for piece in stream:
                if not with_tools:
                    chunk = _chunk(piece)
                    if run_manager:
                        await run_manager.on_llm_new_token(piece, chunk=chunk)
                    yield chunk
            yield self._last_chunk(await stream.wait(), with_tools)

    def _open(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> AnswerStream:
        """Begin an answer; arguments of the call win over the model's."""
        given = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "timeout": self.timeout,
            "blend": self.blend,
            **self.generate_kwargs,
            **kwargs,
        }
        for internal in ("ls_structured_output_format", "parallel_tool_calls", "strict"):
            given.pop(internal, None)
        if given.pop("model", self.model_name) not in (self.model_name, self.engine.model.name):
            raise InputError(f"This ChatKVMem has loaded {self.engine.model.name!r}. Make another for another model.")
        wanted = given.pop("response_format", None)
        if wanted is not None and given.get("schema") is None:
            given["schema"] = _schema_of(wanted)
        given["tool_choice"] = given.get("tool_choice") or "auto"
        return self.engine.stream_chat(to_messages(messages), stop=stop or self.stop, **given)

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
