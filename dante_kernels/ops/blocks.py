"""Blocks of a one-hidden-layer network in one launch, where the backend has a kernel for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import losses
from . import backends, checks, registration
from .layer import Layer, flatten


class Span(NamedTuple):
    """Places `start` to `stop` of an order of rows; None is the order in which they lie."""

    order: Tensor | None
    start: int
    stop: int


class Block(NamedTuple):
    """A layer's turn: which of the two, the rows that it visits, pass by pass, and its rate."""

    layer: int
    rows: Sequence[Span]
    lr: float


class Velocity(NamedTuple):
    """A layer's velocity; None where there is no momentum, or no bias."""

    weight: Tensor | None
    bias: Tensor | None


def block_launcher(
    layers: Sequence[Layer], x: Tensor, batch_size: int, loss: str, momentum: bool, steps: float, backend: str
) -> Any:
    """What `sngd_blocks_` needs to run blocks of about `steps` steps in one launch; None where it cannot, or is slower so."""
    weight = layers[0].weight
    serving = backends.module(backends.serving(backend, weight.device, weight.dtype))
    if len(layers) != 2 or not hasattr(serving, "sngd_blocks_"):
        return None
    widths = [weight.shape[1], *(layer.weight.shape[0] for layer in layers)]
    tiles = serving.blocks_tiles(widths, min(batch_size, x.shape[0]), losses.code(loss), momentum, steps, x)
    return None if tiles is None else (serving, tiles)


def _in_one_order(blocks: Sequence[Block], x: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The orders of all blocks as one, and the table of their steps, (steps, 4): first place in it, rows, layer and block."""
    offsets: dict[int, int] = {}
    orders: list[Tensor] = []
    pieces: list[tuple[int, int, int, int]] = []
    end = 0
    for i, block in enumerate(blocks):
        for order, start, stop in block.rows:
            if id(order) not in offsets:
                offsets[id(order)] = end
                orders.append(torch.arange(x.shape[0], device=x.device) if order is None else order)
                end += orders[-1].shape[0]
            pieces.append((offsets[id(order)] + start, stop - start, block.layer, i))
    first, rows, *owner = np.array(pieces, dtype=np.int64).T
    steps = -(-rows // batch_size)
    piece = np.repeat(np.arange(len(rows)), steps)
    skipped = (np.arange(len(piece)) - (np.cumsum(steps) - steps)[piece]) * batch_size  # rows of the piece before the step
    table = [first[piece] + skipped, np.minimum(batch_size, rows[piece] - skipped), *(of[piece] for of in owner)]
    return torch.cat(orders), torch.from_numpy(np.column_stack(table))


def sngd_blocks_(
    launcher: Any,
    layers: Sequence[Layer],
    velocities: Sequence[Velocity],
    x: Tensor,
    target: Tensor,
    blocks: Sequence[Block],
    batch_size: int,
    loss: str,
    *,
    momentum: float,
    nesterov: bool,
    relative_lr: bool,
    reset_momentum: bool,
    x_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Train two layers in turn, block by block, in one launch, without waiting for the device.

    What `layer_forward` and `sngd_epoch_` do block by block, up to rounding: the hidden layer's activations are computed anew
    in every step. Arguments as theirs, of both layers; weights, biases and velocities are **mutated**.

    Args:
        launcher: from `block_launcher`.
        relative_lr: a block's steps are its rate times the Frobenius norm of its layer at the block's start.
        reset_momentum: a block starts from zero velocity.

    Returns:
        (losses, norms, lengths): two of every step, (steps,), and the length of each block's steps, (blocks,).
    """
    serving, tiles = launcher
    order, table = _in_one_order(blocks, x, batch_size)
    (weight, bias, activation), last = layers
    weights, biases, numbers = flatten([last], activation)
    checks.problem(weight, bias, x, target, weights, biases, numbers, losses.code(loss), x_scale)
    with torch.no_grad():
        lengths = torch.tensor([block.lr for block in blocks], dtype=weight.dtype).to(weight.device, non_blocking=True)
        schedule = table.to(weight.device, non_blocking=True)
        for layer, velocity in zip(layers, velocities, strict=True):
            checks.update(*layer[:2], lengths[0], *velocity, momentum, nesterov)
        values, norms = serving.sngd_blocks_(
            [weight, *weights], [bias, *biases], x, target, order, schedule, batch_size, numbers,
            losses.code(loss), lengths, [v.weight for v in velocities], [v.bias for v in velocities], momentum, nesterov,
            x_scale, relative_lr, reset_momentum, tiles,
        )  # fmt: skip
    registration.count_up([t for layer in layers for t in layer[:2]] + [t for v in velocities for t in v])
    return values, norms, lengths
