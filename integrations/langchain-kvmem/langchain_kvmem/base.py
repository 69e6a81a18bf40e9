"""The fields of ChatKVMem, the engine that they open, and what LangChain wants to know of them."""

from __future__ import annotations

import asyncio
import json
import warnings
from copy import copy
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from kvmem import BlendSettings, InputError, KVMem, Settings
from kvmem.model.loading import glance
from kvmem.model.locate import is_remote
from kvmem.options import EngineOptions
from kvmem.sharing import SharedEngine

# Fields that change what is sampled.
SAMPLED = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
# Arguments of a call that name documents or a conversation, which change while the prompt stays the same.
_CHANGING = frozenset(("collection", "documents", "retriever", "thread"))
# What other packages call an argument, and what it is here.
_HINTS = {
    "max_new_tokens": "Use max_tokens.",
    "num_predict": "Use max_tokens.",
    "num_ctx": "The model's own window is used. Limit documents with model_kwargs={'context_tokens': ...}.",
    "model_id": "Use model.",
    "model_path": "Use model.",
    "repeat_penalty": "Use repetition_penalty.",
    "enable_thinking": "Use chat_template_kwargs={'enable_thinking': ...}.",
    "reasoning": "Use chat_template_kwargs, with the name that the model's template has for it.",
    "reasoning_effort": "Use chat_template_kwargs={'reasoning_effort': ...}.",
}


class BaseChatKVMem(BaseChatModel):
    """See `ChatKVMem`."""

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
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the model's chat template, such as {"enable_thinking": False}. A call may give more."""
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

    def __copy__(self) -> Self:
        copied = super().__copy__()
        # A share of its own, so that closing one leaves the other open.
        copied._share = copy(self._share)
        return copied

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _ready(self) -> None:
        """Open the engine without blocking the event loop."""
        if self._opened is None:
            await asyncio.to_thread(lambda: self.engine)

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
            **{name: getattr(self, name) for name in (*SAMPLED, "stop")},
            "generate_kwargs": self.generate_kwargs,
            "chat_template_kwargs": {**engine.settings.chat_template_kwargs, **self.chat_template_kwargs},
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
        """Read from the model's config and tokenizer; its weights are not loaded.

        `tool_calling` tells whether the chat template has tools, in a format whose calls can be read. Without it,
        answers with tools bound follow the tools' JSON schemas.
        """
        if (opened := self._opened) is not None:
            window, template = opened.model.window, opened.model.template
        elif is_remote(self.model_name):
            return None
        else:
            found = glance(self.model_name)
            window, template = found.window, found.template
        answer = min(window, self.max_tokens or Settings().max_tokens)
        return ModelProfile(
            max_input_tokens=window - answer,
            max_output_tokens=answer,
            text_inputs=True,
            text_outputs=True,
            tool_calling=template.calls is not None,
            tool_choice=True,
            structured_output=True,
            reasoning_output=template.thinks,
        )


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
