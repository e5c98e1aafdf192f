"""A layer as operators see it, and a chain of them as the schemas spell it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..activations import Activation, resolve
from . import checks


class Layer(NamedTuple):
    """One layer a = phi(x W^T + bias): weight (n_out, n_in), bias (n_out,) or None, and its activation."""

    weight: Tensor
    bias: Tensor | None
    activation: Activation | str | nn.Module


def flatten(
    suffix: Sequence[Layer | tuple[Tensor, Tensor | None, Activation | str | nn.Module]],
    activation: Activation | str | nn.Module,
) -> tuple[list[Tensor], list[Tensor | None], list[float]]:
    """(suffix weights, suffix biases, three numbers for each activation with the active layer's first)."""
    if not isinstance(suffix, list | tuple):
        raise TypeError(f"suffix: expected a list of layers, empty for the last layer, got {type(suffix).__name__}")
    for i, layer in enumerate(suffix):
        if not isinstance(layer, tuple) or len(layer) != 3:
            raise TypeError(f"suffix[{i}]: expected a Layer or (weight, bias, activation), got {type(layer).__name__}")
        checks.argument_types({f"suffix[{i}] weight": layer[0]}, {f"suffix[{i}] bias": layer[1]}, {}, {})
    numbers = list(resolve(activation).encode())
    for _, _, phi in suffix:
        numbers += resolve(phi).encode()
    return [w for w, _, _ in suffix], [b for _, b, _ in suffix], numbers
