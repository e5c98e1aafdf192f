"""The bound on the layers' norms after a round."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import Layer


def parts(layer: Layer) -> list[Tensor]:
    """The layer's weight, and its bias where it has one."""
    return [part for part in (layer.weight, layer.bias) if part is not None]


def norm(layer: Layer) -> Tensor:
    """The Frobenius norm of weight and bias together, in float64, which no float32 weight overflows."""
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts(layer)]).norm()


def bound(layer: Layer, max_norm: float) -> Tensor:
    """The largest norm that a layer may have: `fit`'s max_norm for each of its units together, or what it has now."""
    return norm(layer).clamp(min=max_norm * math.sqrt(layer.weight.shape[0]))


def scale_back(layers: Sequence[Layer], bounds: Sequence[Tensor]) -> None:
    """Scale those that are longer than their bounds back to these, in place. One without a finite norm is left alone."""
    scaled, factors = list[Tensor](), list[Tensor]()
    for layer, most in zip(layers, bounds, strict=True):
        length = norm(layer)
        factor = torch.where(torch.isfinite(length) & (length > most), most / length, 1.0)
        scaled += parts(layer)
        factors += [factor] * len(parts(layer))
    torch._foreach_mul_(scaled, factors)  # in one call, which no Ctrl-C comes into
