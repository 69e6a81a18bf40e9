"""KVMemChatEngine: a drop-in replacement for ContextChatEngine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.chat_engine.types import AgentChatResponse
from llama_index.core.memory import BaseMemory, Memory
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, NodeWithScore

from kvmem import Collection, InputError, KVMem
from llama_index_kvmem.convert import chunk_nodes, to_document, to_leaves
from llama_index_kvmem.llm import KVMemLLM
from llama_index_kvmem.scope import NodeSet, ScopeRetriever, only_ranks
from llama_index_kvmem.synthesis import as_llm
from llama_index_kvmem.synthesizer import TOLD, KVMemSynthesizer


class KVMemChatEngine(ContextChatEngine):
    """A conversation over documents whose caches are computed once: a turn computes its new message only.

    It is a `ContextChatEngine`, with its events, memory and templates: nodes stand in the system message. What it
    answers from: the engine's own documents, those of a collection or of `from_documents`, all of them while they fit
    the window; or exactly the nodes that `retriever` returns.

    Args:
        mem: an engine, a collection of it, or a `KVMemLLM`.
        memory: keeps the history; LlamaIndex's `Memory` by default.
        system: a system prompt, behind which the documents stand; that of the engine by default.
        retriever: answer from the nodes that it returns instead.
        node_postprocessors: applied to the nodes before they are shown to the model.
        context_template: LlamaIndex's, with `{context_str}`, in front of the system prompt.
        callback_manager: as in LlamaIndex.
        options: `max_tokens`, `blend` and other options of `KVMem.chat` for every turn.

    Raises:
        InputError: for an option that does not exist.

    Example:
        ```python
        from llama_index.core import Document
        from llama_index_kvmem import KVMemChatEngine

        documents = [Document(text="The rent is 3,200 euros a month.")]
        chat = KVMemChatEngine.from_documents(documents, "smollm2", store="./kv", max_tokens=32)
        print(chat.chat("How much is the rent?"))
        ```
    """

    def __init__(
        self,
        mem: KVMem | Collection | KVMemLLM,
        *,
        memory: BaseMemory | None = None,
        system: str | None = None,
        retriever: BaseRetriever | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        context_template: str | None = None,
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> None:
        llm: KVMemLLM = as_llm(mem, options)
        if options:
            raise InputError(f"{min(options)!r} is not an option of a conversation.")
        self.mem = llm.engine
        own = self.mem.settings.system if system is None else system
        self.system = own
        if context_template is None:
            context_template = "{context_str}\n\n" if own is None else own + "\n\n{context_str}\n\n"
            own = None
        kept = mem if isinstance(mem, Collection) else self.mem
        self._collection: Collection | None = mem if isinstance(mem, Collection) else None
        self._kvmem_llm = llm
        self._nodes_in_scope: Any = lambda: NodeSet(chunk_nodes(kept.chunks()))
        super().__init__(
            retriever or ScopeRetriever(lambda: self._nodes_in_scope(), self._fits),
            llm=llm,
            memory=memory if memory is not None else Memory.from_defaults(token_limit=llm.metadata.context_window),
            prefix_messages=[] if own is None else [ChatMessage(content=own, role=llm.metadata.system_role)],
            node_postprocessors=list(node_postprocessors),
            context_template=context_template,
            callback_manager=callback_manager,
        )

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
    ) -> KVMemChatEngine:
        """A conversation over these documents or nodes, and no others that the engine or its store may hold.

        Arguments and errors as in `KVMemQueryEngine.from_documents` and `KVMemChatEngine`.
        """
        given = KVMem(model, store) if isinstance(model, str) else model
        asked = retriever is not None and not only_ranks(retriever)
        engine = cls(given, retriever=retriever if asked else None, **options)
        if retriever is not None and isinstance(engine._retriever, ScopeRetriever):
            engine._retriever.otherwise = lambda: retriever
        nodes = NodeSet(to_leaves(documents, engine.mem))
        engine._nodes_in_scope = lambda: nodes
        engine._collection = engine.mem.collection(collection)
        engine._collection.set_all(map(to_document, nodes.nodes), prompt=engine._synthesizer([]).messages("?"))
        return engine

    def chat(
        self,
        message: str,
        chat_history: list[ChatMessage] | None = None,
        prev_chunks: list[NodeWithScore] | None = None,
    ) -> AgentChatResponse:
        """As `ContextChatEngine.chat`; the response's metadata has plan, usage and timings."""
        TOLD.set(None)
        response: AgentChatResponse = super().chat(message, chat_history, prev_chunks)
        response.metadata = TOLD.get()
        return response

    async def achat(
        self,
        message: str,
        chat_history: list[ChatMessage] | None = None,
        prev_chunks: list[NodeWithScore] | None = None,
    ) -> AgentChatResponse:
        """Like `chat`."""
        TOLD.set(None)
        response: AgentChatResponse = await super().achat(message, chat_history, prev_chunks)
        response.metadata = TOLD.get()
        return response

    def _fits(self, query: str, texts: Sequence[str]) -> bool:
        # Where the history leaves no room for all nodes, the synthesizer takes several prompts.
        return self._synthesizer([]).fits(query, texts)

    def _synthesizer(self, history: list[ChatMessage], streaming: bool = False) -> KVMemSynthesizer:
        found = self._get_response_synthesizer(history, streaming)
        if not isinstance(found, KVMemSynthesizer):
            raise AssertionError("the synthesizer is ours")
        return found

    def _get_response_synthesizer(self, chat_history: list[ChatMessage], streaming: bool = False) -> Any:
        theirs = super()._get_response_synthesizer(chat_history, streaming)
        prompts = theirs._get_prompts()
        return KVMemSynthesizer(
            self._kvmem_llm,
            callback_manager=self.callback_manager,
            text_qa_template=prompts["text_qa_template"],
            refine_template=prompts["refine_template"],
            streaming=streaming,
        )
