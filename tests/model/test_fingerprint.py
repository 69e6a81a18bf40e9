"""What the key of a cache covers: a cache is never taken for that of other weights or adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvmem import KVMem, LanguageModel
from kvmem.testing import tiny_model


class Adapted(nn.Linear):
    """A linear layer with adapters, with the attributes that PEFT's layers have."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.active: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self.scaling = {"a": 1.0, "b": 1.0}
        for seed, name in enumerate(("a", "b")):
            torch.manual_seed(seed)
            self.register_buffer(f"delta_{name}", torch.randn_like(base.weight) * 0.2)

    @property
    def active_adapters(self) -> list[str]:
        return self.active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = super().forward(x)
        for name in [] if self.disable_adapters else self.active:
            found = found + self.scaling[name] * nn.functional.linear(x, getattr(self, f"delta_{name}"))
        return found


def adapted() -> tuple[LanguageModel, list[Adapted]]:
    """A tiny model with two adapters, none of them active."""
    model = tiny_model()
    layers = []
    for block in model.hf.model.layers:
        for name in ("k_proj", "v_proj"):
            layers.append(Adapted(getattr(block.self_attn, name)))
            setattr(block.self_attn, name, layers[-1])
    return LanguageModel(model.hf, model.tokenizer, name="adapted"), layers


def off_by(mem: KVMem) -> float:
    """How far the prompt's last logits are from those of full prefill."""
    found = mem.prefill("Who pays?")
    assert mem.local_model is not None
    with torch.no_grad():
        full = mem.local_model.hf(found.token_ids[None]).logits[0, -1]
    return float((found.logits - full).abs().max())


def scale_in_place(model: LanguageModel) -> None:
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.mul_(1.5)


def scale_data(model: LanguageModel) -> None:
    for parameter in model.hf.parameters():
        parameter.data.mul_(1.5)


def replace_weights(model: LanguageModel) -> None:
    other = tiny_model(seed=7).hf.state_dict()
    model.hf.load_state_dict(other)


def assign_weights(model: LanguageModel) -> None:
    model.hf.load_state_dict(tiny_model(seed=7).hf.state_dict(), assign=True)


@pytest.mark.parametrize("change", [scale_in_place, scale_data, replace_weights, assign_weights])
def test_what_changes_while_an_engine_is_open_is_noticed(change: Any, tmp_path: Path) -> None:
    """Nothing computed before is used, in memory or from the store, and nothing is stored under the old key."""
    model = tiny_model()
    with KVMem(model, tmp_path / "kv", max_tokens=2) as mem:
        mem.add("The tenant pays the rent on the first of the month.", id="x")
        assert off_by(mem) < 1e-3
        before = model.fingerprint
        change(model)
        assert off_by(mem) < 1e-3
        mem.ask("Who pays?")
        assert off_by(mem) < 1e-3
        assert model.fingerprint != before
    with KVMem(tiny_model(), tmp_path / "kv", max_tokens=2) as mem:
        assert off_by(mem) < 1e-3


def test_adapters_have_caches_of_their_own(tmp_path: Path) -> None:
    """Whichever is active, how it is scaled, and none; what was computed with one is found again with it."""
    model, layers = adapted()
    with KVMem(model, tmp_path / "kv", max_tokens=2) as mem:
        mem.add("The rent is 3,200 euros a month.", id="y")
        seen: dict[str, str] = {}

        def use(name: str, **state: Any) -> None:
            for layer in layers:
                for field, value in state.items():
                    setattr(layer, field, value)
            assert off_by(mem) < 1e-3, name
            mem.add("The tenant pays the rent on the first of the month.", id="x")
            assert off_by(mem) < 1e-3, name
            seen[name] = model.fingerprint

        use("base")
        use("a", active=["a"])
        use("b", active=["b"])
        use("both", active=["a", "b"])
        use("half", active=["a"], scaling={"a": 0.5, "b": 1.0})
        assert len(set(seen.values())) == len(seen)
        use("disabled", disable_adapters=True)
        use("a again", active=["a"], scaling={"a": 1.0, "b": 1.0}, disable_adapters=False)
        assert seen["disabled"] == seen["base"]
        assert seen["a again"] == seen["a"]
        found = mem.prefill("Who pays?").usage
        assert found.exact > 30


def test_engines_of_one_model_notice_what_either_changes(tmp_path: Path) -> None:
    """The buffers of the other are dropped, too."""
    model = tiny_model()
    with KVMem(model, None, max_tokens=2) as first, KVMem(model, None, max_tokens=2, namespace="b") as second:
        for mem in (first, second):
            mem.add("The tenant pays the rent on the first of the month.", id="x")
            mem.ask("Who pays?")
        scale_in_place(model)
        assert off_by(first) < 1e-3
        assert off_by(second) < 1e-3


def test_a_fingerprint_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing changes, whatever the engine does."""
    model = tiny_model()
    with KVMem(model, None, max_tokens=2) as mem:
        monkeypatch.setattr("kvmem.model.fingerprint.xxhash.xxh3_128", lambda: pytest.fail("hashed again"))
        mem.add("The tenant pays the rent.", id="x")
        mem.ask("Who pays?")
        mem.chat([{"role": "user", "content": "Hello"}])
