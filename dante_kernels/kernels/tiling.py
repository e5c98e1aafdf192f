"""Which tiles, how many warps and which arithmetic a product of a step gets: from shapes and switches alone.

No rule of the fused step looks at the number of rows: so a row's result is the same bits whatever rows stand beside it, and
a short last mini-batch is computed like a call of its own. Those of the streamed plan, at the end, look at the mini-batch's
own rows, and so does the choice between the plans (`plan.py`).
"""

from __future__ import annotations

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


def power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two that is not below size, kept between low and high."""
    return min(max(1 << (size - 1).bit_length(), low), high)


def _precision(large: bool, switch: str | None) -> str:
    """The precision switch as a dot's arithmetic; torch.get_float32_matmul_precision() where None is given."""
    wanted = switch or torch.get_float32_matmul_precision()
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


def _warps(largest: int, precision: str) -> int:
    """With 4 warps some ieee specialization of a large tile spills, for sm_100 or under Triton 3.6 or 3.9."""
    return 8 if precision == "ieee" and largest == 64 else 4


def step_product(n_out: int, n_in: int, switch: str | None = None) -> Tiles:
    """Tiles of a layer's product in a step, forward or backward, where n_out is the width of the result."""
    large = n_out * n_in >= LARGE_WEIGHT
    precision = _precision(large, switch)
    if large:
        return Tiles(64, 64 if n_out >= 2048 else 32, 32, precision, 4, 3)
    return Tiles(16, power_of_two(n_out, 16, 32), 32 if precision == "ieee" else 64, precision, 4, 3)


def forward_product(n_out: int, n_in: int, switch: str | None = None) -> Tiles:
    """Tiles of `layer_forward`, which sees all rows of a pass or those of a short block, 60 and more.

    Larger float32 ones would draw less from L2 where there are many rows, and leave most of a GPU idle where there are few.
    """
    precision = _precision(n_out * n_in >= LARGE_WEIGHT, switch)
    largest, inner = (32, 16) if precision == "ieee" else (64, 32)
    return Tiles(largest, power_of_two(n_out, 16, largest), inner, precision, 4, 3)


def gradient_product(n_out: int, n_in: int, x_dtype: torch.dtype, switch: str | None = None) -> Tiles:
    """Tiles of G = D^T X: rows are outputs, columns inputs, the inner dimension the mini-batch."""
    precision = _precision(n_out * n_in >= LARGE_WEIGHT, switch)
    wanted = 64 if n_out * n_in >= LARGE_GRADIENT else 32
    largest = _largest(wanted, precision, x_dtype)
    num_warps = _warps(largest, precision)
    inner = 16 if precision == "ieee" and wanted == 64 else 32
    return Tiles(power_of_two(n_out, 16, largest), power_of_two(n_in, 16, largest), inner, precision, num_warps, 3)


# The update: tile, warps, and the most programs. Every program adds up all partial sums of the norm, so more programs
# than fill a large GPU several times over would only read them more often.
UPDATE_OUT, UPDATE_IN, UPDATE_WARPS, UPDATE_PROGRAMS = 16, 128, 4, 1024

# Softmax over rows wider than a tile.
SOFTMAX_COLUMNS, SOFTMAX_WARPS = 1024, 4


# The streamed plan's rules, by model (figures of an H200 from public sources), not by measurement.

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


# The library plan leaves products of layers with so many weights, or of so many rows, to torch.mm. By model: smaller ones take
# no longer than the launch.
WORTH_A_LAUNCH, MANY_ROWS = 2**14, 2**12


def worth_a_launch(n_out: int, n_in: int, rows: int) -> bool:
    """Whether the library plan leaves this layer's products with so many rows to torch.mm."""
    return n_out * n_in >= WORTH_A_LAUNCH or rows >= MANY_ROWS


def library(n_out: int, n_in: int, switch: str | None = None) -> bool:
    """Whether the streamed plan leaves this layer's products with D or X to torch.mm.

    By model: cuBLAS reaches 320 to 400 TFLOP/s in tf32, more than Triton's loop here; in plain float32 35 to 50, less than
    three tf32 products. Small layers are bound by launches, and a library's product needs one more.
    """
    return n_out * n_in >= LARGE_WEIGHT and (switch or torch.get_float32_matmul_precision()) != "highest"


def streamed_product(n_out: int, n_in: int, switch: str | None = None) -> Tiles:
    """Tiles of the streamed plan: rows are outputs, columns inputs of W, the inner dimension the mini-batch."""
    precision = _precision(True, switch)
    widest = 32 if precision == "tf32x3" else 64  # found by compiling: wider ones spill
    return Tiles(power_of_two(n_out, 16, 64), power_of_two(n_in, 16, widest), 32, precision, 8, 2)


def streamed_share(n_out: int, n_in: int, tiles: Tiles) -> int:
    """Inputs of one program, in whole tiles."""
    strips, blocks = -(-n_out // tiles.rows), -(-n_in // tiles.columns)
    return -(-blocks // max(1, min(blocks, STREAMED_PROGRAMS // strips))) * tiles.columns


def next_block(rows: int) -> int:
    """Rows of the next mini-batch's tile in the update."""
    return power_of_two(rows, 16, NEXT_ROWS) if rows else 16


def gram_tiles(rows: int, n_out: int, n_in: int) -> tuple[int, int]:
    """(rows of a tile, columns of X or D that one program multiplies) of a mini-batch's Gram matrices.

    Tiles of 64 rows in float64 do not compile for sm_100 in Triton 3.7.
    """
    block = power_of_two(rows, 16, 32)
    along = -(-rows // block)
    share = (n_in + n_out) * along * (along + 1) // 2 // GRAM_PROGRAMS
    return block, max(GRAM_SHARE, -(-share // GRAM_INNER) * GRAM_INNER)


# With two layers after the active one, the persistent plan's programs add up partial pre-activations so many at once.
PIECE = 256
