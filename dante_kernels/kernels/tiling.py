"""Which tiles, how many warps and which arithmetic a product of the fused step gets: from shapes and switches alone.

No rule looks at the number of rows: so a row's result is the same bits whatever rows stand beside it, and a short last
mini-batch is computed like a call of its own. Only the choice between the plans (`plan.py`) looks at the mini-batch's size.
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


def step_product(n_out: int, n_in: int, switch: str | None = None) -> Tiles:
    """Tiles of a layer's product in a step, forward or backward, where n_out is the width of the result."""
    large = n_out * n_in >= LARGE_WEIGHT
    precision = _precision(large, switch)
    if large:
        return Tiles(64, 64 if n_out >= 2048 else 32, 32, precision, 4, 3)
    return Tiles(16, power_of_two(n_out, 16, 32), 32 if precision == "ieee" else 64, precision, 4, 3)


def forward_product(n_out: int, n_in: int, x_dtype: torch.dtype) -> Tiles:
    """Tiles of `layer_forward`, which mostly sees many rows at once."""
    precision = _precision(n_out * n_in >= LARGE_WEIGHT, None)
    largest = _largest(64, precision, x_dtype)
    return Tiles(largest, power_of_two(n_out, 16, largest), 16 if precision == "ieee" else 32, precision, 4, 3)


def gradient_product(n_out: int, n_in: int, x_dtype: torch.dtype, switch: str | None = None) -> Tiles:
    """Tiles of G = D^T X: rows are outputs, columns inputs, the inner dimension the mini-batch."""
    precision = _precision(n_out * n_in >= LARGE_WEIGHT, switch)
    wanted = 64 if n_out * n_in >= LARGE_GRADIENT else 32
    largest = _largest(wanted, precision, x_dtype)
    # With 4 warps some ieee specialization of the large tile spills under Triton 3.6 or 3.9.
    num_warps = 8 if precision == "ieee" and largest == 64 else 4
    inner = 16 if precision == "ieee" and wanted == 64 else 32
    return Tiles(power_of_two(n_out, 16, largest), power_of_two(n_in, 16, largest), inner, precision, num_warps, 3)


# The update: tile, warps, and the most programs. Every program adds up all partial sums of the norm, so more programs
# than fill a large GPU several times over would only read them more often.
UPDATE_OUT, UPDATE_IN, UPDATE_WARPS, UPDATE_PROGRAMS = 16, 128, 4, 1024

# Softmax over rows wider than a tile.
SOFTMAX_COLUMNS, SOFTMAX_WARPS = 1024, 4
