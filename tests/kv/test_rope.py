from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvmem.kv.rope import Rope

INV_FREQ = 1.0 / 10_000 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)


def test_turning_equals_the_rotation_of_transformers() -> None:
    """A key turned by its position is what transformers' Llama computes for it."""
    config = AutoConfig.for_model("llama", hidden_size=32, num_attention_heads=2, head_dim=16)
    keys = torch.randn(1, 2, 7, 16)
    positions = torch.tensor([0, 1, 5, 17, 90, 700, 1999])
    cos, sin = LlamaRotaryEmbedding(config)(keys, positions[None])
    _, expected = apply_rotary_pos_emb(keys, keys, cos, sin)
    rope = Rope(INV_FREQ, "half")
    assert torch.allclose(rope.turn(positions).apply(keys), expected, atol=1e-4)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_turns_compose(pairing: str) -> None:
    """Turning to one position and then by the difference is turning to the other position."""
    rope = Rope(INV_FREQ, pairing)  # type: ignore[arg-type]
    keys = torch.randn(3, 5, 20)
    there = rope.turn(torch.arange(5) + 1000).apply(keys)
    moved = rope.move(torch.arange(5) + 1000, torch.arange(5) + 600).apply(there)
    assert torch.allclose(moved, rope.turn(torch.arange(5) + 600).apply(keys), atol=1e-5)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_inverse_undoes_and_partial_dimensions_stay(pairing: str) -> None:
    """The inverse gives the key back; dimensions beyond the rotary ones are never touched."""
    rope = Rope(INV_FREQ, pairing)  # type: ignore[arg-type]
    keys = torch.randn(2, 4, 24)
    turn = rope.turn(torch.tensor([3, 9, 27, 81]))
    turned = turn.apply(keys)
    assert not torch.allclose(turned, keys)
    assert torch.equal(turned[..., 16:], keys[..., 16:])
    assert torch.allclose(turn.inverse().apply(turned), keys, atol=1e-5)
