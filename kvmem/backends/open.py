"""Open the model that a `KVMem` is given, and the backend that runs its prompts."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from kvmem.backends.base import Backend
from kvmem.backends.calibrate import check, recall
from kvmem.backends.local import LocalBackend
from kvmem.blend.compose import Composer
from kvmem.errors import InputError
from kvmem.library.request import prefix_of
from kvmem.model.base import AnyModel
from kvmem.model.local import LanguageModel
from kvmem.model.locate import is_remote
from kvmem.prompt.layout import DEFAULT_SYSTEM, Typesetter
from kvmem.prompt.span import Span
from kvmem.runtime.worker import turns_of
from kvmem.settings import ModelSettings, Settings
from kvmem.store.base import Store

logger = logging.getLogger("kvmem")
_warned: WeakSet[LanguageModel] = WeakSet()


def open_model(model: Any, tokenizer: Any, settings: Settings, overrides: Mapping[str, Any]) -> tuple[AnyModel, bool]:
    """The opened model, and whether to close it together with the engine.

    Raises InputError, ModelNotFoundError, ModelError, RemoteError.
    """
    if isinstance(model, AnyModel):
        if ignored := overrides.keys() & ModelSettings.model_fields.keys():
            raise InputError(
                f"{min(ignored)} applies when a model is loaded, but this model is already loaded. "
                "Pass it to LanguageModel.load() in a ModelSettings."
            )
        return model, False
    if isinstance(model, (str, os.PathLike)):
        name = os.fspath(model)
        if not is_remote(name):
            if tokenizer is not None:
                raise InputError(f"{name!r} comes with a tokenizer of its own. Leave tokenizer out, or load both.")
            return LanguageModel.load(name, settings.model), False
        from kvmem.backends.vllm import VLLMModel  # an extra

        remote = settings.remote
        if isinstance(tokenizer, str):
            remote, tokenizer = remote.model_copy(update={"tokenizer": tokenizer}), None
        return VLLMModel.connect(name, remote, tokenizer), True
    if tokenizer is None:
        raise InputError("A model object needs its tokenizer. Call KVMem(model, store, tokenizer=tokenizer).")
    return LanguageModel(model, tokenizer, settings=settings.model), False


def open_backend(model: AnyModel, store: Store, settings: Settings, typesetter: Typesetter) -> Backend:
    """The backend for a namespace: this process, or the model server."""
    if not isinstance(model, LanguageModel):
        from kvmem.backends.vllm import VLLMBackend, VLLMModel  # an extra

        if not isinstance(model, VLLMModel):
            raise InputError(f"{type(model).__name__} is not a supported model. Give a LanguageModel or a VLLMModel.")
        return VLLMBackend(model, settings.namespace, settings.blend)
    # Compute both now; otherwise the first question waits for them.
    _ = model.fingerprint, model.anatomy
    if not model.blendable and model not in _warned:
        _warned.add(model)
        logger.warning("kvmem: %s reuses exact prefixes only, because %s", model.name, model.anatomy.reason)
    return open_local(model, store, settings, typesetter)


def open_local(model: LanguageModel, store: Store, settings: Settings, typesetter: Typesetter) -> LocalBackend:
    """A backend for a model in this process."""

    def find_recompute() -> float:
        # The check runs the model, so no other prompt may run at the same time.
        with turns_of(model).lock:
            model.refresh()
            found = (recall(model) or check(model)).recompute
        return 0.0 if found is None else found

    neutral = prefix_of(typesetter, DEFAULT_SYSTEM)
    preamble = Span(tuple(token for span in neutral for token in span.token_ids))
    composer = Composer(model, store, settings.namespace, preamble)
    return LocalBackend(model, store, composer, settings.blend, find_recompute, settings.buffer_bytes)
