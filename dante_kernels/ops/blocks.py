"""Blocks of several layers in one call: one launch of a kernel, or launches that are recorded once and replayed."""

from __future__ import annotations

import functools
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
    """A layer's turn: which one, the rows that it visits, pass by pass, and its rate."""

    layer: int
    rows: Sequence[Span]
    lr: float


class Velocity(NamedTuple):
    """A layer's velocity; None where there is no momentum, or no bias."""

    weight: Tensor | None
    bias: Tensor | None


class Launcher(NamedTuple):
    """How a `Round` runs: in one launch of a backend's kernel, with these tiles; or, without them, recorded and replayed."""

    serving: Any
    tiles: Any

    @property
    def whole(self) -> bool:
        """Whether blocks, however many, are one launch."""
        return self.tiles is not None


def block_launcher(
    layers: Sequence[Layer],
    x: Tensor,
    batch_size: int,
    loss: str,
    momentum: bool,
    steps: float,
    backend: str,
    every_layer: bool,
) -> Launcher | None:
    """What runs blocks of about `steps` steps; None where the backend has nothing for them.

    `every_layer` says that every layer has its blocks, as the kernel for all of them demands.
    """
    weight = layers[0].weight
    serving = backends.module(backends.serving(backend, weight.device, weight.dtype))
    if not hasattr(serving, "sngd_blocks_"):
        return None
    if len(layers) != 2 or not every_layer:
        return Launcher(serving, None)
    widths = [weight.shape[1], *(layer.weight.shape[0] for layer in layers)]
    return Launcher(serving, serving.blocks_tiles(widths, min(batch_size, x.shape[0]), losses.code(loss), momentum, steps, x))


def check_plans(
    layers: Sequence[Layer], trained: Sequence[int], x: Tensor, batch_size: int, loss: str, momentum: bool, backend: str
) -> None:
    """Raise a ValueError, naming the layer, where a plan that the environment names cannot serve one of the trained ones."""
    weights = [layer.weight for layer in layers]
    serving = backends.module(backends.serving(backend, weights[0].device, weights[0].dtype))
    if not hasattr(serving, "waiting_programs"):
        return
    rows, code = min(batch_size, x.shape[0]), losses.code(loss)
    for i in trained:
        bias, dtype = layers[i].bias is not None, weights[i].dtype if i else x.dtype
        try:
            serving.waiting_programs(weights[i:], bias, rows, dtype, code, momentum)
        except ValueError as error:
            raise ValueError(f"layer {i} ({weights[i].shape[1]} x {weights[i].shape[0]}): {error}") from error


def launches_of_step(layers: int) -> int:
    """How many launches a step takes at most, in a net of so many layers; a block has some more beside its steps."""
    return 4 * layers + 3


def norms_or_one(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Each layer's Frobenius norm, which a relative rate is multiplied by, (layers,); 1 where that is 0, and would stay so.

    Where all lie dense in memory, the bits are each layer's own, and on a GPU these are six launches, however many layers there
    are.
    """
    nothing = weights[0].new_zeros(1) if any(bias is None for bias in biases) else weights[0]
    parts = [part for weight, bias in zip(weights, biases, strict=True) for part in (weight, nothing if bias is None else bias)]
    norms = torch.hypot(*torch.stack(torch._foreach_norm(parts)).view(-1, 2).unbind(1))
    return torch.nn.functional.threshold(norms, 0.0, 1.0)


def _in_one_order(blocks: Sequence[Block], x: Tensor, batch_size: int, cycle: int) -> tuple[Tensor, Tensor]:
    """The orders of all blocks as one, and the table of their steps, (steps, 4): first place in it, rows, layer and block.

    Of each cycle the last layer's block comes first: so, of what a block in parallel must see as it was, the kernel keeps the
    smaller layer.
    """
    offsets: dict[int, int] = {}
    orders: list[Tensor] = []
    pieces: list[tuple[int, int, int, int]] = []
    end = 0
    for i, block in sorted(enumerate(blocks), key=lambda each: (each[0] // cycle, -each[1].layer) if cycle else each[0]):
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


def _apart(
    serving: Any,
    weights: list[Tensor],
    biases: list[Tensor | None],
    x: Tensor,
    target: Tensor,
    rows: Tensor,
    pieces: bytes,
    batch_size: int,
    activations: list[float],
    loss: int,
    rates: Tensor,
    velocity_weights: list[Tensor | None],
    velocity_biases: list[Tensor | None],
    momentum: float,
    nesterov: bool,
    x_scale: float,
    relative: bool,
    reset: bool,
    cycle: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, norms, lengths): blocks by a backend's operators; `pieces` as from `_rows_of`."""
    numbers = _numbers(pieces)
    turns = [*{block: layer for *_, layer, block in numbers}.values()]
    results: list[tuple[Tensor, Tensor]] = []
    lengths: list[Tensor] = []
    begun = 0
    # A row for each block, so that each one's length lies aligned as if it were alone.
    rates = rates[:, None].expand(-1, 4).contiguous()
    classes = target[rows] if target.dim() == 1 else None
    seen, seen_biases = weights, biases
    for start, stop, layer, block in numbers:
        if block == len(lengths):
            # No layer changes before its own block, so all that blocks of different layers need of them is made at once.
            coming = _until_one_repeats(turns[block:])
            if cycle:
                seen, seen_biases = _with_copies(coming[:-1], weights, biases)
            of_blocks = rates[block : block + len(coming)]
            if relative:
                of_blocks = of_blocks * norms_or_one([weights[i] for i in coming], [biases[i] for i in coming])[:, None]
            lengths += of_blocks[:, 0].unbind()
        velocity = velocity_weights[layer], velocity_biases[layer]
        if block == begun:
            begun += 1
            if reset:
                for part in velocity:
                    if part is not None:
                        part.zero_()
        h, t, scale = x, target, x_scale
        order: Tensor | None = rows[start:stop]
        if layer:
            t = target[order] if classes is None else classes[start:stop]
            for i in range(layer):
                h = serving.layer_forward(h, seen[i], seen_biases[i], activations[3 * i : 3 * i + 3], scale, order)
                order, scale = None, 1.0
        problem = weights[layer], biases[layer], h, t, order, batch_size
        after = seen[layer + 1 :], seen_biases[layer + 1 :], activations[3 * layer :], loss
        results.append(serving.sngd_epoch_(*problem, *after, lengths[block], *velocity, momentum, nesterov, scale))
    every_loss, every_norm = (torch.cat(part) for part in zip(*results, strict=True))
    return every_loss, every_norm, torch.stack(lengths)


def _until_one_repeats(layers: Sequence[int]) -> list[int]:
    """The first of these, as many as are different."""
    found: list[int] = []
    for layer in layers:
        if layer in found:
            break
        found.append(layer)
    return found


def _with_copies(
    copied: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """All weights and biases, with copies in place of some layers' own, on a GPU in one launch."""
    seen, seen_biases = list(weights), list(biases)
    copies: list[Tensor] = []
    originals: list[Tensor] = []
    for i in copied:
        for own, part in ((seen, weights[i]), (seen_biases, biases[i])):
            if part is not None:
                own[i] = copy = torch.empty_like(part)
                copies.append(copy)
                originals.append(part)
    if copies:
        torch._foreach_copy_(copies, originals)
    return seen, seen_biases


def _rows_of(blocks: Sequence[Block], x: Tensor, batch_size: int) -> tuple[Tensor, bytes]:
    """The rows of all blocks, one after the other, and of each piece its places there, its layer and its block, as int64."""
    rows: list[Tensor] = []
    pieces: list[list[int]] = []
    end = 0
    for i, block in enumerate(blocks):
        for order, start, stop in block.rows:
            rows.append(torch.arange(start, stop, device=x.device) if order is None else order[start:stop])
            pieces.append([end, end + stop - start, block.layer, i])
            end += stop - start
    return torch.cat(rows), np.array(pieces, dtype=np.int64).tobytes()


def _numbers(pieces: bytes) -> list[list[int]]:
    found: list[list[int]] = np.frombuffer(pieces, dtype=np.int64).reshape(-1, 4).tolist()
    return found


class Round(NamedTuple):
    """Blocks of several layers in one call: what `layer_forward` and `sngd_epoch_` do block by block; in one launch up to
    rounding, since there the hidden layer's activations are computed anew in every step.

    `launcher` is that of `block_launcher`; with `relative_lr` a block's steps are its rate times the Frobenius norm of its
    layer at the block's start; with `reset_momentum` a block starts from zero velocity. With `cycle` above 0 a block sees the
    other layers as they were before the first of its cycle of so many blocks, each of another layer. The rest is as in
    `sngd_epoch_`.
    """

    launcher: Launcher
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
    cycle: int = 0

    def arguments(self) -> tuple[Any, ...]:
        """Checked, as the backend takes them; the table of steps is still on the CPU."""
        (weight, bias, activation), *rest = self.layers
        weights, biases, numbers = flatten(rest, activation)
        code = losses.code(self.loss)
        checks.problem(weight, bias, self.x, self.target, weights, biases, numbers, code, self.x_scale)
        batch_size = min(self.batch_size, self.x.shape[0])  # as the tiles were chosen
        of_blocks = functools.partial(_in_one_order, cycle=self.cycle) if self.launcher.whole else _rows_of
        order, table = of_blocks(self.blocks, self.x, batch_size)
        lengths = torch.tensor([block.lr for block in self.blocks], dtype=weight.dtype).to(weight.device, non_blocking=True)
        for layer, velocity in zip(self.layers, self.velocities, strict=True):
            checks.update(*layer[:2], lengths[0], *velocity, self.momentum, self.nesterov)
        return (
            [weight, *weights], [bias, *biases], self.x, self.target, order, table, batch_size, numbers, code, lengths,
            [v.weight for v in self.velocities], [v.bias for v in self.velocities], self.momentum, self.nesterov,
            self.x_scale, self.relative_lr, self.reset_momentum, self.cycle,
        )  # fmt: skip

    @property
    def changed(self) -> list[Tensor | None]:
        """What it writes to."""
        active = {block.layer for block in self.blocks}
        return [t for i in active for t in (*self.layers[i][:2], *self.velocities[i])]


def sngd_blocks_(rounds: Sequence[Round]) -> list[tuple[Tensor, Tensor, Tensor] | Exception]:
    """Each model's round, in place, without waiting for the device. Those alike that are one launch share as few as can be;
    those that are recorded and replayed overlap.

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
                whole = one.launcher.whole
                same = (calls[i][TABLE].numpy().tobytes(), *map(checks.kind, calls[i])) if whole else (one.x.device,)
                groups.setdefault((*one.launcher, *same), []).append(i)
        for (serving, tiles, *_), members in groups.items():
            if tiles is None:
                results.update(_overlapping(serving, {i: (rounds[i], calls[i]) for i in members}))
                registration.count_up(t for i in members if not isinstance(results[i], Exception) for t in rounds[i].changed)
                continue
            try:
                done = serving.sngd_blocks_([(*calls[i], tiles) for i in members])
            except Exception as error:
                results.update(dict.fromkeys(members, error))
            else:
                if rounds[members[0]].cycle:
                    places = calls[members[0]][TABLE][:, -1].argsort(stable=True).to(done[0][0].device, non_blocking=True)
                    done = [(losses_[places], norms[places]) for losses_, norms in done]
                results.update((i, (*made, calls[i][LENGTHS])) for i, made in zip(members, done, strict=True))
                registration.count_up(t for i in members for t in rounds[i].changed)
    return [results[i] for i in range(len(rounds))]


def _overlapping(
    serving: Any, members: dict[int, tuple[Round, tuple[Any, ...]]]
) -> dict[int, tuple[Tensor, Tensor, Tensor] | Exception]:
    """The results of rounds on one device that are recorded and replayed, or the errors of those that no plan serves."""
    found: dict[int, Any] = {}
    waiting = 0
    for i, (one, call) in members.items():
        try:
            waiting = max(waiting, _waiting(serving, one, call) if len(members) > 1 else 0)
        except Exception as error:  # one model must not end the others
            found[i] = error
    left = [i for i in members if i not in found]
    jobs = [functools.partial(_replayed, serving, members[i][1]) for i in left]
    if jobs:
        found.update(zip(left, serving.overlapping(members[left[0]][0].x, jobs, waiting), strict=True))
    return found


def _waiting(serving: Any, one: Round, call: tuple[Any, ...]) -> int:
    """How many programs wait for each other in any of a round's passes."""
    weights, biases, x, *_, pieces, batch_size, _, loss = call[: TABLE + 4]
    passes = {(layer, min(stop - start, batch_size)) for start, stop, layer, _ in _numbers(pieces)}
    counts = (
        serving.waiting_programs(
            weights[layer:], biases[layer] is not None, rows, weights[layer].dtype if layer else x.dtype, loss, one.momentum > 0
        )
        for layer, rows in passes
    )
    return max(counts)


def _replayed(serving: Any, call: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor] | Exception:
    rows, pieces, batch_size = call[TABLE - 1 : TABLE + 2]
    steps = sum(-(-(stop - start) // batch_size) for start, stop, *_ in _numbers(pieces))
    try:
        found: tuple[Tensor, Tensor, Tensor] = serving.recorded(
            _apart, (serving, *call), (rows, call[LENGTHS]), steps * launches_of_step(len(call[0]))
        )
    except Exception as error:
        return error
    return found
