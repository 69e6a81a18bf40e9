from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmem.errors import PromptTooLongError
from kvmem.prompt.plan import Plan, make_plan
from kvmem.text.document import Chunk
from kvmem.text.retrieval import BM25Retriever


def plan(
    chunks: Sequence[int],
    scores: Sequence[float] | None = None,
    documents: Sequence[str] | None = None,
    limit: int | None = None,
    **sizes: int,
) -> Plan:
    def score() -> Sequence[float]:
        assert scores is not None, "nothing overflows, so nothing is scored"
        return scores

    given_sizes = {"prefix": 10, "query": 20, "answer": 30, "window": 100} | sizes
    return make_plan(chunks=chunks, scores=score, documents=documents, limit=limit, **given_sizes)


def test_everything_is_taken_when_it_fits_to_the_last_token() -> None:
    """prefix + chunks + query + answer may fill the window exactly."""
    whole = plan([20, 20])
    assert (whole.mode, whole.chunks, whole.prompt_tokens, whole.over) == ("whole", (0, 1), 70, 0)


def test_one_token_more_means_retrieval_of_the_best_in_their_own_order() -> None:
    """The reason says how many tokens were over; chunks stand as in the corpus."""
    chosen = plan([20, 20, 1], [0.5, 0.1, 0.9])
    assert (chosen.mode, chosen.chunks, chosen.over) == ("retrieve", (0, 2), 1)
    assert "1 tokens over" in chosen.reason
    assert chosen.prompt_tokens == 51


def test_irrelevant_chunks_are_left_out_but_never_all() -> None:
    """Scores of zero fill no window; with nothing relevant, one chunk is still shown."""
    assert plan([20, 20, 20], [0.0, 2.0, 0.0]).chunks == (1,)
    assert plan([20, 20, 20], [0.0, 0.0, 0.0]).chunks == (0,)


def test_what_can_never_fit_is_an_error() -> None:
    """A long question, or chunks that are all too long."""
    with pytest.raises(PromptTooLongError, match="Shorten"):
        plan([5], query=61)
    with pytest.raises(PromptTooLongError, match="smaller chunks"):
        plan([50, 60], [1.0, 1.0])


def test_documents_that_score_clearly_best_are_taken_whole() -> None:
    """If they are few and fit; the reason says how many of how many."""
    documents = ["a", "a", "b", "b", "c"]
    routed = plan([10, 10, 10, 10, 10], [0.0, 3.0, 0.1, 0.0, 1.0], documents)
    assert (routed.mode, routed.chunks) == ("route", (0, 1))
    assert "1 of 3 documents" in routed.reason
    assert plan([10] * 5, [0.0, 3.0, 0.1, 0.0, 2.0], documents).chunks == (0, 1, 4)
    assert plan([30] * 5, [0.0, 3.0, 0.1, 0.0, 1.0], documents).mode == "retrieve"
    assert plan([10] * 5, [0.0] * 5, documents).mode == "retrieve"
    assert plan([10] * 5, [0.0, 3.0, 0.1, 0.0, 1.0]).mode == "retrieve"


def test_room_that_is_left_goes_to_neighbours() -> None:
    """Of the same document only, best chunk first."""
    documents = ["a", "a", "a", "b", "c", "d", "e"]
    chunks = [9, 9, 25, 9, 9, 9, 9]
    assert plan(chunks, [0.0, 2.0, 0.0, 1.9, 1.8, 1.7, 0.0], documents, window=105).chunks == (0, 1, 3, 4, 5)


def test_a_limit_on_the_context_is_kept() -> None:
    """Fewer tokens than the window holds, and the reason names the limit."""
    limited = plan([10, 10, 10], [0.1, 0.3, 0.2], limit=20)
    assert (limited.mode, limited.chunks, limited.over) == ("retrieve", (1, 2), 10)
    assert "context_tokens of 20" in limited.reason


@given(
    chunks=st.lists(st.integers(1, 60), max_size=12),
    seeds=st.lists(st.floats(0, 10), min_size=12, max_size=12),
    window=st.integers(61, 300),
    documents=st.one_of(st.none(), st.lists(st.sampled_from("abcd"), min_size=12, max_size=12)),
)
def test_no_plan_exceeds_the_window(
    chunks: list[int], seeds: list[float], window: int, documents: list[str] | None
) -> None:
    """Whatever the sizes and scores, prompt and answer fit, and indices are distinct and ascending."""
    try:
        named = None if documents is None else sorted(documents[: len(chunks)])
        made = plan(chunks, seeds[: len(chunks)], named, window=window)
    except PromptTooLongError:
        assert chunks
        assert min(chunks) > window - 60
        return
    assert made.prompt_tokens + 30 <= window
    assert made.prompt_tokens == 30 + sum(chunks[i] for i in made.chunks)
    assert list(made.chunks) == sorted(set(made.chunks))
    assert (made.mode == "whole") == (len(made.chunks) == len(chunks) and made.over == 0)
    if made.mode == "route":
        assert named is not None
        assert [i for i, name in enumerate(named) if name in {named[i] for i in made.chunks}] == list(made.chunks)


def test_bm25_scores_every_chunk_in_order() -> None:
    """The chunk with the question's words wins; unknown words score nothing; a changed corpus is indexed anew."""
    texts = ["the cat sat on a mat", "dogs bark at night", "a boiler makes steam for milk"]
    chunks = [Chunk(text, "d", n, {}) for n, text in enumerate(texts)]
    retriever = BM25Retriever()
    scores = retriever.score("Which boiler makes steam?", chunks)
    assert scores.index(max(scores)) == 2
    assert scores[0] == scores[1] == 0.0
    assert retriever.score("quantum entanglement", chunks) == [0.0, 0.0, 0.0]
    assert retriever.score("boiler", chunks[::-1])[0] > 0.0
    assert retriever.score("boiler", []) == []


def test_digits_and_scripts_without_spaces_are_words() -> None:
    """A lone digit tells two chunks apart, and so does a Chinese character."""
    chunks = [
        Chunk(text, "d", i, {}) for i, text in enumerate(("See section 4.", "See section 5.", "猫很小。", "狗很大。"))
    ]
    scores = BM25Retriever().score("What is in section 5?", chunks)
    assert max(range(4), key=scores.__getitem__) == 1
    scores = BM25Retriever().score("狗", chunks)
    assert max(range(4), key=scores.__getitem__) == 3
    assert scores[2] == 0
