from __future__ import annotations

from pathlib import Path

import torch
from transformers import DynamicCache

from kvmem import KVMem, LanguageModel
from kvmem.kv.entry import EntryKey

DOCUMENTS = Path(__file__).parents[2] / "examples" / "documents"


def parts(name: str, count: int) -> list[str]:
    """The first sections of an example document."""
    sections = (DOCUMENTS / name).read_text().split("\n## ")
    return [f"## {section}" for section in sections[1 : 1 + count]]


def test_exact_hits_and_all_equal_full_prefill_beyond_the_window(gemma3: LanguageModel, tmp_path: Path) -> None:
    """Prompts longer than the sliding window of 512 tokens: from disk and recomputed, the logits of full prefill."""
    context = parts("lease.md", 5)
    assert {group.window for group in gemma3.anatomy.groups} == {512, None}
    with KVMem(gemma3, tmp_path / "kv") as mem:
        mem.prefill("?", context=context)
    with KVMem(gemma3, tmp_path / "kv") as mem:
        for order, blend in ((context, "query"), (context[::-1], "all")):
            state = mem.prefill("How much is the Base Rent?", context=order, blend=blend)
            assert len(state.token_ids) > 700
            with torch.no_grad():
                full = gemma3.hf(state.token_ids[None], logits_to_keep=1).logits[0, -1]
            assert (state.logits - full).abs().max() <= 2e-3


def test_keys_of_both_rotations_move(gemma3: LanguageModel) -> None:
    """Sliding and full layers rotate by different bases; moved keys are those the model computes there."""
    ids = gemma3.tokenize(parts("lease.md", 1)[0], markup=False)[:60]
    here = gemma3.new_cache(60)
    gemma3.append(ids, here)
    entry = here.entry(EntryKey("", "", "", ""), ids, 0, ())
    moved = gemma3.new_cache(460)
    moved.load(entry, 400)
    there = DynamicCache()
    positions = torch.arange(400, 460)[None]
    with torch.no_grad():
        gemma3.hf.base_model(torch.tensor([ids]), position_ids=positions, past_key_values=there, use_cache=True)
    for layer, expected in zip(moved.blended, there.layers, strict=True):
        assert torch.allclose(layer.keys[0, :, 400:], expected.keys[0], atol=1e-3)  # type: ignore[index]


def test_blending_is_nearer_to_full_prefill_than_plain_reuse(gemma3: LanguageModel) -> None:
    """On a real text in another order, the default leaves less than half of the divergence of reuse without repair."""
    context = parts("oncall-runbook.md", 5)
    found = {}
    with KVMem(gemma3, None) as mem:
        for part in context:
            mem.prefill("?", context=[part])
        for blend in ("none", "query"):
            state = mem.prefill("What is finch?", context=context[::-1], blend=blend)
            with torch.no_grad():
                truth = gemma3.hf(state.token_ids[None], logits_to_keep=1).logits[0, -1].log_softmax(-1)
            found[blend] = float((truth.exp() * (truth - state.logits.log_softmax(-1))).sum())
    assert found["query"] < 0.5 * found["none"]
