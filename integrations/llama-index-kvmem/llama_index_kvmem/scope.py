"""What a query engine answers from: nodes of its own, of an index, or of an engine's documents."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.indices.base import BaseIndex
from llama_index.core.indices.vector_store.retrievers import VectorIndexRetriever
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from llama_index.core.vector_stores.simple import SimpleVectorStore
from llama_index.core.vector_stores.types import MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn, node_to_metadata_dict

from kvmem import Chunk, InputError
from kvmem.text.retrieval import BM25Retriever
from llama_index_kvmem.convert import to_text

# Arguments of as_retriever that choose among nodes, and leave none out that would fit.
_RANKING = {
    "similarity_top_k",
    "vector_store_query_mode",
    "alpha",
    "sparse_top_k",
    "hybrid_top_k",
    "embed_model",
    "callback_manager",
    "verbose",
    "object_map",
    "objects",
}


class NodeSet:
    """Nodes in scope, with what the model sees of each."""

    def __init__(self, nodes: Sequence[BaseNode]) -> None:
        self.nodes = list(nodes)
        self.texts = [to_text(node) for node in self.nodes]

    def with_scores(self, scores: Sequence[float], taken: Sequence[int]) -> list[NodeWithScore]:
        """Copies: postprocessors change nodes in place."""
        found = []
        for number in taken:
            node = self.nodes[number].model_copy()
            node.metadata = dict(node.metadata)
            found.append(NodeWithScore(node=node, score=scores[number]))
        return found


class IndexScope:
    """The nodes of an index as they are at each query, less those that a filter excludes.

    Args:
        index: keeps its nodes in its docstore.
        retriever_kwargs: arguments of `as_retriever`.
        changed: called with all nodes of the index when they are not what they were.
    """

    def __init__(self, index: BaseIndex[Any], retriever_kwargs: Mapping[str, Any]) -> None:
        self._index, self._kwargs = index, dict(retriever_kwargs)
        self.changed: Callable[[list[BaseNode]], None] = lambda nodes: None
        self._known: tuple[object, NodeSet] | None = None
        filters = self._kwargs.get("filters")
        if filters is not None and not isinstance(filters, MetadataFilters):
            raise InputError(f"filters is a {type(filters).__name__}. Give MetadataFilters.")

    @property
    def listable(self) -> bool:
        """Whether all nodes that the retriever could return are known here."""
        store = getattr(self._index, "vector_store", None)
        known = _RANKING | {"filters", "node_ids", "doc_ids"}
        if self._kwargs.keys() - known or _retrieves_itself(self._index):
            return False
        # Only this store says which nodes it has: deleted ones may still be named by the index.
        return store is None or isinstance(store, SimpleVectorStore)

    def nodes(self) -> NodeSet:
        """In the order of the index."""
        docstore = self._index.docstore
        ids = list(dict.fromkeys(self._node_ids()))
        state = [(node_id, docstore.get_document_hash(node_id)) for node_id in ids]
        if self._known is None or self._known[0] != state:
            every = [docstore.get_document(node_id, raise_error=False) for node_id in ids]
            there = [node for node in every if node is not None and node.get_content().strip()]
            self.changed(there)
            self._known = state, NodeSet([node for node in there if self._passes(node)])
        return self._known[1]

    def _node_ids(self) -> list[str]:
        struct = self._index.index_struct
        if not hasattr(struct, "nodes_dict"):
            return list(struct.nodes)
        store = getattr(self._index, "vector_store", None)
        there = store.data.embedding_dict if isinstance(store, SimpleVectorStore) else None
        return [node_id for node_id in struct.nodes_dict.values() if there is None or node_id in there]

    def _passes(self, node: BaseNode) -> bool:
        node_ids, doc_ids = self._kwargs.get("node_ids"), self._kwargs.get("doc_ids")
        if node_ids is not None and node.node_id not in node_ids:
            return False
        if doc_ids is not None and node.ref_doc_id not in doc_ids:
            return False
        filters: MetadataFilters | None = self._kwargs.get("filters")
        if filters is None:
            return True
        metadata = node_to_metadata_dict(node, remove_text=True, flat_metadata=False)
        return bool(build_metadata_filter_fn(lambda _: metadata, filters)(node.node_id))

    def retriever(self) -> BaseRetriever:
        """The index's own, as the user asked for it."""
        return self._index.as_retriever(**self._kwargs)

    def wide_retriever(self, count: int) -> BaseRetriever:
        """One that returns all nodes of the scope, with the scores that postprocessors expect."""
        kwargs = dict(self._kwargs)
        if hasattr(self._index, "vector_store"):
            kwargs["similarity_top_k"] = max(1, count)
        return self._index.as_retriever(**kwargs)


def _retrieves_itself(index: BaseIndex[Any]) -> bool:
    """Whether the kind of index decides which nodes belong to a query, so that its retriever is always asked."""
    return not hasattr(index.index_struct, "nodes_dict") and not isinstance(
        getattr(index.index_struct, "nodes", None), list
    )


class ScopeRetriever(BaseRetriever):
    """All nodes in scope while they fit the window; else what a retriever finds.

    Args:
        nodes: the nodes in scope, at each query.
        fits: whether these texts fit the window beside a question.
        wide: gives every node with the scores that postprocessors need; None scores them by words (BM25).
        otherwise: asked when they do not fit; None takes those that score best by words.
    """

    def __init__(
        self,
        nodes: Callable[[], NodeSet],
        fits: Callable[[str, Sequence[str]], bool],
        wide: Callable[[int], BaseRetriever] | None = None,
        otherwise: Callable[[], BaseRetriever] | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._nodes, self._fits, self._wide = nodes, fits, wide
        self.otherwise = otherwise
        self._words = BM25Retriever()
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._choose(query_bundle.query_str)
        return found.retrieve(query_bundle) if isinstance(found, BaseRetriever) else found

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = await asyncio.to_thread(self._choose, query_bundle.query_str)
        return await found.aretrieve(query_bundle) if isinstance(found, BaseRetriever) else found

    def _choose(self, query: str) -> list[NodeWithScore] | BaseRetriever:
        """The nodes, or the retriever to ask for them."""
        scope = self._nodes()
        if not scope.nodes:
            return []
        if not self._fits(query, scope.texts):
            return self._best_that_fit(query, scope) if self.otherwise is None else self.otherwise()
        if self._wide is not None:
            return self._wide(len(scope.nodes))
        return scope.with_scores(self._scores(query, scope), range(len(scope.nodes)))

    def _scores(self, query: str, scope: NodeSet) -> list[float]:
        return self._words.score(query, [Chunk(text, str(n), 0, {}) for n, text in enumerate(scope.texts)])

    def _best_that_fit(self, query: str, scope: NodeSet) -> list[NodeWithScore]:
        """As many of the best as fit, in their order; at least one, which the synthesizer may have to cut."""
        scores = self._scores(query, scope)
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        low, high = 1, len(ranked)
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits(query, [scope.texts[i] for i in sorted(ranked[:middle])]):
                low = middle
            else:
                high = middle - 1
        return scope.with_scores(scores, sorted(ranked[:low]))


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
