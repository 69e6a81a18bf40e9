from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kvmem.kv import attention
from kvmem.kv.attention import Step, attend

MODULE = SimpleNamespace(layer_idx=1)


def reference(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Dense softmax attention with the mask spelt out, one query at a time."""
    groups = q.shape[1] // k.shape[1]
    rows = []
    for row, position in enumerate(positions.tolist()):
        low = 0 if window is None else max(0, position - window + 1)
        heads = []
        for head in range(q.shape[1]):
            keys, values = k[0, head // groups, low : position + 1], v[0, head // groups, low : position + 1]
            weights = torch.softmax(keys @ q[0, head, row] / q.shape[-1] ** 0.5, dim=0)
            heads.append(weights @ values)
        rows.append(torch.stack(heads))
    return torch.stack(rows)[None]


def inputs(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = int(positions[-1]) + 1
    return (
        torch.randn(1, 4, len(positions), 16),
        torch.randn(1, 2, total, 16),
        torch.randn(1, 2, total, 16),
    )


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(
    "positions", [[0], [3], [0, 1, 2, 3, 4], [5, 6, 7], [0, 9, 10, 33], [2, 60, 61, 62, 63], list(range(30))]
)
def test_any_subset_of_positions_attends_to_exactly_what_stands_before_it(
    backend: str, window: int | None, positions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the positions, the window and the block size, attention equals the dense reference."""
    monkeypatch.setattr(attention, "ROWS_PER_BLOCK", 3)
    monkeypatch.setattr(attention, "SPLIT_FROM", 2)
    at = torch.tensor(positions)
    q, k, v = inputs(at)
    step = Step(at, backend)  # type: ignore[arg-type]
    out, _ = attend(MODULE, q, k, v, None, kvmem_step=step, sliding_window=window)  # type: ignore[arg-type]
    assert torch.allclose(out, reference(q, k, v, at, window), atol=1e-5)
    assert step.layers_seen == 1


def test_observed_attention_adds_up_to_one_and_does_not_change_the_output() -> None:
    """Scores are a mean over heads and rows, and observing is free of side effects."""
    at = torch.tensor([4, 11, 12])
    q, k, v = inputs(at)
    scores = torch.zeros(13)
    seen = Step(at, scored_layers=frozenset({1}), scores=scores)
    out, _ = attend(MODULE, q, k, v, None, kvmem_step=seen)  # type: ignore[arg-type]
    plain, _ = attend(MODULE, q, k, v, None, kvmem_step=Step(at))  # type: ignore[arg-type]
    assert torch.allclose(out, plain, atol=1e-5)
    assert scores.sum() == pytest.approx(1.0, abs=1e-5)
    assert (scores[5:] > 0).all()


def test_masks_that_are_too_large_to_keep_are_made_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step over its mask budget gives the same result."""
    at = torch.arange(3, 40)
    q, k, v = inputs(at)
    kept, _ = attend(MODULE, q, k, v, None, kvmem_step=Step(at))  # type: ignore[arg-type]
    monkeypatch.setattr(attention, "MASK_PAIRS", 0)
    step = Step(at)
    made, _ = attend(MODULE, q, k, v, None, kvmem_step=step)  # type: ignore[arg-type]
    assert not any(block.kept for block in step.blocks(None))
    assert torch.equal(kept, made)


def test_a_call_without_positions_is_refused() -> None:
    """The function never guesses a mask."""
    q, k, v = inputs(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="positions"):
        attend(MODULE, q, k, v, None)  # type: ignore[arg-type]
