"""The fused-step plan: one step is a forward product per layer, a backward product per suffix layer, gradient, update.

Bias, activation, subgradient and residual are epilogues of the products; G is written once; the norm stays on the
device. A step of an L-layer chain is 2 L + 1 launches (one more where a softmax row is wider than a tile).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import losses
from . import launcher, layers, step, tiling


class Layer(NamedTuple):
    """A layer as kernels see it: weight (n_out, n_in), bias (n_out,) or None, activation code and slopes."""

    weight: Tensor
    bias: Tensor | None
    kind: int
    low: float
    high: float

    @property
    def n_out(self) -> int:
        """The width of the layer's result."""
        return self.weight.shape[0]

    @property
    def n_in(self) -> int:
        """The width of the layer's input."""
        return self.weight.shape[1]


class Update(NamedTuple):
    """What the update rule needs beside the gradient; absent velocities mean no momentum."""

    lr: Tensor
    velocity_weight: Tensor | None
    velocity_bias: Tensor | None
    momentum: float
    nesterov: bool


class Call(NamedTuple):
    """The arguments of `sngd_epoch_`, as its schema orders them."""

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    target: Tensor
    order: Tensor | None
    batch_size: int
    suffix_weights: list[Tensor]
    suffix_biases: list[Tensor | None]
    activations: list[float]
    loss: int
    lr: Tensor
    velocity_weight: Tensor | None = None
    velocity_bias: Tensor | None = None
    momentum: float = 0.0
    nesterov: bool = False
    x_scale: float = 1.0

    @property
    def layers(self) -> list[Layer]:
        """The active layer and its suffix."""
        return chain(self.weight, self.bias, self.suffix_weights, self.suffix_biases, self.activations)

    @property
    def rows(self) -> int:
        """How many rows the pass visits."""
        return (self.x if self.order is None else self.order).shape[0]

    @property
    def rule(self) -> Update:
        """How the layer is updated."""
        return Update(self.lr, self.velocity_weight, self.velocity_bias, self.momentum, self.nesterov)


def chain(
    weight: Tensor,
    bias: Tensor | None,
    suffix_weights: list[Tensor],
    suffix_biases: list[Tensor | None],
    activations: list[float],
) -> list[Layer]:
    """The active layer and its suffix, from an operator's flat arguments."""
    numbers = [activations[i : i + 3] for i in range(0, len(activations), 3)]
    parameters = zip([weight, *suffix_weights], [bias, *suffix_biases], numbers, strict=True)
    return [Layer(w, b, int(kind), low, high) for w, b, (kind, low, high) in parameters]


def ceil(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return (size + block - 1) // block


def stride_of(vector: Tensor | None) -> int:
    """A vector's stride, 0 for an absent one."""
    return 0 if vector is None else vector.stride(0)


def forward(x: Tensor, layer: Layer, out: Tensor, x_scale: float = 1.0, order: Tensor | None = None) -> None:
    """out <- phi(x W^T + bias) of x's rows in `order`, or all; out (rows, n_out) contiguous."""
    rows = out.shape[0]
    tiles = tiling.forward_product(layer.n_out, layer.n_in)
    launcher.launch(
        layers.product, (ceil(rows, tiles.rows), ceil(layer.n_out, tiles.columns)),
        x, layer.weight, layer.bias, out, None, None, None, order, None,
        0, rows, x.shape[0], layer.n_out, layer.n_in, 0,
        *x.stride(), layer.weight.stride(1), layer.weight.stride(0), stride_of(layer.bias), stride_of(order), 0, 0,
        layer.low, layer.high, 1.0, x_scale,
        EPILOGUE=layers.FORWARD, KIND=layer.kind, LOSS=0, CLASSES=False, FROM_X=True, PRECISION=tiles.precision,
        BLOCK_B=tiles.rows, BLOCK_OUT=tiles.columns, BLOCK_IN=tiles.inner,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


class Pass:
    """One call's problem and its scratch, allocated once and used again by each of its steps.

    Scratch, float32: h and g of each layer for one mini-batch, G, the bias's gradient, and partial sums of the loss and
    of the squares. On the way back each layer's D takes the place of its g, the last layer's that of its h.
    """

    def __init__(
        self,
        chain: list[Layer],
        x: Tensor,
        target: Tensor,
        order: Tensor | None,
        batch_size: int,
        loss: int,
        x_scale: float = 1.0,
    ) -> None:
        self.chain, self.x, self.target, self.order, self.loss, self.x_scale = chain, x, target, order, loss, x_scale
        last = chain[-1]
        self.rows = x.shape[0] if order is None else order.shape[0]
        self.batch_size = min(batch_size, self.rows)
        self.tiles = [tiling.step_product(layer.n_out, layer.n_in) for layer in chain]
        self.wide_softmax = loss == losses.CROSS_ENTROPY and last.n_out > self.tiles[-1].columns
        self.h = [self._scratch(self.batch_size, layer.n_out) for layer in chain]
        slopes = chain if self.wide_softmax else chain[:-1]
        self.g = [self._scratch(self.batch_size, layer.n_out) for layer in slopes]
        self.loss_partials = self._scratch(self._loss_programs(self.batch_size))
        sizes = {self.batch_size, self.rows % self.batch_size} - {0}
        by_library = [(rows, layer) for rows in sizes for layer in chain if self._by_library(layer, rows)]
        self.product = self._scratch(max((rows * max(layer.n_out, layer.n_in) for rows, layer in by_library), default=0))
        self.gathered: Tensor | None = None
        self._gradient_scratch()

    def _scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def _gradient_scratch(self) -> None:
        """What comes after D: G, the bias's gradient, and the sums of their squares."""
        active = self.chain[0]
        self.gradient_tiles = tiling.gradient_product(active.n_out, active.n_in, self.x.dtype)
        self.grad = self._scratch(active.n_out, active.n_in)
        self.grad_bias = None if active.bias is None else self._scratch(active.n_out)
        strips = ceil(active.n_out, self.gradient_tiles.rows)
        self.programs = strips * ceil(active.n_in, self.gradient_tiles.columns) + (0 if active.bias is None else strips)
        self.partials = self._scratch(self.programs)

    def _loss_programs(self, rows: int) -> int:
        if self.wide_softmax:
            return rows
        return ceil(rows, self.tiles[-1].rows) * ceil(self.chain[-1].n_out, self.tiles[-1].columns)

    def _input(self, i: int) -> Tensor:
        """Layer i's input."""
        return self.h[i - 1] if i else self.x if self.gathered is None else self.gathered

    def _gather(self, out: Tensor, start: int, rows: int) -> Tensor:
        """The mini-batch's rows of x, in `out`."""
        n_in = self.x.shape[1]
        launcher.launch(
            layers.gather, (rows, ceil(n_in, tiling.GATHER_COLUMNS)),
            self.x, self.order, out, start, self.x.shape[0], n_in, *self.x.stride(), stride_of(self.order), self.x_scale,
            BLOCK=tiling.GATHER_COLUMNS, num_warps=4, num_stages=1,
        )  # fmt: skip
        return out

    def _by_library(self, layer: Layer, rows: int) -> bool:
        """Whether torch's library makes this layer's products with so many rows, forward and backward."""
        return False

    def _library_product(self, a: Tensor, b: Tensor) -> Tensor:
        """A B by torch's library at torch's precision, as the one slice that `layers.product` takes."""
        out = self.product[: a.shape[0] * b.shape[1]].view(1, a.shape[0], b.shape[1])
        torch.mm(a, b, out=out[0])
        return out

    def _product(self, i: int, epilogue: int, start: int, rows: int, slices: Tensor | None = None) -> None:
        """Layer i forward: h[i], g[i]; as the last layer D instead of h, and the loss's partial sums."""
        layer, tiles, target, order = self.chain[i], self.tiles[i], self.target, self.order
        a = self._input(i)
        last, from_x = epilogue == layers.LAST, a is self.x
        if slices is None and self._by_library(layer, rows):
            slices = self._library_product(a[:rows], layer.weight.t())
        launcher.launch(
            layers.product, (ceil(rows, tiles.rows), ceil(layer.n_out, tiles.columns)),
            *((a, layer.weight) if slices is None else (None, None)), layer.bias, self.h[i],
            self.g[i] if i < len(self.g) else None, slices,
            target if last else None, order if last or from_x else None, self.loss_partials if last else None,
            start, rows, self.x.shape[0], layer.n_out, layer.n_in, 0 if slices is None else slices.shape[0],
            *a.stride(), layer.weight.stride(1), layer.weight.stride(0), stride_of(layer.bias), stride_of(order),
            *self._target_strides(), layer.low, layer.high, self._scale(rows), self.x_scale,
            EPILOGUE=epilogue, KIND=layer.kind, LOSS=self.loss if last else 0, CLASSES=last and target.dim() == 1,
            FROM_X=from_x, PRECISION=tiles.precision,
            BLOCK_B=tiles.rows, BLOCK_OUT=tiles.columns, BLOCK_IN=tiles.inner,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip

    def _softmax(self, start: int, rows: int) -> None:
        target = self.target
        launcher.launch(
            layers.softmax_rows, (rows,),
            self.h[-1], self.g[-1], target, self.order, self.loss_partials,
            start, rows, self.x.shape[0], self.chain[-1].n_out, stride_of(self.order), *self._target_strides(),
            self._scale(rows), CLASSES=target.dim() == 1, BLOCK_OUT=tiling.SOFTMAX_COLUMNS,
            num_warps=tiling.SOFTMAX_WARPS, num_stages=1,
        )  # fmt: skip

    def _backward(self, i: int, d: Tensor, rows: int) -> Tensor:
        """D of layer i from the next layer's: D <- (D W) g, in place of g[i]."""
        layer, out = self.chain[i + 1], self.g[i]
        slices = self._library_product(d[:rows], layer.weight) if self._by_library(layer, rows) else None
        tiles = tiling.step_product(layer.n_in, layer.n_out)
        launcher.launch(
            layers.product, (ceil(rows, tiles.rows), ceil(layer.n_in, tiles.columns)),
            *((d, layer.weight) if slices is None else (None, None)), None, out, out, slices, None, None, None,
            0, rows, rows, layer.n_in, layer.n_out, 0 if slices is None else slices.shape[0],
            *d.stride(), *layer.weight.stride(), 0, 0, 0, 0, 0.0, 0.0, 1.0, 1.0,
            EPILOGUE=layers.BACKWARD, KIND=0, LOSS=0, CLASSES=False, FROM_X=False, PRECISION=tiles.precision,
            BLOCK_B=tiles.rows, BLOCK_OUT=tiles.columns, BLOCK_IN=tiles.inner,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        return out

    def _target_strides(self) -> tuple[int, int]:
        return (self.target.stride(0), 0 if self.target.dim() == 1 else self.target.stride(1))

    def _elements(self, rows: int) -> int:
        """What the loss is a mean over: rows for the cross-entropy, all elements of the output otherwise."""
        return rows if self.loss == losses.CROSS_ENTROPY else rows * self.chain[-1].n_out

    def _scale(self, rows: int) -> float:
        return (2.0 if self.loss == losses.MSE else 1.0) / self._elements(rows)

    def residual(self, start: int, rows: int) -> Tensor:
        """D of the active layer and the loss's partial sums, for the mini-batch of `rows` rows at `start`."""
        last = len(self.chain) - 1
        for i in range(last):
            self._product(i, layers.FORWARD, start, rows)
        self._product(last, layers.FORWARD if self.wide_softmax else layers.LAST, start, rows)
        if self.wide_softmax:
            self._softmax(start, rows)
        d = self.h[-1]
        for i in reversed(range(last)):
            d = self._backward(i, d, rows)
        return d

    def gradient(self, start: int, rows: int) -> None:
        """grad, grad_bias and all partial sums, for the mini-batch of `rows` rows at `start`."""
        self._gradient(self.residual(start, rows), self.x, start, rows)

    def _gradient(self, d: Tensor, x: Tensor | None, start: int, rows: int) -> None:
        """G from D and X, or as the library has left it where there is no X; the bias's gradient and all squares."""
        tiles, active = self.gradient_tiles, self.chain[0]
        launcher.launch(
            step.gradient, (self.programs,),
            d, x, self.order, self.grad, self.grad_bias, self.partials,
            start, rows, self.x.shape[0], active.n_out, active.n_in, *self.x.stride(), stride_of(self.order), self.x_scale,
            PRECISION=tiles.precision, BLOCK_OUT=tiles.rows, BLOCK_IN=tiles.columns, BLOCK_B=tiles.inner,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip

    def update(self, rule: Update | None, rows: int, losses: Tensor | None, norms: Tensor, at: int) -> None:
        """The norm to norms[at], the loss to losses[at], and, with a rule, the step itself."""
        weight, bias, grad, grad_bias = (None,) * 4 if rule is None else (*self.chain[0][:2], self.grad, self.grad_bias)
        n_out, n_in = self.chain[0].weight.shape
        tiles = ceil(n_out, tiling.UPDATE_OUT) * ceil(n_in, tiling.UPDATE_IN)
        velocity_weight = None if rule is None else rule.velocity_weight
        velocity_bias = None if rule is None else rule.velocity_bias
        launcher.launch(
            step.update, (1 if rule is None else min(tiles, tiling.UPDATE_PROGRAMS),),
            weight, bias, velocity_weight, velocity_bias, grad, grad_bias, self.partials, self.loss_partials,
            losses, norms, None if rule is None else rule.lr,
            at, self.programs, self._loss_programs(rows), n_out, n_in,
            *((0, 0) if weight is None else weight.stride()), stride_of(bias),
            *((0, 0) if velocity_weight is None else velocity_weight.stride()), stride_of(velocity_bias),
            float(self._elements(rows)), 0.0 if rule is None else rule.momentum,
            NESTEROV=rule is not None and rule.nesterov, BLOCK_OUT=tiling.UPDATE_OUT, BLOCK_IN=tiling.UPDATE_IN,
            num_warps=tiling.UPDATE_WARPS, num_stages=1,
        )  # fmt: skip

    def run(self, rule: Update) -> tuple[Tensor, Tensor]:
        """All mini-batches in turn; (losses, norms), one of each a step."""
        starts = range(0, self.rows, self.batch_size)
        losses, norms = (torch.empty(len(starts), dtype=torch.float32, device=self.x.device) for _ in range(2))
        for at, start in enumerate(starts):
            rows = min(self.batch_size, self.rows - start)
            self.gradient(start, rows)
            self.update(rule, rows, losses, norms, at)
        return losses, norms


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """All mini-batches of a `Call`, step by step, in place; (losses, norms), one of each a step."""
    call = Call(*arguments)
    return Pass(call.layers, call.x, call.target, call.order, call.batch_size, call.loss, call.x_scale).run(call.rule)
