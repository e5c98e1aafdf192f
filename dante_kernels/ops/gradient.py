"""`layer_gradient`: one layer's gradient through the frozen suffix, for update rules other than SNGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..activations import Activation
from . import checks, registration
from .layer import Layer, flatten


def _fake(weight: Tensor, bias: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape[0]), weight.new_empty(())


_operator = registration.register(
    "layer_gradient",
    f"Tensor weight, Tensor? bias, Tensor x, Tensor target, {registration.PROBLEM}, {registration.SCALE}",
    "(Tensor, Tensor, Tensor)",
    checks.problem,
    _fake,
)


def layer_gradient(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    suffix: Sequence[Layer],
    activation: Activation | str | nn.Module,
    loss: str,
    *,
    x_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The subgradient of the loss with respect to one layer's weight and bias, all later layers frozen.

    Args:
        weight: the active layer's weight, (n_out, n_in), float32 or float64; any strides.
        bias: (n_out,) of the weight's dtype, or None.
        x: the active layer's input, (rows, n_in), of the weight's dtype, bfloat16 beside float32 weights, or uint8; any
            strides.
        target: class indices (rows,) int64, or values (rows, n_last) of the weight's dtype. An index outside
            0..n_last-1 makes the result NaN.
        suffix: the layers after the active one, each (weight, bias, activation); an empty list for the last layer.
        activation: the active layer's activation.
        loss: ``"mse"``, ``"cross_entropy"`` or ``"binary_cross_entropy"``.
        x_scale: what uint8 x stands for times: the layer's input is x.to(weight.dtype) * x_scale, rounded once. Above 0,
            and 1 unless x is uint8.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.

    Returns:
        (grad_weight, grad_bias, norm): of the weight's shape, the bias's shape (None without a bias), and the Frobenius
        norm of both together, 0-dimensional. All on the weight's device and of its dtype.

    Mutates nothing. No autograd.

    Source: the gradient g_t of Algorithm 1 of the 2020 DANTE paper, before it is normalized.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> w = torch.tensor([[1.0, 1.0]])
    >>> layer_gradient(w, None, torch.tensor([[3.0, 4.0]]), torch.tensor([[6.5]]), [], "identity", "mse")
    (tensor([[3., 4.]]), None, tensor(5.))
    """
    checks.argument_types({"weight": weight, "x": x, "target": target}, {"bias": bias}, {}, {})
    with torch.no_grad():
        grad_weight, grad_bias, norm = _operator(
            weight, bias, x, target, *flatten(suffix, activation), losses.code(loss),
            checks.number("x_scale", x_scale), backend=checks.backend_name(backend),
        )  # fmt: skip
    return grad_weight, None if bias is None else grad_bias, norm
