"""torch.compile of a whole step: forward, gradients and update in one graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import SLOPE, JointMethod, Layers, NotHere, Problem
from .torch_plain import PlainSngd, sngd_step


def sgd_step(weights: Layers, x: Tensor, one_hot: Tensor, lr: float) -> None:
    """One step of SGD on all layers; torch.func.grad, since autograd's backward would break the graph in two."""

    def loss(parameters: Layers) -> Tensor:
        h = x
        for w, b in parameters:
            h = F.leaky_relu(F.linear(h, w, b), SLOPE)
        return F.mse_loss(h, one_hot)

    for parameters, gradients in zip(weights, torch.func.grad(loss)(weights), strict=True):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(lr * gradient)


def prepare(method: CompiledSgd | CompiledSngd) -> None:
    """Weights that keep their addresses, which a CUDA graph changes in place, and a compiler that knows no earlier problem."""
    if method.mode is not None and method.problem.x.device.type != "cuda":
        raise NotHere("CUDA graphs need a GPU")
    for layer in method.weights:
        for t in layer:
            torch._dynamo.mark_static_address(t)
    torch._dynamo.reset()  # or the variants of earlier problems would count against its limit


class CompiledSgd(JointMethod):
    """SGD, compiled by Inductor."""

    family = "sgd"
    mode: str | None = None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        prepare(self)
        self.one_step = torch.compile(sgd_step, dynamic=False, fullgraph=True, mode=self.mode)

    def update(self, x: Tensor, one_hot: Tensor) -> None:
        self.one_step(self.weights, x, one_hot, self.problem.rate)


class CompiledGraphedSgd(CompiledSgd):
    """SGD, compiled, replayed as a CUDA graph that torch captures."""

    mode = "reduce-overhead"


class CompiledSngd(PlainSngd):
    """SNGD, compiled by Inductor."""

    mode: str | None = None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        prepare(self)
        self.one_step = torch.compile(sngd_step, dynamic=False, fullgraph=True, mode=self.mode)


class CompiledGraphedSngd(CompiledSngd):
    """SNGD, compiled, replayed as a CUDA graph that torch captures."""

    mode = "reduce-overhead"
