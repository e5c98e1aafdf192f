"""The data side of training: which rows a block sees, what the frozen prefix makes of them, and how well a chain does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import losses, ops
from ..ops import Layer
from ..ops.blocks import Span

Rows = Tensor | slice
FORWARD_ROWS = 8192  # rows that go through a chain of layers at once, so that its inner activations stay small
SERIAL = 2**15 - 1  # elements that torch adds up on the CPU in an order that does not depend on the number of threads


def scale_of(x: Tensor, x_scale: float) -> float:
    """What an operator multiplies this input with: uint8 is the data, anything else may be a layer's activations."""
    return x_scale if x.dtype == torch.uint8 else 1.0


def forward(layers: Sequence[Layer], x: Tensor, backend: str, x_scale: float) -> Tensor:
    """The output of a chain of layers, (rows, n_out); x itself for an empty chain."""
    if not layers:
        return x
    out = layers[-1].weight.new_empty((x.shape[0], layers[-1].weight.shape[0]))
    for start in range(0, x.shape[0], FORWARD_ROWS):
        h = x[start : start + FORWARD_ROWS]
        for weight, bias, activation in layers:
            h = ops.layer_forward(h, weight, bias, activation, x_scale=scale_of(h, x_scale), backend=backend)
        if h.shape[0] == x.shape[0]:
            return h
        out[start : start + FORWARD_ROWS] = h
    return out


def _add_loss_(total: Tensor, h: Tensor, values: Tensor, code: int) -> None:
    """Add the loss of output h (rows, n_out), times its rows; on the CPU the same bits with any number of threads."""
    at_once = h.shape[0] if h.is_cuda else max(1, SERIAL // h.shape[1])
    for part, wanted in zip(h.split(at_once), values.split(at_once), strict=True):
        total += losses.value(code, part, wanted) * part.shape[0]


def mean_loss(h: Tensor, target: Tensor, loss: str) -> Tensor:
    """The loss of output h (rows, n_out), 0-dimensional and on the device."""
    values = losses.as_values(target, h.shape[1], h.dtype)
    total = h.new_zeros(())
    _add_loss_(total, h, values, losses.code(loss))
    return total / h.shape[0]


def evaluate(
    layers: Sequence[Layer], x: Tensor, target: Tensor, loss: str, backend: str, x_scale: float
) -> tuple[Tensor, Tensor]:
    """(loss, correct rows) of a chain over all rows, both 0-dimensional and on the device.

    A row is correct where the largest output stands at its class; with one output, where the output is on the target's
    side of the middle (0 for logits, 1/2 for values).
    """
    total = layers[0].weight.new_zeros(())
    correct = torch.zeros((), dtype=torch.int64, device=total.device)
    code = losses.code(loss)
    for start in range(0, x.shape[0], FORWARD_ROWS):
        h = forward(layers, x[start : start + FORWARD_ROWS], backend, x_scale)
        t = target[start : start + FORWARD_ROWS]
        values = losses.as_values(t, h.shape[1], h.dtype)
        _add_loss_(total, h, values, code)
        if h.shape[1] == 1:
            middle = 0.0 if loss == "binary_cross_entropy" else 0.5
            correct += ((h > middle) == (values > 0.5)).sum()
        else:
            correct += (h.argmax(dim=1) == values.argmax(dim=1)).sum()
    return total / x.shape[0], correct


class RowStream:
    """The rows that one layer visits: pass after pass, each in a new order, cut into whole mini-batches.

    The last batch of a pass may be shorter and never runs over into the next pass.
    """

    def __init__(self, rows: int, batch_size: int, shuffle: bool, generator: torch.Generator) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator
        self.order: Tensor | None = None
        self.cursor = rows

    def take(self, steps: int) -> Iterator[Rows]:
        """The rows of the next `steps` mini-batches, in pieces of which none spans two passes."""
        for order, start, stop in self.spans(steps):
            yield slice(start, stop) if order is None else order[start:stop]

    def spans(self, steps: int) -> Iterator[Span]:
        """The same pieces, each as its pass's order (None: the rows as they lie) and the places in it."""
        while steps:
            if self.cursor >= self.rows:
                self.cursor = 0
                if self.shuffle:
                    self.order = torch.randperm(self.rows, generator=self.generator, device=self.generator.device)
            stop = min(self.cursor + steps * self.batch_size, self.rows)
            steps -= -(-(stop - self.cursor) // self.batch_size)
            start, self.cursor = self.cursor, stop
            yield Span(self.order, start, stop)

    def state(self) -> dict[str, Any]:
        """Where the stream stands; the generator's state is kept beside it."""
        return {"order": self.order, "cursor": self.cursor}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was taken."""
        self.order, self.cursor = state["order"], state["cursor"]


class Piece(NamedTuple):
    """Inputs and targets of some mini-batches: rows of x and target in `order`, or as they lie."""

    x: Tensor
    target: Tensor
    order: Tensor | None


class Problem:
    """The input and the target of a phase, and the input of an active layer behind a frozen prefix.

    Args:
        x: (rows, n) the data.
        target: class indices or values; None where the phase's input is its own target.
        encoder: frozen layers whose activations are the phase's input.
        budget: bytes that kept activations may take; beyond it they are computed anew for the rows of each piece.
        backend: the operators' backend.
        x_scale: what uint8 x is multiplied with.
    """

    def __init__(
        self, x: Tensor, target: Tensor | None, encoder: Sequence[Layer], budget: int, backend: str, x_scale: float
    ) -> None:
        self.budget = budget
        self.backend = backend
        self.x_scale = x_scale
        self.encoder = tuple(encoder)
        self.x = x
        if not encoder or self.fits(encoder[-1:], x.shape[0]):
            self.x = forward(self.encoder, x, backend, x_scale)
            self.encoder = ()
        self.target = target
        if target is None and not self.encoder:
            self.target = self.x

    def _row_bytes(self, layers: Sequence[Layer]) -> int:
        return layers[-1].weight.shape[0] * layers[-1].weight.element_size() if layers else 0

    def fits(self, layers: Sequence[Layer], rows: int) -> bool:
        """Whether the activations of each of these layers, for so many rows, fit the budget."""
        return all(rows * self._row_bytes([layer]) <= self.budget for layer in layers)

    def behind(self, prefix: Sequence[Layer]) -> Problem | None:
        """The problem of the layers after `prefix`, with the prefix's activations of all rows kept; None beyond the budget."""
        if self.encoder or not self.fits(prefix[-1:], self.x.shape[0]):
            return None
        x = forward(prefix, self.x, self.backend, self.x_scale)
        return Problem(x, self.target, (), self.budget, self.backend, self.x_scale)

    def pieces(self, rows: Rows, prefix: Sequence[Layer], batch_size: int) -> Iterator[Piece]:
        """Inputs of the layer after `prefix` for these rows; each piece's activations fit the budget, or are one batch."""
        chain = (*self.encoder, *prefix)
        if not chain:
            assert self.target is not None
            if isinstance(rows, slice):
                yield Piece(self.x[rows], self.target[rows], None)
            else:
                yield Piece(self.x, self.target, rows)
            return
        if isinstance(rows, slice):
            count, first = rows.stop - rows.start, rows.start
        else:
            count, first = rows.shape[0], 0
        chunk = max(1, self.budget // (self._row_bytes(chain) * batch_size)) * batch_size
        for start in range(0, count, chunk):
            part = slice(first + start, first + min(start + chunk, count))
            chosen = part if isinstance(rows, slice) else rows[part]
            x = forward(self.encoder, self.x[chosen], self.backend, self.x_scale)
            target = x if self.target is None else self.target[chosen]
            yield Piece(forward(prefix, x, self.backend, self.x_scale), target, None)

    def all_pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The phase's input and target over all rows, in pieces that fit the budget."""
        for x, target, _ in self.pieces(slice(0, self.x.shape[0]), (), FORWARD_ROWS):
            yield x, target
