# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment"
# ruff: noqa: SIM108 - an `if` on a constexpr is decided at compile time, and stands apart from the others
"""What a program of the persistent kernel does with one tile of rows, and with its part of a layer."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    CROSS_ENTROPY,
    element_loss,
    load_x,
    multiply_add,
    phi,
    quotients,
    residual,
    slope,
    source_rows,
    target_tile,
    tile_sum,
)
from .layers import softmax_tile

# How many times a Gram norm's square may be below the bound of its terms.
TRUST = tl.constexpr(64.0)

POINTERS = tl.constexpr(16)  # of a model, in the order of the persistent kernel's arguments


@triton.jit
def of_model(p, p_offsets, model, PLACE: tl.constexpr):
    """A model's own pointer: the call's, and with `offsets` (models, POINTERS) so many elements after it."""
    if p_offsets is not None:
        p += tl.load(p_offsets + model * POINTERS + PLACE)
    return p


@triton.jit
def mini_batch(p_schedule, step, steps, rows, batch):
    """A step's mini-batch: its first position, its number of rows, the active layer (0, or 1 for the next one), its block."""
    at = tl.zeros([], tl.int64) + step
    if p_schedule is None:
        first = at * batch
        count = tl.minimum(rows - first, batch).to(tl.int32)
        layer = tl.zeros([], tl.int32)
        block = tl.zeros([], tl.int32)
    else:
        p_step = p_schedule + 4 * at
        inside = at < steps
        first = tl.load(p_step, mask=inside, other=0)
        count = tl.load(p_step + 1, mask=inside, other=0).to(tl.int32)
        layer = tl.load(p_step + 2, mask=inside, other=0).to(tl.int32)
        block = tl.load(p_step + 3, mask=inside, other=0).to(tl.int32)
    return first, count, layer, block


@triton.jit
def in_parallel(seen, other, acted, layer):
    """Of the last layer's two versions the one that a block of `layer` works with, after one of `acted`, and the other one.

    They are the newest, which its own block moves, and the one before that block, which the hidden layer's block, the last of
    a cycle, sees.
    """
    newest = tl.where(acted == 0, other, seen)
    return tl.where(layer == 0, other, newest), tl.where(layer == 0, newest, other)


@triton.jit
def rows_of(p_order, stride_order, first, count, tile, x_rows, BLOCK_B: tl.constexpr):
    """Of a mini-batch's tile of rows: source rows, which of them exist, and which belong to the mini-batch."""
    position = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    m_row = position < count
    row, exists = source_rows(p_order, stride_order, position.to(tl.int64) + first, m_row, x_rows)
    return row, exists, m_row


@triton.jit
def part(group, share, size, local):
    """Which of `size` units or inputs a group's `local` ones are, and which exist: a part ends where the next one begins."""
    index = group * share + local
    return index, (local < share) & (index < size)


@triton.jit
def part_of_layer(
    i, p, stride_o, stride_i, unit_group, share_out, n_out, column, m_column, PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr
):  # fmt: skip
    """Where a layer's weights from these inputs to the i-th of PARTS parts of a program's units lie, and which exist."""
    unit, m_unit = part(unit_group, share_out, n_out, i * (BLOCK_OUT // PARTS) + tl.arange(0, BLOCK_OUT // PARTS))
    p_part = p + unit.to(tl.int64)[:, None] * stride_o + tl.expand_dims(column.to(tl.int64), -2) * stride_i
    return p_part, m_unit[:, None] & tl.expand_dims(m_column, -2)


@triton.jit
def load_parts(
    p, stride_o, stride_i, unit_group, share_out, n_out, column, m_column, PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr
):  # fmt: skip
    """A program's part of a layer, as PARTS tiles of its units one after the other."""
    tiles = ()
    for i in tl.static_range(PARTS):
        p_part, m_part = part_of_layer(
            i, p, stride_o, stride_i, unit_group, share_out, n_out, column, m_column, PARTS, BLOCK_OUT
        )  # fmt: skip
        tiles += (tl.load(p_part, mask=m_part, other=0.0),)
    return tiles


@triton.jit
def store_parts(
    tiles, p, stride_o, stride_i, unit_group, share_out, n_out, column, m_column, PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr
):  # fmt: skip
    """What `load_parts` has loaded, back to its place."""
    for i in tl.static_range(PARTS):
        p_part, m_part = part_of_layer(
            i, p, stride_o, stride_i, unit_group, share_out, n_out, column, m_column, PARTS, BLOCK_OUT
        )  # fmt: skip
        tl.store(p_part, tiles[i], mask=m_part)


@triton.jit
def kept_part(p_kept, i, like):
    """Where the i-th part of a program's tile lies that it keeps in memory: one after the other, without gaps."""
    slices: tl.constexpr = like.shape[0]
    units: tl.constexpr = like.shape[1]
    inputs: tl.constexpr = like.shape[2]
    row = tl.arange(0, slices)[:, None] * units + tl.arange(0, units)[None, :]
    return p_kept + i * (slices * units * inputs) + row[:, :, None] * inputs + tl.arange(0, inputs)[None, None, :]


@triton.jit
def tile_part(i, BLOCK_B: tl.constexpr, BLOCK_OUT: tl.constexpr, PARTS: tl.constexpr):
    """Where the columns of the i-th part of the units lie in a (BLOCK_B, BLOCK_OUT) tile."""
    local_unit = i * (BLOCK_OUT // PARTS) + tl.arange(0, BLOCK_OUT // PARTS)
    return tl.arange(0, BLOCK_B)[:, None] * BLOCK_OUT + local_unit[None, :]


@triton.jit
def load_rows(p_x_columns, stride_xr, row, m_row, m_column, x_scale):
    """Rows of x at a program's columns, (SLICES, BLOCK_B, BLOCK_IN) or (BLOCK_B, BLOCK_IN)."""
    mask = m_row[:, None] & tl.expand_dims(m_column, -2)
    return load_x(p_x_columns + row[:, None] * stride_xr, mask, x_scale)


@triton.jit
def product(x, w, PRECISION: tl.constexpr):
    """x w^T over a program's columns, (BLOCK_B, BLOCK_OUT): of each slice, if there are any, summed in their order."""
    if len(w.shape) == 2:
        zeros = tl.zeros([x.shape[0], w.shape[0]], tl.float32)
        z = multiply_add(x, tl.trans(w), zeros, PRECISION)
    else:
        zeros = tl.zeros([w.shape[0], x.shape[1], w.shape[1]], tl.float32)
        z = tl.sum(multiply_add(x, tl.permute(w, (0, 2, 1)), zeros, PRECISION), axis=0)
    return z


@triton.jit
def through(h, w, PRECISION: tl.constexpr):
    """h w of each slice of w, (SLICES, BLOCK_B, columns of w)."""
    every = tl.broadcast_to(h[None, :, :], [w.shape[0], h.shape[0], h.shape[1]])
    zeros = tl.zeros([w.shape[0], h.shape[0], w.shape[2]], tl.float32)
    return multiply_add(every, w, zeros, PRECISION)


@triton.jit
def add_gradient(d, x, grad, PRECISION: tl.constexpr):
    """grad + d^T x over a program's columns, of the tile's shape."""
    d_t = tl.trans(d)
    if len(x.shape) == 3:
        d_t = tl.broadcast_to(d_t[None, :, :], [x.shape[0], d_t.shape[0], d_t.shape[1]])
    return multiply_add(d_t, x, grad, PRECISION)


@triton.jit
def exchanged(p, mask):
    """What other programs have stored, 0 outside the mask, if there is one; past L1, which knows nothing of their stores."""
    if mask is None:
        stored = tl.load(p, cache_modifier=".cg")
    else:
        stored = tl.load(p, mask=mask, other=0.0, cache_modifier=".cg")
    return stored


@triton.jit
def sum_of_parts(p_tile, mask, size, PARTS: tl.constexpr):
    """The sum of a tile's exchanged parts, in their order; `size` floats lie between one and the next."""
    total = exchanged(p_tile, mask)
    for i in tl.range(1, PARTS, loop_unroll_factor=4):
        total += exchanged(p_tile + i * size, mask)
    return total


@triton.jit
def forward_of_part(
    i, w, p_z, p_x_columns, p_order, stride_order, stride_xr, first, count, tiles, x_rows, m_column, x_scale,
    BLOCK_B: tl.constexpr, BLOCK_OUT: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X w^T of all tiles of a mini-batch's rows, w being the i-th part of a program's units, to its columns of `p_z`."""
    for tile in range(0, tiles):
        row, exists, m_row = rows_of(p_order, stride_order, first, count, tile, x_rows, BLOCK_B)
        x = load_rows(p_x_columns, stride_xr, row, m_row & exists, m_column, x_scale)
        tl.store(p_z + tile * (BLOCK_B * BLOCK_OUT) + tile_part(i, BLOCK_B, BLOCK_OUT, PARTS), product(x, w, PRECISION))


@triton.jit
def gradient_of_part(
    i, grad, p_d, p_x_columns, p_order, stride_order, stride_xr, first, count, tiles, x_rows, m_column, x_scale,
    BLOCK_B: tl.constexpr, BLOCK_OUT: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad + D^T X over all tiles of a mini-batch's rows, for the i-th part of a program's units; D from memory."""
    for tile in range(0, tiles):
        row, exists, m_row = rows_of(p_order, stride_order, first, count, tile, x_rows, BLOCK_B)
        d = exchanged(p_d + tile * (BLOCK_B * BLOCK_OUT) + tile_part(i, BLOCK_B, BLOCK_OUT, PARTS), None)
        x = load_rows(p_x_columns, stride_xr, row, m_row & exists, m_column, x_scale)
        grad = add_gradient(d, x, grad, PRECISION)
    return grad


@triton.jit
def squares_of(grad, grad_bias, counted, BIAS: tl.constexpr):
    """The sum of squares of a gradient's parts, a tuple; the bias's where it is this program's to count."""
    squares = grad[0] * grad[0]
    for i in tl.static_range(1, len(grad)):
        squares += grad[i] * grad[i]
    squares = tile_sum(squares)
    if BIAS:
        squares += tl.where(counted, tl.sum(grad_bias * grad_bias, axis=0), 0.0)
    return squares


@triton.jit
def gram_squares(d, gram, PRECISION: tl.constexpr):
    """(s^2 = <D, gram D>, whether it can be trusted), gram being X X^T, or X X^T + 1 where there is a bias.

    The rounding errors of s^2 are small beside (sum over rows of sqrt(gram_ii) |d_i|)^2, whatever cancels; where s^2 is not,
    or where it is beyond what float32 holds of squares, it is not trusted. With rows that have
    nothing to do with each other that sum is about as many times s^2 as there are rows, of which 32 at most come here.
    """
    zeros = tl.zeros([d.shape[0], d.shape[1]], tl.float32)
    squares = tile_sum(d * multiply_add(gram, d, zeros, PRECISION))
    at = tl.arange(0, d.shape[0])
    diagonal = tl.sum(tl.where(at[:, None] == at[None, :], gram, 0.0), axis=1)
    most = tl.sum(tl.sqrt(diagonal * tl.sum(d * d, axis=1)), axis=0)
    # s is at most that sum, unless squares of D underflow. NaN is neither above nor below anything.
    trusted = (TRUST * squares > most * most) & (squares < 1.01 * most * most) & (squares > 1e-30) & (squares < 1e36)
    return squares, trusted


@triton.jit
def with_bias(z, bias, exists):
    """z + bias, NaN for rows that do not exist."""
    return tl.where(exists[:, None], z + tl.expand_dims(bias, -2), float("nan"))


@triton.jit
def hidden(z, m_unit, low, high, KIND: tl.constexpr):
    """phi(z), and 0 for units that are not there: from an infinite x their weights of 0 make a NaN."""
    return tl.where(tl.expand_dims(m_unit, -2), phi(z, low, high, KIND), 0.0)


@triton.jit
def next_product(h, next_w, PRECISION: tl.constexpr):
    """h next_w^T over a program's units, (BLOCK_B, BLOCK_NEXT)."""
    zeros = tl.zeros([h.shape[0], next_w.shape[0]], tl.float32)
    return multiply_add(h, tl.trans(next_w), zeros, PRECISION)


@triton.jit
def last_layer(
    z, p_target, row, exists, m_row, column, m_column, stride_tr, stride_tc, n, scale, low, high,
    KIND: tl.constexpr, LOSS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """D = dJ/dZ of the last layer at these columns, 0 outside the masks, and their part of the loss before the mean."""
    h = phi(z, low, high, KIND)
    t = target_tile(p_target, row, m_row & exists, column, m_column, stride_tr, stride_tc, n, CLASSES)
    if LOSS == CROSS_ENTROPY:
        d, value = softmax_tile(h, t, m_column, scale)
    else:
        d = residual(h, t, scale, LOSS)
        value = element_loss(h, t, LOSS)
    mask = m_row[:, None] & m_column[None, :]
    return tl.where(mask, d * slope(z, low, high, KIND), 0.0), tile_sum(tl.where(mask, value, 0.0))


@triton.jit
def move(parameter, velocity, grad, norm, lr, momentum, moves, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr):
    """(parameter, velocity) after one step in the reference's order of operations, or as they were unless `moves`."""
    direction = quotients(grad, norm)
    if MOMENTUM:
        # Not the new velocity or the old one: the compiler would choose at the end of a step, and keep both until then.
        direction = tl.where(moves, direction, 0.0)
        velocity = tl.where(moves, momentum, 1.0) * velocity + direction
        if NESTEROV:
            direction = direction + momentum * velocity
        else:
            direction = velocity
    return tl.where(moves, parameter - lr * direction, parameter), velocity
