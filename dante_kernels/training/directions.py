"""Directions other than SNGD's inside the alternation: plain SGD, Adam, Adagrad and RMSProp, by torch's own optimizers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

from .. import ops
from ..activations import Activation
from ..ops import Layer
from ..ops.checks import number
from .problem import forward, mean_loss

BY_KERNELS = ("sngd", "nesterov")  # `ops.sngd_epoch_` takes their steps
WITHOUT_MOMENTUM = ("adam", "adagrad", "rmsprop")
NAMES = (*BY_KERNELS, "sgd", *WITHOUT_MOMENTUM)
# What the kernels' directions take where no lr is given. Where all hidden layers are generalized ReLUs, cross-entropies have a
# rate of their own, and MSE that of all layers together, where it is less a layer.
RELATIVE_LR, RELATIVE_LR_CROSS_ENTROPY, RELATIVE_LR_TOGETHER, MOMENTUM = 0.004, 0.005, 0.012, 0.9
WIDE = 100  # units, above which layers are not narrow
# How much a layer may grow then beside one other, from torch's initial weights; beside more it is less, down to the second.
GROWTH = {"generalized_relu": (4.0, 0.0), "sigmoid": (12.0, 4.0), "tanh": (6.0, 2.0)}


def check(direction: str, momentum: float) -> None:
    """Refuse what is no direction, or one with a momentum that does not go with it.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if direction not in NAMES:
        raise ValueError(f"direction: expected one of {', '.join(NAMES)}, got {direction!r}")
    if direction == "nesterov" and momentum == 0:
        raise ValueError("direction: 'nesterov' needs a momentum above 0, got momentum=0; give momentum=0.9, say, beside lr")
    if direction in WITHOUT_MOMENTUM and momentum != 0:
        raise ValueError(f"momentum: expected 0 with direction={direction!r}, got {momentum}")


class Steps(NamedTuple):
    """`fit`'s arguments of these names, settled."""

    lr: Any
    relative_lr: bool
    momentum: float
    direction: str
    max_norm: float


def settled(
    lr: Any,
    relative_lr: bool | None,
    momentum: float | None,
    direction: str | None,
    max_norm: float | None,
    hidden: Sequence[tuple[int, Activation]],
    loss: str,
    classes: bool,
) -> Steps:
    """Where they are not given, what goes together; docs/defaults.md has the reasons.

    `hidden` are widths and activations of the layers before the last one; `classes` says that the target holds class indices.

    Raises:
        ValueError: where lr is missing and cannot be settled.
    """
    if max_norm is None:
        max_norm = usual_max_norm(hidden, loss, classes) if lr is None else math.inf
    if lr is not None:
        direction = "sngd" if direction is None else direction
        return Steps(lr, bool(relative_lr), 0.0 if momentum is None else momentum, direction, max_norm)
    if direction in NAMES and direction not in BY_KERNELS:
        raise ValueError(f"lr: expected a number with direction={direction!r}, got None")
    if relative_lr is not None and not relative_lr:
        raise ValueError("lr: expected a number with relative_lr=False, got None")
    momentum = MOMENTUM if momentum is None else number("momentum", momentum)
    if direction is None:
        direction = "nesterov" if momentum else "sngd"
    lr = usual_lr(hidden, loss)
    if 0 <= momentum < 1:  # steps that add up to as much; others are refused later
        lr *= (1 - momentum) / (1 - MOMENTUM)
    return Steps(lr, True, momentum, direction, max_norm)


def usual_lr(hidden: Sequence[tuple[int, Activation]], loss: str) -> float:
    """`fit`'s lr, relative to the layer's norm, where none is given; arguments as for `settled`."""
    if not hidden or not _by_relus(hidden):
        return RELATIVE_LR
    return min(RELATIVE_LR, RELATIVE_LR_TOGETHER / (len(hidden) + 1)) if loss == "mse" else RELATIVE_LR_CROSS_ENTROPY


def usual_max_norm(hidden: Sequence[tuple[int, Activation]], loss: str, classes: bool) -> float:
    """`fit`'s max_norm where neither it nor lr is given; arguments as for `settled`.

    The norm of a unit of torch's initial weights, 1 / sqrt(3), times a growth that is less the more layers there are, and with
    cross-entropies more where deep nets are narrow. No bound where there is no hidden layer, nor in MSE where values are to be
    met or a hidden layer is no generalized ReLU.
    """
    if not hidden or (loss == "mse" and not (classes and _by_relus(hidden))):
        return math.inf
    layers, growths = len(hidden), [GROWTH[activation.kind] for _, activation in hidden]
    if loss == "mse":
        return math.sqrt(1 / 3) * growths[0][0] ** (1 / layers)
    growth = max(max(beside_one / layers, least) for beside_one, least in growths)
    narrow = max(1.0, WIDE / statistics.geometric_mean(width for width, _ in hidden))
    return math.sqrt(1 / 3) * growth * narrow ** ((layers - 1) / 6)


def _by_relus(hidden: Sequence[tuple[int, Activation]]) -> bool:
    return all(activation.kind == "generalized_relu" for _, activation in hidden)


class Rule:
    """How one layer's weights follow its gradient, and what that keeps from step to step. Settings are torch's defaults.

    torch's optimizers in their functional form, so that what they keep is plain tensors, here and in a checkpoint.

    Args:
        direction: one of `NAMES` that is not one of `BY_KERNELS`.
        momentum: of plain SGD, as torch.optim.SGD has it; 0 with the others.
        parameters: the layer's weight, and its bias where it has one.

    Attributes:
        kept: all that it keeps, zero at first.
        coasts: whether a step whose gradient is zero moves the weights, by the steps before.
    """

    def __init__(self, direction: str, momentum: float, parameters: Sequence[Tensor]) -> None:
        self.direction = direction
        self.momentum = momentum
        self.coasts = direction == "adam" or momentum > 0
        device = parameters[0].device
        # The fused Adagrad came to CUDA later than the others; without it the steps are counted where no one must wait.
        self.fused = direction != "adagrad" or torch._C._dispatch_has_kernel_for_dispatch_key(
            "aten::_fused_adagrad_.tensor_lr", device.type.upper()
        )
        averages = {"sgd": int(momentum > 0), "adam": 2}.get(direction, 1)
        self.averages = [
            [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters] for _ in range(averages)
        ]
        counted_on = device if self.fused else "cpu"
        self.counts = [torch.zeros((), dtype=torch.float32, device=counted_on) for _ in parameters]

    @property
    def kept(self) -> list[Tensor]:
        """Averages like each parameter, and the number of steps."""
        return [*(part for parts in self.averages for part in parts), *self.counts]

    def epoch_(
        self,
        *,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        target: Tensor,
        order: Tensor | None,
        batch_size: int,
        suffix: Sequence[Layer],
        activation: Any,
        loss: str,
        lr: Tensor,
        x_scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """A pass as `ops.sngd_epoch_` makes it, with the same arguments, but in this direction; losses and norms likewise.

        A step is taken whatever its norm, also where that is not finite.
        """
        own = [weight] if bias is None else [weight, bias]
        parameters = [p.contiguous() for p in own]  # fused steps go by memory, not by strides
        layer = Layer(parameters[0], None if bias is None else parameters[1], activation)
        # On CUDA a float32 tensor is what fused steps read without waiting for the device.
        rate = lr.float() if lr.is_cuda else lr.item()
        rows = x.shape[0] if order is None else order.shape[0]
        values, norms = [], []
        for start in range(0, rows, batch_size):
            chosen = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
            inputs, wanted = x[chosen], target[chosen]
            values.append(mean_loss(forward([layer, *suffix], inputs, backend, x_scale), wanted, loss))
            *gradients, norm = ops.layer_gradient(
                layer.weight, layer.bias, inputs, wanted, suffix, activation, loss, x_scale=x_scale, backend=backend
            )
            self._step_(parameters, [g for g in gradients if g is not None], rate)
            norms.append(norm)
        for parameter, stepped in zip(own, parameters, strict=True):
            if stepped is not parameter:
                parameter.copy_(stepped)
        return torch.stack(values), torch.stack(norms)

    def _step_(self, parameters: list[Tensor], gradients: list[Tensor], rate: Any) -> None:
        plain: Any = {"lr": rate, "weight_decay": 0.0, "maximize": False}
        averages: Any = (*self.averages, [], [])
        (first, second), counts = averages[:2], self.counts
        if self.direction == "sgd":
            sgd(parameters, gradients, first, fused=True, momentum=self.momentum, dampening=0.0, nesterov=False, **plain)
        elif self.direction == "adam":
            adam(
                parameters, gradients, first, second, [], counts, fused=True, amsgrad=False, beta1=0.9, beta2=0.999, eps=1e-8,
                **plain,
            )  # fmt: skip
        elif self.direction == "adagrad":
            adagrad(
                parameters, gradients, first, counts, fused=self.fused, foreach=not self.fused, lr_decay=0.0, eps=1e-10,
                **plain,
            )  # fmt: skip
        else:
            rmsprop(
                parameters, gradients, first, [], [], counts, foreach=True, capturable=parameters[0].is_cuda, alpha=0.99,
                eps=1e-8, momentum=0.0, centered=False, **plain,
            )  # fmt: skip
