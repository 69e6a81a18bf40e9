from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kvmem import LanguageModel, ModelSettings
from kvmem.model.packing import PackedLinear, can_pack, pack
from kvmem.testing import tiny_model

packs = pytest.mark.skipif(not can_pack(), reason="this CPU has no packed bfloat16 products")


def save(directory: Path, **overrides: object) -> str:
    """A tiny bfloat16 checkpoint."""
    model = tiny_model(**overrides)  # type: ignore[arg-type]
    model.hf.to(torch.bfloat16).save_pretrained(directory)
    model.tokenizer.save_pretrained(directory)
    return str(directory)


def layers(model: LanguageModel, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.hf.named_modules() if type(module) is kind]


@packs
@pytest.mark.parametrize("attention_bias", [False, True])
def test_a_packed_model_says_the_same(tmp_path: Path, attention_bias: bool) -> None:
    """The same logits for any number of rows, by fewer kinds of layers, under the same fingerprint."""
    directory = save(tmp_path, attention_bias=attention_bias)
    packed = LanguageModel.load(directory)
    plain = LanguageModel.load(directory, ModelSettings(packed=False))
    assert layers(packed, PackedLinear)
    assert not layers(plain, PackedLinear)
    assert packed.fingerprint == plain.fingerprint
    assert packed.dtype == plain.dtype
    assert packed.bytes_per_token == plain.bytes_per_token
    assert packed.hf.num_parameters() == plain.hf.num_parameters()
    for rows in (1, 2, 31, 64, 200):
        ids = torch.arange(rows)[None] % 250
        with torch.no_grad():
            ours, theirs = packed.hf(ids).logits.float(), plain.hf(ids).logits.float()
        assert torch.allclose(ours, theirs, atol=2e-2)


@packs
def test_tied_weights_and_other_dtypes_stay_as_they_are(tmp_path: Path) -> None:
    """Embeddings that are also the last layer are read by both; float32 is not packed."""
    directory = save(tmp_path, tie_word_embeddings=True)
    tied = LanguageModel.load(directory)
    assert layers(tied, nn.Linear) == ["lm_head"]
    assert tied.hf.lm_head.weight is tied.hf.get_input_embeddings().weight
    assert not layers(LanguageModel.load(directory, ModelSettings(dtype="float32")), PackedLinear)


@packs
def test_layers_of_other_classes_are_left_alone() -> None:
    """A subclass has a forward of its own."""

    class Other(nn.Linear):
        pass

    module = nn.ModuleDict({"own": nn.Linear(8, 8), "other": Other(8, 8)}).to(torch.bfloat16)
    assert pack(module) == 1
    assert type(module["own"]) is PackedLinear
    assert type(module["other"]) is Other
    assert pack(module) == 0


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_widens_half_precision_where_the_cpu_has_no_instructions_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, expected: torch.dtype
) -> None:
    """A dtype that is asked for by name is kept."""
    directory = save(tmp_path)
    monkeypatch.setattr("kvmem.model.loading.has_fast_products", lambda dtype: fast or dtype == torch.float32)
    loaded = LanguageModel.load(directory)
    assert {parameter.dtype for parameter in loaded.hf.parameters()} == {loaded.dtype} == {expected}
    assert LanguageModel.load(directory, ModelSettings(dtype="bfloat16")).dtype == torch.bfloat16
    assert LanguageModel.load(directory, ModelSettings(device_map="cpu")).dtype == expected


@packs
def test_a_model_that_was_handed_over_is_not_changed() -> None:
    """Only what kvmem loads is its own to pack."""
    model = tiny_model()
    LanguageModel(model.hf.to(torch.bfloat16), model.tokenizer)
    assert not layers(model, PackedLinear)
