"""The specification: every operator in plain torch, for any floating dtype; in float64 it is the oracle.

The other backends are compared with this one. It is written to be read, not to be fast, and is not edited to make a
kernel pass. Shapes: x (rows, n_in) is the input of the active layer, `weight` (n_out, n_in), `bias` (n_out,) or None;
`target` is class indices (rows,) int64 or values (rows, n_last); `suffix` is a sequence of (weight, bias, activation),
the frozen layers after the active one; `loss` is a code of `dante_kernels.losses`. x may be of a narrower dtype than
the weight, or uint8 that stands for x * x_scale; everything is computed in the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import losses
from ..activations import Activation

Suffix = Sequence[tuple[Tensor, Tensor | None, Activation]]


def widened(x: Tensor, dtype: torch.dtype, x_scale: float) -> Tensor:
    """x as values of `dtype`; uint8 times x_scale, which is rounded to `dtype`, as is the product."""
    return x.to(dtype) * x_scale if x.dtype == torch.uint8 else x.to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = x @ weight.t()
    return z if bias is None else z + bias


def layer_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, x_scale: float = 1.0) -> Tensor:
    """h = phi(x W^T + bias), of shape (rows, n_out)."""
    return activation.phi(_linear(widened(x, weight.dtype, x_scale), weight, bias))


def _loss_and_gradient(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    suffix: Suffix,
    activation: Activation,
    loss: int,
    x_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss J, G = D^T X and the column sums of D, where D = dJ/dZ of the active layer, through the frozen suffix."""
    h = x = widened(x, weight.dtype, x_scale)
    slopes = []
    for w, b, phi in ((weight, bias, activation), *suffix):
        z = _linear(h, w, b)
        h = phi.phi(z)
        slopes.append(phi.g(z))
    values = losses.as_values(target, h.shape[1], h.dtype)
    d = losses.gradient(loss, h, values) * slopes.pop()
    for (w, _, _), slope in zip(reversed(suffix), reversed(slopes), strict=True):
        d = (d @ w) * slope
    return losses.value(loss, h, values), d.t() @ x, d.sum(dim=0)


def _frobenius_norm(grad_weight: Tensor, grad_bias: Tensor | None) -> Tensor:
    squares = grad_weight.square().sum()
    return (squares if grad_bias is None else squares + grad_bias.square().sum()).sqrt()


def layer_gradient(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    suffix: Suffix,
    activation: Activation,
    loss: int,
    x_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_weight, grad_bias, norm): G, the bias's gradient (empty without a bias) and the norm of both together."""
    _, grad_weight, grad_bias = _loss_and_gradient(weight, bias, x, target, suffix, activation, loss, x_scale)
    if bias is None:
        return grad_weight, grad_bias[:0], _frobenius_norm(grad_weight, None)
    return grad_weight, grad_bias, _frobenius_norm(grad_weight, grad_bias)


def sngd_step_(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    suffix: Suffix,
    activation: Activation,
    loss: int,
    lr: Tensor,
    velocity_weight: Tensor | None,
    velocity_bias: Tensor | None,
    momentum: float,
    nesterov: bool,
    x_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One mini-batch of Algorithm 1, in place: W <- W - lr G / s; with momentum V <- mu V + G / s, W <- W - lr V.

    s is the Frobenius norm of [G, bias gradient]. Where s is zero or not finite, nothing changes. Returns (loss, norm).
    """
    value, grad_weight, grad_bias = _loss_and_gradient(weight, bias, x, target, suffix, activation, loss, x_scale)
    norm = _frobenius_norm(grad_weight, None if bias is None else grad_bias)
    usable = torch.isfinite(norm) & (norm > 0)
    for parameter, grad, velocity in ((weight, grad_weight, velocity_weight), (bias, grad_bias, velocity_bias)):
        if parameter is None:
            continue
        direction = grad / norm
        if velocity is not None:
            new_velocity = momentum * velocity + direction
            direction = direction + momentum * new_velocity if nesterov else new_velocity
            velocity.copy_(torch.where(usable, new_velocity, velocity))
        parameter.copy_(torch.where(usable, parameter - lr * direction, parameter))
    return value, norm


def sngd_epoch_(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    order: Tensor | None,
    batch_size: int,
    suffix: Suffix,
    activation: Activation,
    loss: int,
    lr: Tensor,
    velocity_weight: Tensor | None,
    velocity_bias: Tensor | None,
    momentum: float,
    nesterov: bool,
    x_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`sngd_step_` on each mini-batch in turn, rows in the given order; returns the losses and norms, one per step."""
    rows = x.shape[0] if order is None else order.shape[0]
    results = []
    for start in range(0, rows, batch_size):
        chosen = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
        results.append(
            sngd_step_(
                weight, bias, x[chosen], target[chosen], suffix, activation, loss, lr,
                velocity_weight, velocity_bias, momentum, nesterov, x_scale,
            )
        )  # fmt: skip
    values, norms = zip(*results, strict=True)
    return torch.stack(values), torch.stack(norms)
