# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""One layer's matrix product with everything that follows it, forward and backward; softmax of wide rows; x's rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    CROSS_ENTROPY,
    element_loss,
    load_x,
    log_of_sum,
    multiply_add,
    phi,
    residual,
    slope,
    source_rows,
    target_tile,
    tile_sum,
)

# What `product` does with A B before it is stored.
FORWARD, LAST, BACKWARD = 0, 1, 2
_LAST = tl.constexpr(LAST)
_BACKWARD = tl.constexpr(BACKWARD)

# Values that change from step to step, or only guard: a kernel is not compiled anew for them.
_VARYING = ["start", "rows", "x_rows", "slices", "stride_order", "stride_tr", "stride_tc"]


@triton.jit
def softmax_tile(h, t, m_column, scale):
    """dJ/dh and each row's cross-entropy, for a tile that holds whole rows: (p sum(t) - t) scale, p the softmax."""
    logits = tl.where(m_column[None, :], h, -float("inf"))
    shifted = logits - tl.max(logits, axis=1)[:, None]
    e = tl.exp(shifted)
    total = tl.sum(e, axis=1)[:, None]
    p = tl.div_rn(e, tl.zeros_like(e) + total)
    mass = tl.sum(t, axis=1)[:, None]
    # A class without weight adds nothing, also at a logit of -inf; but NaN must come through.
    entropy = tl.where(m_column[None, :] & ((t != 0) | (shifted != shifted)), t * (log_of_sum(total) - shifted), 0.0)
    return (p * mass - t) * scale, entropy


@triton.jit(do_not_specialize=["start", "x_rows", "stride_order"])
def gather(
    p_x, p_order, p_out, start, x_rows, n_in, stride_xr, stride_xc, stride_order, x_scale, BLOCK: tl.constexpr
):  # fmt: skip
    """The mini-batch's rows of x as contiguous float32 rows; a row that does not exist is NaN, which spoils all that it meets.
    uint8 stands for x * x_scale.

    A grid of (rows, ceil(n_in / BLOCK)) programs. Bytes: x read once, float32 written once.
    """
    position = tl.program_id(0) + tl.arange(0, 1)
    row, exists = source_rows(p_order, stride_order, position.to(tl.int64) + start, position >= 0, x_rows)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_column = (column < n_in)[None, :]
    p_row = p_x + row[:, None] * stride_xr + column[None, :].to(tl.int64) * stride_xc
    values = load_x(p_row, exists[:, None] & m_column, x_scale).to(tl.float32)
    values = tl.where(exists[:, None], values, float("nan"))
    tl.store(p_out + position[:, None].to(tl.int64) * n_in + column[None, :], values, mask=m_column)


@triton.jit(do_not_specialize=_VARYING)
def product(
    p_a, p_b, p_bias, p_out, p_slope, p_slices, p_target, p_order, p_loss,
    start, rows, x_rows, n, k, slices,
    stride_ar, stride_ak, stride_bk, stride_bc, stride_bias, stride_order, stride_tr, stride_tc,
    low, high, scale, x_scale,
    EPILOGUE: tl.constexpr, KIND: tl.constexpr, LOSS: tl.constexpr, CLASSES: tl.constexpr, FROM_X: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """One layer for one mini-batch: out = epilogue(A B), A (rows, k), B (k, n), out and slope (rows, n), contiguous.

    A grid of (ceil(rows / BLOCK_B), ceil(n / BLOCK_OUT)) programs, each with one tile of the result in registers; tiles
    of A and B stream through shared memory. No barrier, no second pass. A and B have any strides: B is W^T forward, W
    backward. Bytes: A is read ceil(n / BLOCK_OUT) times, B ceil(rows / BLOCK_B) times (mostly from L2), the epilogue's
    operands and results once. A row's result does not depend on `rows`.

    With `slices` (so many, rows, n), contiguous, another kernel has made A B: it is their sum in order, A and B are not read.

    FROM_X: A is x, whose rows are looked up in `order` at start.. (or are start.. themselves), never copied first; a row
    number that does not exist gives a row of NaN; uint8 stands for x * x_scale. Otherwise A is scratch, row i for position
    i of the mini-batch.

    EPILOGUE forward: z = A B + bias; out = phi(z), and g(z) to `slope` unless that is None.
    EPILOGUE last: z and h = phi(z) likewise; out = D = dJ/dh g(z) for the target's rows, and the tile's part of the
    loss, before the mean, to `loss`[program]. For the cross-entropy a tile must hold whole rows (BLOCK_OUT >= n).
    EPILOGUE backward: A is the next layer's D, B its W; out = (A B) * `slope`, with `slope` = g(z) of this layer from
    the forward product (out may be the same memory).
    """
    position = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.arange(0, BLOCK_IN)
    m_row = position < rows
    m_column = column < n
    m_tile = m_row[:, None] & m_column[None, :]
    p_tile = position[:, None].to(tl.int64) * n + column[None, :]

    if FROM_X or EPILOGUE == _LAST:
        x_row, exists = source_rows(p_order, stride_order, position.to(tl.int64) + start, m_row, x_rows)
        m_x = m_row & exists
    acc = tl.zeros([BLOCK_B, BLOCK_OUT], tl.float32)
    if p_slices is not None:
        slice_step = rows.to(tl.int64) * n
        for _ in range(0, slices):
            acc += tl.load(p_slices + p_tile, mask=m_tile, other=0.0)
            p_slices += slice_step
    else:
        if FROM_X:
            a_row, m_a = x_row, m_x
        else:
            a_row, m_a = position.to(tl.int64), m_row
        p_a_tile = p_a + a_row[:, None] * stride_ar + inner[None, :].to(tl.int64) * stride_ak
        p_b_tile = p_b + inner[:, None].to(tl.int64) * stride_bk + column[None, :].to(tl.int64) * stride_bc
        a_step = tl.full([], BLOCK_IN, tl.int64) * stride_ak
        b_step = tl.full([], BLOCK_IN, tl.int64) * stride_bk
        for first in range(0, k, BLOCK_IN):
            m_inner = first + inner < k
            a = load_x(p_a_tile, m_a[:, None] & m_inner[None, :], x_scale)
            b = tl.load(p_b_tile, mask=m_inner[:, None] & m_column[None, :], other=0.0)
            acc = multiply_add(a, b, acc, PRECISION)
            p_a_tile += a_step
            p_b_tile += b_step

    if EPILOGUE == _BACKWARD:
        tl.store(p_out + p_tile, acc * tl.load(p_slope + p_tile, mask=m_tile, other=0.0), mask=m_tile)
    else:
        z = acc
        if p_bias is not None:
            z += tl.load(p_bias + column.to(tl.int64) * stride_bias, mask=m_column, other=0.0)[None, :]
        if FROM_X and p_order is not None:
            z = tl.where(exists[:, None], z, float("nan"))
        h = phi(z, low, high, KIND)
        if EPILOGUE == _LAST:
            g = slope(z, low, high, KIND)
            t = target_tile(p_target, x_row, m_x, column, m_column, stride_tr, stride_tc, n, CLASSES)
            if LOSS == CROSS_ENTROPY:
                d, value = softmax_tile(h, t, m_column, scale)
            else:
                d = residual(h, t, scale, LOSS)
                value = element_loss(h, t, LOSS)
            value = tile_sum(tl.where(m_tile, value, 0.0))
            tl.store(p_loss + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), value)
            tl.store(p_out + p_tile, d * g, mask=m_tile)
        else:
            tl.store(p_out + p_tile, h, mask=m_tile)
            if p_slope is not None:
                tl.store(p_slope + p_tile, slope(z, low, high, KIND), mask=m_tile)


@triton.jit(do_not_specialize=_VARYING)
def softmax_rows(
    p_h, p_slope, p_target, p_order, p_loss,
    start, rows, x_rows, n, stride_order, stride_tr, stride_tc, scale,
    CLASSES: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Cross-entropy where a row is wider than a tile: D = (softmax(h) sum(t) - t) scale * slope, in place of h.

    h and slope are (rows, n), contiguous, left there by `product`. One program a row, which goes over its columns twice
    in tiles of BLOCK_OUT: first the running maximum, the sum of exponentials at that maximum and the target's sum, then
    D and the loss, which goes to `loss`[row]. Bytes: h and target twice, slope and D once.
    """
    position = tl.program_id(0) + tl.arange(0, 1)
    m_row = position < rows
    x_row, exists = source_rows(p_order, stride_order, position.to(tl.int64) + start, m_row, x_rows)
    m_x = m_row & exists
    row = position[:, None].to(tl.int64) * n

    peak = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    mass = tl.zeros([1], tl.float32)
    for first in range(0, n, BLOCK_OUT):
        column = first + tl.arange(0, BLOCK_OUT)
        m_column = column < n
        h = tl.load(p_h + row + column[None, :], mask=m_row[:, None] & m_column[None, :], other=-float("inf"))
        t = target_tile(p_target, x_row, m_x, column, m_column, stride_tr, stride_tc, n, CLASSES)
        new_peak = tl.maximum(peak, tl.max(h, axis=1))
        # Before the first finite value the peak is -inf, and -inf - -inf would be NaN.
        shrink = tl.where(peak == new_peak, 1.0, tl.exp(peak - new_peak))
        finite_peak = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        total = total * shrink + tl.sum(tl.exp(h - finite_peak[:, None]), axis=1)
        mass += tl.sum(t, axis=1)
        peak = new_peak

    acc_loss = tl.zeros([1, BLOCK_OUT], tl.float32)
    for first in range(0, n, BLOCK_OUT):
        column = first + tl.arange(0, BLOCK_OUT)
        m_tile = m_row[:, None] & (column < n)[None, :]
        h = tl.load(p_h + row + column[None, :], mask=m_tile, other=0.0)
        g = tl.load(p_slope + row + column[None, :], mask=m_tile, other=0.0)
        t = target_tile(p_target, x_row, m_x, column, column < n, stride_tr, stride_tc, n, CLASSES)
        shifted = h - peak[:, None]
        p = tl.div_rn(tl.exp(shifted), tl.zeros_like(shifted) + total[:, None])
        acc_loss += tl.where(m_tile & ((t != 0) | (shifted != shifted)), t * (log_of_sum(total)[:, None] - shifted), 0.0)
        tl.store(p_h + row + column[None, :], (p * mass[:, None] - t) * scale * g, mask=m_tile)
    tl.store(p_loss + position, tl.sum(acc_loss, axis=1), mask=m_row)
