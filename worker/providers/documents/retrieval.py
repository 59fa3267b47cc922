"""From a question to the passages that may answer it: by words (BM25), by vectors, or by both, fused by rank.

Built anew from the chunks whenever the index has changed, and never changed itself, so any thread may ask it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llama_index.core.llms import MockLLM
from llama_index.core.retrievers import BaseRetriever, QueryFusionRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.retrievers.bm25 import BM25Retriever

from shared.errors import UpstreamError
from worker.providers.documents.kept import Chunk

PASSAGES = 4  # that an answer rests on
CANDIDATES = 12  # that each way of finding brings to the fusion
OTHER_VECTORS = UpstreamError(
    "the embedding model's vectors are longer or shorter than they were: empty the folder of REJOIN_DOCUMENTS_INDEX",
    code="documents_unavailable",
)


def retriever_of(chunks: Sequence[Chunk], way: str) -> BaseRetriever:
    """`way`: `bm25`, `vectors` or `fused`. A question for `vectors` or `fused` comes with its embedding."""
    nodes = [_node(chunk) for chunk in chunks]
    if not nodes:
        return Nothing()
    if way == "bm25":
        return _by_words(nodes, PASSAGES)
    if way == "vectors":
        return ByVectors(nodes, chunks, PASSAGES)
    return QueryFusionRetriever(
        [_by_words(nodes, CANDIDATES), ByVectors(nodes, chunks, CANDIDATES)],
        llm=MockLLM(),  # for questions it would think up; it is told to think up none
        num_queries=1,
        mode=FUSION_MODES.RECIPROCAL_RANK,
        similarity_top_k=PASSAGES,
        use_async=False,
    )


class Nothing(BaseRetriever):
    """What a folder without a word in it brings."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return []


class ByWords(BaseRetriever):
    """BM25, without those that share no word with the question: it would fill up with them."""

    def __init__(self, nodes: Sequence[TextNode], top_k: int) -> None:
        super().__init__()
        with np.errstate(invalid="ignore"):  # where not one word counts, the mean length is none
            self._bm25 = BM25Retriever(nodes=list(nodes), similarity_top_k=min(top_k, len(nodes)))

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [found for found in self._bm25.retrieve(query_bundle) if (found.score or 0.0) > 0]


class ByVectors(BaseRetriever):
    """Cosine similarity over all passages at once. The question's embedding comes with it."""

    def __init__(self, nodes: Sequence[TextNode], chunks: Sequence[Chunk], top_k: int) -> None:
        super().__init__()
        self._nodes = nodes
        self._top_k = top_k
        vectors = [np.frombuffer(chunk.vector or b"", np.float32) for chunk in chunks]
        if len({len(vector) for vector in vectors}) > 1:
            raise OTHER_VECTORS
        self._matrix = np.stack(vectors)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        asked = np.array(query_bundle.embedding, np.float32)
        if len(asked) != self._matrix.shape[1]:
            raise OTHER_VECTORS
        scores = self._matrix @ asked
        best = np.argsort(-scores, kind="stable")[: self._top_k]
        return [NodeWithScore(node=self._nodes[place], score=float(scores[place])) for place in best]


def _by_words(nodes: Sequence[TextNode], top_k: int) -> BaseRetriever:
    try:
        return ByWords(nodes, top_k)
    except ValueError:  # bm25s', where not one word in all documents counts
        return Nothing()


def _node(chunk: Chunk) -> TextNode:
    """The title counts as the passage's own words; where it stands does not."""
    return TextNode(
        id_=f"{chunk.path}#{chunk.number}",
        text=chunk.words,
        metadata={"title": chunk.title, "path": chunk.path},
        metadata_template="{value}",
        excluded_embed_metadata_keys=["path"],
        excluded_llm_metadata_keys=["path"],
    )
