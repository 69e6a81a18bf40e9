from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmem.blend.correction import LocalCorrection, _weigh
from kvmem.blend.select import SELECTORS, Candidates, _shares, select
from kvmem.settings import BlendSettings
from kvmem.testing import tiny_model

SEGMENTS = ((10, 50), (50, 51), (60, 119))


def candidates(attention: torch.Tensor | None = None, deviation: torch.Tensor | None = None) -> Candidates:
    def missing() -> torch.Tensor:
        raise AssertionError("this selector needs no measurement")

    return Candidates(
        SEGMENTS,
        missing if attention is None else lambda: attention,
        missing if deviation is None else lambda: deviation,
        torch.device("cpu"),
    )


@pytest.mark.parametrize("selector", sorted(SELECTORS))
@pytest.mark.parametrize("recompute", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_selectors_choose_their_budget_inside_the_segments(selector: str, recompute: float) -> None:
    """Positions are distinct, ascending, approximate, and no more than the budget, or a few in every chunk."""
    generator = torch.Generator().manual_seed(0)
    chosen = select(
        candidates(torch.rand(130, generator=generator), torch.rand(100, generator=generator)),
        BlendSettings(selector=selector, recompute=recompute),  # type: ignore[arg-type]
    )
    budget = int(recompute * 100)
    # The chunks have 40 tokens, 1 and 59; each gets four, or all of it.
    few = {0.01: 4 + 1 + 4, 0.1: 4 + 1 + 6}.get(recompute, budget)
    expected = {"none": 0, "all": 100, "query": few}.get(selector, budget)
    assert len(chosen) == expected
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(chosen.tolist()) <= {p for a, b in SEGMENTS for p in range(a, b)}


def test_query_takes_in_every_chunk_what_the_question_attends_to() -> None:
    """Each chunk has its share of the budget, however little attention it gets beside the others."""
    attention = torch.rand(130, generator=torch.Generator().manual_seed(0)) * 0.01
    attention[100:119] += 9.0  # the chunk next to the question
    attention[20:23] += 0.5
    attention[0:10] += 5.0  # not a candidate
    chosen = select(candidates(attention), BlendSettings(recompute=0.2)).tolist()
    assert {20, 21, 22} <= set(chosen)
    assert sum(p < 50 for p in chosen) == 8
    assert sum(100 <= p < 119 for p in chosen) == 12


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.floats(0, 1))
def test_shares_add_up_and_never_exceed_a_chunk(sizes: list[int], part: float) -> None:
    """Proportional to the sizes, within one token."""
    budget = int(part * sum(sizes))
    shares = _shares(sizes, budget)
    assert sum(shares) == budget
    for size, share in zip(sizes, shares, strict=True):
        assert share <= size
        assert abs(share - budget * size / sum(sizes)) < 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_short_chunks_are_repaired_too(count: int) -> None:
    """However small the share of so few tokens is."""
    segments = tuple((20 * number, 20 * number + 12) for number in range(count))
    attention = torch.rand(120, generator=torch.Generator().manual_seed(0))
    few = Candidates(segments, lambda: attention, lambda: attention, torch.device("cpu"))
    chosen = select(few, BlendSettings(recompute=0.07)).tolist()
    assert [sum(start <= position < end for position in chosen) for start, end in segments] == [4] * count
    assert select(few, BlendSettings(recompute=0.0)).tolist() == []


def test_deviation_takes_the_most_deviating_and_first_k_the_beginnings() -> None:
    """The two baselines do what their papers say."""
    deviation = torch.arange(100.0)
    chosen = select(candidates(deviation=deviation), BlendSettings(selector="deviation", recompute=0.1))
    assert chosen.tolist() == list(range(109, 119))
    chosen = select(candidates(), BlendSettings(selector="first_k", recompute=0.09))
    assert chosen.tolist() == [10, 11, 12, 13, 50, 60, 61, 62, 63]


def test_the_correction_is_on_for_query_only_unless_it_is_set() -> None:
    """Published baselines stay plain; a setting switches it on or off."""
    assert BlendSettings().corrects
    assert not BlendSettings(selector="deviation").corrects
    assert BlendSettings(selector="deviation", correction=True).corrects
    assert not BlendSettings(correction=False).corrects
    assert not BlendSettings(selector="all", correction=True).corrects


def test_weights_decay_shrink_and_spare_the_samples() -> None:
    """Rows near a sample move most, sampled rows not at all, far rows not at all."""
    block = _weigh(torch.tensor([5, 100, 110, 700]), 90, 600, BlendSettings(reach=20.0, shrinkage=2.0), torch.float32)
    assert block is not None
    assert block.first == 1
    assert block.weights[:, 2:].abs().max() == 0.0
    assert block.weights[510:].abs().max() == 0.0
    strength = block.weights.sum(dim=1)
    assert strength[10] == strength[20] == 0.0
    assert strength[11] > strength[60] > strength[90] > 0.0
    assert strength.max() < 0.5
    assert strength[300:].max() == 0.0
    assert _weigh(torch.tensor([5]), 90, 600, BlendSettings(), torch.float32) is None


def test_a_uniform_change_is_carried_to_the_neighbours_in_the_keys_own_frame() -> None:
    """If all rows were to change alike before rotation, the correction moves unsampled rows in that direction."""
    model = tiny_model()
    cache = model.new_cache(64)
    layer = cache.blended[1]
    rope = layer.group.rope
    assert rope is not None
    layer.keys.zero_()
    layer.values.zero_()
    selected = torch.arange(0, 64, 4)
    change = torch.randn(2, 1, 16)
    rotated = rope.turn(selected).apply(change.expand(2, len(selected), 16))
    values = torch.randn(2, 1, 16).expand(2, len(selected), 16)
    correction = LocalCorrection(selected, [(0, 64)], BlendSettings(shrinkage=1e-6), torch.float32)
    correction.apply(layer, rotated[None], values[None])
    others = torch.tensor([p for p in range(64) if p % 4])
    unrotated = rope.turn(others).inverse().apply(layer.keys[0][:, others])
    assert torch.allclose(unrotated, change.expand(2, len(others), 16), atol=1e-3)
    assert torch.allclose(layer.values[0][:, others], values[:, :1].expand(2, len(others), 16), atol=1e-3)
    assert layer.keys[0][:, selected].abs().max() == 0.0


def test_chunks_are_moved_by_their_own_samples_only() -> None:
    """Chunks of any length, side by side: a change in one does not reach over its edge."""
    layer = tiny_model().new_cache(120).blended[1]
    layer.keys.zero_()
    layer.values.zero_()
    selected = torch.tensor([2, 9, 30, 45, 100])
    values = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])[:, None].expand(1, 2, 5, 16)
    segments = [(0, 23), (23, 90), (90, 119)]
    LocalCorrection(selected, segments, BlendSettings(), torch.float32).apply(layer, torch.zeros(1, 2, 5, 16), values)
    others = torch.tensor([p for p in range(119) if p not in selected])
    for (start, end), sign in zip(segments, (1.0, -1.0, 2.0), strict=True):
        moved = layer.values[0][:, others[(others >= start) & (others < end)]] / sign
        assert moved.min() >= 0.0
        assert 0.3 < moved.max() <= 1.0
    assert layer.values[0, :, 119].abs().max() == 0.0


def test_layer_zero_is_never_corrected() -> None:
    """Its keys and values depend on the token alone."""
    model = tiny_model()
    layer = model.new_cache(8).blended[0]
    layer.keys.zero_()
    new = torch.ones(1, 2, 1, 16)
    LocalCorrection(torch.tensor([3]), [(0, 8)], BlendSettings(), torch.float32).apply(layer, new, new)
    assert layer.keys.abs().max() == 0.0
