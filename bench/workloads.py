"""What is measured on what: the workloads, the methods by name, and how a problem and a method are made of them."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .peers import Method, NotHere, Problem, initial


class Workload(NamedTuple):
    """A net, a mini-batch and what is done: SNGD's rounds take the first `trained` layers, each for `epochs` passes."""

    widths: tuple[int, ...]
    batch: int
    trained: int = 1
    epochs: int = 1
    rows: int = 6000

    @property
    def net(self) -> str:
        """Such as 784-100-10."""
        return "-".join(map(str, self.widths))

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.widths) - 1

    @property
    def what(self) -> str:
        """What a round is, in words."""
        if self.trained < self.layers:
            return "first layer"
        return "every layer" if self.epochs == 1 else f"every layer, T = {self.epochs}"

    def methods(self, kind: str) -> list[str]:
        """Those that do this work: a pass over some of the layers only is nothing for SGD."""
        return list(ALTERNATING if kind == "pass" and self.trained < self.layers else METHODS)

    def sized(self, rows: int) -> Workload:
        """With about so many rows, fewer for wide inputs, and whole mini-batches."""
        rows = rows if self.widths[0] < 3000 else rows // 4
        return self._replace(rows=max(self.batch, rows // self.batch * self.batch))


PASSES = [
    Workload((784, 100, 10), 20),
    Workload((784, 100, 10), 100),
    Workload((784, 100, 10), 500),
    Workload((3072, 512, 10), 100),
    Workload((64, 100, 10), 20),
    Workload((784, 100, 10), 100, trained=2),
    Workload((784, 100, 10), 100, trained=2, epochs=5),
    Workload((784, 400, 200, 10), 100, trained=3),
]
# On a GPU: an SNGD pass of the first layer, and a round of the whole net beside as many weights updated by SGD.
GPU_PASSES = [
    Workload(widths, batch, trained)
    for widths in ((784, 100, 10), (784, 400, 200, 10), (3072, 512, 10), (12288, 3072, 1536, 768, 384, 200))
    for batch in (20, 100, 500)
    for trained in (1, len(widths) - 1)
]
STEPS = [Workload((784, 100, 10), batch) for batch in (20, 100, 500)] + [Workload((784, 400, 200, 10), 100)]
QUICK = Workload((20, 16, 10), 10, trained=2)

OURS = "dante"
ALTERNATING = {  # name: module of bench.peers, class
    OURS: "ours:Operators",
    "dante, fused plan": "ours:FusedPlan",
    "dk.fit": "ours:Fit",
    "torch SNGD": "torch_plain:PlainSngd",
    "torch.compile SNGD": "torch_compiled:CompiledSngd",
    "torch.compile SNGD, reduce-overhead": "torch_compiled:CompiledGraphedSngd",
    "CUDA graph SNGD": "cuda_graph:GraphedSngd",
    "JAX scan SNGD": "jax_scan:ScanSngd",
}
JOINT = {  # these train all layers at once
    "torch SGD": "torch_autograd:Autograd",
    "torch SGD, foreach": "torch_autograd:ForeachSgd",
    "torch SGD, fused": "torch_autograd:FusedSgd",
    "torch.compile SGD": "torch_compiled:CompiledSgd",
    "torch.compile SGD, reduce-overhead": "torch_compiled:CompiledGraphedSgd",
    "CUDA graph SGD": "cuda_graph:GraphedSgd",
    "JAX scan SGD": "jax_scan:ScanSgd",
    "torch momentum, fused": "torch_autograd:Momentum",
    "torch Adam, fused": "torch_autograd:Adam",
    "torch Adagrad, fused": "torch_autograd:Adagrad",
    "torch RMSProp, foreach": "torch_autograd:Rmsprop",
    "scikit-learn MLP": "sklearn_mlp:Mlp",
}
METHODS = ALTERNATING | JOINT
PLAIN = {  # family: its plain composition in torch
    "sngd": "torch_plain:PlainSngd",
    "sgd": "torch_autograd:Autograd",
    "momentum": "torch_autograd:PlainMomentum",
    "adam": "torch_autograd:PlainAdam",
    "adagrad": "torch_autograd:PlainAdagrad",
    "rmsprop": "torch_autograd:PlainRmsprop",
    "mlp": "sklearn_mlp:PlainMlp",
}
# The grid in which a family's rate is searched for time to quality, each with six values at factors of about 3; steps and
# passes are timed with the first.
RATES = {
    "sngd": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "sgd": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "momentum": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "adagrad": (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
    "rmsprop": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "mlp": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
}
PACKAGES = {"jax_scan": "jax", "sklearn_mlp": "sklearn"}  # what a peer needs beside torch


def of(kind: str, quick: bool, device: torch.device) -> list[Workload]:
    """Those of a kind, step or pass, for a device."""
    if quick:
        return [QUICK]
    if kind == "step":
        return STEPS
    return GPU_PASSES if device.type == "cuda" else PASSES


def method_class(place: str) -> type[Method]:
    """The class at `module:Class` of bench.peers.

    Raises:
        NotHere: where the package that it needs is not installed.
    """
    module, name = place.split(":")
    package = PACKAGES.get(module, "torch")
    if importlib.util.find_spec(package) is None:
        raise NotHere(f"{package} is not installed")
    found: type[Method] = getattr(importlib.import_module(f"bench.peers.{module}"), name)
    return found


def timing_rate(family: str) -> float:
    """The rate that steps and passes are timed with."""
    return RATES[family][0]


def make(place: str, problem: Problem) -> Method:
    """The method, for the problem with the rate of the method's family."""
    method = method_class(place)
    return method(replace(problem, rate=timing_rate(method.family)))


def plain(family: str, problem: Problem) -> Method:
    """The family's plain composition in torch, at the problem's own rate; in float64 it is the truth."""
    return method_class(PLAIN[family])(problem)


def random_problem(workload: Workload, device: torch.device) -> tuple[Problem, Tensor]:
    """A problem of this size, and the order of its rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(workload.rows, workload.widths[0], generator=generator)
    y = torch.randint(0, workload.widths[-1], (workload.rows,), generator=generator)
    order = torch.randperm(workload.rows, generator=generator).to(device)
    return problem_of(x, y, workload, generator, device), order


def problem_of(x: Tensor, y: Tensor, workload: Workload, generator: torch.Generator, device: torch.device) -> Problem:
    """These data on the device, with new initial weights; its rate is not set."""
    x, y = x.to(device), y.to(device)
    one_hot = F.one_hot(y, workload.widths[-1]).to(x.dtype)
    start = initial(workload.widths, generator, device)
    return Problem(x, y, one_hot, start, workload.batch, workload.trained, workload.epochs, None, rate=float("nan"))
