"""`explain`: which GPU plan each layer of a model gets, why, and what a step of it takes by the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from .. import losses, network
from ..ops import backends
from ..ops.checks import number
from .directions import MOMENTUM
from .fit import PRECISIONS, _device, _whole
from .schedules import INNER_STEPS, STEPS_IN_TURN

if TYPE_CHECKING:
    from ..kernels import plan

X_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


@dataclass(frozen=True)
class LayerPlan:
    """One layer as the active one: its place and widths, and the plan of its passes; None where it is frozen.

    ``launched`` is the modelled time of a step in a pass that no CUDA graph replays, such as the first one.
    """

    layer: int
    name: str
    n_in: int
    n_out: int
    choice: plan.Choice | None
    launched: float

    @property
    def how(self) -> str:
        """Programs and their tiles, or launches."""
        assert self.choice is not None
        tiles = self.choice.tiles
        if tiles is None:
            return f"{self.choice.launches} launches a step"
        arithmetic = {"ieee": "float32", "bf16": "bfloat16"}.get(tiles.precision, tiles.precision)
        how = f"{tiles.split_out} x {tiles.split_in} programs of {tiles.units} x {tiles.slices * tiles.inputs} weights"
        return f"{how}, {arithmetic}{', one barrier' * tiles.one_barrier}"


class Blocks(NamedTuple):
    """Blocks of so many steps, where a pass has as many: how `fit` runs them, and what one takes by the model.

    ``tiles`` are those with which many are one launch, or None. ``microseconds`` is what a block takes, a layer's on average;
    where each is several launches, replayed from a CUDA graph, ``beside`` is what of it is not its steps, else 0.
    """

    steps: int
    tiles: plan.Persistent | None
    microseconds: float
    beside: float


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; as a string, the table.

    Attributes:
        layers: a `LayerPlan` for each layer.
        batch_size: rows of a mini-batch.
        samples_per_second: these rows over the modelled time of one step on every trained layer, in passes; None where
            nothing is trained. Modelled, not measured.
        parallel, in_turn: `Blocks` of 3 steps in parallel, `fit`'s default for classes, and of 20 in turn.
        replayed: whether passes and short blocks that are not one launch are replayed as CUDA graphs.

    A plan's limit is what most of its step is spent on; the persistent plan's is what would save the most if it took no time.
    """

    layers: tuple[LayerPlan, ...]
    batch_size: int
    samples_per_second: float | None
    parallel: Blocks
    in_turn: Blocks
    replayed: bool
    heading: str
    served_by: str

    def __str__(self) -> str:
        rows = [("layer", "n_in x n_out", "plan", "how", "us a step", "without graph", "limit")]
        reasons = []
        for layer in self.layers:
            cells = (f"{layer.layer} ({layer.name})", f"{layer.n_in} x {layer.n_out}")
            if layer.choice is None:
                rows.append((*cells, "frozen", "", "", "", ""))
                continue
            times = (f"{layer.choice.microseconds:.1f}", f"{layer.launched:.1f}")
            rows.append((*cells, layer.choice.plan, layer.how, *times, layer.choice.limit))
            reasons.append(f"layer {layer.layer}: {layer.choice.plan}, since {layer.choice.why}")
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        rate = []
        if self.samples_per_second is not None:
            rate = [f"a pass of each layer, given its input: {self.samples_per_second:,.0f} samples/s, modelled"]
            rate.append(self._of_blocks("in parallel, fit's default for classes,", self.parallel))
            rate.append(self._of_blocks("in turn, its default otherwise,", self.in_turn))
        return "\n".join([self.heading, "", *table, "", *reasons, *rate, self.served_by])

    __repr__ = __str__

    def _of_blocks(self, kind: str, blocks: Blocks) -> str:
        """How short blocks run, and how fast."""
        tiles, of = blocks.tiles, f"blocks of {blocks.steps} steps {kind}"
        if tiles is None and not self.replayed:
            return f"{of} are launched one after the other, which Python bounds"
        trained = sum(layer.choice is not None for layer in self.layers)
        rate = f"{self.batch_size * blocks.steps * 1e6 / (trained * blocks.microseconds):,.0f} samples/s, modelled"
        if tiles is not None:
            return f"{of} run many in a launch of {tiles.programs} programs, {blocks.microseconds:.0f} us each: {rate}"
        parts = f"{blocks.microseconds:.0f} us each, {blocks.beside:.0f} us of it beside the steps"
        return f"{of} are replayed from CUDA graphs, {parts}: {rate}"


def explain(
    model: nn.Module,
    batch_size: int,
    *,
    loss: str = "mse",
    momentum: float | None = None,
    x_dtype: torch.dtype = torch.float32,
    precision: str | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """Say which GPU plan each layer of a model gets when it is trained, why, and what it takes by the cost model.

    Nothing is run, and no time in it is measured. Where the device is no CUDA device, the plans are those of an H200.
    The environment variable DANTE_GPU_PLAN is heeded. Plans are for passes of SNGD; other directions of
    `fit` go through `ops.layer_gradient`, whose launches do not depend on them.

    Args:
        model: as for `fit`; not changed. Weights on the meta device will do.
        batch_size: rows in a mini-batch, at least 1.
        loss: as for `fit`.
        momentum: as for `fit`; None is the 0.9 that `fit` takes where no lr is given.
        x_dtype: float32, bfloat16 or uint8, as `fit`'s x.
        precision: ``"highest"``, ``"high"`` or ``"medium"``; None takes what is set in torch.
        device: where the model would be trained; None takes where it is.

    Returns:
        The `Explanation`, whose str is a table: print it.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        ImportError: where triton is not installed, without which there are no GPU plans.

    Source: docs/plans.md.

    >>> model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    >>> [layer.choice.plan for layer in explain(model, 20).layers]
    ['persistent', 'persistent']
    """
    net = network.from_module(model, loss)
    code = losses.code(loss)
    batch = _whole("batch_size", batch_size, low=1)
    velocity = MOMENTUM if momentum is None else number("momentum", momentum)
    if not 0 <= velocity < 1:
        raise ValueError(f"momentum: expected a number from 0 to below 1, got {velocity}")
    if x_dtype not in X_DTYPES:
        raise ValueError(f"x_dtype: expected one of {', '.join(map(str, X_DTYPES))}, got {x_dtype!r}")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    where = net.layers[0].weight.device if device is None else _device(device)
    try:
        from ..kernels import cost, graphs, plan
    except ModuleNotFoundError as error:
        raise ImportError("explain: expected triton, whose kernels the GPU plans are made of, got no such module") from error

    gpu = plan.device_of(where)
    switch = precision or torch.get_float32_matmul_precision()
    widths, wanted = net.widths, plan.wanted_plan()
    layers = []
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        bias = net.layers[i].bias is not None
        # A hidden layer's result, the next one's input, is float32 whatever x is.
        shape = plan.Shape(tuple(widths[i:]), batch, code, bias, velocity > 0, x_dtype if i == 0 else torch.float32, switch)
        try:
            choice = plan.choose(shape, gpu, gpu.multiprocessors, wanted) if net.trainable[i] else None
        except ValueError as error:
            raise ValueError(f"layer {i} ({n_in} x {n_out}): {error}") from error
        launched = 0.0 if choice is None else max(choice.microseconds, choice.launches * gpu.host_launch)
        layers.append(LayerPlan(i, net.names[i], n_in, n_out, choice, launched))
    shape = plan.Shape(tuple(widths), batch, code, momentum=velocity > 0, x_dtype=x_dtype, precision=switch)
    trained = [layer for layer in layers if layer.choice is not None]
    replayed, one_launch = graphs.switched_on(), all(net.trainable) and wanted in ("auto", "persistent")
    times = [layer.choice.microseconds if replayed else layer.launched for layer in trained if layer.choice is not None]

    def blocks(steps: int) -> Blocks:
        tiles = plan.blocks(shape, steps, gpu.multiprocessors, gpu, wanted) if one_launch else None
        if tiles is not None:
            return Blocks(steps, tiles, steps * tiles.microseconds, 0.0)
        beside = cost.block(shape, steps, gpu, [layer.layer for layer in trained]) if trained else 0.0
        return Blocks(steps, None, beside + steps * sum(times) / max(1, len(times)), beside)

    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "an H200"
    chain = "-".join(map(str, widths))
    return Explanation(
        tuple(layers),
        batch,
        batch * 1e6 / sum(times) if times else None,
        blocks(INNER_STEPS),
        blocks(STEPS_IN_TURN),
        replayed,
        f"{chain}, {loss}, batch {batch}, momentum {velocity:g}, x {str(x_dtype).removeprefix('torch.')}, precision {switch}: "
        f"modelled for {name}, not measured",
        _served_by(where, net.layers[0].weight.dtype),
    )


def _served_by(device: torch.device, dtype: torch.dtype) -> str:
    if device.type not in ("cpu", "cuda"):
        return f"on {device} nothing can be trained, only explained"
    name = backends.serving("auto", device, dtype)
    note = "" if device.type == "cuda" else ", interpreted, in one program"
    if name != "triton":
        note = ", which has no such plans" + (f"; no GPU plan takes {dtype}" if dtype != torch.float32 else "")
    return f"on {device} the backend {name} serves{note}"
