"""What is compared: every method trains the same net from the same start, each by a real implementation of its own.

The net is a chain of linear layers, each with leaky ReLU 0.01, the loss MSE against one-hot classes (the scikit-learn peer
says what differs). A *round* updates every weight of the active layers `epochs` times a mini-batch: for SNGD one layer
after the other, for SGD and its kin all at once, so that rounds are equal in weights updated.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Layers = list[tuple[Tensor, Tensor]]
SLOPE = 0.01


class NotHere(Exception):
    """A method cannot run here, and why."""


@dataclass(frozen=True)
class Problem:
    """What is trained on what: all methods get the same one, on the device.

    Attributes:
        x: (rows, n_in); y: (rows,) class indices; one_hot: (rows, classes) of x's dtype.
        start: the initial (weight, bias) of each layer.
        batch: rows in a mini-batch; rows are a multiple of it.
        layers: how many layers SNGD trains, counted from the first.
        epochs: passes of a layer in its turn (T).
        block: rows in a turn, whose inputs are gathered and computed for it; or None for one turn with all of the order.
        rate: the learning rate.
    """

    x: Tensor
    y: Tensor
    one_hot: Tensor
    start: Layers
    batch: int
    layers: int
    epochs: int
    block: int | None
    rate: float

    def double(self) -> Problem:
        """The same in float64, for the truth."""
        start = [(w.double(), b.double()) for w, b in self.start]
        return replace(self, x=self.x.double(), one_hot=self.one_hot.double(), start=start)

    @property
    def widths(self) -> list[int]:
        """From input to output."""
        return [self.x.shape[1], *(len(b) for _, b in self.start)]


class Method(abc.ABC):
    """One way to train. A subclass is built for a problem, or raises NotHere, and then reset and run many times.

    `family` names the mathematics: methods of a family give the same weights, and share the float64 truth and the grid
    of learning rates.
    """

    family: str

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @abc.abstractmethod
    def reset(self) -> None:
        """Back to the problem's start; nothing of an earlier run is left. Not timed."""

    @staticmethod
    def convert(tensor: Tensor) -> Any:
        """An argument of `round` or `step` as the method takes it. Not timed; so it has no data from which to gather rows."""
        return tensor

    @abc.abstractmethod
    def round(self, order: Tensor) -> None:
        """Train on the order of rows, in the method's form, as the problem says; it may return before that is done."""

    def step(self, x: Tensor, y: Tensor, one_hot: Tensor) -> None:
        """One mini-batch: SNGD on the first layer, SGD on all of them."""
        raise NotHere("it has no single step")

    @abc.abstractmethod
    def wait(self) -> None:
        """Until all that was asked for is done; each says so itself, lest a peer is timed before it is done."""

    @abc.abstractmethod
    def layers(self) -> Layers:
        """The weights as torch's tensors."""


class TorchMethod(Method):
    """A method whose weights are torch tensors, in `weights`; they keep their addresses, for compilers and CUDA graphs."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.weights: Layers = [(w.clone(), b.clone()) for w, b in problem.start]

    def reset(self) -> None:
        with torch.no_grad():
            for (w, b), (w0, b0) in zip(self.weights, self.problem.start, strict=True):
                w.copy_(w0)
                b.copy_(b0)

    def wait(self) -> None:
        if self.problem.x.device.type == "cuda":  # on the CPU torch's calls return when they are done
            torch.cuda.synchronize()

    def layers(self) -> Layers:
        return [(w.detach(), b.detach()) for w, b in self.weights]


class JointMethod(TorchMethod):
    """All layers at once; a round gathers its rows once, which is faster than at every step."""

    @abc.abstractmethod
    def update(self, x: Tensor, one_hot: Tensor) -> None:
        """One step on a mini-batch."""

    def step(self, x: Tensor, y: Tensor, one_hot: Tensor) -> None:
        self.update(x, one_hot)

    def round(self, order: Tensor) -> None:
        p = self.problem
        x, one_hot = p.x[order].split(p.batch), p.one_hot[order].split(p.batch)
        for _ in range(p.epochs):
            for inputs, targets in zip(x, one_hot, strict=True):
                self.update(inputs, targets)


def loss_and_hits(family: str, layers: Layers, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(the loss that the family minimizes, the fraction of rows whose class is the largest output)."""
    h = x.to(layers[0][0])
    for i, (w, b) in enumerate(layers):
        h = F.linear(h, w, b)
        if family != "mlp":
            h = F.leaky_relu(h, SLOPE)
        elif i < len(layers) - 1:
            h = h.relu()
    y = y.to(h.device)
    loss = F.cross_entropy(h, y) if family == "mlp" else F.mse_loss(h, F.one_hot(y, h.shape[1]).to(h.dtype))
    return float(loss), float((h.argmax(1) == y).double().mean())


def initial(widths: Sequence[int], generator: torch.Generator, device: torch.device) -> Layers:
    """The initial weights, of nn.Linear's size."""

    def uniform(n_in: int, *shape: int) -> Tensor:
        return ((torch.rand(shape, generator=generator) * 2 - 1) / n_in**0.5).to(device)

    return [(uniform(n_in, n_out, n_in), uniform(n_in, n_out)) for n_in, n_out in pairwise(widths)]
