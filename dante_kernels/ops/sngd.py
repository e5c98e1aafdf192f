"""`sngd_step_` and `sngd_epoch_`: Stochastic Normalized Gradient Descent on one layer, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..activations import Activation
from . import checks, registration
from .layer import Layer, flatten


def _check_step(*args: Any) -> None:
    problem, update, scale = args[:8], args[8:-1], args[-1:]
    checks.problem(*problem, *scale)
    checks.update(*problem[:2], *update)


def check_epoch(*args: Any) -> None:
    """What the operator checks of its arguments, which come in the order of its schema."""
    layer_and_data, (order, batch_size), rest = args[:4], args[4:6], args[6:]
    _check_step(*layer_and_data, *rest)
    checks.batches(order, batch_size, layer_and_data[2])


def _fake_step(weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return weight.new_empty(()), weight.new_empty(())


def _fake_epoch(
    weight: Tensor, bias: Tensor | None, x: Tensor, target: Tensor, order: Tensor | None, batch_size: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if order is None else order.shape[0]
    steps = (rows + batch_size - 1) // batch_size
    return weight.new_empty(steps), weight.new_empty(steps)


_DATA = "Tensor(a!) weight, Tensor(b!)? bias, Tensor x, Tensor target"
_step = registration.register(
    "sngd_step_",
    f"{_DATA}, {registration.PROBLEM}, {registration.UPDATE}, {registration.SCALE}",
    "(Tensor, Tensor)",
    _check_step,
    _fake_step,
)
epoch = registration.register(
    "sngd_epoch_",
    f"{_DATA}, Tensor? order, int batch_size, {registration.PROBLEM}, {registration.UPDATE}, {registration.SCALE}",
    "(Tensor, Tensor)",
    check_epoch,
    _fake_epoch,
)


def _update(
    lr: float | Tensor,
    weight: Tensor,
    velocity_weight: Tensor | None,
    velocity_bias: Tensor | None,
    momentum: float,
    nesterov: bool,
) -> tuple[Any, ...]:
    """The schema's arguments of the update, with lr as a tensor on the weight's device."""
    checks.argument_types({}, {"velocity_weight": velocity_weight, "velocity_bias": velocity_bias}, {"momentum": momentum}, {})
    if not isinstance(lr, Tensor):
        lr = torch.full((), checks.finite("lr", lr), dtype=weight.dtype, device=weight.device)
    return lr, velocity_weight, velocity_bias, momentum, bool(nesterov)


def epoch_arguments(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    order: Tensor | None,
    batch_size: int,
    suffix: Sequence[Layer],
    activation: Activation | str | nn.Module,
    loss: str,
    lr: float | Tensor,
    velocity_weight: Tensor | None = None,
    velocity_bias: Tensor | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    x_scale: float = 1.0,
) -> tuple[Any, ...]:
    """The arguments of `sngd_epoch_` in the order of the schema, without the backend."""
    tensors = {"weight": weight, "x": x, "target": target}
    checks.argument_types(tensors, {"bias": bias, "order": order}, {}, {"batch_size": batch_size})
    update = _update(lr, weight, velocity_weight, velocity_bias, momentum, nesterov)
    problem = (weight, bias, x, target, order, batch_size, *flatten(suffix, activation), losses.code(loss))
    return *problem, *update, checks.number("x_scale", x_scale)


def sngd_step_(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    suffix: Sequence[Layer],
    activation: Activation | str | nn.Module,
    loss: str,
    lr: float | Tensor,
    *,
    velocity_weight: Tensor | None = None,
    velocity_bias: Tensor | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    x_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One mini-batch of Stochastic Normalized Gradient Descent on one layer, in place, all later layers frozen.

    With G the loss's subgradient with respect to [weight, bias] and s its Frobenius norm, one norm for both:
    W <- W - lr G / s; with momentum V <- mu V + G / s and W <- W - lr V, or with Nesterov's
    W <- W - lr (G / s + mu V).

    Args:
        weight: the active layer's weight, (n_out, n_in), float32 or float64; any strides without overlap. **Mutated.**
        bias: (n_out,) of the weight's dtype, or None. **Mutated.**
        x: the active layer's input, (rows, n_in), of the weight's dtype, bfloat16 beside float32 weights, or uint8; any
            strides.
        target: class indices (rows,) int64, or values (rows, n_last) of the weight's dtype. An index outside
            0..n_last-1 makes loss and norm NaN.
        suffix: the layers after the active one, each (weight, bias, activation); empty for the last layer.
        activation: the active layer's activation: an `Activation`, a name or a torch module.
        loss: ``"mse"``, ``"cross_entropy"`` or ``"binary_cross_entropy"``.
        lr: the step's length in weight space: a number, or a 0-dimensional tensor on the weight's device.
        velocity_weight, velocity_bias: the momentum's velocity, shaped as weight and bias; needed where momentum > 0.
            **Mutated.**
        momentum: mu, from 0 to below 1.
        nesterov: Nesterov's form, as in torch.optim.SGD.
        x_scale: what uint8 x stands for times: the layer's input is x.to(weight.dtype) * x_scale, rounded once. Above 0,
            and 1 unless x is uint8.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.

    Returns:
        (loss, norm), each 0-dimensional, on the weight's device and of its dtype: the loss before the step, and s.
        Where s is zero or not finite, nothing was changed.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. Nothing is changed then.

    Source: Algorithm 1 of the 2020 DANTE paper.

    >>> w = torch.tensor([[1.0, 1.0]])
    >>> loss, norm = sngd_step_(w, None, torch.tensor([[3.0, 4.0]]), torch.tensor([[6.5]]), [], "identity", "mse", 0.5)
    >>> w, float(loss), float(norm)
    (tensor([[0.7000, 0.6000]]), 0.25, 5.0)
    """
    checks.argument_types({"weight": weight, "x": x, "target": target}, {"bias": bias}, {}, {})
    return _step(
        weight, bias, x, target, *flatten(suffix, activation), losses.code(loss),
        *_update(lr, weight, velocity_weight, velocity_bias, momentum, nesterov), checks.number("x_scale", x_scale),
        backend=checks.backend_name(backend),
    )  # fmt: skip


def sngd_epoch_(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    order: Tensor | None,
    batch_size: int,
    suffix: Sequence[Layer],
    activation: Activation | str | nn.Module,
    loss: str,
    lr: float | Tensor,
    *,
    velocity_weight: Tensor | None = None,
    velocity_bias: Tensor | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    x_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A whole pass of `sngd_step_` over mini-batches of x, in one call, without waiting for the device.

    Equal, bit for bit, to calling `sngd_step_` on x[order[i : i + batch_size]] for i = 0, batch_size, ...; the last
    batch may be shorter (on a GPU a call with so few rows may get another plan, and so equal this step up to rounding only).
    Arguments are those of `sngd_step_`, weight, bias and velocities **mutated** likewise, and:

    Args:
        order: (n,) int64, the row numbers of x and target in the order in which they are visited, repeats allowed;
            None visits all rows as they lie. Rows are gathered by the kernels, not copied first.
        batch_size: rows in a mini-batch, at least 1.

    Returns:
        (losses, norms), each of shape (steps,) with steps = ceil(n / batch_size), on the weight's device.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. Nothing is changed then. A row
        number out of range is an error on the CPU; by triton on a GPU its step's loss and norm are NaN and the step is
        skipped; by the reference there it is an assertion on the device, which ends the process's use of it.

    Source: Algorithm 1 of the 2020 DANTE paper, inside Algorithm 2.
    """
    with torch.no_grad():
        arguments = epoch_arguments(
            weight, bias, x, target, order, batch_size, suffix, activation, loss, lr, velocity_weight, velocity_bias, momentum,
            nesterov, x_scale,
        )  # fmt: skip
        return epoch(*arguments, backend=checks.backend_name(backend))
