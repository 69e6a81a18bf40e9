"""Pack the weights of linear layers into the layout that the CPU's matrix kernels use.

Without packing, every call converts the weights again, which is expensive for calls with few rows: a question or a
single decoded token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# The number of rows that the layout is optimised for; it works for any number.
_ROWS = 64


class PackedLinear(nn.Linear):
    """A linear layer whose `weight` is an opaque oneDNN tensor of the same shape and dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in features] -> [..., out features]."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return found


def can_pack() -> bool:
    """Whether this torch build and this CPU support packed bfloat16 matrix products."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return has_fast_products(torch.bfloat16) and all(hasattr(torch.ops.mkldnn, name) for name in names)


def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for matrix products in `dtype`.

    Without them, a 16-bit product is several times slower than the same product in float32.
    """
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in names:
        return True
    supported = getattr(torch.ops.mkldnn, names[dtype], None)
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and supported is not None
        and bool(supported())
    )


@torch.no_grad()
def pack(module: nn.Module) -> int:
    """Pack every bfloat16 linear layer in `module` that is on the CPU, in place; returns the number of packed layers.

    Shared weights (tied embeddings) and other layer types are left unchanged. No weight is kept twice. A packed layer
    computes the same product.
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
