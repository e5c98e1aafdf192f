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

    Where an operand was widened from bfloat16, Triton 3.7 for sm_100 computes an ieee dot of 64 rows or more as tf32,
    which would round the other, float32 operand; and on sm_90 such a dot spills. Tiles of 32 do neither. The inner
    block stays what it is for float32 x, so that equal values give equal bits.
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


# The streamed plan, by model (figures of an H200 from public sources), not by measurement. Per weight and step it moves 8 or 12
# bytes where the fused plan moves 20, for four launches more, 1.3 us each in a graph. While W and G fit the L2 cache of 50 MB
# together, what it saves is about what it costs; from 25 MB of weights on they do not, and it saves 3 us a million weights.
STREAMED_WEIGHT = 6 * 2**20

# Mini-batches up to this size have their forward product in the update before. With more rows the three tf32 products spill on
# sm_80 and sm_90, and reading both mini-batches from L2 for every strip of outputs takes longer than W from memory.
NEXT_ROWS = 64

# Programs of the update and of the exact norm: about four for each multiprocessor. Each has a part of the inputs of a strip of
# outputs, so that its partial pre-activations are summed in registers, and few of them go through memory.
STREAMED_PROGRAMS = 512

# The Gram matrices: a product's inner block, a program's fewest columns, programs aimed at, and a block of terms.
GRAM_INNER, GRAM_SHARE, GRAM_PROGRAMS, GRAM_TERMS = 16, 256, 264, 1024

# Columns that a program of the gather copies.
GATHER_COLUMNS = 1024


def by_gram(n_out: int, n_in: int, rows: int) -> bool:
    """Whether the norm comes from Gram matrices, in the streamed plan, rather than from tiles of G that are not stored.

    The matrices cost rows^2 (n_in + n_out) multiplications in float64, the tiles rows n_out n_in at the weights' precision, and
    rows < 2 n_out n_in / (n_in + n_out) are fewer operations. But float64 has a quarter of the speed of three tf32 products,
    half of theirs being saved by symmetry: so 2 becomes 1/2.
    """
    return 2 * rows * (n_in + n_out) < n_out * n_in


def streams(n_out: int, n_in: int, rows: int) -> bool:
    """Whether the streamed plan is modelled to beat the fused one, for the active layer and mini-batches of `rows`.

    8 bytes a weight less at 4.3 TB/s must outweigh the Gram matrices, rows^2 (n_in + n_out) operations at 33 TFLOP/s. Without
    them forming G a second time costs more than storing it.
    """
    wins = rows * rows * (n_in + n_out) < 61 * n_out * n_in
    return n_out * n_in >= STREAMED_WEIGHT and by_gram(n_out, n_in, rows) and wins


def library(n_out: int, n_in: int) -> bool:
    """Whether the streamed plan leaves this layer's products with D or X to torch.mm.

    By model: cuBLAS reaches 320 to 400 TFLOP/s in tf32, more than Triton's loop here; in plain float32 35 to 50, less than
    three tf32 products. Small layers are bound by launches, and a library's product needs one more.
    """
    return n_out * n_in >= LARGE_WEIGHT and torch.get_float32_matmul_precision() != "highest"


def streamed_product(n_out: int, n_in: int) -> Tiles:
    """Tiles of the streamed plan: rows are outputs, columns inputs of W, the inner dimension the mini-batch."""
    precision = _precision(True)
    widest = 32 if precision == "tf32x3" else 64  # found by compiling: wider ones spill
    return Tiles(_power_of_two(n_out, 16, 64), _power_of_two(n_in, 16, widest), 32, precision, 8, 2)


def streamed_share(n_out: int, n_in: int, tiles: Tiles) -> int:
    """Inputs of one program, in whole tiles."""
    strips, blocks = -(-n_out // tiles.rows), -(-n_in // tiles.columns)
    return -(-blocks // max(1, min(blocks, STREAMED_PROGRAMS // strips))) * tiles.columns


def next_block(rows: int) -> int:
    """Rows of the next mini-batch's tile in the update."""
    return _power_of_two(rows, 16, NEXT_ROWS) if rows else 16


def gram_tiles(rows: int, n_out: int, n_in: int) -> tuple[int, int]:
    """(rows of a tile, columns of X or D that one program multiplies) of a mini-batch's Gram matrices.

    Tiles of 64 rows in float64 do not compile for sm_100 in Triton 3.7.
    """
    block = _power_of_two(rows, 16, 32)
    along = -(-rows // block)
    share = (n_in + n_out) * along * (along + 1) // 2 // GRAM_PROGRAMS
    return block, max(GRAM_SHARE, -(-share // GRAM_INNER) * GRAM_INNER)


class Device(NamedTuple):
    """What the cost model knows of a GPU. From public figures and latencies: nothing of it has been measured."""

    barrier: float = 0.9  # microseconds of a grid barrier
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


def _persistent(
    n_out: int, n_in: int, n_next: int, rows: int, units: int, inputs: int, warps: int, device: Device
) -> Persistent:
    split_out, split_in = -(-n_out // units), -(-n_in // (warps * inputs))
    next_units = _power_of_two(n_next, 16, 64) if n_next else 16
    barriers = (split_in > 1) + (n_next > 0 and split_out > 1) + (split_out * split_in > 1)
    products = 2 * rows * units * warps * inputs + (2 * rows * units * next_units if n_next else 0)
    exchanged = rows * warps * inputs + (split_in > 1) * split_in * rows * units
    exchanged += (n_next > 0 and split_out > 1) * split_out * rows * next_units
    arithmetic = products / 1e6 / device.fma
    transfers = 4 * exchanged / 1e6 / device.l2_per_multiprocessor
    time = barriers * device.barrier + arithmetic + transfers
    return Persistent(rows, units, inputs, next_units, split_out, split_in, warps, time)


def persistent(
    widths: list[int],
    batch: int,
    cross_entropy: bool,
    momentum: bool,
    x_dtype: torch.dtype,
    most_programs: int,
    device: Device = H200,
) -> Persistent | None:
    """The fastest tiles, by the model, of the persistent plan, or None where it does not serve.

    `widths` are n_in, n_out and the widths of the suffix. It serves the last layer and the one before it, where the layer
    fits the registers of at most `most_programs` programs and a mini-batch their tiles. Its arithmetic is plain float32
    whatever the precision switch allows: that costs little there, and tf32 needs registers that the tiles have.
    """
    n_in, n_out, *suffix = widths
    n_next = suffix[0] if suffix else 0
    rows = _power_of_two(batch, 32, 64)
    # Widened bfloat16 in a larger dot would be rounded to tf32 (see `_largest`); a last layer with 64 rows spills under 3.6.
    most_rows = 64 if suffix and x_dtype == torch.float32 else 32
    if len(suffix) > 1 or n_next > 64 or batch > most_rows:
        return None
    fitting = []
    for warps, units, inputs in itertools.product((4, 8), (16, 32, 64), (16, 32, 64)):
        tiles = _persistent(n_out, n_in, n_next, rows, units, inputs, warps, device)
        registers = ((3 + momentum) * units * inputs + 2 * rows * inputs + 2 * rows * units) // 32
        if registers > PERSISTENT_REGISTERS or tiles.split_out * tiles.split_in > most_programs:
            continue
        if cross_entropy and not suffix and tiles.split_out > 1:
            continue
        fitting.append(tiles)
    return min(fitting, key=lambda tiles: (tiles.microseconds, tiles.split_out * tiles.split_in), default=None)
