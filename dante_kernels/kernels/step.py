# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM102, SIM108 - an `if` on a constexpr is decided at compile time, and stands apart from the others
"""The gradient of the active layer with its norm, and the normalized update in place."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import divide, load_x, multiply_add, quotients, source_rows, sum_of, tile_sum

BIAS_ROWS = tl.constexpr(64)
PARTIALS = tl.constexpr(1024)


@triton.jit
def gradient_tile(
    p_d, p_x, p_order, start, rows, x_rows, out, column, n_out, n_in, stride_xr, stride_xc, stride_order, x_scale,
    PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """G = D^T X at these outputs and inputs, (BLOCK_OUT, BLOCK_IN), over all rows; 0 outside of G."""
    m_out = out < n_out
    m_column = column < n_in
    p_x_columns = p_x + column[None, :].to(tl.int64) * stride_xc
    acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for first in range(0, rows, BLOCK_B):
        position = first + tl.arange(0, BLOCK_B)
        m_row = position < rows
        x_row, exists = source_rows(p_order, stride_order, position.to(tl.int64) + start, m_row, x_rows)
        # A row that does not exist has a D of NaN, which spoils G without a row of X.
        x = load_x(p_x_columns + x_row[:, None] * stride_xr, (m_row & exists)[:, None] & m_column[None, :], x_scale)
        d = tl.load(
            p_d + position[None, :].to(tl.int64) * n_out + out[:, None], mask=m_out[:, None] & m_row[None, :], other=0.0
        )
        acc = multiply_add(d, x, acc, PRECISION)
    return acc


@triton.jit
def column_sums(p_d, rows, out, n_out, BLOCK_OUT: tl.constexpr):
    """The bias's gradient, D's column sums, at these outputs."""
    acc = tl.zeros([BIAS_ROWS, BLOCK_OUT], tl.float32)
    for first in range(0, rows, BIAS_ROWS):
        position = first + tl.arange(0, BIAS_ROWS)
        m_tile = (position < rows)[:, None] & (out < n_out)[None, :]
        acc += tl.load(p_d + position[:, None].to(tl.int64) * n_out + out[None, :], mask=m_tile, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["start", "rows", "x_rows", "stride_order"])
def gradient(
    p_d, p_x, p_order, p_grad, p_grad_bias, p_partials,
    start, rows, x_rows, n_out, n_in, stride_xr, stride_xc, stride_order, x_scale,
    PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """G = D^T X and the column sums of D, with the squares of both summed per program into `partials`.

    D (rows, n_out) is scratch, contiguous; rows of X (any strides) are looked up in `order` at start.. as in `product`;
    G (n_out, n_in) and the bias's gradient (n_out,) are contiguous. A 1D grid: first one program for each tile of G,
    which stays in registers over all rows; then, where the layer has a bias, one for each strip of BLOCK_OUT columns of
    D. Without X (None) a library has made G, which is read instead. No barrier. Bytes: D is read ceil(n_in / BLOCK_IN)
    times, X ceil(n_out / BLOCK_OUT) times (mostly from L2), G
    written once. s^2 = ||G||^2 + ||column sums||^2 is then the sum of `partials`, one a program.
    """
    program = tl.program_id(0)
    tiles_in = tl.cdiv(n_in, BLOCK_IN)
    tiles = tl.cdiv(n_out, BLOCK_OUT) * tiles_in
    if program < tiles:
        out = (program // tiles_in) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        column = (program % tiles_in) * BLOCK_IN + tl.arange(0, BLOCK_IN)
        if p_x is not None:
            acc = gradient_tile(
                p_d, p_x, p_order, start, rows, x_rows, out, column, n_out, n_in, stride_xr, stride_xc, stride_order, x_scale,
                PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_B,
            )  # fmt: skip
        m_tile = (out < n_out)[:, None] & (column < n_in)[None, :]
        p_tile = p_grad + out[:, None].to(tl.int64) * n_in + column[None, :]
        if p_x is None:
            acc = tl.load(p_tile, mask=m_tile, other=0.0)
        else:
            tl.store(p_tile, acc, mask=m_tile)
        tl.store(p_partials + program, tile_sum(acc * acc))
    else:
        if p_grad_bias is not None:
            out = (program - tiles) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            acc_bias = column_sums(p_d, rows, out, n_out, BLOCK_OUT)
            tl.store(p_grad_bias + out, acc_bias, mask=out < n_out)
            tl.store(p_partials + program, tl.sum(acc_bias * acc_bias, axis=0))


@triton.jit
def descend(
    p_parameter, at, p_velocity, velocity_at, mask, grad, norm, lr, momentum, NESTEROV: tl.constexpr
):  # fmt: skip
    """parameter <- parameter - lr * direction for one tile, in the reference's order of operations, without contraction.

    `at` and `velocity_at` are the tile's offsets; without a velocity (None) there is no momentum. Returns the new values.
    """
    direction = quotients(grad, norm)
    if p_velocity is not None:
        velocity = momentum * tl.load(p_velocity + velocity_at, mask=mask, other=0.0) + direction
        tl.store(p_velocity + velocity_at, velocity, mask=mask)
        if NESTEROV:
            direction = direction + momentum * velocity
        else:
            direction = velocity
    parameter = tl.load(p_parameter + at, mask=mask, other=0.0) - lr * direction
    tl.store(p_parameter + at, parameter, mask=mask)
    return parameter


@triton.jit(do_not_specialize=["step", "partials", "loss_partials"])
def update(
    p_weight, p_bias, p_velocity_weight, p_velocity_bias, p_grad, p_grad_bias, p_partials, p_loss_partials,
    p_losses, p_norms, p_lr,
    step, partials, loss_partials, n_out, n_in,
    stride_wo, stride_wi, stride_bias, stride_vo, stride_vi, stride_vbias,
    elements, momentum,
    NESTEROV: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """s from its partial sums, then W <- W - lr G / s in place, and likewise the bias; with momentum through V.

    Every program adds up the same partial sums in the same order, so that s needs no barrier and no visit to the host;
    program 0 also writes norms[step] = s and losses[step] = sum of the loss's partial sums / elements. Where s is zero or
    not finite, no program changes anything. With p_weight None only loss and norm are written.

    W and V have any strides, G is contiguous. A 1D grid of at most ceil(n_out / BLOCK_OUT) ceil(n_in / BLOCK_IN)
    programs, each taking every so-many-th tile; the program of a row of tiles' first tile also takes its part of the
    bias. Bytes: G read once, W (and V) read and written once, the partial sums once a program.
    """
    first = tl.program_id(0)
    norm = tl.sqrt_rn(sum_of(p_partials, partials, PARTIALS))
    if first == 0:
        tl.store(p_norms + step, norm)
        if p_losses is not None:
            tl.store(p_losses + step, divide(sum_of(p_loss_partials, loss_partials, PARTIALS), elements))
    if p_weight is not None:
        # NaN is neither above 0 nor below infinity.
        if (norm > 0) & (norm < float("inf")):
            lr = tl.load(p_lr)
            tiles_in = tl.cdiv(n_in, BLOCK_IN)
            tiles = tl.cdiv(n_out, BLOCK_OUT) * tiles_in
            for tile in range(first, tiles, tl.num_programs(0)):
                out = (tile // tiles_in) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
                column = (tile % tiles_in) * BLOCK_IN + tl.arange(0, BLOCK_IN)
                row = out[:, None].to(tl.int64)
                column = column[None, :].to(tl.int64)
                mask = (out < n_out)[:, None] & (column < n_in)
                grad = tl.load(p_grad + row * n_in + column, mask=mask, other=0.0)
                at, velocity_at = row * stride_wo + column * stride_wi, row * stride_vo + column * stride_vi
                descend(p_weight, at, p_velocity_weight, velocity_at, mask, grad, norm, lr, momentum, NESTEROV)
                if p_bias is not None:
                    if tile % tiles_in == 0:
                        m_out = out < n_out
                        grad_bias = tl.load(p_grad_bias + out, mask=m_out, other=0.0)
                        at_bias, velocity_at_bias = out.to(tl.int64) * stride_bias, out.to(tl.int64) * stride_vbias
                        descend(
                            p_bias, at_bias, p_velocity_bias, velocity_at_bias, m_out, grad_bias, norm, lr, momentum, NESTEROV
                        )
