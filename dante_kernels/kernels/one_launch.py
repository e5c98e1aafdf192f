"""What one launch of the persistent kernel is given: models side by side, each a pass or blocks of two layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import barrier, launcher
from .fused import Call, Layer, stride_of
from .persistent import persistent
from .plan import Persistent


class Model(NamedTuple):
    """One model's part of a launch: the tensors that the kernel reads and writes, in its order."""

    weight: Tensor
    bias: Tensor | None
    velocity_weight: Tensor | None
    velocity_bias: Tensor | None
    x: Tensor
    target: Tensor
    order: Tensor | None
    next_weight: Tensor | None
    next_bias: Tensor | None
    next_velocity_weight: Tensor | None
    next_velocity_bias: Tensor | None
    lr: Tensor
    last_weight: Tensor | None
    last_bias: Tensor | None


class Blocks(NamedTuple):
    """Blocks of both layers: `schedule` (steps, 4) as the kernel reads it, and what the kernel's names say in capitals."""

    schedule: Tensor
    relative: bool
    reset: bool
    parallel: bool


def model(call: Call) -> Model:
    """The tensors of a call."""
    (next_weight, last_weight), (next_bias, last_bias) = (
        [*suffix, None, None][:2] for suffix in (call.suffix_weights, call.suffix_biases)
    )
    return Model(
        call.weight, call.bias, call.velocity_weight, call.velocity_bias, call.x, call.target, call.order,
        next_weight, next_bias, None, None, call.lr, last_weight, last_bias,
    )  # fmt: skip


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1) if tensor.dim() > 1 else 0)


def run(
    models: list[Model],
    layers: list[Layer],
    batch_size: int,
    loss: int,
    momentum: float,
    nesterov: bool,
    x_scale: float,
    tiles: Persistent,
    blocks: Blocks | None = None,
    kernel: Any = persistent,
) -> list[tuple[Tensor, Tensor]]:
    """All mini-batches in one launch, in place, for models alike in everything but their tensors' addresses.

    `layers` are the first model's active layer and those after it, two at most: their activations and shapes are those of all.
    Returns (losses, norms) of each model, one of each a step. Without `blocks` the steps are those of a pass.
    """
    one, active, (following, last) = models[0], layers[0], [*layers[1:], None, None][:2]
    rows = one.x.shape[0] if one.order is None else one.order.shape[0]
    batch = min(batch_size, rows)
    steps = -(-rows // batch) if blocks is None else blocks.schedule.shape[0]
    programs = tiles.programs
    padded = -(-batch // tiles.rows) * tiles.rows
    one_tile = batch <= tiles.rows and last is None and tiles.parts == 1

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=one.x.device)

    results = [(scratch(steps), scratch(steps)) for _ in models]
    exchanges_next = following is not None and not (one_tile and tiles.split_out == 1)
    kept = z = next_z = sums = counter = offsets = None
    if tiles.parts > 1 and one.velocity_weight is not None:
        kept = scratch(len(models), programs, tiles.slices * tiles.units * tiles.inputs)
    if tiles.one_barrier:
        z = scratch(len(models), 2, programs, padded, tiles.units + padded)
    elif tiles.split_in > 1 or not one_tile:
        z = scratch(len(models), tiles.split_out, tiles.split_in + 1, padded, tiles.units)
    if last is not None:
        next_z = scratch(len(models), tiles.split_out + 1, padded, tiles.slices * tiles.next_units)
    elif exchanges_next:
        next_z = scratch(len(models), tiles.split_out, padded, tiles.next_units)
    if programs > 1:
        sums = scratch(len(models), 5, programs)
        counter = barrier.counters(one.x.device, len(models))
    if len(models) > 1:
        every = [[*model, *result] for model, result in zip(models, results, strict=True)]
        offsets = torch.tensor(
            [[_elements_apart(first, other) for first, other in zip(every[0], row, strict=True)] for row in every],
            dtype=torch.int64,
        ).to(one.x.device, non_blocking=True)
    launcher.launch(
        kernel, (len(models) * programs,),
        *one, *results[0], offsets, None if blocks is None else blocks.schedule, kept, z, next_z, sums, counter,
        rows, batch, steps, one.x.shape[0], active.n_in, active.n_out, following.n_out if following else 0,
        last.n_out if last else 0,
        _share(active.n_in, tiles.split_in, tiles.slices * tiles.inputs), _share(active.n_out, tiles.split_out, tiles.units),
        *_strides(one.weight), stride_of(one.bias), *_strides(one.velocity_weight), stride_of(one.velocity_bias),
        *_strides(one.x), stride_of(one.order), *_strides(one.target), *_strides(one.next_weight), stride_of(one.next_bias),
        *_strides(one.next_velocity_weight), stride_of(one.next_velocity_bias),
        *_strides(one.last_weight), stride_of(one.last_bias),
        active.low, active.high, following.low if following else 0.0, following.high if following else 0.0,
        last.low if last else 0.0, last.high if last else 0.0, momentum, x_scale,
        KIND=active.kind, NEXT_KIND=following.kind if following else 0, LAST_KIND=last.kind if last else 0, LOSS=loss,
        CLASSES=one.target.dim() == 1, NESTEROV=nesterov, RELATIVE=blocks is not None and blocks.relative,
        RESET=blocks is not None and blocks.reset, PARALLEL=blocks is not None and blocks.parallel,
        PRECISION=tiles.precision, SPLIT_OUT=tiles.split_out, SPLIT_IN=tiles.split_in, SLICES=tiles.slices, PARTS=tiles.parts,
        ONE_TILE=one_tile, ONE_BARRIER=tiles.one_barrier,
        BLOCK_B=tiles.rows, BLOCK_OUT=tiles.units, BLOCK_IN=tiles.inputs, BLOCK_NEXT=tiles.next_units,
        BLOCK_LAST=tiles.last_units,
        BLOCK_PROGRAMS=triton.next_power_of_2(programs),
        num_warps=tiles.num_warps, num_stages=1, persistent=True,
    )  # fmt: skip
    return results


def _share(size: int, groups: int, block: int) -> int:
    """How much of `size` each group but the last takes: even parts, in sixteens where that fits, for aligned loads."""
    even = -(-size // groups)
    return min(-(-even // 16) * 16, block)


def _elements_apart(first: Tensor | None, other: Tensor | None) -> int:
    if first is None or other is None:
        return 0
    return (other.data_ptr() - first.data_ptr()) // first.element_size()
