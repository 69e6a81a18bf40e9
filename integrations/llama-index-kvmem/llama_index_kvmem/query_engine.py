"""KVMemQueryEngine: a drop-in replacement for RetrieverQueryEngine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.indices.base import BaseIndex
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import BaseNode, QueryBundle

from kvmem import Collection, KVMem
from kvmem.prompt.layout import DEFAULT_SYSTEM
from llama_index_kvmem.convert import chunk_nodes, to_document, to_leaves
from llama_index_kvmem.llm import KVMemLLM
from llama_index_kvmem.scope import IndexScope, NodeSet, ScopeRetriever, only_ranks
from llama_index_kvmem.synthesis import ENGINE, as_llm, check_synthesizer, fits_in, kvmem_of, make_synthesizer
from llama_index_kvmem.synthesizer import KVMemSynthesizer, best_sources


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
        check_synthesizer(response_synthesizer, options, streaming)
        llm = as_llm(mem, options)
        owned = retriever is None
        if owned and "text_qa_template" not in options and "system" not in options:
            options["system"] = self._own_system(llm)
        synthesizer = response_synthesizer or make_synthesizer(llm, options, streaming, callback_manager, top_sources)
        if retriever is None:
            kept = mem if isinstance(mem, Collection) else kvmem_of(llm).engine
            retriever = ScopeRetriever(lambda: NodeSet(chunk_nodes(kept.chunks())), fits_in(synthesizer))
        self.mem = kvmem_of(llm).engine
        self._kvmem_llm = llm
        self._top_sources = top_sources
        super().__init__(retriever, synthesizer, list(node_postprocessors), callback_manager)

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        return best_sources(super()._query(query_bundle), self._top_sources)

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        return best_sources(await super()._aquery(query_bundle), self._top_sources)

    @staticmethod
    def _own_system(llm: Any) -> str:
        system = kvmem_of(llm).engine.settings.system
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
        nodes = NodeSet(to_leaves(documents, kvmem_of(llm).engine))
        restricted = retriever is not None and not only_ranks(retriever)
        engine = cls._over(
            llm,
            lambda: nodes,
            None if retriever is None else lambda: retriever,
            None,
            options,
            always=retriever if restricted else None,
        )
        engine._keep(nodes.nodes, kvmem_of(llm).engine.collection(collection))
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
        kept = kvmem_of(chosen).engine.collection(collection)
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
        check_synthesizer(response_synthesizer, options, streaming)
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
        own = {name: options.pop(name) for name in [*options] if name in ENGINE}
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
