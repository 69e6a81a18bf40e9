"""What a model's KV cache looks like: found by running single tokens, not by a list of architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from kvmem.attention import Step
from kvmem.cache import BlendedCache, LayerGroup
from kvmem.errors import ModelError, first_line
from kvmem.rope import Rope

if TYPE_CHECKING:
    from kvmem.model import LanguageModel


@dataclass(frozen=True)
class Anatomy:
    """What was found out about a model's cache by running it on single tokens.

    groups: the layers that keep keys and values, by shape, window and rotation. recurrent: the other layers, which
        keep a state instead of a row per token.
    blendable: whether keys can be moved to other positions; if not, `reason` says why.
    """

    groups: tuple[LayerGroup, ...]
    blendable: bool
    reason: str
    recurrent: tuple[int, ...] = ()


def examine(model: LanguageModel) -> Anatomy:
    hf, window, token = model.hf, model.window, _ordinary_token(model)

    def keys_at(position: int) -> tuple[list[Any], dict[int, Tensor]]:
        cache = DynamicCache(config=hf.config.get_text_config())
        ids = torch.tensor([[token]], device=model.device)
        with torch.no_grad():
            hf.base_model(
                input_ids=ids,
                position_ids=torch.tensor([[position]], device=model.device),
                past_key_values=cache,
                use_cache=True,
            )
        layers: list[Any] = cache.layers
        _refuse_unknown(model, layers)
        keys = {i: layer.keys[0, :, 0].float().cpu() for i, layer in enumerate(layers) if not _is_recurrent(layer)}
        return layers, keys

    frequencies = _frequencies(hf)
    layers, origin = keys_at(0)
    positions = (1, 5, 97, window - 1)
    moved = [(p, keys_at(p)[1]) for p in positions if 0 < p < window]
    keys_at(0)  # a length-dependent RoPE goes back to its short form
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
        _refuse_if_pieces_differ(model)
    reason = _obstacle(model, list(ropes.values()), built, recurrent)
    return Anatomy(built, not reason, reason or "keys follow rotary position embedding", recurrent)


def _is_recurrent(layer: Any) -> bool:
    return type(layer) is LinearAttentionLayer and layer.number_of_states == 1


def _refuse_unknown(model: LanguageModel, layers: list[Any]) -> None:
    """Raise ModelError when the cache is made of more than keys and values and recurrent states, or has no keys."""
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    strange = sorted(
        {type(layer).__name__ for layer in layers if type(layer) not in known and not _is_recurrent(layer)}
    )
    if strange:
        raise ModelError(
            f"{model.name!r} keeps what cannot be stored yet ({', '.join(strange)}). "
            "Use a model whose layers are attention, sliding-window attention or plain recurrent layers."
        )
    if not layers or all(_is_recurrent(layer) for layer in layers):
        raise ModelError(
            f"{model.name!r} keeps no keys and values by token, so there is no KV cache to reuse. "
            "Use a model with attention layers."
        )


def length_dependent_rope(hf: Any) -> bool:
    """Whether the frequencies of the rotary embedding depend on the prompt's length (dynamic NTK, LongRoPE)."""
    parameters = getattr(hf.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _ordinary_token(model: LanguageModel) -> int:
    """A token that is neither padding nor control: embeddings of padding may be zero, and tell nothing."""
    return int(model.hf.config.get_text_config().vocab_size) // 3


_UNKNOWN = Rope(torch.empty(0), "half")


def _frequencies(hf: Any) -> list[Rope]:
    """Every rotation the model might use, from the inverse frequencies its modules hold."""
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
    """The rotation that turns the key at position 0 into the keys at all other positions.

    origin: float32 [kv heads, dim]. None is the identity (no position in the keys).
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
            # float32 angles lose precision as they grow; bfloat16 keys are exact to about 1%.
            allowed = 0.03 + 1e-6 * position
            worst = max(worst, float((turned - keys).abs().max()) / scale / allowed)
        if worst < least:
            best, least = rope, worst
    return best if least <= 1.0 else _UNKNOWN


@torch.no_grad()
def _refuse_if_pieces_differ(model: LanguageModel) -> None:
    """Raise ModelError when reading a prompt in pieces is not reading it at once: some implementations begin a
    piece of several tokens without the state before it."""
    ids = torch.arange(64, device=model.device)[None] % 7 + _ordinary_token(model)
    whole = model.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float()
    cache = DynamicCache(config=model.hf.config.get_text_config())
    for piece in (ids[:, :40], ids[:, 40:]):
        state = model.hf.base_model(input_ids=piece, past_key_values=cache, use_cache=True)
    difference = float((state.last_hidden_state[0, -1].float() - whole).norm() / whole.norm())
    if difference > (1e-3 if model.dtype == torch.float32 else 0.1):
        raise ModelError(
            f"{model.name!r} cannot be continued exactly: read in two pieces, its output is {difference:.0%} away "
            "from that of one reading. Use another model, or another version of transformers."
        )


def _obstacle(
    model: LanguageModel, ropes: list[Rope | None], groups: tuple[LayerGroup, ...], recurrent: tuple[int, ...]
) -> str:
    """Why the model's caches cannot be moved and repaired; empty if they can."""
    if recurrent:
        return "it has recurrent layers, whose state is of all tokens before it and cannot be taken apart"
    if length_dependent_rope(model.hf):
        return "its rotary position embedding changes with the length of the prompt"
    if any(rope is _UNKNOWN for rope in ropes):
        return "its keys do not follow one rotary position embedding over the whole window"
    layer_types = set(getattr(model.hf.config.get_text_config(), "layer_types", None) or ())
    if not layer_types <= {"full_attention", "sliding_attention"}:
        return f"its layers attend in ways that are not known here ({', '.join(sorted(layer_types))})"
    cache = BlendedCache(groups, 2, model.dtype, model.device)
    step = Step(torch.arange(2, device=model.device))
    token = _ordinary_token(model)
    try:
        model.forward(torch.tensor([token, token]), cache, step)
    except (TypeError, ValueError, AttributeError) as error:
        return f"its forward does not take explicit positions ({first_line(error)})"
    if step.layers_seen != len(ropes):
        return "its attention does not go through transformers' attention interface"
    return ""
