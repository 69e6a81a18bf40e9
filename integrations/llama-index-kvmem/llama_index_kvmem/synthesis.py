"""What answers for a query engine: its LLM, and its response synthesizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.response_synthesizers import BaseSynthesizer, ResponseMode, get_response_synthesizer
from llama_index.core.settings import Settings

from kvmem import Collection, InputError, KVMem
from kvmem.options import OPTION_NAMES
from llama_index_kvmem.base import check_options
from llama_index_kvmem.llm import KVMemLLM
from llama_index_kvmem.synthesizer import KVMemSynthesizer

_TEMPLATES = (
    "text_qa_template",
    "refine_template",
    "summary_template",
    "simple_template",
    "chat_content_qa_template",
    "chat_content_refine_template",
)
_SYNTHESIS = frozenset((*_TEMPLATES, "response_mode", "output_cls", "use_async", "verbose", "multimodal", "system"))
# Options that are the LLM's.
_ANSWERS = OPTION_NAMES | {"max_new_tokens", "chat_template_kwargs"}
ENGINE = ("streaming", "callback_manager", "top_sources", "node_postprocessors")


def kvmem_of(llm: Any) -> KVMemLLM:
    """The `KVMemLLM` itself, behind structured output or not."""
    inner = llm.llm if isinstance(llm, StructuredLLM) else llm
    if not isinstance(inner, KVMemLLM):
        raise InputError(f"A {type(inner).__name__} keeps no caches. Give a KVMemLLM or a KVMem.")
    return inner


def as_llm(given: Any, options: dict[str, Any]) -> Any:
    """The LLM that was given, or that an engine stands for; options of answers are taken out of `options` into it.

    Raises InputError.
    """
    own = {name: options.pop(name) for name in [*options] if name in _ANSWERS}
    if isinstance(given, Collection):
        given = given.mem
    if given is None:
        given = Settings.llm
    if isinstance(given, KVMem):
        given = KVMemLLM(mem=given, max_new_tokens=given.settings.max_tokens)
    kvmem = kvmem_of(given)
    if unknown := options.keys() - _SYNTHESIS - set(ENGINE):
        known = sorted(_SYNTHESIS | set(ENGINE) | _ANSWERS)
        raise InputError(f"{min(unknown)!r} is not known here. Known are: {', '.join(known)}.")
    if not own:
        return given
    tokens = own.pop("max_new_tokens", None) or own.pop("max_tokens", None)
    fields: dict[str, Any] = {} if tokens is None else {"max_new_tokens": _positive(tokens)}
    template = own.pop("chat_template_kwargs", None)
    if template is not None:
        fields["chat_template_kwargs"] = {**kvmem.chat_template_kwargs, **template}
    check_options({name: value for name, value in own.items() if name != "max_tokens"})
    stop = own.pop("stop", None)
    if stop is not None:
        fields["stop"] = [stop] if isinstance(stop, str) else list(stop)
    more = {**kvmem.generate_kwargs, **(own.pop("generate_kwargs", None) or {})}
    named = {name: own.pop(name) for name in [*own] if name in KVMemLLM.model_fields}
    changed = kvmem.model_copy(update={**fields, **named, "generate_kwargs": {**more, **own}})
    return given.model_copy(update={"llm": changed}) if isinstance(given, StructuredLLM) else changed


def _positive(tokens: Any) -> int:
    check_options({"max_tokens": tokens})
    return int(tokens)


def make_synthesizer(
    llm: Any,
    options: dict[str, Any],
    streaming: bool,
    callback_manager: CallbackManager | None,
    top_sources: int | None,
) -> BaseSynthesizer:
    """What answers from nodes: ours for the compact mode, LlamaIndex's own over the same LLM for others."""
    given = dict(options)
    mode = ResponseMode(given.pop("response_mode", ResponseMode.COMPACT))
    system = given.pop("system", None)
    if system is not None:
        if given.get("text_qa_template") is not None:
            raise InputError("system and text_qa_template cannot be combined. Write the system prompt in the template.")
        given["text_qa_template"] = system_template(system)
    plain = not isinstance(llm, StructuredLLM) and not given.get("output_cls") and not given.get("multimodal")
    if mode != ResponseMode.COMPACT or not plain:
        return get_response_synthesizer(
            llm=llm, callback_manager=callback_manager, response_mode=mode, streaming=streaming, **given
        )
    names = ("text_qa_template", "refine_template", "chat_content_qa_template", "chat_content_refine_template")
    kept = {name: given[name] for name in (*names, "verbose") if given.get(name) is not None}
    return KVMemSynthesizer(
        llm, top_sources=top_sources, streaming=streaming, callback_manager=callback_manager, **kept
    )


def system_template(system: str) -> BasePromptTemplate:
    """Nodes behind a system prompt, and the question as the user's message."""
    return ChatPromptTemplate.from_messages([("system", system + "\n\n{context_str}"), ("user", "{query_str}")])


def fits_in(synthesizer: BaseSynthesizer) -> Callable[[str, Sequence[str]], bool]:
    """Whether texts fit one prompt of a synthesizer."""
    if isinstance(synthesizer, KVMemSynthesizer):
        return synthesizer.fits
    probe = KVMemSynthesizer(kvmem_of(synthesizer._llm))
    return probe.fits


def check_synthesizer(synthesizer: BaseSynthesizer | None, options: dict[str, Any], streaming: bool) -> None:
    """Raise InputError for what a synthesizer that was given has decided already."""
    given = sorted(options.keys() & (_SYNTHESIS | OPTION_NAMES | {"max_new_tokens"}))
    if synthesizer is not None and (given or streaming):
        name = given[0] if given else "streaming"
        raise InputError(f"response_synthesizer has its own {name}. Give it there, or leave response_synthesizer out.")
