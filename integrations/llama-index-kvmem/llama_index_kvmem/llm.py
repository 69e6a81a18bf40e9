"""KVMemLLM: a local LLM for LlamaIndex that does not compute the same text twice."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Sequence
from contextvars import ContextVar
from copy import copy
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import llama_index.core
from llama_index.core.base.llms.generic_utils import (
    achat_to_completion_decorator,
    astream_chat_to_completion_decorator,
    chat_to_completion_decorator,
    stream_chat_to_completion_decorator,
)
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
)
from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr, ValidationError
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.types import TokenAsyncGen
from pydantic_core import from_json

from kvmem import Answer, AnswerStream, BlendSettings, Document, InputError, KVMem
from kvmem.library.request import Request
from kvmem.model.base import AnyModel
from kvmem.options import OPTION_NAMES, as_sampling, check_names
from kvmem.settings import EngineOptions
from kvmem.sharing import SharedEngine
from llama_index_kvmem.convert import DOCUMENT, to_message, to_raw

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

_OPENING = threading.RLock()
_CALL_NAMES = frozenset(("context", "collection", "documents", "retriever", "thread", "tools", "tool_choice"))
# What LlamaIndex passes to every LLM, and what has no meaning here.
_PASSED = frozenset(("allow_parallel_tool_calls", "tool_required", "verbose", "formatted"))


class Prepared:
    """A prompt that a query engine has built for a call of an LLM with these messages, and the answer to it.

    Calls that event handlers make meanwhile are not that call.
    """

    def __init__(self, llm: KVMemLLM, messages: Sequence[ChatMessage], request: Request) -> None:
        self._llm, self._texts = llm, _texts(messages)
        self.request = request
        self.stream: AnswerStream | None = None

    def is_for(self, llm: KVMemLLM, messages: Sequence[ChatMessage]) -> bool:
        return llm is self._llm and self.stream is None and _texts(messages) == self._texts


PREPARED: ContextVar[Prepared | None] = ContextVar("kvmem_prepared", default=None)


class KVMemLLM(FunctionCallingLLM):
    """An LLM over `KVMem`: text it has seen, in any prompt and at any position, is not computed again.

    LLMs that name the same model, store and settings share one engine in a process; so do copies. Close it with
    `close()` or `with`. `raw` of a response has `usage`, `plan` and `timings`.

    Args:
        mem: an open engine to use instead of `model_name` and `store`; closing it is up to you.
        model: a loaded transformers model, then with `tokenizer`.
        tokenizer: of `model`.
        messages_to_prompt: renders messages as a prompt, instead of the model's chat template.
        completion_to_prompt: renders the prompt of a completion, instead of one message in the chat template.
        query_wrapper_prompt: a template with `{query_str}`, used like `completion_to_prompt`.
        is_chat_model: False for a base model: completions continue the prompt as it is.
        fields: see below. Arguments of a call (`max_tokens` or `max_new_tokens`, `temperature`, `top_p`, `stop`,
            `seed`, `context`, `schema` and other options of `KVMem.chat`) override them.

    Raises:
        InputError: for an argument that does not exist.

    Example:
        ```python
        from llama_index_kvmem import KVMemLLM

        llm = KVMemLLM(model_name="smollm2", store="./kv", max_new_tokens=32)
        print(llm.complete("What is the capital of France?"))
        ```
    """

    model_name: str = Field(
        default="smollm2", description="A hub id, a local directory, a GGUF file, 'smollm2', or a vLLM address."
    )
    store: str | None = Field(default=None, description="Directory for the caches; None keeps them in memory.")
    max_new_tokens: int = Field(default=256, gt=0, description="The longest answer, in tokens.")
    temperature: float = Field(default=0.0, ge=0.0, description="Sampling temperature; 0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(default=None, gt=0, description="Sample among this many tokens only.")
    repetition_penalty: float | None = Field(default=None, gt=0, description="Above 1 avoids repetition.")
    stop: list[str] | None = Field(default=None, description="An answer ends before any of these.")
    seed: int | None = Field(default=None, description="Makes sampled answers repeatable.")
    timeout: float | None = Field(default=None, gt=0, description="Seconds from a call to the end of its answer.")
    blend: Any = Field(default=None, description="How composed caches are blended; see kvmem.BlendSettings.")
    namespace: str = Field(default="default", description="Isolates memories and caches, for example by user.")
    generate_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Options of KVMem.chat, and more arguments of transformers' generate."
    )
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="More arguments of KVMem.")
    context_window: int | None = Field(default=None, gt=0, description="At most so many tokens of the model's window.")
    device_map: Any = Field(default=None, description="As in transformers' from_pretrained.")
    stopping_ids: list[int] = Field(default_factory=list, description="More token ids that end an answer.")
    count_tokens: bool = Field(
        default=True,
        description="Have LlamaIndex count tokens with this model's tokenizer, unless another one was set.",
    )
    is_chat_model: bool = Field(default=True, description="False for a base model without a chat template.")
    _mem: KVMem | None = PrivateAttr(default=None)
    _share: SharedEngine | None = PrivateAttr(default=None)
    _loaded: tuple[Any, Any] | None = PrivateAttr(default=None)
    _render: Callable[[Sequence[ChatMessage]], str] | None = PrivateAttr(default=None)
    _wrap: Callable[[str], str] | None = PrivateAttr(default=None)

    def __init__(
        self,
        mem: KVMem | None = None,
        model: Any = None,
        tokenizer: Any = None,
        *,
        messages_to_prompt: Callable[[Sequence[ChatMessage]], str] | None = None,
        completion_to_prompt: Callable[[str], str] | None = None,
        query_wrapper_prompt: Any = None,
        **fields: Any,
    ) -> None:
        _check_fields(fields, type(self).model_fields.keys())
        given = {"model": model, "tokenizer": tokenizer, **fields}
        settled = ("model", "tokenizer", "store", "namespace", "model_kwargs", "device_map")
        if mem is not None and (named := [name for name in settled if given.get(name) is not None]):
            raise InputError(f"mem has its own {named[0]}. Give it to KVMem, or leave mem out.")
        if mem is not None and fields.get("model_name") not in (None, mem.model.name):
            raise InputError(f"mem runs {mem.model.name!r}, not {fields['model_name']!r}. Leave one of them out.")
        if tokenizer is not None and model is None:
            raise InputError("tokenizer is used with model only. Give the loaded model, too.")
        super().__init__(**fields)
        self._loaded = None if model is None else (model, tokenizer)
        self._render = messages_to_prompt
        self._wrap = completion_to_prompt or _wrapper(query_wrapper_prompt)
        self._mem = mem
        if mem is not None:
            self.model_name = mem.model.name

    @property
    def engine(self) -> KVMem:
        """The engine; opened by the first call."""
        if self._mem is not None:
            return self._mem
        with _OPENING:
            return self._open_engine()

    def _open_engine(self) -> KVMem:
        options = {**self.model_kwargs, "namespace": self.namespace}
        if self.device_map is not None:
            options["device_map"] = self.device_map
        if self._loaded is not None:
            model, tokenizer = self._loaded
            self._mem = KVMem(model, self.store, tokenizer=tokenizer, **options)
            self.model_name = self._mem.model.name
            return self._mem
        share = SharedEngine(self.model_name, self.store, options)
        if self._share is None or self._share != share:
            self._share = share
        return self._share.open()

    @property
    def _is_open(self) -> bool:
        return self._mem is not None or (self._share is not None and self._share.opened is not None)

    @property
    def renders(self) -> bool:
        """Whether messages are rendered by a function that was given, and not by the model's chat template."""
        return self._render is not None

    async def _ready(self) -> None:
        """Open the engine without blocking the event loop."""
        if not self._is_open:
            await asyncio.to_thread(lambda: self.engine)

    def __copy__(self) -> KVMemLLM:
        copied = super().__copy__()
        # A share of its own, so that closing one leaves the other open.
        copied._share = copy(self._share)
        return copied

    def close(self) -> None:
        """Give up the engine; it is closed if no other component uses it. An engine given as `mem` stays open."""
        if self._share is not None:
            self._share.close()
        elif self._loaded is not None and self._mem is not None:
            self._mem.close()

    def __enter__(self) -> KVMemLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    def class_name(cls) -> str:
        return "KVMemLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Opens the engine. The window leaves room for the chat template's markup, which LlamaIndex does not count."""
        model = self.engine.model
        if self.count_tokens:
            _count_with(model)
        markup = model.count_markup() if self.is_chat_model else 0
        window = max(1, model.window - markup)
        return LLMMetadata(
            context_window=min(window, self.context_window or window),
            num_output=self.max_new_tokens,
            is_chat_model=self.is_chat_model,
            is_function_calling_model=self.is_chat_model,
            model_name=self.model_name,
        )

    # LlamaIndex asks for the metadata before it awaits anything, and they need the engine.

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        await self._ready()
        answer: str = await super().apredict(prompt, **prompt_args)
        return answer

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        await self._ready()
        return await super().astream(prompt, **prompt_args)

    # Chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self._chat(messages, **kwargs)

    def _chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return _response(self._open(messages, kwargs).answer)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return await self._achat(messages, **kwargs)

    async def _achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        await self._ready()
        return _response(await self._open(messages, kwargs).wait())

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return self._stream_chat(messages, **kwargs)

    def _stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
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
        return await self._astream_chat(messages, **kwargs)

    async def _astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
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

    # Completion

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        if (raw := self._raw_prompt(prompt, formatted)) is not None:
            return _completion(_response(self._complete(raw, kwargs).answer))
        return chat_to_completion_decorator(self._chat)(prompt, **kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        await self._ready()
        if (raw := self._raw_prompt(prompt, formatted)) is not None:
            return _completion(_response(await self._complete(raw, kwargs).wait()))
        return await achat_to_completion_decorator(self._achat)(prompt, **kwargs)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        if (raw := self._raw_prompt(prompt, formatted)) is None:
            return stream_chat_to_completion_decorator(self._stream_chat)(prompt, **kwargs)
        stream = self._complete(raw, kwargs)

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
        if (raw := self._raw_prompt(prompt, formatted)) is None:
            return await astream_chat_to_completion_decorator(self._astream_chat)(prompt, **kwargs)
        stream = self._complete(raw, kwargs)

        async def pieces() -> CompletionResponseAsyncGen:
            text = ""
            with stream:
                async for piece in stream:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
                yield _completion(_last(await stream.wait(), tools=False))

        return pieces()

    def _raw_prompt(self, prompt: str, formatted: bool) -> str | None:
        """What is continued as it is; None where a completion is a message of a chat."""
        if formatted and not self.is_chat_model:
            return prompt
        if self._wrap is not None:
            return prompt if formatted else self._wrap(prompt)
        return None if self.is_chat_model else prompt

    def _complete(self, prompt: str, kwargs: dict[str, Any]) -> AnswerStream:
        options = {name: value for name, value in self._options(kwargs).items() if name in OPTION_NAMES}
        return self.engine.stream_complete(prompt, **options)

    def _open(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> AnswerStream:
        """Begin an answer; arguments of the call override those of the LLM."""
        given = self._options(kwargs)
        prepared = PREPARED.get()
        if prepared is not None and prepared.is_for(self, messages):
            options = {name: value for name, value in given.items() if name in OPTION_NAMES}
            prepared.stream = self.engine.stream_prompt(prepared.request, **options)
            return prepared.stream
        if self._render is not None or not self.is_chat_model:
            rendered = _plain(messages) if self._render is None else self._render(messages)
            options = {name: value for name, value in given.items() if name in OPTION_NAMES}
            return self.engine.stream_complete(rendered, **options)
        spoken, remembered = without_memories(messages)
        if remembered:
            given["context"] = [*remembered, *(given.get("context") or ())]
        return self.engine.stream_chat([to_message(message) for message in spoken], **given)

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `KVMem.stream_chat`. Raises InputError."""
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed", "timeout", "blend")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        given |= {**self.generate_kwargs, **{n: v for n, v in kwargs.items() if n not in _PASSED}}
        given["max_tokens"] = given.pop("max_new_tokens", None) or given.get("max_tokens") or self.max_new_tokens
        given["tool_choice"] = given.get("tool_choice") or "auto"
        more = {name: given.pop(name) for name in [*given] if name not in OPTION_NAMES | _CALL_NAMES}
        extra = {**(given.get("generate_kwargs") or {}), **more}
        if self.stopping_ids:
            own = self.engine.local_model.hf.generation_config.eos_token_id
            extra.setdefault("eos_token_id", [*(own if isinstance(own, list) else [own]), *self.stopping_ids])
        given["generate_kwargs"] = extra
        return given

    # Structured predictions

    def _structured_stream_call(
        self, output_cls: type[Any], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Generator[Any, None, None]:
        """Objects as they grow, each of them valid; the answer follows the schema token by token."""
        messages = self._extend_messages(prompt.format_messages(llm=self, **prompt_args))
        seen: Any = None
        text = ""
        schema = output_cls.model_json_schema()
        for response in self.stream_chat(messages, schema=schema, **(llm_kwargs or {})):
            text = response.message.content or ""
            found = _partial_object(output_cls, text)
            if found is not None and found != seen:
                seen = found
                yield found
        last = _whole_object(output_cls, text)
        if last != seen:
            yield last

    async def _structured_astream_call(
        self, output_cls: type[Any], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> AsyncGenerator[Any, None]:
        """Like `_structured_stream_call`."""
        messages = self._extend_messages(prompt.format_messages(llm=self, **prompt_args))
        schema = output_cls.model_json_schema()
        stream = await self.astream_chat(messages, schema=schema, **(llm_kwargs or {}))

        async def objects() -> AsyncGenerator[Any, None]:
            seen: Any = None
            text = ""
            async for response in stream:
                text = response.message.content or ""
                found = _partial_object(output_cls, text)
                if found is not None and found != seen:
                    seen = found
                    yield found
            last = _whole_object(output_cls, text)
            if last != seen:
                yield last

        return objects()

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
            cut_off = (response.raw or {}).get("finish_reason") == "length"
            hint = " The answer was cut off: raise max_tokens." if cut_off else ""
            raise ValueError(f"The model called no tool; it answered {response.message.content!r}.{hint}")
        return [
            ToolSelection(
                tool_id=call["id"],
                tool_name=call["function"]["name"],
                tool_kwargs=json.loads(call["function"]["arguments"]),
            )
            for call in calls
        ]


def _texts(messages: Sequence[ChatMessage]) -> list[tuple[str, str | None]]:
    return [(message.role.value, message.content) for message in messages]


def _count_with(model: AnyModel) -> None:
    """Have LlamaIndex count tokens as a model does, unless a tokenizer was chosen."""
    known = llama_index.core.global_tokenizer
    # LlamaIndex sets its own default by itself, OpenAI's, which says nothing of this model.
    owner = type(getattr(known.func, "__self__", None)) if isinstance(known, partial) else object
    if known is None or owner.__module__.startswith("tiktoken"):
        llama_index.core.global_tokenizer = lambda text: list(model.tokenize(text, markup=False))


def _check_fields(fields: dict[str, Any], known: Collection[str]) -> None:
    """Take out what `HuggingFaceLLM` has and this LLM does not need; raise InputError for what it cannot do."""
    if fields.pop("tokenizer_name", None) not in (None, fields.get("model_name")):
        raise InputError("The tokenizer is the model's own. Give model and tokenizer as objects for another.")
    if fields.pop("tokenizer_kwargs", None):
        raise InputError("tokenizer_kwargs are not used. Give a tokenizer as an object.")
    fields.pop("tokenizer_outputs_to_remove", None)
    if unknown := fields.keys() - known:
        raise InputError(f"KVMemLLM has no argument {min(unknown)!r}. It has: {', '.join(sorted(known))}.")
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if fields.get("blend") is not None:
        BlendSettings.parse(fields["blend"])
    if unknown := (fields.get("model_kwargs") or {}).keys() - EngineOptions.__annotations__.keys() - {"retriever"}:
        raise InputError(f"model_kwargs has {min(unknown)!r}, which KVMem does not know.")


def check_options(options: dict[str, Any]) -> None:
    """Raise InputError for options of an answer that do not exist, or have wrong values."""
    check_names(options)
    as_sampling(options, 1)  # type: ignore[arg-type]
    if options.get("blend") is not None:
        BlendSettings.parse(options["blend"])


def _wrapper(template: Any) -> Callable[[str], str] | None:
    """A query wrapper prompt as a function; None if it changes nothing."""
    if template is None:
        return None
    text = template if isinstance(template, str) else template.get_template()
    if text in ("", "{query_str}"):
        return None
    return lambda query: str(text).format(query_str=query)


def _plain(messages: Sequence[ChatMessage]) -> str:
    """Messages for a base model, as LlamaIndex renders them for one."""
    lines = [f"{message.role.value}: {message.content or ''}" for message in messages]
    return "\n".join([*lines, "assistant: "])


def without_memories(messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], list[Document]]:
    """Messages, and apart from them what a memory block recalled: context, each memory with its own cache."""
    spoken = [message for message in messages if DOCUMENT not in message.additional_kwargs]
    recalled = [message for message in messages if DOCUMENT in message.additional_kwargs]
    return spoken, [Document(m.additional_kwargs[DOCUMENT], m.content or "", {}, (m.content or "",)) for m in recalled]


def _partial_object(output_cls: type[BaseModel], text: str) -> BaseModel | None:
    """What JSON that is not complete yet says already, if that is a valid object."""
    try:
        return output_cls.model_validate(from_json(text, allow_partial="trailing-strings"))
    except (ValueError, ValidationError):
        return None


def _whole_object(output_cls: type[BaseModel], text: str) -> BaseModel:
    try:
        return output_cls.model_validate_json(text)
    except ValueError as error:
        raise ValueError(
            f"The answer ends before its JSON is complete: {text[-200:]!r}. Raise max_new_tokens."
        ) from error


def _partial(text: str, piece: str) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=piece)


def _last(answer: Answer, tools: bool) -> ChatResponse:
    """The end of a stream: nothing new unless there were tools, when all of it comes at once."""
    response = _response(answer)
    response.delta = answer.text if tools else ""
    return response


def _response(answer: Answer) -> ChatResponse:
    calls = [call.as_openai() for call in answer.tool_calls]
    message = ChatMessage(
        role=MessageRole.ASSISTANT, content=answer.text, additional_kwargs={"tool_calls": calls} if calls else {}
    )
    return ChatResponse(message=message, raw=to_raw(answer))


def _completion(response: ChatResponse) -> CompletionResponse:
    return CompletionResponse(text=response.message.content or "", raw=response.raw, delta=response.delta)
