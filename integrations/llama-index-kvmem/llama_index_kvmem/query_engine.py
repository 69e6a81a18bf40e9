"""KVMemQueryEngine: a drop-in replacement for RetrieverQueryEngine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.indices.base import BaseIndex
from llama_index.core.indices.vector_store.retrievers import VectorIndexRetriever
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer, ResponseMode, get_response_synthesizer
from llama_index.core.schema import BaseNode, QueryBundle
from llama_index.core.settings import Settings

from kvmem import Collection, InputError, KVMem
from kvmem.options import OPTION_NAMES
from kvmem.prompt.layout import DEFAULT_SYSTEM
from llama_index_kvmem.convert import chunk_nodes, to_document, to_leaves
from llama_index_kvmem.llm import KVMemLLM, check_options
from llama_index_kvmem.scope import IndexScope, NodeSet, ScopeRetriever
from llama_index_kvmem.synthesizer import KVMemSynthesizer, best_sources

_TEMPLATES = (
    "text_qa_template",
    "refine_template",
    "summary_template",
    "simple_template",
    "chat_content_qa_template",
    "chat_content_refine_template",
)
_SYNTHESIS = frozenset((*_TEMPLATES, "response_mode", "output_cls", "use_async", "verbose", "multimodal", "system"))


class KVMemQueryEngine(RetrieverQueryEngine):
    """Answers queries from nodes whose caches are computed once.

    It is a `RetrieverQueryEngine`, with its events, callbacks, prompts and postprocessors. What it answers from:

    - `from_args(retriever, llm)`: exactly the nodes that the retriever returns, after the postprocessors.
    - `from_index(index, llm)`: the nodes of the index, as they are at each query, that pass the filters of
      `retriever_kwargs`; all of them while they fit the window, else those that the index's retriever returns.
    - `from_documents(documents, ...)`: these documents or nodes, and no others that the engine or its store may hold.
    - `KVMemQueryEngine(mem)`: the documents that were added to the engine.

    A response's `source_nodes` are what is in the prompt, with scores, and its `metadata` has plan, usage and timings
    beside the nodes' metadata. With `streaming`, `query` returns a `StreamingResponse`, whose metadata has the plan.

    Args:
        mem: an engine, a collection of it, or a `KVMemLLM`.
        retriever: answer from the nodes that it returns instead.
        node_postprocessors: applied to the nodes before they are shown to the model.
        streaming: see above.
        callback_manager: as in LlamaIndex.
        top_sources: how many source nodes a response has at most, the most relevant first; None for all.
        options: `text_qa_template`, `response_mode` and other arguments of LlamaIndex's response synthesizers;
            `system`, a system prompt that the nodes are put behind instead of LlamaIndex's template; `max_tokens`,
            `blend` and other options of `KVMem.ask`.

    Raises:
        InputError: for an option that does not exist or cannot be honoured.

    Example:
        ```python
        from llama_index.core import Document
        from llama_index_kvmem import KVMemQueryEngine

        documents = [Document(text="The rent is 3,200 euros a month.", metadata={"source": "lease.md"})]
        engine = KVMemQueryEngine.from_documents(documents, "smollm2", store="./kv", max_tokens=32)
        print(engine.query("How much is the rent?"))
        ```
    """

    def __init__(
        self,
        mem: KVMem | Collection | KVMemLLM,
        *,
        retriever: BaseRetriever | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        top_sources: int | None = None,
        response_synthesizer: BaseSynthesizer | None = None,
        **options: Any,
    ) -> None:
        _check_synthesizer(response_synthesizer, options, streaming)
        llm = as_llm(mem, options)
        owned = retriever is None
        if owned and "text_qa_template" not in options and "system" not in options:
            options["system"] = self._own_system(llm)
        synthesizer = response_synthesizer or make_synthesizer(llm, options, streaming, callback_manager, top_sources)
        if retriever is None:
            kept = mem if isinstance(mem, Collection) else _kvmem(llm).engine
            retriever = ScopeRetriever(lambda: NodeSet(chunk_nodes(kept.chunks())), fits_in(synthesizer))
        self.mem = _kvmem(llm).engine
        self._kvmem_llm = llm
        self._top_sources = top_sources
        super().__init__(retriever, synthesizer, list(node_postprocessors), callback_manager)

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        return best_sources(super()._query(query_bundle), self._top_sources)

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        return best_sources(await super()._aquery(query_bundle), self._top_sources)

    @staticmethod
    def _own_system(llm: Any) -> str:
        system = _kvmem(llm).engine.settings.system
        return DEFAULT_SYSTEM if system is None else system

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[BaseNode],
        model: str | KVMem | KVMemLLM = "smollm2",
        store: str | None = None,
        *,
        collection: str | None = None,
        retriever: BaseRetriever | None = None,
        **options: Any,
    ) -> KVMemQueryEngine:
        """An engine that answers from these documents or nodes. Each is read once; nodes are not cut again.

        Args:
            documents: LlamaIndex documents, which kvmem cuts, or nodes. Those without text are logged and left out.
            model: a model as `KVMem` takes it, an open engine, or an LLM.
            store: a directory for the caches; None keeps them in memory.
            collection: keeps the nodes in the store under this name, and removes those that were in it and are not
                given. Without a name, the query engine keeps them, and the store has their caches only.
            retriever: asked when not all nodes fit the window; by default, the best by words (BM25) are taken. One that
                is not known to rank and nothing else (it has a filter, wraps others, or is your own) is always asked.
            options: see `KVMemQueryEngine`.

        Raises:
            InputError: for bad documents or options.
        """
        llm = as_llm(KVMem(model, store) if isinstance(model, str) else model, options)
        nodes = NodeSet(to_leaves(documents, _kvmem(llm).engine))
        restricted = retriever is not None and not only_ranks(retriever)
        engine = cls._over(
            llm,
            lambda: nodes,
            None if retriever is None else lambda: retriever,
            None,
            options,
            always=retriever if restricted else None,
        )
        engine._keep(nodes.nodes, _kvmem(llm).engine.collection(collection))
        return engine

    @classmethod
    def from_index(
        cls,
        index: BaseIndex[Any],
        llm: KVMemLLM | KVMem | None = None,
        *,
        retriever_kwargs: dict[str, Any] | None = None,
        collection: str | None = None,
        **options: Any,
    ) -> KVMemQueryEngine:
        """An engine that answers from the nodes of an index.

        Nodes that are deleted from the index, or edited in its docstore, are gone or changed at the next query.
        Filters, `node_ids` and `doc_ids` hold whether or not everything fits. An index that keeps its nodes elsewhere
        (a vector store that stores texts), or whose kind decides what belongs to a query, is always asked.

        Args:
            index: the index.
            llm: a `KVMemLLM`, an engine, or None for `Settings.llm`.
            retriever_kwargs: arguments of `index.as_retriever`.
            collection: keeps the nodes in the store under this name, so that the caches of what leaves the index while
                this process does not run are removed at its next start.
            options: see `KVMemQueryEngine`.

        Raises:
            InputError: for bad options, or an LLM that keeps no caches.
        """
        chosen = as_llm(llm, options)
        scope = IndexScope(index, retriever_kwargs or {})
        if not scope.listable:
            return cls._over(chosen, lambda: NodeSet([]), None, None, options, always=scope.retriever())
        engine = cls._over(chosen, scope.nodes, scope.retriever, scope.wide_retriever, options)
        # One collection for all changes: caches of what leaves the index leave the store.
        kept = _kvmem(chosen).engine.collection(collection)
        scope.changed = lambda nodes: engine._keep(nodes, kept)
        scope.nodes()
        return engine

    @classmethod
    def from_args(  # type: ignore[override]
        cls,
        retriever: BaseRetriever,
        llm: KVMemLLM | KVMem | None = None,
        response_synthesizer: BaseSynthesizer | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        streaming: bool = False,
        **options: Any,
    ) -> KVMemQueryEngine:
        """As `RetrieverQueryEngine.from_args`: answers from the retriever's nodes, and computes none of them twice."""
        _check_synthesizer(response_synthesizer, options, streaming)
        return cls(
            as_llm(llm, options),
            retriever=retriever,
            node_postprocessors=node_postprocessors or (),
            callback_manager=callback_manager,
            streaming=streaming,
            response_synthesizer=response_synthesizer,
            **options,
        )

    @classmethod
    def _over(
        cls,
        llm: Any,
        nodes: Callable[[], NodeSet],
        otherwise: Callable[[], BaseRetriever] | None,
        wide: Callable[[int], BaseRetriever] | None,
        options: dict[str, Any],
        always: BaseRetriever | None = None,
    ) -> KVMemQueryEngine:
        """An engine over nodes in scope; `always` is asked instead of them."""
        own = {name: options.pop(name) for name in [*options] if name in _ENGINE}
        synthesizer = make_synthesizer(
            llm, options, own.get("streaming", False), own.get("callback_manager"), own.get("top_sources")
        )
        # Postprocessors expect the scores of the retriever that they were written for.
        ask_all = wide if own.get("node_postprocessors") else None
        retriever = always or ScopeRetriever(nodes, fits_in(synthesizer), ask_all, otherwise)
        own.pop("streaming", None)  # the synthesizer's
        return cls(llm, retriever=retriever, response_synthesizer=synthesizer, **own)

    def _keep(self, nodes: Sequence[BaseNode], collection: Collection) -> None:
        """Compute the caches of nodes, in the place where the template will show them."""
        synthesizer = self._response_synthesizer
        if not isinstance(synthesizer, KVMemSynthesizer):
            return
        self._collection = collection
        collection.set_all(map(to_document, nodes), prompt=synthesizer.messages("?"))

    @property
    def llm(self) -> Any:
        """The LLM that answers."""
        return self._kvmem_llm


_ENGINE = ("streaming", "callback_manager", "top_sources", "node_postprocessors")


def _kvmem(llm: Any) -> KVMemLLM:
    """The `KVMemLLM` itself, behind structured output or not."""
    inner = llm.llm if isinstance(llm, StructuredLLM) else llm
    if not isinstance(inner, KVMemLLM):
        raise InputError(f"A {type(inner).__name__} keeps no caches. Give a KVMemLLM or a KVMem.")
    return inner


def as_llm(given: Any, options: dict[str, Any]) -> Any:
    """The LLM that was given, or that an engine stands for; options of answers are taken out of `options` into it.

    Raises InputError.
    """
    own = {name: options.pop(name) for name in [*options] if name in OPTION_NAMES | {"max_new_tokens"}}
    if isinstance(given, Collection):
        given = given.mem
    if given is None:
        given = Settings.llm
    if isinstance(given, KVMem):
        given = KVMemLLM(mem=given, max_new_tokens=given.settings.max_tokens)
    kvmem = _kvmem(given)
    if unknown := options.keys() - _SYNTHESIS - set(_ENGINE):
        known = sorted(_SYNTHESIS | set(_ENGINE) | OPTION_NAMES)
        raise InputError(f"{min(unknown)!r} is not known here. Known are: {', '.join(known)}.")
    if not own:
        return given
    tokens = own.pop("max_new_tokens", None) or own.pop("max_tokens", None)
    check_options({name: value for name, value in own.items() if name != "max_tokens"})
    fields: dict[str, Any] = {} if tokens is None else {"max_new_tokens": _positive(tokens)}
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
    probe = KVMemSynthesizer(_kvmem(synthesizer._llm))
    return probe.fits


def _check_synthesizer(synthesizer: BaseSynthesizer | None, options: dict[str, Any], streaming: bool) -> None:
    """Raise InputError for what a synthesizer that was given has decided already."""
    given = sorted(options.keys() & (_SYNTHESIS | OPTION_NAMES | {"max_new_tokens"}))
    if synthesizer is not None and (given or streaming):
        name = given[0] if given else "streaming"
        raise InputError(f"response_synthesizer has its own {name}. Give it there, or leave response_synthesizer out.")


def only_ranks(retriever: BaseRetriever) -> bool:
    """Whether a retriever is known to leave nothing out on purpose, as a filter or a cutoff would.

    An unknown retriever, or one that wraps others, may leave something out.
    """
    if isinstance(retriever, VectorIndexRetriever):
        # An index names all of its nodes to its retriever.
        chosen = set(retriever._node_ids or ()) != set(retriever._index.index_struct.nodes_dict.values())
        narrowed = retriever._filters or retriever._doc_ids or retriever._kwargs or (retriever._node_ids and chosen)
        return type(retriever) is VectorIndexRetriever and not narrowed
    return type(retriever).__name__ in ("BM25Retriever", "SummaryIndexRetriever", "SummaryIndexEmbeddingRetriever")
