"""A whole round, or a step, captured by hand as one CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import NotHere, Problem, TorchMethod
from .torch_autograd import ForeachSgd
from .torch_plain import PlainSngd


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` captured as a CUDA graph, after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class Graphed(TorchMethod):
    """The eager method `eager`, captured at its first round or step of a size, replayed ever after."""

    eager: type[TorchMethod]

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if problem.x.device.type != "cuda":
            raise NotHere("CUDA graphs need a GPU")
        self.method = self.eager(problem)
        self.weights = self.method.weights
        self.method.reset()
        self.captured: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}

    def _replay(self, run: Callable[..., None], *inputs: Tensor) -> None:
        sizes = tuple(t.shape for t in inputs)
        if sizes not in self.captured:
            weights = [t.detach().clone() for layer in self.weights for t in layer]
            inside = [t.clone() for t in inputs]
            self.captured[sizes] = graph_of(lambda: run(*inside)), inside
            with torch.no_grad():  # what the warm-up changed
                for t, w in zip((t for layer in self.weights for t in layer), weights, strict=True):
                    t.copy_(w)
        graph, inside = self.captured[sizes]
        for t, new in zip(inside, inputs, strict=True):
            t.copy_(new)
        graph.replay()

    def round(self, order: Tensor) -> None:
        self._replay(self.method.round, order)

    def step(self, x: Tensor, y: Tensor, one_hot: Tensor) -> None:
        self._replay(self.method.step, x, y, one_hot)


class GraphedSgd(Graphed):
    """SGD by autograd and foreach."""

    family = "sgd"
    eager = ForeachSgd


class GraphedSngd(Graphed):
    """SNGD written plainly."""

    family = "sngd"
    eager = PlainSngd
