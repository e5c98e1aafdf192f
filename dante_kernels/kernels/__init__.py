"""The GPU backend, in Triton: the four operators with the flat arguments of their schemas.

Arguments are already checked (see `dante_kernels.ops`): float32 weights, x float32 or bfloat16, all on one device. Under
TRITON_INTERPRET=1 the same kernels run on CPU tensors. Importing this compiles nothing and needs no GPU.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

from .. import losses
from . import persistent, plan, streamed
from .fused import Layer, Pass, Update, chain, forward

__all__ = ["layer_forward", "layer_gradient", "sngd_epoch_", "sngd_step_"]


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _wanted_plan() -> str:
    """The plan that the environment variable DANTE_GPU_PLAN names: auto, fused or streamed."""
    wanted = os.environ.get("DANTE_GPU_PLAN", "auto")
    if wanted not in ("auto", "fused", "streamed"):
        raise ValueError(f"DANTE_GPU_PLAN: expected auto, fused or streamed, got {wanted!r}")
    return wanted


def _most_programs(tensor: Tensor) -> int:
    """How many programs of a persistent kernel are sure to be on the device at once: one for each multiprocessor.

    The interpreter runs one program after the other, so there it must be one that waits for no other. Where another plan is
    wanted there are none.
    """
    if _wanted_plan() != "auto":
        return 0
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def layer_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: list[float]) -> Tensor:
    """h = phi(x W^T + bias), (rows, n_out) contiguous; a row's bits do not depend on the rows beside it."""
    kind, low, high = activation
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=weight.dtype, device=weight.device)
    if x.shape[0]:
        with _on_device_of(weight):
            forward(x, Layer(weight, bias, int(kind), low, high), out)
    return out


def layer_gradient(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    suffix_weights: list[Tensor],
    suffix_biases: list[Tensor | None],
    activations: list[float],
    loss: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(G, the bias's gradient or an empty tensor, their common Frobenius norm)."""
    layers = chain(weight, bias, suffix_weights, suffix_biases, activations)
    norm = torch.empty((), dtype=weight.dtype, device=weight.device)
    with _on_device_of(weight):
        problem = Pass(layers, x, target, None, x.shape[0], loss)
        problem.gradient(0, x.shape[0])
        problem.update(None, x.shape[0], None, norm, 0)
    return problem.grad, weight.new_empty(0) if problem.grad_bias is None else problem.grad_bias, norm


def sngd_step_(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    suffix_weights: list[Tensor],
    suffix_biases: list[Tensor | None],
    activations: list[float],
    loss: int,
    *update: Any,
) -> tuple[Tensor, Tensor]:
    """One step on all rows of x, in place: (loss before the step, norm), 0-dimensional."""
    losses, norms = sngd_epoch_(
        weight, bias, x, target, None, x.shape[0], suffix_weights, suffix_biases, activations, loss, *update
    )
    return losses[0], norms[0]


def sngd_epoch_(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    order: Tensor | None,
    batch_size: int,
    suffix_weights: list[Tensor],
    suffix_biases: list[Tensor | None],
    activations: list[float],
    loss: int,
    lr: Tensor,
    velocity_weight: Tensor | None = None,
    velocity_bias: Tensor | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor]:
    """A step for each mini-batch of `batch_size` rows, in the given order, in place: (losses, norms)."""
    layers = chain(weight, bias, suffix_weights, suffix_biases, activations)
    rule = Update(lr, velocity_weight, velocity_bias, momentum, nesterov)
    rows = x.shape[0] if order is None else order.shape[0]
    tiles = plan.persistent(
        [layers[0].n_in, *(layer.n_out for layer in layers)], min(batch_size, rows), loss == losses.CROSS_ENTROPY,
        velocity_weight is not None, x.dtype, _most_programs(weight),
    )  # fmt: skip
    with _on_device_of(weight):
        if tiles is not None and 0 < rows < persistent.MOST_STEPS * batch_size:
            return persistent.run(layers, x, target, order, batch_size, loss, rule, tiles)
        large = plan.streams(layers[0].n_out, layers[0].n_in, min(batch_size, rows))
        if _wanted_plan() == "streamed" or (large and _wanted_plan() == "auto"):
            return streamed.run(layers, x, target, order, batch_size, loss, rule)
        return Pass(layers, x, target, order, batch_size, loss).run(rule)
