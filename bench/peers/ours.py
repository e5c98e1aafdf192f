"""This package: its operators, one call for a pass, and `dk.fit`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import dante_kernels as dk
from dante_kernels import ops
from dante_kernels.ops import backends

from . import SLOPE, Layers, NotHere, Problem, TorchMethod


@contextmanager
def chosen_plan(name: str | None) -> Iterator[None]:
    """The GPU kernels take this plan; with None they choose."""
    if name is not None:
        os.environ["DANTE_GPU_PLAN"] = name
    try:
        yield
    finally:
        if name is not None:
            del os.environ["DANTE_GPU_PLAN"]


class Operators(TorchMethod):
    """`dk.ops`: `layer_forward` for the prefix, `sngd_epoch_` for a pass, `sngd_step_` for a step."""

    family = "sngd"
    plan: str | None = None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        device, dtype = problem.x.device, problem.x.dtype
        if self.plan is not None and device.type != "cuda":
            raise NotHere("GPU plans need a GPU")
        self.backend = "triton" if device.type == "cuda" else "cpp"
        reason = backends.why_not(self.backend, device, dtype)
        if reason is not None:
            raise NotHere(f"backend {self.backend}: {reason}")

    def _suffix(self, active: int) -> list[ops.Layer]:
        return [ops.Layer(w, b, "leaky_relu") for w, b in self.weights[active + 1 :]]

    def _forward(self, layers: Layers, h: Tensor) -> Tensor:
        for w, b in layers:
            h = ops.layer_forward(h, w, b, "leaky_relu", backend=self.backend)
        return h

    def _turn(self, active: int, h: Tensor, y: Tensor, one_hot: Tensor, order: Tensor) -> None:
        p = self.problem
        with chosen_plan(self.plan):
            for _ in range(p.epochs):
                ops.sngd_epoch_(
                    *self.weights[active], h, y, order, p.batch, self._suffix(active), "leaky_relu", "mse", p.rate,
                    backend=self.backend,
                )  # fmt: skip

    def round(self, order: Tensor) -> None:
        p = self.problem
        for rows in order.split(p.block or len(order)):
            for active in range(p.layers):
                if active and p.block is not None:
                    h = self._forward(self.weights[:active], p.x[rows])
                    in_turn = torch.arange(len(rows), device=rows.device)
                    self._turn(active, h, p.y[rows], p.one_hot[rows], in_turn)
                else:
                    h = self._forward(self.weights[:active], p.x) if active else p.x
                    self._turn(active, h, p.y, p.one_hot, rows)

    def step(self, x: Tensor, y: Tensor, one_hot: Tensor) -> None:
        with chosen_plan(self.plan):
            ops.sngd_step_(
                *self.weights[0], x, y, self._suffix(0), "leaky_relu", "mse", self.problem.rate, backend=self.backend
            )


class FusedPlan(Operators):
    """Held to the GPU's fused-step plan, where the operators would choose the persistent one."""

    plan = "fused"


class Fit(TorchMethod):
    """`dk.fit`, end to end: its checks, its schedule and its records are in the time."""

    family = "sngd"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        widths = problem.widths
        modules: list[nn.Module] = []
        for i, (w, b) in enumerate(self.weights):
            linear = nn.Linear(widths[i], widths[i + 1], device="meta")
            trained = i < problem.layers
            linear.weight, linear.bias = nn.Parameter(w, requires_grad=trained), nn.Parameter(b, requires_grad=trained)
            modules += [linear, nn.LeakyReLU(SLOPE)]
        self.model = nn.Sequential(*modules)

    def round(self, order: Tensor) -> None:
        p = self.problem
        steps = None if p.block is None else p.block // p.batch
        dk.fit(
            self.model, p.x[order], p.y[order], loss="mse", lr=p.rate, lr_schedule="constant", shuffle=False,
            schedule=dk.RoundRobin(rounds=1, inner_epochs=p.epochs, inner_steps=steps), batch_size=p.batch,
        )  # fmt: skip

    def step(self, x: Tensor, y: Tensor, one_hot: Tensor) -> None:
        raise NotHere("it trains in rounds")
