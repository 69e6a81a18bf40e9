"""Packing: the weights of linear layers in the layout that the CPU's matrix kernels read.

Plain weights are brought into that layout by every call anew, which counts where a call has few rows: those of a
question, or of one decoded token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# The rows that the layout is made for; it holds for any number.
_ROWS = 64


class PackedLinear(nn.Linear):
    """A linear layer whose `weight` is an opaque oneDNN tensor of the same shape and dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in features] -> [..., out features]."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return found


def can_pack() -> bool:
    """Whether this torch and this processor have packed bfloat16 products."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.no_grad()
def pack(module: nn.Module) -> int:
    """Pack every bfloat16 linear layer in `module` on the CPU, in place; how many there were.

    Weights that are shared (tied embeddings) and layers of other classes stay as they are. Nothing is held twice.
    A packed layer computes the same product.
    """
    owners: dict[int, int] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    packed = 0
    for layer in module.modules():
        if type(layer) is nn.Linear and owners[id(layer.weight)] == 1 and _is_packable(layer.weight):
            weight: Any = torch.ops.mkldnn._reorder_linear_weight(layer.weight, _ROWS)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.__class__ = PackedLinear
            packed += 1
    return packed


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.layout == torch.strided
