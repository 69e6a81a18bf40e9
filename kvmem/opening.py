"""The model that an engine is given, by whatever name, and what runs its prompts."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from kvmem.any_model import AnyModel
from kvmem.backend import Backend
from kvmem.compose import Composer
from kvmem.errors import InputError
from kvmem.locate import is_remote
from kvmem.model import LanguageModel
from kvmem.prompt import DEFAULT_SYSTEM, Span, Typesetter
from kvmem.request import prefix_of
from kvmem.runner import Runner
from kvmem.settings import ModelSettings, Settings
from kvmem.store.base import Store

logger = logging.getLogger("kvmem")
_warned: WeakSet[LanguageModel] = WeakSet()


def open_model(model: Any, tokenizer: Any, settings: Settings, overrides: Mapping[str, Any]) -> tuple[AnyModel, bool]:
    """The model as `KVMem` takes it, and whether it has to be closed with the engine.

    Raises InputError, ModelNotFoundError, ModelError, RemoteError.
    """
    if isinstance(model, AnyModel):
        if ignored := overrides.keys() & ModelSettings.model_fields.keys():
            raise InputError(f"{min(ignored)} belongs to loading, and this model is loaded. Give it to load().")
        return model, False
    if isinstance(model, (str, os.PathLike)):
        name = os.fspath(model)
        if not is_remote(name):
            if tokenizer is not None:
                raise InputError(f"{name!r} has a tokenizer of its own. Leave tokenizer out, or load both yourself.")
            return LanguageModel.load(name, settings.model), False
        from kvmem.vllm import VLLMModel  # an extra

        remote = settings.remote
        if isinstance(tokenizer, str):
            remote, tokenizer = remote.model_copy(update={"tokenizer": tokenizer}), None
        return VLLMModel.connect(name, remote, tokenizer), True
    if tokenizer is None:
        raise InputError("A model object needs its tokenizer: KVMem(model, store, tokenizer=tokenizer).")
    return LanguageModel(model, tokenizer, settings=settings.model), False


def open_backend(model: AnyModel, store: Store, namespace: str, typesetter: Typesetter) -> Backend:
    """What runs a namespace's prompts: this process, or the server that has the model."""
    if not isinstance(model, LanguageModel):
        from kvmem.vllm import VLLMBackend, VLLMModel  # an extra

        if not isinstance(model, VLLMModel):
            raise InputError(f"A {type(model).__name__} cannot be run. Give a LanguageModel or a VLLMModel.")
        return VLLMBackend(model, namespace)
    # Both are looked up by the first question otherwise, which would wait for them.
    _ = model.fingerprint, model.anatomy
    if not model.blendable and model not in _warned:
        _warned.add(model)
        logger.warning("kvmem: %s reuses exact prefixes only, since %s", model.name, model.anatomy.reason)
    neutral = prefix_of(typesetter, DEFAULT_SYSTEM)
    preamble = Span(tuple(token for span in neutral for token in span.token_ids))
    return Runner(model, store, Composer(model, store, namespace, preamble))
