"""The GPU backend, in Triton: the four operators with the flat arguments of their schemas.

Arguments are already checked (see `dante_kernels.ops`): float32 weights, x float32, bfloat16 or uint8, all on one device.
Under TRITON_INTERPRET=1 the same kernels run on CPU tensors. Importing this compiles nothing and needs no GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import branches, fused, graphs, library, one_launch, plan, streamed
from .fused import Call, Layer, Pass, chain, forward

__all__ = [
    "blocks_tiles",
    "layer_forward",
    "layer_gradient",
    "overlapping",
    "recorded",
    "sngd_blocks_",
    "sngd_epoch_",
    "sngd_epochs_",
    "sngd_step_",
    "waiting_programs",
]

T = TypeVar("T")


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _most_programs(tensor: Tensor) -> int:
    """How many programs of a persistent kernel are sure to be on the device at once: one for each multiprocessor.

    The interpreter runs one program after the other, so there it must be one that waits for no other.
    """
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def recorded(
    function: Callable[..., tuple[Tensor, ...]], arguments: tuple[Any, ...], changing: tuple[Tensor | None, ...], launches: int
) -> tuple[Tensor, ...]:
    """`graphs.run` on the device of what changes, which need not be the current one."""
    with _on_device_of(next(tensor for tensor in changing if tensor is not None)):
        return graphs.run(function, arguments, changing, launches)


def overlapping(tensor: Tensor, jobs: Sequence[Callable[[], T]], waiting: int) -> list[T]:
    """`branches.run` on a tensor's device, which need not be the current one.

    In a job's launch up to `waiting` programs wait for each other, so those of all jobs that overlap must find room at once.
    """
    at_once = _most_programs(tensor) // waiting if waiting else branches.MOST
    with _on_device_of(tensor):
        return branches.run(tensor, jobs, at_once)


def waiting_programs(weights: list[Tensor], bias: bool, rows: int, x_dtype: torch.dtype, loss: int, momentum: bool) -> int:
    """How many programs wait for each other in a pass on the first of these layers, in mini-batches of so many rows."""
    tiles = _choice(weights, bias, rows, x_dtype, loss, momentum).tiles
    return tiles.programs if tiles else 0


def _choice(weights: list[Tensor], bias: bool, rows: int, x_dtype: torch.dtype, loss: int, momentum: bool) -> plan.Choice:
    widths = (weights[0].shape[1], *(weight.shape[0] for weight in weights))
    shape = plan.Shape(widths, rows, loss, bias, momentum, x_dtype, torch.get_float32_matmul_precision())
    return plan.choose(shape, plan.device_of(weights[0].device), _most_programs(weights[0]), plan.wanted_plan())


def layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: list[float],
    x_scale: float = 1.0,
    order: Tensor | None = None,
) -> Tensor:
    """h = phi(x W^T + bias) of the rows in `order`, or all, contiguous; a row's bits do not depend on the rows beside it."""
    kind, low, high = activation
    rows = x.shape[0] if order is None else order.shape[0]
    out = torch.empty((rows, weight.shape[0]), dtype=weight.dtype, device=weight.device)
    if rows:
        with _on_device_of(weight):
            forward(x, Layer(weight, bias, int(kind), low, high), out, x_scale, order)
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
    x_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(G, the bias's gradient or an empty tensor, their common Frobenius norm)."""
    layers = chain(weight, bias, suffix_weights, suffix_biases, activations)
    norm = torch.empty((), dtype=weight.dtype, device=weight.device)
    with _on_device_of(weight):
        problem = Pass(layers, x, target, None, x.shape[0], loss, x_scale)
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


def sngd_epoch_(*arguments: Any) -> tuple[Tensor, Tensor]:
    """A step for each mini-batch of `batch_size` rows, in the given order, in place: (losses, norms). See `Call`."""
    return _side_by_side([Call(*arguments)])[0]


def sngd_epochs_(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, Tensor]]:
    """`sngd_epoch_` for models side by side: calls alike in everything but their tensors' addresses and values.

    In one launch where the persistent plan serves, or as few as there is room for on the device; else each in launches of its
    own, which overlap. Each has the bits that it would have alone.
    """
    return _side_by_side([Call(*call) for call in calls])


def _side_by_side(group: list[Call]) -> list[tuple[Tensor, Tensor]]:
    one = group[0]
    weights, rows = [layer.weight for layer in one.layers], min(one.batch_size, one.rows)
    choice = _choice(weights, one.bias is not None, rows, one.x.dtype, one.loss, one.velocity_weight is not None)
    with _on_device_of(one.weight):
        if choice.tiles is None:
            launches = choice.launches * -(-one.rows // one.batch_size)
            run = {"streamed": streamed.run, "fused": fused.run, "library": library.run}[choice.plan]
            jobs = [functools.partial(recorded, run, tuple(call), (call.order, call.lr), launches) for call in group]
            return [(losses, norms) for losses, norms in overlapping(one.weight, jobs, 0)]
        at_once = choice.tiles.at_once(_most_programs(one.weight))
        if one.weight.is_cuda and torch.cuda.is_current_stream_capturing():
            at_once = 1  # where models lie is copied from the host, from memory that a replay would not find again
        results: list[tuple[Tensor, Tensor]] = []
        for first in range(0, len(group), at_once):
            models = [one_launch.model(call) for call in group[first : first + at_once]]
            results += one_launch.run(
                models, one.layers, one.batch_size, one.loss, one.momentum, one.nesterov, one.x_scale, choice.tiles
            )
    return results


def blocks_tiles(widths: list[int], batch_size: int, loss: int, momentum: bool, steps: float, x: Tensor) -> Any:
    """The tiles with which `sngd_blocks_` runs blocks of about `steps` steps in one launch, or None where it should not."""
    wanted = plan.wanted_plan()
    if wanted not in ("auto", "persistent"):
        return None
    precision = torch.get_float32_matmul_precision()
    shape = plan.Shape(tuple(widths), batch_size, loss, momentum=momentum, x_dtype=x.dtype, precision=precision)
    return plan.blocks(shape, steps, _most_programs(x), plan.device_of(x.device), wanted)


def sngd_blocks_(calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, Tensor]]:
    """Blocks of two layers in one launch, in place: (losses, norms) of each model, one of each a step.

    Of `calls`, alike in everything but their tensors' addresses and values, as many share a launch as there is room for. Each
    is (weights, biases, x, target, order, schedule, batch_size, activations, loss, lr, velocities of weights and of biases,
    momentum, nesterov, x_scale, relative, reset, cycle, tiles): `schedule` (steps, 4), equal for all, holds each step's first
    position in `order`, its number of rows (at most `batch_size`), its active layer and its block; `lr` (blocks,) the
    blocks' rates. Where `cycle` is not 0, blocks are in parallel, and of the two of a cycle the last layer's must come first.
    The rest is as for `sngd_epoch_`, of both layers.
    """
    weights, biases, _, _, _, schedule, batch_size, activations, loss, *_ = calls[0]
    momentum, nesterov, x_scale, relative, reset, cycle, tiles = calls[0][-7:]
    device, at_once = weights[0].device, max(1, tiles.at_once(_most_programs(weights[0])))
    layers = chain(weights[0], biases[0], weights[1:], biases[1:], activations)
    blocks = one_launch.Blocks(schedule.to(device, non_blocking=True), relative, reset, cycle > 0)
    models = [
        one_launch.Model(w[0], b[0], v[0], vb[0], x, target, order, w[1], b[1], v[1], vb[1], lr, None, None)
        for w, b, x, target, order, _, _, _, _, lr, v, vb, *_ in calls
    ]
    results: list[tuple[Tensor, Tensor]] = []
    with _on_device_of(weights[0]):
        for first in range(0, len(models), at_once):
            some = models[first : first + at_once]
            results += one_launch.run(some, layers, batch_size, loss, momentum, nesterov, x_scale, tiles, blocks)
    return results
