"""`layer_forward`: one layer's forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation, resolve
from . import checks, registration


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: list[float], x_scale: float) -> None:
    checks.layer(weight, bias)
    checks.inputs(x, weight, x_scale)
    Activation.decode(list(activation))


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return weight.new_empty((x.shape[0], weight.shape[0]))


_operator = registration.register(
    "layer_forward",
    f"Tensor x, Tensor weight, Tensor? bias, float[] activation, {registration.SCALE}",
    "Tensor",
    _check,
    _fake,
)


def layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | str | nn.Module,
    *,
    x_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The activations h = phi(x W^T + bias) of one layer.

    Args:
        x: input, (rows, n_in), of the weight's dtype, bfloat16 beside float32 weights, or uint8; any strides; rows
            may be 0.
        weight: (n_out, n_in), float32 or float64; any strides.
        bias: (n_out,) of the weight's dtype, or None.
        activation: an `Activation`, a name (``"leaky_relu"``, ``"sigmoid"``, ...) or a torch activation module.
        x_scale: what uint8 x stands for times: the layer's input is x.to(weight.dtype) * x_scale, rounded once. Above 0,
            and 1 unless x is uint8.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.

    Returns:
        h, (rows, n_out), of the weight's dtype. On the backends cpp and triton a row's result does not depend on the
        number of rows beside it, bit for bit.

    Mutates nothing. No autograd.

    Source: section 2 of the 2020 DANTE paper (a layer as a set of generalized linear models).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> layer_forward(torch.tensor([[1.0, -2.0]]), torch.eye(2), None, "leaky_relu")
    tensor([[ 1.0000, -0.0200]])
    """
    checks.argument_types({"x": x, "weight": weight}, {"bias": bias}, {}, {})
    numbers = resolve(activation).encode()
    with torch.no_grad():
        return _operator(x, weight, bias, numbers, checks.number("x_scale", x_scale), backend=checks.backend_name(backend))
