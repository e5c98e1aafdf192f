"""What a step takes by the model, under each plan but the persistent one: launches, arithmetic, bytes; from shapes alone.

Every launch costs its latency and the longest of three: the multiply-adds of the busiest multiprocessor (whole tiles, whole
waves of programs), what its programs draw through it and all of them through L2, and what the launch must move at least
once, from L2 where all that a step touches fits there, else from memory. Nothing here has been measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from .. import losses
from . import tiling

LIMITS = ("barriers", "launches", "arithmetic", "L2", "memory")


class Device(NamedTuple):
    """What the model knows of a GPU: an H200's numbers, from public figures and latencies, none of them measured here."""

    multiprocessors: int = 132
    hopper: bool = True  # of capability 9.0, for which some tiles of the persistent plan were found to compile without spills
    barrier: float = 0.7  # microseconds of a grid barrier of few programs
    barrier_program: float = 0.0035  # and of each program more
    tile: float = 0.5  # microseconds of latency that each further tile of rows adds to a step of the persistent plan
    in_and_out: float = 1.5  # microseconds of latency until a block's pass has its layer, and until the layer is back
    launch: float = 1.3  # microseconds of a launch that waits for the one before it, in a CUDA graph
    host_launch: float = 5.5  # microseconds of one from Python without a graph
    l2_per_multiprocessor: float = 0.12  # MB a microsecond that one multiprocessor reads from L2
    l2: float = 5.5  # MB a microsecond that all of them read from L2
    l1: float = 0.25  # MB a microsecond that one multiprocessor reads from its L1: 128 bytes a cycle
    l1_bytes: int = 160_000  # of it, beside the shared memory that the persistent plan's largest tiles take
    memory: float = 4.3  # MB a microsecond from memory
    l2_bytes: int = 50_000_000
    fma: float = 0.253  # millions of float32 fused multiply-adds a microsecond on one multiprocessor: its peak
    streamed_fma: float = 0.15  # the same in a product whose operands stream through shared memory: 40 TFLOP/s in all
    tf32: float = 1.2  # likewise with tf32 operands: 320 TFLOP/s in all
    bf16: float = 3.0  # likewise with bfloat16 operands: 790 TFLOP/s in all
    float64: float = 0.1  # likewise in float64, as `tiling.by_gram` takes it: 26 TFLOP/s in all

    def rate(self, precision: str) -> float:
        """Millions of multiply-adds a microsecond on one multiprocessor, in a product of this arithmetic."""
        rates = {
            "float64": self.float64,
            "ieee": self.streamed_fma,
            "tf32x3": self.tf32 / 3,
            "tf32": self.tf32,
            "bf16": self.bf16,
        }
        return rates[precision]


H200 = Device()


class Shape(NamedTuple):
    """A pass as the plans see it: n_in, n_out and the suffix's widths; rows of a mini-batch; and what else decides."""

    widths: tuple[int, ...]
    batch: int
    loss: int = losses.MSE
    bias: bool = True
    momentum: bool = False
    x_dtype: torch.dtype = torch.float32
    precision: str = "highest"


class Cost(NamedTuple):
    """Modelled microseconds of a step, what most of them are spent on (one of `LIMITS`), and its launches."""

    microseconds: float
    limit: str
    launches: int


class Launch(NamedTuple):
    """What one launch asks of the device."""

    programs: int
    products: float  # multiply-adds of a program, its tile's padding included
    drawn: float  # bytes that a program reads and writes
    moved: float  # bytes that all programs together must read or write at least once
    precision: str = "ieee"


def _ceil(size: int, block: int) -> int:
    return (size + block - 1) // block


def _total(launches: Iterable[Launch], working_set: float, device: Device) -> Cost:
    launches = list(launches)
    fits = working_set <= device.l2_bytes
    spent = dict.fromkeys(LIMITS, 0.0)
    spent["launches"] = len(launches) * device.launch
    for launch in launches:
        waves = _ceil(launch.programs, device.multiprocessors)
        drawn = max(waves * launch.drawn / device.l2_per_multiprocessor, launch.programs * launch.drawn / device.l2)
        parts = {
            "arithmetic": waves * launch.products / device.rate(launch.precision),
            "L2": max(drawn, launch.moved / device.l2),
            "memory": 0.0 if fits else launch.moved / device.memory,
        }
        longest = max(parts, key=lambda name: parts[name])
        spent[longest] += parts[longest] / 1e6
    return Cost(sum(spent.values()), max(spent, key=lambda name: spent[name]), len(launches))


def _working_set(shape: Shape, copies: int) -> float:
    """Bytes that a step touches: `copies` of W and one of each suffix weight, and activations and x of a mini-batch."""
    n_in, n_out, *suffix = shape.widths
    weights = copies * n_in * n_out + sum(a * b for a, b in pairwise((n_out, *suffix)))
    return 4 * (weights + 2 * shape.batch * sum(shape.widths))


def _product(rows: int, columns: int, inner: int, how: tiling.Tiles, a_bytes: int = 4, results: int = 1) -> Launch:
    """A tiled product (rows, inner) x (inner, columns), whose epilogue reads or writes `results` tiles like its own."""
    programs = _ceil(rows, how.rows) * _ceil(columns, how.columns)
    drawn = inner * (a_bytes * how.rows + 4 * how.columns) + 4 * results * how.rows * how.columns
    moved = inner * (a_bytes * rows + 4 * columns) + 4 * results * rows * columns
    return Launch(programs, how.rows * how.columns * _ceil(inner, how.inner) * how.inner, drawn, moved, how.precision)


def fused(shape: Shape, device: Device) -> Cost:
    """A step of `fused.py`: 2 L + 1 launches for L layers, one more where a softmax row is wider than a tile."""
    n_in, n_out, *suffix = shape.widths
    batch, x_bytes = shape.batch, shape.x_dtype.itemsize
    launches = []
    for i, (k, n) in enumerate(pairwise(shape.widths)):
        how = tiling.step_product(n, k, shape.precision)
        launches.append(_product(batch, n, k, how, 4 if i else x_bytes, results=2))
    launches += _wide_softmax(shape)
    for k, n in reversed(list(pairwise((n_out, *suffix)))):
        launches.append(_product(batch, k, n, tiling.step_product(k, n, shape.precision), results=2))
    how = tiling.gradient_product(n_out, n_in, shape.x_dtype, shape.precision)
    gradient = _product(n_out, n_in, batch, how)
    launches += [gradient, _update(shape, gradient.programs)]
    return _total(launches, _working_set(shape, 3 if shape.momentum else 2), device)


# Launches that short blocks of all layers, one each, have together beside their passes and the products before these: step
# lengths relative to the layers' norms (`ops.blocks.norms_or_one`), and copies of layers where blocks are in parallel.
CYCLE_LAUNCHES = 8


def block(shape: Shape, steps: float, device: Device, trained: Sequence[int] | None = None) -> float:
    """Microseconds that short blocks of `steps` steps have beside their steps where they are replayed, a layer's on average.

    `shape` is that of a pass of the first layer; `trained` says which layers have blocks, None all. What is added up is what
    the layers of a cycle share, what those before make of a block's rows, and the launch of its pass, with its layer and the
    velocity in and out.
    """
    trained = range(len(shape.widths) - 1) if trained is None else trained
    layers, rows = list(pairwise(shape.widths)), math.ceil(steps * shape.batch)
    total = CYCLE_LAUNCHES * device.launch
    for i in trained:
        n_in, n_out = layers[i]
        before = [
            _product(rows, n, k, tiling.forward_product(n, k, shape.precision), 4 if j else shape.x_dtype.itemsize)
            for j, (k, n) in enumerate(layers[:i])
        ]
        whole_layer = _elementwise((4 if shape.momentum else 2) * n_in * n_out, device)
        total += _total([*before, whole_layer], 0.0, device).microseconds + device.in_and_out
    return total / len(trained)


def _wide_softmax(shape: Shape) -> list[Launch]:
    """The launch that softmax rows wider than a tile have."""
    outputs, inner = shape.widths[-1], shape.widths[-2]
    if shape.loss != losses.CROSS_ENTROPY or outputs <= tiling.step_product(outputs, inner, shape.precision).columns:
        return []
    return [Launch(shape.batch, 0, 20 * outputs, 20 * shape.batch * outputs)]


def _update(shape: Shape, partials: int) -> Launch:
    """W (and V) from G, by programs of which each adds up all partial sums."""
    n_in, n_out, *_ = shape.widths
    tiles = _ceil(n_out, tiling.UPDATE_OUT) * _ceil(n_in, tiling.UPDATE_IN)
    programs = min(tiles, tiling.UPDATE_PROGRAMS)
    each = 20 if shape.momentum else 12  # G and W read, W written; the velocity read and written
    drawn = _ceil(tiles, programs) * tiling.UPDATE_OUT * tiling.UPDATE_IN * each + 4 * partials
    return Launch(programs, 0, drawn, each * n_in * n_out)


# A library's product is taken to spread evenly over the whole device, with tiles of this size: its best case.
LIBRARY_TILE = 128


def _library_product(rows: int, columns: int, inner: int, shape: Shape, device: Device) -> Launch:
    """A library's product. Its precision switch knows no bfloat16: medium is tf32 there too."""
    passes = rows * inner * _ceil(columns, LIBRARY_TILE) + inner * columns * _ceil(rows, LIBRARY_TILE) + rows * columns
    moved = 4 * (rows * inner + inner * columns + rows * columns)
    precision = "ieee" if shape.precision == "highest" else "tf32"
    programs = device.multiprocessors
    return Launch(programs, rows * columns * inner / programs, 4 * passes / programs, moved, precision)


def _elementwise(numbers: float, device: Device) -> Launch:
    """A kernel that reads and writes so many float32 numbers together."""
    return Launch(device.multiprocessors, 0, 4 * numbers / device.multiprocessors, 4 * numbers)


def _library_chain(shape: Shape, device: Device) -> list[Launch]:
    """Forward and back to D with a library's products: x gathered, then for each layer a product and an epilogue."""
    n_in, n_out, *suffix = shape.widths
    batch = shape.batch
    launches = [_elementwise(2 * batch * n_in, device)]
    for k, n in pairwise(shape.widths):
        launches += [_library_product(batch, n, k, shape, device), _elementwise(3 * batch * n, device)]
    for k, n in pairwise((n_out, *suffix)):
        launches += [_library_product(batch, k, n, shape, device), _elementwise(3 * batch * k, device)]
    return launches


def _sum_of_slices(rows: int, columns: int, slices: int, how: tiling.Tiles) -> Launch:
    """`layers.product` where another kernel has made the product, in so many slices."""
    each = 4 * (slices + 2)
    programs = _ceil(rows, how.rows) * _ceil(columns, how.columns)
    return Launch(programs, 0, each * how.rows * how.columns, each * rows * columns)


def _norm_without_gradient(shape: Shape) -> list[Launch]:
    """The streamed plan's norm: Gram matrices where they serve, else tiles of G that are not stored."""
    n_in, n_out, *_ = shape.widths
    batch, tiles = shape.batch, tiling.streamed_product(n_out, n_in, shape.precision)
    strips, blocks = _ceil(n_out, tiles.rows), _ceil(n_in, tiles.columns)
    programs = min(strips * (blocks + shape.bias), tiling.STREAMED_PROGRAMS)
    last = Launch(1, 0, 4 * programs, 4 * programs)
    if tiling.by_gram(n_out, n_in, batch):
        block, share = tiling.gram_tiles(batch, n_out, n_in)
        slices, along = _ceil(n_in, share) + _ceil(n_out, share), _ceil(batch, block)
        pairs, terms = along * (along + 1) // 2, _ceil(batch * batch, tiling.GRAM_TERMS)
        inner, result = min(share, max(n_in, n_out)), 8 * block * block
        moved = 4 * batch * (n_in + n_out) + slices * pairs * result
        gram = Launch(slices * pairs, block * block * inner, 8 * block * inner + result, moved, "float64")
        drawn, moved = 8 * slices * min(batch * batch, tiling.GRAM_TERMS), 8 * slices * batch * batch
        return [gram, Launch(terms, 0, drawn, moved), Launch(programs, 0, 16 * terms, 16 * terms), last]
    each = _ceil(strips * blocks, programs)
    products = each * tiles.rows * tiles.columns * _ceil(batch, tiles.inner) * tiles.inner
    drawn, moved = 4 * batch * (tiles.rows + tiles.columns) * each, 4 * batch * (n_in + n_out)
    return [Launch(programs, products, drawn, moved, tiles.precision), last]


def _advance(shape: Shape) -> Launch:
    """The streamed plan's update, with the next mini-batch's forward product where its rows are few enough."""
    n_in, n_out, *_ = shape.widths
    batch, tiles = shape.batch, tiling.streamed_product(n_out, n_in, shape.precision)
    share = tiling.streamed_share(n_out, n_in, tiles)
    slices, each = _ceil(n_in, share), 16 if shape.momentum else 8  # W read and written, and likewise the velocity
    products = tiles.rows * share * _ceil(batch, tiles.inner) * tiles.inner
    drawn = each * tiles.rows * share + 4 * batch * (share // tiles.columns * tiles.rows + share)
    moved = each * n_in * n_out + 4 * batch * (n_in + n_out)
    if batch <= tiling.NEXT_ROWS:
        products += tiles.rows * share * tiling.next_block(batch)
        drawn += 4 * batch * (share + tiles.rows)
        moved += 4 * batch * (n_in + slices * n_out)
    return Launch(_ceil(n_out, tiles.rows) * slices, products, drawn, moved, tiles.precision)


def _by_either(rows: int, columns: int, inner: int, shape: Shape, device: Device, library: bool) -> list[Launch]:
    """A product with its epilogue, in one launch, or in two where a library makes the product."""
    how = tiling.step_product(columns, inner, shape.precision)
    if library:
        return [_library_product(rows, columns, inner, shape, device), _sum_of_slices(rows, columns, 1, how)]
    return [_product(rows, columns, inner, how, results=2)]


def _gather(shape: Shape) -> Launch:
    """A mini-batch's rows of x, copied."""
    n_in, each = shape.widths[0], 4 + shape.x_dtype.itemsize
    programs = shape.batch * _ceil(n_in, tiling.GATHER_COLUMNS)
    return Launch(programs, 0, each * min(n_in, tiling.GATHER_COLUMNS), each * shape.batch * n_in)


def library(shape: Shape, device: Device) -> Cost:
    """A step of `library.py`: at most 4 L + 2 launches for L layers, one more for a softmax row wider than a tile."""
    n_in, n_out, *suffix = shape.widths
    launches, batch = [_gather(shape)], shape.batch
    for k, n in pairwise(shape.widths):
        launches += _by_either(batch, n, k, shape, device, tiling.worth_a_launch(n, k, batch))
    launches += _wide_softmax(shape)
    for k, n in reversed(list(pairwise((n_out, *suffix)))):
        launches += _by_either(batch, k, n, shape, device, tiling.worth_a_launch(n, k, batch))
    how = tiling.gradient_product(n_out, n_in, shape.x_dtype, shape.precision)
    programs = _ceil(n_out, how.rows) * (_ceil(n_in, how.columns) + shape.bias)
    squares = Launch(programs, 0, 4 * how.rows * how.columns, 4 * n_in * n_out)
    launches += [_library_product(n_out, n_in, batch, shape, device), squares, _update(shape, programs)]
    return _total(launches, _working_set(shape, 3 if shape.momentum else 2), device)


def streamed(shape: Shape, device: Device) -> Cost:
    """A step of `streamed.py`, as it is within a pass: each step gathers the next one's rows of x.

    A library's products, where they are allowed, take one launch more each, for their epilogue.
    """
    n_in, n_out, *suffix = shape.widths
    batch = shape.batch
    w_tiles = tiling.streamed_product(n_out, n_in, shape.precision)
    launches = []
    for i, (k, n) in enumerate(pairwise(shape.widths)):
        how = tiling.step_product(n, k, shape.precision)
        if i == 0 and batch <= tiling.NEXT_ROWS:
            launches.append(_sum_of_slices(batch, n, _ceil(k, tiling.streamed_share(n, k, w_tiles)), how))
        else:
            launches += _by_either(batch, n, k, shape, device, tiling.library(n, k, shape.precision))
    launches += _wide_softmax(shape)
    for k, n in reversed(list(pairwise((n_out, *suffix)))):
        launches += _by_either(batch, k, n, shape, device, tiling.library(n, k, shape.precision))
    launches += [*_norm_without_gradient(shape), _gather(shape), _advance(shape)]
    return _total(launches, _working_set(shape, 2 if shape.momentum else 1), device)


def plain(shape: Shape, device: Device) -> Cost:
    """The plain composition, for comparison: a library's products, G, and torch's elementwise kernels, in a CUDA graph.

    Beside the chain: the gathered target, g(z) of each layer, the loss and its residual, G and its bias, the norms and
    their sum, and the updates.
    """
    n_in, n_out, *_ = shape.widths
    batch, outputs, weight = shape.batch, shape.widths[-1], n_in * n_out
    launches = _library_chain(shape, device)
    launches += [_elementwise(2 * batch * n, device) for n in shape.widths[1:]]
    launches += [_elementwise(count * batch * outputs, device) for count in (2, 2, 3)]
    launches += [_library_product(n_out, n_in, batch, shape, device), _elementwise(weight, device)]
    launches += [_elementwise((6 if shape.momentum else 3) * weight, device)]
    launches += [_elementwise(batch * n_out, device), _elementwise(n_out, device), _elementwise(3 * n_out, device)] * shape.bias
    launches += [_elementwise(2, device)]
    return _total(launches, _working_set(shape, 3 if shape.momentum else 2), device)
