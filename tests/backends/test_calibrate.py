from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import open_mem

import kvmem
from kvmem import KVMem
from kvmem.backends import calibrate as checking
from kvmem.backends.calibrate import check, recall
from kvmem.testing import tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
    "rope_theta": 1e4,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
BLENDABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3 scaling": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "mistral, window": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3, QK norm": ("qwen3", {}),
    "phi3, partial rotary": ("phi3", {"partial_rotary_factor": 0.5}),
    "gpt-neox, partial rotary": ("gpt_neox", {"rotary_pct": 0.25}),
    "gemma2, window and softcap": ("gemma2", {"sliding_window": 64, "attn_logit_softcapping": 5.0}),
    "gemma3, two RoPE bases": (
        "gemma3_text",
        {"sliding_window": 64, "layer_types": MIXED, "rope_parameters": GEMMA3_ROPE},
    ),
    "olmo2": ("olmo2", {}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "cohere, interleaved": ("cohere", {}),
    "smollm3, layers without RoPE": ("smollm3", {}),
    "gpt-oss, sinks": ("gpt_oss", {"sliding_window": 64, "num_local_experts": 4, "rope_parameters": YARN}),
}
HYBRID: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_positions": 2048}),
    "bloom": ("bloom", {"seq_length": 2048}),
    "mpt": ("mpt", {"max_seq_len": 2048, "d_model": 64, "n_heads": 4, "n_layers": 4}),
    "dynamic ntk": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    "hybrid, short convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "hybrid, gated delta rule": ("qwen3_next", HYBRID),
}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of checks go to a directory of the test; two budgets are enough to try."""
    monkeypatch.setattr(checking, "BUDGETS", (0.1, 0.9))
    monkeypatch.setattr(checking, "QUESTIONS", checking.QUESTIONS[:2])
    monkeypatch.setattr(checking, "TEXTS", tuple(text[:200] for text in checking.TEXTS))
    monkeypatch.setattr(checking, "default_cache_dir", lambda: tmp_path / "cache")


@pytest.mark.parametrize("name", BLENDABLE)
def test_architectures_that_blend(name: str) -> None:
    """Moved keys are right, recomputing all is full prefill, and so is exact reuse: each to float32's precision."""
    model_type, overrides = BLENDABLE[name]
    model = tiny_model(model_type, **overrides)
    report = check(model)
    assert report.blendable, report.reason
    assert report.rotation_error is not None
    assert report.rotation_error < 1e-3
    assert report.all_divergence is not None
    assert abs(report.all_divergence) < 1e-5
    assert abs(report.exact_divergence) < 1e-5
    assert report.divergence["0.9"] < report.divergence["0"] + 1e-6  # short windows leave nothing to repair
    assert recall(model) == report


def test_a_check_that_cannot_be_kept_is_made_once_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The user's cache directory cannot be written."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(checking, "default_cache_dir", lambda: tmp_path / "file")
    monkeypatch.setattr(checking, "_unwritten", {})
    model = tiny_model()
    assert recall(model) is None
    report = check(model)
    assert "cannot be kept" in caplog.text
    assert recall(model) == report


@pytest.mark.parametrize("name", BLENDABLE)
def test_all_and_exact_have_the_logits_of_full_prefill(name: str) -> None:
    """On every architecture, within 1e-3 in float32, and generation continues as transformers' own."""
    model_type, overrides = BLENDABLE[name]
    model = tiny_model(model_type, **overrides)
    texts = list(checking.TEXTS[:3])
    with open_mem(model, None, max_tokens=12) as mem:
        mem.prefill("?", context=texts)
        for order, blend in ((texts, "query"), (texts[::-1], "all")):
            state = mem.prefill("Who drew the coast?", context=order, blend=blend)
            with torch.no_grad():
                full = model.hf(state.token_ids[None]).logits[0, -1].float()
            assert (state.logits - full).abs().max() <= 1e-3
            ids = state.token_ids[None]
            expected = model.hf.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=2
            )
            text = model.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
            assert mem.ask("Who drew the coast?", context=order, blend=blend).text == text


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_do_not_blend_say_why_and_reuse_exactly(name: str) -> None:
    """Learned positions, ALiBi, RoPE that depends on the length, and layers with a recurrent state."""
    model_type, overrides = REFUSED[name]
    report = check(tiny_model(model_type, **overrides))
    assert not report.blendable
    assert len(report.reason) > 20
    assert report.recompute is None
    assert report.exact
    assert abs(report.exact_divergence) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_exact_reuse_from_disk_continues_any_model(name: str, tmp_path: Path) -> None:
    """After a restart, a prompt that begins as an earlier one reads only what is new, and is answered the same."""
    model_type, overrides = REFUSED[name]
    model = tiny_model(model_type, **overrides)
    texts = list(checking.TEXTS[:3])
    with open_mem(model, tmp_path / "kv", max_tokens=12) as mem:
        mem.prefill("?", context=texts[:2])
    with open_mem(model, tmp_path / "kv", max_tokens=12) as mem:
        for context in (texts, texts[:1]):
            state = mem.prefill("Who drew the coast?", context=context)
            assert state.usage.exact > 150
            ids = state.token_ids[None]
            expected = model.hf.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=2
            )
            text = model.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
            answer = mem.ask("Who drew the coast?", context=context)
            assert answer.text == text
            assert answer.usage.exact > 150


def test_a_model_that_cannot_be_continued_in_pieces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrent layer that forgets its state when it reads several tokens would make every reuse wrong."""
    model = tiny_model("lfm2", layer_types=["conv", "full_attention"] * 2)
    monkeypatch.setattr(
        transformers.cache_utils.LinearAttentionLayer, "update_conv_state", lambda self, states, *_, **__: states
    )
    with pytest.raises(kvmem.ModelError, match="in two pieces"):
        _ = model.anatomy


def test_a_rotation_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were keys moved the wrong way round, the check would refuse the model."""
    from kvmem.kv.rope import Rope

    right = Rope.move
    monkeypatch.setattr(Rope, "move", lambda self, old, new: right(self, new, old))
    report = check(tiny_model())
    assert not report.blendable
    assert "moved keys" in report.reason


def test_nothing_is_remembered_of_another_model() -> None:
    """Results are kept by fingerprint."""
    check(tiny_model(seed=1))
    assert recall(tiny_model(seed=1)) is not None
    assert recall(tiny_model(seed=2)) is None


def test_auto_takes_the_budget_of_the_check() -> None:
    """recompute="auto" uses the smallest budget that was enough, running the check when there is none."""
    model = tiny_model()
    with KVMem(model, None, max_tokens=4, blend={"recompute": "auto"}) as mem:
        mem.prefill("?", context=checking.TEXTS)
        report = recall(model)
        assert report is not None
        state = mem.prefill("Who?", context=checking.TEXTS[::-1])
        share = state.usage.recomputed / (state.usage.recomputed + state.usage.reused)
        assert share == pytest.approx(report.recompute, abs=0.01)
