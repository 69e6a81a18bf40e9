from __future__ import annotations

from pathlib import Path

import torch

from kvmem import KVMem, LanguageModel, ModelSettings, Prefill
from kvmem.kv.attention import Step
from kvmem.model.locate import locate

DOCUMENTS = Path(__file__).parents[2] / "examples" / "documents"


def parts(name: str, count: int = 3) -> list[str]:
    """The first sections of an example document."""
    sections = (DOCUMENTS / name).read_text().split("\n## ")
    return [f"## {section}" for section in sections[1 : 1 + count]]


def full_logits(model: LanguageModel, prefill: Prefill) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.hf(prefill.token_ids[None], logits_to_keep=1).logits[0, -1]
        return logits.float()


def test_exact_hits_and_all_equal_full_prefill(smollm2: LanguageModel, tmp_path: Path) -> None:
    """From memory, from disk after a restart, and recomputed from another order: the logits of full prefill."""
    context = parts("lease.md")
    question = "How much is the Base Rent?"
    with KVMem(smollm2, tmp_path / "kv") as mem:
        cold = mem.prefill(question, context=context)
        truth = full_logits(smollm2, cold)
        assert (cold.logits - truth).abs().max() <= 1e-3
    with KVMem(smollm2, tmp_path / "kv") as mem:
        warm = mem.prefill(question, context=context)
        assert warm.usage.exact == warm.usage.prompt - warm.usage.computed > 200
        assert (warm.logits - truth).abs().max() <= 1e-3
        moved = mem.prefill(question, context=context[::-1], blend="all")
        assert moved.usage.recomputed > 200
        assert (moved.logits - full_logits(smollm2, moved)).abs().max() <= 1e-3


def test_greedy_answers_equal_those_of_generate(smollm2: LanguageModel, tmp_path: Path) -> None:
    """The same 32 greedy tokens, exactly reused and recomputed as a whole."""
    context = parts("oncall-runbook.md")
    with KVMem(smollm2, tmp_path / "kv", max_tokens=32) as mem:
        mem.prefill("?", context=context)
        for order, blend in ((context, "query"), (context[::-1], "all")):
            prefill = mem.prefill("What is finch?", context=order, blend=blend)
            ids = prefill.token_ids[None]
            output = smollm2.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
            expected = smollm2.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            answer = mem.ask("What is finch?", context=order, blend=blend)
            assert answer.text == expected


def test_keys_moved_equal_keys_computed_there(smollm2: LanguageModel) -> None:
    """A chunk loaded at another position has, layer by layer, the keys of being computed at it."""
    ids = smollm2.tokenize(parts("lease.md", 1)[0], markup=False)[:80]
    cache = smollm2.new_cache(80)
    smollm2.append(ids, cache)
    from kvmem.kv.entry import EntryKey

    entry = cache.entry(EntryKey("n", "m", "c", "t"), ids, 0, ())
    moved = smollm2.new_cache(3080)
    moved.load(entry, 3000)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda _, __, out: seen.append(out[0]))
        for layer in smollm2.hf.model.layers
    ]
    again = smollm2.new_cache(80)
    smollm2.append(ids, again)
    for hook in hooks:
        hook.remove()
    positions = torch.arange(3000, 3080)
    cos, sin = smollm2.hf.model.rotary_emb(seen[0], positions[None])
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    for layer, raw in zip(moved.blended, seen, strict=True):
        keys = raw.view(80, 3, 64).transpose(0, 1)[None]
        _, expected = apply_rotary_pos_emb(keys, keys, cos, sin)
        assert torch.allclose(layer.keys[:, :, 3000:3080], expected, atol=1e-4)


def test_blending_is_nearer_to_full_prefill_than_plain_reuse(smollm2: LanguageModel, tmp_path: Path) -> None:
    """Mean divergence over questions: the default at least halves that of reuse without repair."""
    context = parts("espresso-machine.md", 6)
    questions = [
        "How many litres does the tank hold?",
        "How long does heating up take?",
        "How wide is the basket?",
        "How often is it cleaned?",
        "What does the red lamp mean?",
        "Which pressure does the pump give?",
        "How fine is the coffee ground?",
        "What is the warranty?",
    ]
    total = {"none": 0.0, "query": 0.0}
    with KVMem(smollm2, tmp_path / "kv") as mem:
        mem.prefill("?", context=context)
        for question in questions:
            for name in total:
                prefill = mem.prefill(question, context=context[::-1], blend=name)
                truth = full_logits(smollm2, prefill).log_softmax(-1)
                total[name] += float((truth.exp() * (truth - prefill.logits.log_softmax(-1))).sum())
    assert total["query"] < 0.5 * total["none"]


def test_the_second_start_reads_safetensors_and_gives_the_same_model(smollm2_default: LanguageModel) -> None:
    """The GGUF file is converted once."""
    assert any(Path(locate("smollm2")).glob("*.safetensors"))
    again = LanguageModel.load("smollm2")
    assert again.fingerprint == smollm2_default.fingerprint
    assert again.window == 8192
    assert again.bytes_per_token == 11_520 * again.dtype.itemsize
    assert again.blendable


def test_scoring_a_window_of_tokens_leaves_rows_finite() -> None:
    """In bfloat16, a repair of scattered rows gives finite keys and values everywhere."""
    model = LanguageModel.load("smollm2", ModelSettings(dtype="bfloat16"))
    ids = torch.arange(1000, 1400)
    cache = model.new_cache(400)
    model.append(ids.tolist(), cache)
    positions = torch.arange(0, 400, 7)
    model.forward(ids[positions], cache, Step(positions))
    assert all(bool(layer.keys.isfinite().all() and layer.values.isfinite().all()) for layer in cache.blended)
