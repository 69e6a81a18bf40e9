from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvmem import LanguageModel
from kvmem.kv import attention
from kvmem.kv.attention import ATTENTION, Step
from kvmem.kv.buffer import BlendedCache
from kvmem.kv.entry import Context, EntryKey, KVEntry, digest_tokens
from kvmem.testing import tiny_model

IDS = torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(3))


def attention_of(model: LanguageModel) -> str:
    """The attention that transformers runs. It has no public name after loading."""
    return str(model.hf.config._attn_implementation)  # noqa: SLF001


def full_logits(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(ids[None]).logits[0]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def any_model(request: pytest.FixtureRequest) -> LanguageModel:
    """A model with full attention, and one that alternates with a window shorter than the prompt."""
    overrides = {"sliding_window": 16} if request.param == "gemma2" else {}
    return tiny_model(request.param, **overrides)


@pytest.mark.parametrize("cuts", [[60], [1, 59], [20, 20, 20], [59, 1]])
def test_reading_in_pieces_equals_full_prefill(any_model: LanguageModel, cuts: list[int]) -> None:
    """However a prompt is cut, appending its pieces gives the logits of reading it at once."""
    cache = any_model.new_cache(1)
    start = 0
    for size in cuts:
        any_model.append(IDS[start : start + size].tolist(), cache)
        start += size
    last = any_model.next_logits(IDS[59:], cache, Step(torch.tensor([59])))
    assert torch.allclose(last, full_logits(any_model, IDS)[-1], atol=1e-4)
    assert cache.length == cache.get_seq_length() == 60


def test_any_subset_recomputed_over_an_exact_buffer_changes_nothing(any_model: LanguageModel) -> None:
    """Exact rows are a fixed point of recomputing, layer by layer."""
    cache = any_model.new_cache(60)
    any_model.append(IDS.tolist(), cache)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.blended]
    positions = torch.tensor([0, 7, 8, 30, 59])
    any_model.forward(IDS[positions], cache, Step(positions))
    for layer, (keys, values) in zip(cache.blended, before, strict=True):
        assert torch.allclose(layer.keys, keys, atol=1e-4)
        assert torch.allclose(layer.values, values, atol=1e-4)


def test_recomputing_everything_repairs_any_buffer(any_model: LanguageModel) -> None:
    """Whatever was in the rows, recomputing all of them is full prefill."""
    cache = any_model.new_cache(60)
    for layer in cache.blended:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    logits = any_model.next_logits(IDS, cache, Step(torch.arange(60)))
    assert torch.allclose(logits, full_logits(any_model, IDS)[-1], atol=1e-4)


def test_the_models_own_call_and_generate_continue_the_buffer(any_model: LanguageModel) -> None:
    """The cache is a transformers cache: several tokens at once, or generate, go on as with DynamicCache."""
    cache = any_model.new_cache(1)
    any_model.append(IDS[:40].tolist(), cache)
    with torch.no_grad():
        logits = any_model.hf(IDS[None, 40:], past_key_values=cache, use_cache=True).logits[0]
    assert torch.allclose(logits, full_logits(any_model, IDS)[40:], atol=1e-4)
    assert cache.length == 60
    cache.crop(1)
    options = {"attention_mask": torch.ones(1, 60, dtype=torch.long), "max_new_tokens": 32, "do_sample": False}
    ours = any_model.hf.generate(IDS[None], past_key_values=cache, **options)
    theirs = any_model.hf.generate(IDS[None], past_key_values=DynamicCache(config=any_model.hf.config), **options)
    assert torch.equal(ours, theirs)


def test_re_rotated_keys_equal_those_computed_at_the_new_position(any_model: LanguageModel) -> None:
    """A span read at one position and loaded at another has the keys of being read there."""
    span = tuple(IDS[:20].tolist())
    here, there = any_model.new_cache(20), any_model.new_cache(120)
    any_model.append(span, here)
    entry = here.entry(EntryKey("n", "m", Context().digest, digest_tokens(span)), span, 0, ())
    with any_model.attention(ATTENTION):
        moved = any_model.new_cache(120)
        moved.load(entry, 100)
    expected = keys_read_at(any_model, span, 100, there)
    for layer, keys in zip(moved.blended, expected, strict=True):
        assert torch.allclose(layer.keys[0, :, 100:120], keys, atol=1e-4)


def keys_read_at(model: LanguageModel, span: tuple[int, ...], start: int, cache: BlendedCache) -> list[torch.Tensor]:
    """The keys of `span` by the model itself, its positions beginning at `start` and nothing before it."""
    reading = DynamicCache(config=model.hf.config)
    positions = torch.arange(start, start + len(span))[None]
    mask = torch.ones(len(span), len(span), dtype=torch.bool).tril()
    window = next((g.window for g in model.anatomy.groups if g.window is not None), None)
    if window is None:
        masks: object = mask[None, None]
    else:
        near = mask & ~torch.ones_like(mask).tril(-window)
        masks = {"full_attention": mask[None, None], "sliding_attention": near[None, None]}
    if not isinstance(masks, dict):
        options = {"attention_mask": masks}
    else:
        floats = {k: torch.where(m, 0.0, float("-inf")) for k, m in masks.items()}
        options = {"attention_mask": floats}
    recorded: list[torch.Tensor] = []
    original = reading.update

    def update(keys: torch.Tensor, values: torch.Tensor, layer: int, *args: object, **kwargs: object) -> object:
        recorded.append(keys[0].clone())
        return original(keys, values, layer, *args, **kwargs)

    reading.update = update  # type: ignore[method-assign]
    with torch.no_grad():
        model.hf.base_model(
            torch.tensor([span]), position_ids=positions, past_key_values=reading, use_cache=True, **options
        )
    return recorded


def entries(model: LanguageModel, count: int) -> list[KVEntry]:
    """Spans of 20 tokens, each read alone."""
    found = []
    for number in range(count):
        span = tuple(IDS[20 * number : 20 * number + 20].tolist())
        cache = model.new_cache(20)
        model.append(span, cache)
        found.append(cache.entry(EntryKey("n", "m", Context().digest, digest_tokens(span)), span, 0, ()))
    return found


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_are_loaded_in_the_order_asked_for_whoever_copies_them(model: LanguageModel, ahead: bool) -> None:
    """What is asked for last stays, also where rows overlap and where the buffer grows in between."""
    first, second, third = entries(model, 3)
    cache = model.new_cache(40)
    cache.load(first, 5)
    cache.load(second, 15)
    cache.length = 35
    if ahead:
        cache.load_ahead()
    cache.reserve(200)
    cache.load(third, 100)
    if ahead:
        cache.load_ahead()
    for number, layer in enumerate(cache.blended):
        assert torch.equal(layer.values[0, :, 5:15], first.values[0][number][:, :10])
        assert torch.equal(layer.values[0, :, 15:35], second.values[0][number])
        assert torch.equal(layer.values[0, :, 100:120], third.values[0][number])


def test_what_is_loaded_ahead_is_there_before_anyone_looks(model: LanguageModel) -> None:
    """Another thread copies every layer's rows."""
    (entry,) = entries(model, 1)
    cache = model.new_cache(40)
    cache.load(entry, 3)
    cache.load_ahead()
    for thread in threading.enumerate():
        if thread.name == "kvmem-load":
            thread.join()
    assert not any(layer.is_expecting for layer in cache.blended)
    for number, layer in enumerate(cache.blended):
        assert torch.equal(layer.values[0, :, 3:23], entry.values[0][number])


def test_reserving_room_that_is_there_copies_nothing(model: LanguageModel) -> None:
    """Planning a prompt does not wait for what is loaded beside it."""
    (entry,) = entries(model, 1)
    cache = model.new_cache(40)
    cache.load(entry, 0)
    cache.reserve(40)
    assert cache.capacity == 40
    assert all(layer.is_expecting for layer in cache.blended)


def test_a_copy_that_fails_is_met_by_whoever_looks(model: LanguageModel) -> None:
    """No row that is missing is taken for one that is there, however often it is looked at."""
    (entry,) = entries(model, 1)
    broken = replace(entry, values=tuple(v[..., :-1] for v in entry.values))
    cache = model.new_cache(40)
    cache.load(broken, 0)
    cache.load_ahead()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            _ = cache.blended[0].keys


def test_growing_keeps_the_rows(model: LanguageModel) -> None:
    """More tokens than the capacity are taken, and earlier rows stay."""
    cache = model.new_cache(4)
    model.append(IDS[:4].tolist(), cache)
    first = copy.deepcopy(cache.blended[0].keys[:, :, :4])
    model.append(IDS[4:40].tolist(), cache)
    assert cache.capacity >= 40
    assert torch.equal(cache.blended[0].keys[:, :, :4], first)


def test_the_model_keeps_its_own_attention_outside_our_forwards(model: LanguageModel) -> None:
    """Nothing stays switched, even when a forward fails."""
    before = attention_of(model)
    cache = model.new_cache(2)
    with pytest.raises(IndexError):
        model.forward(torch.tensor([10**6, 1]), cache, Step(torch.arange(2)))
    assert attention_of(model) == before
    assert all(layer.step is None for layer in cache.blended)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 16])
def test_decoding_attends_as_the_model_does_with_shared_heads_as_rows(
    kv_heads: int, dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, with and without it, and beyond the window; keys are not repeated, and single bfloat16 rows,
    which torch is slow with, are doubled. More tokens at once are the model's own, and so is everything afterwards."""
    model = tiny_model("mistral", num_key_value_heads=kv_heads, sliding_window=window)
    model.hf.to(dtype)
    caches = [model.new_cache(40) for _ in range(2)]
    for cache in caches:
        model.append(IDS[:30].tolist(), cache)
    shapes: list[torch.Size] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        shapes.append(query.shape)
        return real(query, *args, **options)

    def read(cache: BlendedCache, first: int, last: int) -> torch.Tensor:
        with torch.no_grad():
            return model.hf(IDS[None, first:last], past_key_values=cache, use_cache=True).logits[0, -1].float()

    rows = max(4 // kv_heads, 2 if dtype == torch.bfloat16 else 1)
    for first, last in [(n, n + 1) for n in range(30, 50)] + [(50, 60)]:
        expected = read(caches[0], first, last)
        with model.decoding(), monkeypatch.context() as patch:
            patch.setattr(attention.F, "scaled_dot_product_attention", noted)
            found = read(caches[1], first, last)
        assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 0.25)
        assert (found.argmax() == expected.argmax()) or dtype == torch.bfloat16
        heads = (kv_heads, rows) if last == first + 1 else (4, 10)
        assert {shape[1:3] for shape in shapes} == {heads}
        shapes.clear()
    assert attention_of(model) == "sdpa"
