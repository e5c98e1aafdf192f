"""Rounds of blocks of one-hidden-layer networks in one launch, where the backend has a kernel for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import losses
from . import backends, checks, registration
from .layer import Layer, flatten

TABLE, LENGTHS = 5, 9  # places among a backend's arguments


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
    """What a `Round` needs to run blocks of about `steps` steps in one launch; None where it cannot, or is slower so."""
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


class Round(NamedTuple):
    """Blocks of two layers in turn, which one launch makes: what `layer_forward` and `sngd_epoch_` do block by block, up to
    rounding, since the hidden layer's activations are computed anew in every step.

    `launcher` is that of `block_launcher`; with `relative_lr` a block's steps are its rate times the Frobenius norm of its
    layer at the block's start; with `reset_momentum` a block starts from zero velocity. The rest is as in `sngd_epoch_`.
    """

    launcher: Any
    layers: Sequence[Layer]
    velocities: Sequence[Velocity]
    x: Tensor
    target: Tensor
    blocks: Sequence[Block]
    batch_size: int
    loss: str
    momentum: float
    nesterov: bool
    relative_lr: bool
    reset_momentum: bool
    x_scale: float

    def arguments(self) -> tuple[Any, ...]:
        """Checked, as the backend takes them; the table of steps is still on the CPU."""
        (weight, bias, activation), last = self.layers
        weights, biases, numbers = flatten([last], activation)
        code = losses.code(self.loss)
        checks.problem(weight, bias, self.x, self.target, weights, biases, numbers, code, self.x_scale)
        batch_size = min(self.batch_size, self.x.shape[0])  # as the tiles were chosen
        order, table = _in_one_order(self.blocks, self.x, batch_size)
        lengths = torch.tensor([block.lr for block in self.blocks], dtype=weight.dtype).to(weight.device, non_blocking=True)
        for layer, velocity in zip(self.layers, self.velocities, strict=True):
            checks.update(*layer[:2], lengths[0], *velocity, self.momentum, self.nesterov)
        return (
            [weight, *weights], [bias, *biases], self.x, self.target, order, table, batch_size, numbers, code, lengths,
            [v.weight for v in self.velocities], [v.bias for v in self.velocities], self.momentum, self.nesterov,
            self.x_scale, self.relative_lr, self.reset_momentum, self.launcher[1],
        )  # fmt: skip

    @property
    def changed(self) -> list[Tensor | None]:
        """What it writes to."""
        return [t for layer in self.layers for t in layer[:2]] + [t for v in self.velocities for t in v]


def sngd_blocks_(rounds: Sequence[Round]) -> list[tuple[Tensor, Tensor, Tensor] | Exception]:
    """Each model's round, in place, those alike in as few launches as there is room for, without waiting for the device.

    Weights, biases and velocities are **mutated**; no two rounds may share them. Bits are those of each round alone.

    Returns:
        (losses, norms, lengths) of each round: two of every step, (steps,), and the length of each block's steps, (blocks,).
        In place of it the error of a round that was refused or failed.
    """
    results: dict[int, tuple[Tensor, Tensor, Tensor] | Exception] = {}
    groups: dict[Any, list[int]] = {}
    calls: dict[int, tuple[Any, ...]] = {}
    with torch.no_grad():
        for i, one in enumerate(rounds):
            try:
                calls[i] = one.arguments()
            except Exception as error:
                results[i] = error
            else:
                same = (calls[i][TABLE].numpy().tobytes(), *map(checks.kind, calls[i]))
                groups.setdefault((one.launcher[0], *same), []).append(i)
        for (serving, *_), members in groups.items():
            try:
                done = serving.sngd_blocks_([calls[i] for i in members])
            except Exception as error:
                results.update(dict.fromkeys(members, error))
            else:
                results.update((i, (*made, calls[i][LENGTHS])) for i, made in zip(members, done, strict=True))
                registration.count_up(t for i in members for t in rounds[i].changed)
    return [results[i] for i in range(len(rounds))]
