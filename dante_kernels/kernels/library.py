"""The library plan: the fused step with torch.mm for its larger products, at torch's precision; epilogues stay in Triton.

By model the fastest for most large mini-batches. A step of an L-layer chain is 4 L + 2 launches, one more where a softmax row
is wider than a tile, and fewer by one for each product that is not worth a launch of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import tiling
from .fused import Call, Layer, Pass


class Library(Pass):
    """The library plan of one call. Scratch beside that of `Pass`: a mini-batch of x, and one of the widest product."""

    def _gradient_scratch(self) -> None:
        super()._gradient_scratch()
        self.inputs = self.gathered = self._scratch(self.batch_size, self.chain[0].n_in)

    def _by_library(self, layer: Layer, rows: int) -> bool:
        return tiling.worth_a_launch(layer.n_out, layer.n_in, rows)

    def gradient(self, start: int, rows: int) -> None:
        """grad, grad_bias and all partial sums, for the mini-batch of `rows` rows at `start`."""
        x = self._gather(self.inputs, start, rows)[:rows]
        d = self.residual(start, rows)
        torch.mm(d[:rows].t(), x, out=self.grad)
        self._gradient(d, None, start, rows)


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """All mini-batches of a `Call`, step by step, in place; (losses, norms), one of each a step."""
    call = Call(*arguments)
    return Library(call.layers, call.x, call.target, call.order, call.batch_size, call.loss, call.x_scale).run(call.rule)
