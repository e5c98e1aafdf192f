"""SNGD and DANTE as a user of torch would write them: plain products, no autograd; also compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import SLOPE, Layers, Problem, TorchMethod


def sngd_step(active: tuple[Tensor, Tensor], suffix: Sequence[tuple[Tensor, Tensor]], x: Tensor, t: Tensor, lr: float) -> None:
    """One SNGD step on `active` = (weight, bias), whose input x is, against targets t."""
    weight, bias = active
    h, slopes = x, []
    for w, b in (active, *suffix):
        z = torch.addmm(b, h, w.t())
        slopes.append(torch.where(z < 0, SLOPE, 1.0))
        h = z * slopes[-1]
    d = (h - t) * (2 / h.numel()) * slopes.pop()
    for w, _ in reversed(suffix):
        d = (d @ w) * slopes.pop()
    grad, grad_bias = d.t() @ x, d.sum(0)
    step = lr / torch.sqrt(grad.square().sum() + grad_bias.square().sum())
    weight -= step * grad
    bias -= step * grad_bias


class PlainSngd(TorchMethod):
    """Eager, the rows of a turn gathered once; in float64 the truth for SNGD."""

    family = "sngd"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.one_step = sngd_step

    def forward(self, layers: Layers, h: Tensor) -> Tensor:
        for w, b in layers:
            h = F.leaky_relu(F.linear(h, w, b), SLOPE)
        return h

    def round(self, order: Tensor) -> None:
        p = self.problem
        for rows in order.split(p.block or len(order)):
            x, targets = p.x[rows], p.one_hot[rows].split(p.batch)
            for active in range(p.layers):
                h = self.forward(self.weights[:active], x).split(p.batch)
                for _ in range(p.epochs):
                    for inputs, target in zip(h, targets, strict=True):
                        self.one_step(self.weights[active], self.weights[active + 1 :], inputs, target, p.rate)

    def step(self, x: Tensor, y: Tensor, one_hot: Tensor) -> None:
        self.one_step(self.weights[0], self.weights[1:], x, one_hot, self.problem.rate)
