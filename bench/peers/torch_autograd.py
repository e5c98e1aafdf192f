"""torch's own optimizers on the whole net, gradients by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import SLOPE, JointMethod, Problem


class Autograd(JointMethod):
    """A torch optimizer; in float64, with neither foreach nor fused, the truth of its family."""

    family = "sgd"
    optimizer = torch.optim.SGD
    form: str | None = None  # how torch computes it: "foreach", "fused", or a for-loop over the tensors
    settings: tuple[tuple[str, Any], ...] = ()

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.parameters = [t.requires_grad_() for layer in self.weights for t in layer]

    def reset(self) -> None:
        super().reset()
        form = {"foreach": False} if self.form is None else {self.form: True}
        self.updates = self.optimizer(self.parameters, lr=self.problem.rate, **dict(self.settings), **form)

    def loss(self, x: Tensor, one_hot: Tensor) -> Tensor:
        """MSE; what the family minimizes."""
        for w, b in self.weights:
            x = F.leaky_relu(F.linear(x, w, b), SLOPE)
        return F.mse_loss(x, one_hot)

    def update(self, x: Tensor, one_hot: Tensor) -> None:
        self.updates.zero_grad()
        self.loss(x, one_hot).backward()
        self.updates.step()


class ForeachSgd(Autograd):
    """SGD over lists of tensors."""

    form = "foreach"


class FusedSgd(Autograd):
    """SGD in one kernel."""

    form = "fused"


class PlainMomentum(Autograd):
    """SGD with momentum 0.9."""

    family = "momentum"
    settings = (("momentum", 0.9),)


class PlainAdam(Autograd):
    """Adam with torch's defaults."""

    family = "adam"
    optimizer = torch.optim.Adam


class PlainAdagrad(Autograd):
    """Adagrad with torch's defaults."""

    family = "adagrad"
    optimizer = torch.optim.Adagrad


class PlainRmsprop(Autograd):
    """RMSProp with torch's defaults."""

    family = "rmsprop"
    optimizer = torch.optim.RMSprop


class Momentum(PlainMomentum):
    """Fused."""

    form = "fused"


class Adam(PlainAdam):
    """Fused."""

    form = "fused"


class Adagrad(PlainAdagrad):
    """Fused on the CPU, foreach on a GPU: torch has no fused form there."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.form = "fused" if problem.x.device.type == "cpu" else "foreach"


class Rmsprop(PlainRmsprop):
    """Foreach: torch has no fused form."""

    form = "foreach"
