"""ChatKVMem: a local chat model that does not read the same text twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from kvmem import Answer, AnswerStream, AnswerTimeoutError, InputError, KVMemError
from kvmem.library.request import Request
from kvmem.options import OPTION_NAMES, SCOPE_NAMES
from kvmem.prompt.tools import Toolbox
from langchain_kvmem.base import SAMPLED, BaseChatKVMem
from langchain_kvmem.chunks import Chunks, to_ai_message
from langchain_kvmem.convert import to_messages
from langchain_kvmem.errors import as_langchain
from langchain_kvmem.prepared import PREPARED
from langchain_kvmem.structured import schema_of, structured
from langchain_kvmem.together import ANSWERS, Answers, key_of

_CALL_NAMES = SCOPE_NAMES | {"thread", "tools", "tool_choice", "generate_kwargs"}


class ChatKVMem(BaseChatKVMem):
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

    # LangChain asks for the parameters of a call before it makes it, and they need the engine.

    async def agenerate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> LLMResult:
        await self._ready()
        return await super().agenerate(messages, *args, **kwargs)

    async def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[AIMessageChunk]:
        await self._ready()
        async with aclosing(super().astream(*args, **kwargs)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk

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
            prepared = ANSWERS.get()
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
        with as_langchain(), self._open(messages, stop, kwargs) as stream:
            chunks = Chunks(self.engine.model.name)
            for part in stream.parts:
                chunk = chunks.of(part)
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
            yield chunks.last(stream.answer)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        await self._ready()
        with as_langchain(), self._open(messages, stop, kwargs) as stream:
            chunks = Chunks(self.engine.model.name)
            async for part in stream.parts:
                chunk = chunks.of(part)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
            yield chunks.last(await stream.wait())

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
        given = {name: getattr(self, name) for name in (*SAMPLED, "timeout", "blend")}
        given |= {"stop": stop or self.stop, **kwargs}
        for internal in ("ls_structured_output_format", "parallel_tool_calls", "strict"):
            given.pop(internal, None)
        if given.pop("model", self.model_name) not in (self.model_name, self.engine.model.name):
            raise InputError(f"This ChatKVMem runs {self.engine.model.name!r}. Create another one for another model.")
        own = given.pop("chat_template_kwargs", None) or {}
        if self.chat_template_kwargs or own:
            given["chat_template_kwargs"] = {**self.chat_template_kwargs, **own}
        wanted = given.pop("response_format", None)
        if wanted is not None and given.get("schema") is None:
            given["schema"] = schema_of(wanted)
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
        token = ANSWERS.set(together)
        try:
            # Runnable.batch runs each prompt in a copy of this context.
            return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        finally:
            ANSWERS.reset(token)

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
        token = ANSWERS.set(together)
        try:
            return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        finally:
            ANSWERS.reset(token)

    def _answer_together(self, inputs: list[LanguageModelInput], kwargs: dict[str, Any]) -> Answers | None:
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
        return Answers(self, zip(map(key_of, prompts), found, strict=True))

    def _result(self, answer: Answer) -> ChatResult:
        message = to_ai_message(answer, self.engine.model.name)
        return ChatResult(generations=[ChatGeneration(message=message)])

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
        return structured(self, schema, method, include_raw)
