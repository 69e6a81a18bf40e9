"""Detect the structure of a model's KV cache by running single tokens, not by a list of architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from kvmem.errors import ModelError, first_line
from kvmem.kv.attention import Step
from kvmem.kv.buffer import BlendedCache
from kvmem.kv.layer import LayerGroup
from kvmem.kv.rope import Rope


@dataclass(frozen=True)
class Anatomy:
    """The structure of a model's cache.

    Attributes:
        groups: The layers that keep keys and values, grouped by shape, window and rotation.
        blendable: Whether keys can be moved to other positions.
        reason: If not `blendable`, why not.
        recurrent: Indices of the other layers, which keep a state instead of a row per token.
    """

    groups: tuple[LayerGroup, ...]
    blendable: bool
    reason: str
    recurrent: tuple[int, ...] = ()


class Forward(Protocol):
    """Runs token ids (int64 [m]) through a model, at the positions of a step."""

    def __call__(self, token_ids: Tensor, cache: BlendedCache, step: Step) -> None: ...


def examine(hf: Any, name: str, window: int, forward: Forward) -> Anatomy:
    """Run a transformers model on single tokens and derive the cache's structure from the keys it computes.

    Args:
        hf: The transformers model.
        name: Name for error messages.
        window: The context window, in tokens.
        forward: Runs the model over a `BlendedCache`.

    Raises:
        ModelError: The model has a cache that cannot be stored.
    """
    token = _ordinary_token(hf)

    def keys_at(position: int) -> tuple[list[Any], dict[int, Tensor]]:
        cache = DynamicCache(config=hf.config.get_text_config())
        ids = torch.tensor([[token]], device=hf.device)
        with torch.no_grad():
            hf.base_model(
                input_ids=ids,
                position_ids=torch.tensor([[position]], device=hf.device),
                past_key_values=cache,
                use_cache=True,
            )
        layers: list[Any] = cache.layers
        _refuse_unknown(name, layers)
        keys = {i: layer.keys[0, :, 0].float().cpu() for i, layer in enumerate(layers) if not _is_recurrent(layer)}
        return layers, keys

    frequencies = _frequencies(hf)
    layers, origin = keys_at(0)
    positions = (1, 5, 97, window - 1)
    moved = [(p, keys_at(p)[1]) for p in positions if 0 < p < window]
    keys_at(0)  # resets a length-dependent RoPE to its short form
    ropes = {i: _fit(origin[i], [(p, k[i]) for p, k in moved], frequencies) for i in origin}
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index in origin:
        layer = layers[index]
        sliding = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        rope = ropes[index]
        shape = (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        groups.setdefault((*shape, sliding, rope if rope is not _UNKNOWN else None), []).append(index)
    built = tuple(LayerGroup(tuple(indices), *key) for key, indices in groups.items())
    recurrent = tuple(i for i, layer in enumerate(layers) if _is_recurrent(layer))
    if recurrent:
        _refuse_if_pieces_differ(hf, name)
    reason = _obstacle(hf, forward, list(ropes.values()), built, recurrent)
    return Anatomy(built, not reason, reason or "keys follow rotary position embedding", recurrent)


def _is_recurrent(layer: Any) -> bool:
    return type(layer) is LinearAttentionLayer and layer.number_of_states == 1


def _refuse_unknown(name: str, layers: list[Any]) -> None:
    """Raise ModelError if the cache has layers of an unsupported type, or no keys at all."""
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    strange = sorted(
        {type(layer).__name__ for layer in layers if type(layer) not in known and not _is_recurrent(layer)}
    )
    if strange:
        raise ModelError(
            f"{name!r} has cache layers that cannot be stored yet ({', '.join(strange)}). "
            "Use a model whose layers are attention, sliding-window attention or plain recurrent layers."
        )
    if not layers or all(_is_recurrent(layer) for layer in layers):
        raise ModelError(
            f"{name!r} has no layers with keys and values, so there is no KV cache to reuse. "
            "Use a model with attention layers."
        )


def length_dependent_rope(config: Any) -> bool:
    """Whether the RoPE frequencies depend on the length of the prompt (dynamic NTK, LongRoPE)."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _ordinary_token(hf: Any) -> int:
    """A token that is neither padding nor control: a padding token's embedding may be zero."""
    return int(hf.config.get_text_config().vocab_size) // 3


_UNKNOWN = Rope(torch.empty(0), "half")


def _frequencies(hf: Any) -> list[Rope]:
    """The rotations the model may use, from the `inv_freq` buffers of its modules."""
    found: list[Rope] = []
    for name, buffer in hf.named_buffers():
        if not name.endswith("inv_freq") or "original" in name or buffer.ndim != 1:
            continue
        exact = buffer.detach().to("cpu", torch.float64).clone()
        if any(torch.equal(exact, rope.inv_freq) for rope in found):
            continue
        found += [Rope(exact, "half"), Rope(exact, "interleaved")]
    return found


def _fit(origin: Tensor, moved: list[tuple[int, Tensor]], candidates: list[Rope]) -> Rope | None:
    """The rotation that turns the key at position 0 (float32 [kv heads, dim]) into the keys at all other positions.

    None is the identity: the keys do not depend on the position.
    """
    scale = float(origin.abs().max())
    if scale == 0.0:
        return _UNKNOWN
    best: Rope | None = _UNKNOWN
    least = float("inf")
    for rope in (None, *candidates):
        if rope is not None and rope.rotary_dim > origin.shape[-1]:
            continue
        worst = 0.0
        for position, keys in moved:
            turned = origin if rope is None else rope.turn(torch.tensor([position])).apply(origin[:, None])[:, 0]
            # float32 angles lose precision as they grow; bfloat16 keys are accurate to about 1%.
            allowed = 0.03 + 1e-6 * position
            worst = max(worst, float((turned - keys).abs().max()) / scale / allowed)
        if worst < least:
            best, least = rope, worst
    return best if least <= 1.0 else _UNKNOWN


@torch.no_grad()
def _refuse_if_pieces_differ(hf: Any, name: str) -> None:
    """Raise ModelError if a prefill in two pieces differs from a prefill in one.

    Some implementations of recurrent layers ignore the earlier state when given several tokens.
    """
    ids = torch.arange(64, device=hf.device)[None] % 7 + _ordinary_token(hf)
    whole = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float()
    cache = DynamicCache(config=hf.config.get_text_config())
    for piece in (ids[:, :40], ids[:, 40:]):
        state = hf.base_model(input_ids=piece, past_key_values=cache, use_cache=True)
    difference = float((state.last_hidden_state[0, -1].float() - whole).norm() / whole.norm())
    if difference > (1e-3 if hf.dtype == torch.float32 else 0.1):
        raise ModelError(
            f"{name!r} cannot be continued exactly: prefilled in two pieces, its output differs by "
            f"{difference:.0%} from a single prefill. Use another model, or another version of transformers."
        )


def _obstacle(
    hf: Any, forward: Forward, ropes: list[Rope | None], groups: tuple[LayerGroup, ...], recurrent: tuple[int, ...]
) -> str:
    """Why the model's entries cannot be moved and blended; empty if they can."""
    if recurrent:
        return "it has recurrent layers, whose state depends on all earlier tokens and cannot be split"
    if length_dependent_rope(hf.config):
        return "its rotary position embedding depends on the length of the prompt"
    if any(rope is _UNKNOWN for rope in ropes):
        return "its keys do not follow a single rotary position embedding over the whole window"
    layer_types = set(getattr(hf.config.get_text_config(), "layer_types", None) or ())
    if not layer_types <= {"full_attention", "sliding_attention"}:
        return f"it has unsupported attention layers ({', '.join(sorted(layer_types))})"
    cache = BlendedCache(groups, 2, hf.dtype, hf.device)
    step = Step(torch.arange(2, device=hf.device))
    token = _ordinary_token(hf)
    try:
        forward(torch.tensor([token, token]), cache, step)
    except (TypeError, ValueError, AttributeError) as error:
        return f"its forward method does not accept explicit positions ({first_line(error)})"
    if step.layers_seen != len(ropes):
        return "it does not use transformers' attention interface"
    return ""
