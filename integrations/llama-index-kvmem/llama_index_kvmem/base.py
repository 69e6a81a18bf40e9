"""The fields of KVMemLLM, the engine that they open, and the options of its calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Sequence
from copy import copy
from functools import partial
from types import TracebackType
from typing import Any, Self

import llama_index.core
from llama_index.core.base.llms.types import ChatMessage, LLMMetadata
from llama_index.core.bridge.pydantic import Field, PrivateAttr

from kvmem import BlendSettings, InputError, KVMem
from kvmem.model.base import AnyModel
from kvmem.options import OPTION_NAMES, SCOPE_NAMES, EngineOptions, as_sampling, check_names
from kvmem.sharing import SharedEngine
from llama_index_kvmem.structured import StructuredStreams

_OPENING = threading.RLock()
_CALL_NAMES = SCOPE_NAMES | {"thread", "tools", "tool_choice"}
# What LlamaIndex passes to every LLM, and what has no meaning here.
_PASSED = frozenset(("allow_parallel_tool_calls", "tool_required", "verbose", "formatted"))


class BaseKVMemLLM(StructuredStreams):
    """See `KVMemLLM`."""

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
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template, such as {'enable_thinking': False}."
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

    def __copy__(self) -> Self:
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

    def __enter__(self) -> Self:
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

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `KVMem.stream_chat`. Raises InputError."""
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed", "timeout", "blend")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        given |= {**self.generate_kwargs, **{n: v for n, v in kwargs.items() if n not in _PASSED}}
        own = given.pop("chat_template_kwargs", None) or {}
        if self.chat_template_kwargs or own:
            given["chat_template_kwargs"] = {**self.chat_template_kwargs, **own}
        given["max_tokens"] = given.pop("max_new_tokens", None) or given.get("max_tokens") or self.max_new_tokens
        given["tool_choice"] = given.get("tool_choice") or "auto"
        more = {name: given.pop(name) for name in [*given] if name not in OPTION_NAMES | _CALL_NAMES}
        extra = {**(given.get("generate_kwargs") or {}), **more}
        if self.stopping_ids:
            own = self.engine.local_model.hf.generation_config.eos_token_id
            extra.setdefault("eos_token_id", [*(own if isinstance(own, list) else [own]), *self.stopping_ids])
        given["generate_kwargs"] = extra
        return given


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


def _wrapper(template: Any) -> Callable[[str], str] | None:
    """A query wrapper prompt as a function; None if it changes nothing."""
    if template is None:
        return None
    text = template if isinstance(template, str) else template.get_template()
    if text in ("", "{query_str}"):
        return None
    return lambda query: str(text).format(query_str=query)


def check_options(options: dict[str, Any]) -> None:
    """Raise InputError for options of an answer that do not exist, or have wrong values."""
    check_names(options)
    as_sampling(options, 1)  # type: ignore[arg-type]
    if options.get("blend") is not None:
        BlendSettings.parse(options["blend"])
