"""Which plan a pass gets, and which tiles, how many warps and which arithmetic a product: from shapes and switches alone.

No rule for a product looks at the number of rows: so a row's result is the same bits whatever rows stand beside it, and a
short last mini-batch is computed like a call of its own. Only the choice between the plans looks at the mini-batch's size.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

# From this many elements on, a layer's products are bound by throughput: larger tiles, and full float32 as three tf32
# products on the matrix units. Below, small tiles give more programs, and plain float32 arithmetic costs about the same.
LARGE_WEIGHT = 2**21

# A gradient with this many elements fills a large GPU with tiles of 64 x 64; smaller ones get smaller tiles.
LARGE_GRADIENT = 2**19


class Tiles(NamedTuple):
    """One product's tile sizes (rows and columns of the result, inner dimension) and how to compute it."""

    rows: int
    columns: int
    inner: int
    precision: str
    num_warps: int
    num_stages: int


def _power_of_two(size: int, low: int, high: int) -> int:
    return min(max(1 << (size - 1).bit_length(), low), high)


def _precision(large: bool) -> str:
    """torch.get_float32_matmul_precision() as a dot's arithmetic."""
    wanted = torch.get_float32_matmul_precision()
    if wanted == "highest":
        return "tf32x3" if large else "ieee"
    return "tf32" if wanted == "high" else "bf16"


def _largest(wanted: int, precision: str, x_dtype: torch.dtype) -> int:
    """The larger side of a tile that reads x.

    Where an operand was widened from bfloat16 or uint8, Triton 3.7 for sm_100 computes an ieee dot of 64 rows or more as
    tf32, which would round the other, float32 operand; and on sm_80 or sm_90 such a dot spills. Tiles of 32 do neither.
    The inner block stays what it is for float32 x, so that equal values give equal bits.
    """
    return min(wanted, 32) if precision == "ieee" and x_dtype != torch.float32 else wanted


def step_product(n_out: int, n_in: int) -> Tiles:
    """Tiles of a layer's product in a step, forward or backward, where n_out is the width of the result."""
    large = n_out * n_in >= LARGE_WEIGHT
    precision = _precision(large)
    if large:
        return Tiles(64, 64 if n_out >= 2048 else 32, 32, precision, 4, 3)
    return Tiles(16, _power_of_two(n_out, 16, 32), 32 if precision == "ieee" else 64, precision, 4, 3)


def forward_product(n_out: int, n_in: int, x_dtype: torch.dtype) -> Tiles:
    """Tiles of `layer_forward`, which mostly sees many rows at once."""
    precision = _precision(n_out * n_in >= LARGE_WEIGHT)
    largest = _largest(64, precision, x_dtype)
    return Tiles(largest, _power_of_two(n_out, 16, largest), 16 if precision == "ieee" else 32, precision, 4, 3)


def gradient_product(n_out: int, n_in: int, x_dtype: torch.dtype) -> Tiles:
    """Tiles of G = D^T X: rows are outputs, columns inputs, the inner dimension the mini-batch."""
    precision = _precision(n_out * n_in >= LARGE_WEIGHT)
    wanted = 64 if n_out * n_in >= LARGE_GRADIENT else 32
    largest = _largest(wanted, precision, x_dtype)
    # With 4 warps some ieee specialization of the large tile spills under Triton 3.6 or 3.9.
    num_warps = 8 if precision == "ieee" and largest == 64 else 4
    inner = 16 if precision == "ieee" and wanted == 64 else 32
    return Tiles(_power_of_two(n_out, 16, largest), _power_of_two(n_in, 16, largest), inner, precision, num_warps, 3)


# The update: tile, warps, and the most programs. Every program adds up all partial sums of the norm, so more programs
# than fill a large GPU several times over would only read them more often.
UPDATE_OUT, UPDATE_IN, UPDATE_WARPS, UPDATE_PROGRAMS = 16, 128, 4, 1024

# Softmax over rows wider than a tile.
SOFTMAX_COLUMNS, SOFTMAX_WARPS = 1024, 4


class Device(NamedTuple):
    """What the cost model knows of a GPU. From public figures and latencies: nothing of it has been measured."""

    barrier: float = 0.7  # microseconds of a grid barrier of few programs
    barrier_program: float = 0.0035  # and of each program more
    block: float = 25.0  # microseconds that a block costs beside its steps: prefix product, rows, launches, W in and out
    tile: float = 0.5  # microseconds of latency that each further tile of rows adds to a step
    l2_per_multiprocessor: float = 0.12  # MB a microsecond that one multiprocessor reads from L2
    fma: float = 0.253  # millions of float32 fused multiply-adds a microsecond on one multiprocessor


H200 = Device()


class Persistent(NamedTuple):
    """The tiles of a pass in one launch (`persistent.py`), and the modelled microseconds of a step."""

    rows: int
    units: int
    inputs: int
    next_units: int
    split_out: int
    split_in: int
    num_warps: int
    microseconds: float


# Registers of a thread that the tiles of one program may take, by the estimate in `persistent`. Found by compiling: with more
# some specialization spills.
PERSISTENT_REGISTERS = 160

# A modelled time within this factor of the best is as good: the model is no better than that.
NEAR = 1.1


def _persistent(
    n_out: int, n_in: int, n_next: int, batch: int, units: int, inputs: int, warps: int, device: Device
) -> Persistent:
    split_out, split_in = -(-n_out // units), -(-n_in // (warps * inputs))
    next_units = _power_of_two(n_next, 16, 64) if n_next else 16
    rows = 32  # with more some specialization spills; widened bfloat16 in a larger dot would be rounded to tf32 (`_largest`)
    tiles = -(-batch // rows)
    padded, programs = tiles * rows, split_out * split_in
    products = 2 * padded * warps * inputs * units + (2 * padded * units * next_units if n_next else 0)
    if tiles == 1:
        barriers = (split_in > 1) + (n_next > 0 and split_out > 1) + (programs > 1)
        exchanged = (warps * inputs + (split_in > 1) * split_in * units + (split_out > 1) * split_out * n_next) * padded
    else:
        barriers = (split_in > 1) + 2 * (programs > 1)
        exchanged = (2 * warps * inputs + 2 * units + split_out * n_next) * padded
    time = barriers * (device.barrier + device.barrier_program * programs) + (tiles - 1) * device.tile
    time += products / 1e6 / device.fma + 4 * exchanged / 1e6 / device.l2_per_multiprocessor
    return Persistent(rows, units, inputs, next_units, split_out, split_in, warps, time)


def persistent(
    widths: list[int],
    batch: int,
    cross_entropy: bool,
    momentum: bool,
    most_programs: int,
    device: Device = H200,
) -> Persistent | None:
    """The tiles of the persistent plan: of those near the fastest, by the model, the ones with the fewest programs.

    So that several models find room side by side, with the tiles, and the bits, of each alone. None where the plan does not
    serve.

    `widths` are n_in, n_out and the widths of the suffix. It serves the last layer and the one before it, where the layer
    fits the registers of at most `most_programs` programs. Its arithmetic is plain float32 whatever the precision switch
    allows: that costs little there, and tf32 needs registers that the tiles have.
    """
    n_in, n_out, *suffix = widths
    n_next = suffix[0] if suffix else 0
    if len(suffix) > 1 or n_next > 64:
        return None
    fitting = []
    for warps, units, inputs in itertools.product((4, 8), (16, 32, 64), (16, 32, 64)):
        tiles = _persistent(n_out, n_in, n_next, batch, units, inputs, warps, device)
        registers = ((3 + momentum) * units * inputs + 2 * tiles.rows * (inputs + units)) // 32
        programs = tiles.split_out * tiles.split_in
        if registers > PERSISTENT_REGISTERS or programs > most_programs:
            continue
        if cross_entropy and not suffix and tiles.split_out > 1:
            continue
        fitting.append((programs, tiles.microseconds, tiles))
    near = NEAR * min((time for _, time, _ in fitting), default=0.0)
    return min((one for one in fitting if one[1] <= near), default=(0, 0.0, None))[2]


def blocks(
    widths: list[int],
    batch: int,
    cross_entropy: bool,
    momentum: bool,
    steps: float,
    most_programs: int,
    device: Device = H200,
) -> Persistent | None:
    """The tiles with which blocks of `steps` steps, of two layers in turn, run in one launch, or None where that is slower.

    There a step of either layer takes what the hidden one's takes, but a block costs nothing beside its steps.
    """
    if len(widths) != 3:
        return None
    hidden = persistent(widths, batch, cross_entropy, momentum, most_programs, device)
    last = persistent(widths[1:], batch, cross_entropy, momentum, most_programs, device)
    if hidden is None or (last is not None and steps * (hidden.microseconds - last.microseconds) > 2 * device.block):
        return None
    return hidden
