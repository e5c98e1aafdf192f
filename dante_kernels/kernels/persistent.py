# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM102, SIM108 - an `if` on a constexpr is decided at compile time, and stands apart from the others
"""A whole pass of SNGD over one layer in one launch: the layer stays in registers, programs meet at grid barriers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launcher
from .device import (
    CROSS_ENTROPY,
    MSE,
    divide,
    element_loss,
    load_x,
    multiply_add,
    phi,
    residual,
    slope,
    source_rows,
    target_tile,
    tile_sum,
)
from .fused import Layer, Update, stride_of
from .layers import softmax_tile
from .plan import Persistent

# With more steps in one launch the barrier's counter, of 32 bits, could overflow on the largest grids.
MOST_STEPS = 2**21


@triton.jit
def arrive(p_counter):
    """Count this program in at a barrier; what it stored before is then visible to whoever has waited for it."""
    tl.debug_barrier()
    tl.atomic_add(p_counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(p_counter, arrivals):
    """Wait until the counter, which only grows, has reached `arrivals`."""
    while tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def batch_rows(p_order, stride_order, first, rows, batch, x_rows, BLOCK_B: tl.constexpr):
    """Of the mini-batch at position `first`: source rows, which of them exist, which belong to it, and their number."""
    position = tl.arange(0, BLOCK_B)
    count = tl.minimum(rows - first, batch)
    m_row = position < count
    row, exists = source_rows(p_order, stride_order, position.to(tl.int64) + first, m_row, x_rows)
    return row, exists, m_row, count


@triton.jit
def sum_of_slices(p_slices, tile, size, SLICES: tl.constexpr):
    """The sum of SLICES exchanged tiles, in their order; `size` floats lie between one and the next."""
    total = tl.load(p_slices + tile, cache_modifier=".cg")
    for i in tl.static_range(1, SLICES):
        total += tl.load(p_slices + i * size + tile, cache_modifier=".cg")
    return total


@triton.jit
def move(parameter, velocity, grad, norm, lr, momentum, moves, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr):
    """(parameter, velocity) after one step in the reference's order of operations, or as they were unless `moves`."""
    direction = divide(grad, norm)
    if MOMENTUM:
        new_velocity = momentum * velocity + direction
        velocity = tl.where(moves, new_velocity, velocity)
        if NESTEROV:
            direction = direction + momentum * new_velocity
        else:
            direction = new_velocity
    return tl.where(moves, parameter - lr * direction, parameter), velocity


_VARYING = ["rows", "batch", "x_rows", "stride_order", "stride_tr", "stride_tc"]


@triton.jit(do_not_specialize=_VARYING)
def persistent(
    p_weight, p_bias, p_velocity_weight, p_velocity_bias, p_x, p_target, p_order, p_next_weight, p_next_bias,
    p_z, p_next_z, p_sums, p_counter, p_lr, p_losses, p_norms,
    rows, batch, x_rows, n_in, n_out, n_next, share_in, share_out,
    stride_wo, stride_wi, stride_bias, stride_vo, stride_vi, stride_vbias, stride_xr, stride_xc, stride_order,
    stride_tr, stride_tc, stride_no, stride_ni, stride_nbias,
    low, high, next_low, next_high, momentum, x_scale,
    KIND: tl.constexpr, NEXT_KIND: tl.constexpr, LOSS: tl.constexpr, CLASSES: tl.constexpr, NESTEROV: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT_OUT: tl.constexpr, SPLIT_IN: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_NEXT: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """SNGD over all mini-batches of `batch` of the `rows` visited rows, on the last layer, or on the one before it.

    A cooperative 1D grid of SPLIT_OUT SPLIT_IN programs, all resident. Program (u, i) keeps W[units of u, inputs of i] and
    its velocity in registers from the first step to the last; u has `share_out` <= BLOCK_OUT units, i has `share_in` <=
    WARPS BLOCK_IN inputs. A tile is (WARPS, BLOCK_OUT, BLOCK_IN), a warp for each slice of the inputs: so its products are
    split over the inner dimension, and no warp holds all of W. Up to three barriers a step:

    - with SPLIT_IN > 1: the partial Z = X W^T of a unit group's programs are exchanged (`z`, (SPLIT_OUT, SPLIT_IN,
      BLOCK_B, BLOCK_OUT)), and each of them adds up all of them;
    - with a next layer (p_next_weight) and SPLIT_OUT > 1: likewise its partial pre-activations (`next_z`, (SPLIT_OUT,
      BLOCK_B, BLOCK_NEXT)), from one program of each unit group;
    - with more than one program: (squares, loss) of each (`sums`, (2, programs, 2)), for s^2 and the loss.

    Every program adds up exchanged numbers in the same order. `sums` is used in turn by even and odd steps, since there may
    be no other barrier that keeps a fast program from its next step; `z` and `next_z` need no second half, since each
    program passes the last barrier before it stores to them again. `counter` is 0 at the launch and only grows. The rows
    of the next mini-batch are loaded while the last barrier is waited for.

    x, target, order, strides, the loss and bad rows as in `layers.product`; for the cross-entropy the last layer must lie
    whole in every program that computes it (SPLIT_OUT = 1 without a next layer; n_next <= BLOCK_NEXT). Loss and norm of
    step t to losses[t] and norms[t]. Where a norm is zero or not finite, that step changes nothing.
    """
    PROGRAMS: tl.constexpr = SPLIT_OUT * SPLIT_IN
    MOMENTUM: tl.constexpr = p_velocity_weight is not None
    program = tl.program_id(0)
    unit_group = program // SPLIT_IN
    input_group = program % SPLIT_IN

    position = tl.arange(0, BLOCK_B)
    local_unit = tl.arange(0, BLOCK_OUT)
    unit = unit_group * share_out + local_unit
    m_unit = (local_unit < share_out) & (unit < n_out)
    local_input = tl.arange(0, WARPS)[:, None] * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, :]
    column = input_group * share_in + local_input
    # A slice ends where the next one begins, though its tile may be wider.
    m_column = (local_input < share_in) & (column < n_in)
    m_tile = m_unit[None, :, None] & m_column[:, None, :]
    unit_64 = unit.to(tl.int64)
    column_64 = column.to(tl.int64)

    p_w = p_weight + unit_64[None, :, None] * stride_wo + column_64[:, None, :] * stride_wi
    w = tl.load(p_w, mask=m_tile, other=0.0)
    v = w
    if MOMENTUM:
        p_v = p_velocity_weight + unit_64[None, :, None] * stride_vo + column_64[:, None, :] * stride_vi
        v = tl.load(p_v, mask=m_tile, other=0.0)
    bias = tl.zeros([BLOCK_OUT], tl.float32)
    v_bias = bias
    if p_bias is not None:
        bias = tl.load(p_bias + unit_64 * stride_bias, mask=m_unit, other=0.0)
        if MOMENTUM:
            v_bias = tl.load(p_velocity_bias + unit_64 * stride_vbias, mask=m_unit, other=0.0)
    if p_next_weight is not None:
        following = tl.arange(0, BLOCK_NEXT)
        m_next = following < n_next
        p_next = p_next_weight + following.to(tl.int64)[:, None] * stride_no + unit_64[None, :] * stride_ni
        next_w = tl.load(p_next, mask=m_next[:, None] & m_unit[None, :], other=0.0)
        next_bias = tl.zeros([BLOCK_NEXT], tl.float32)
        if p_next_bias is not None:
            next_bias = tl.load(p_next_bias + following.to(tl.int64) * stride_nbias, mask=m_next, other=0.0)
    lr = tl.load(p_lr)

    z_tile = position[:, None] * BLOCK_OUT + local_unit[None, :]
    if SPLIT_IN > 1:
        p_z_group = p_z + unit_group * SPLIT_IN * BLOCK_B * BLOCK_OUT
    arrivals = 0
    row, exists, m_row, count = batch_rows(p_order, stride_order, 0, rows, batch, x_rows, BLOCK_B)
    m_x = (m_row & exists)[None, :, None] & m_column[:, None, :]
    x = load_x(p_x + row[None, :, None] * stride_xr + column_64[:, None, :] * stride_xc, m_x, x_scale)

    for step in range(0, tl.cdiv(rows, batch)):
        zeros = tl.zeros([WARPS, BLOCK_B, BLOCK_OUT], tl.float32)
        z = tl.sum(multiply_add(x, tl.permute(w, (0, 2, 1)), zeros, PRECISION), axis=0)
        if SPLIT_IN > 1:
            tl.store(p_z_group + input_group * BLOCK_B * BLOCK_OUT + z_tile, z)
            arrive(p_counter)
            arrivals += PROGRAMS
            wait(p_counter, arrivals)
            z = sum_of_slices(p_z_group, z_tile, BLOCK_B * BLOCK_OUT, SPLIT_IN)
        if p_bias is not None:
            z += bias[None, :]
        z = tl.where(exists[:, None], z, float("nan"))
        h = phi(z, low, high, KIND)

        m_d = m_row[:, None] & m_unit[None, :]
        if p_next_weight is not None:
            # Units that are not there meet weights of 0.
            next_zeros = tl.zeros([BLOCK_B, BLOCK_NEXT], tl.float32)
            next_z = multiply_add(h, tl.trans(next_w), next_zeros, PRECISION)
            if SPLIT_OUT > 1:
                next_tile = position[:, None] * BLOCK_NEXT + following[None, :]
                if input_group == 0:
                    tl.store(p_next_z + unit_group * BLOCK_B * BLOCK_NEXT + next_tile, next_z)
                arrive(p_counter)
                arrivals += PROGRAMS
                wait(p_counter, arrivals)
                next_z = sum_of_slices(p_next_z, next_tile, BLOCK_B * BLOCK_NEXT, SPLIT_OUT)
            next_z += next_bias[None, :]
            output, m_output, width = following, m_next, n_next
            last_h = phi(next_z, next_low, next_high, NEXT_KIND)
            last_slope = slope(next_z, next_low, next_high, NEXT_KIND)
        else:
            output, m_output, width = unit, m_unit, n_out
            last_h = h
            last_slope = slope(z, low, high, KIND)

        t = target_tile(p_target, row, m_row & exists, output, m_output, stride_tr, stride_tc, width, CLASSES)
        m_last = m_row[:, None] & m_output[None, :]
        elements = count.to(tl.float32)
        if LOSS != CROSS_ENTROPY:
            elements *= width
        scale = divide(tl.full([], 2.0 if LOSS == MSE else 1.0, tl.float32), elements)
        if LOSS == CROSS_ENTROPY:
            d, value = softmax_tile(last_h, t, m_output, scale)
        else:
            d = residual(last_h, t, scale, LOSS)
            value = element_loss(last_h, t, LOSS)
        d = tl.where(m_last, d * last_slope, 0.0)
        loss = tile_sum(tl.where(m_last, value, 0.0))
        if p_next_weight is not None:
            back = tl.zeros([BLOCK_B, BLOCK_OUT], tl.float32)
            back = multiply_add(d, next_w, back, PRECISION)
            d = tl.where(m_d, back * slope(z, low, high, KIND), 0.0)

        d_t = tl.broadcast_to(tl.trans(d)[None, :, :], [WARPS, BLOCK_OUT, BLOCK_B])
        grad = multiply_add(d_t, x, tl.zeros([WARPS, BLOCK_OUT, BLOCK_IN], tl.float32), PRECISION)
        squares = tile_sum(grad * grad)
        grad_bias = tl.sum(d, axis=0)
        if p_bias is not None:
            squares += tl.where(input_group == 0, tl.sum(grad_bias * grad_bias, axis=0), 0.0)
        if PROGRAMS > 1:
            if p_next_weight is not None:
                loss = tl.where(program == 0, loss, 0.0)
            else:
                loss = tl.where(input_group == 0, loss, 0.0)
            p_half = p_sums + (step % 2) * (2 * PROGRAMS)
            tl.store(p_half + program, squares)
            tl.store(p_half + PROGRAMS + program, loss)
            arrive(p_counter)
            arrivals += PROGRAMS

        row, exists, m_row, count = batch_rows(p_order, stride_order, (step + 1) * batch, rows, batch, x_rows, BLOCK_B)
        m_x = (m_row & exists)[None, :, None] & m_column[:, None, :]
        x = load_x(p_x + row[None, :, None] * stride_xr + column_64[:, None, :] * stride_xc, m_x, x_scale)

        if PROGRAMS > 1:
            wait(p_counter, arrivals)
            every = tl.arange(0, BLOCK_PROGRAMS)
            m_every = every < PROGRAMS
            squares = tl.sum(tl.load(p_half + every, mask=m_every, other=0.0, cache_modifier=".cg"), axis=0)
            loss = tl.sum(tl.load(p_half + PROGRAMS + every, mask=m_every, other=0.0, cache_modifier=".cg"), axis=0)
        norm = tl.sqrt_rn(squares)
        if program == 0:
            tl.store(p_norms + step, norm)
            tl.store(p_losses + step, divide(loss, elements))
        # NaN is neither above 0 nor below infinity.
        moves = (norm > 0) & (norm < float("inf"))
        w, v = move(w, v, grad, norm, lr, momentum, moves, MOMENTUM, NESTEROV)
        if p_bias is not None:
            bias, v_bias = move(bias, v_bias, grad_bias, norm, lr, momentum, moves, MOMENTUM, NESTEROV)

    tl.store(p_w, w, mask=m_tile)
    if MOMENTUM:
        tl.store(p_v, v, mask=m_tile)
    if p_bias is not None:
        if input_group == 0:
            tl.store(p_bias + unit_64 * stride_bias, bias, mask=m_unit)
            if MOMENTUM:
                tl.store(p_velocity_bias + unit_64 * stride_vbias, v_bias, mask=m_unit)


def run(
    chain: list[Layer],
    x: Tensor,
    target: Tensor,
    order: Tensor | None,
    batch_size: int,
    loss: int,
    rule: Update,
    tiles: Persistent,
    x_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """All mini-batches of a pass in one launch, in place; (losses, norms), one of each a step."""
    active, following = chain[0], chain[1] if len(chain) > 1 else None
    rows = x.shape[0] if order is None else order.shape[0]
    batch = min(batch_size, rows)
    programs = tiles.split_out * tiles.split_in

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    losses, norms = scratch(-(-rows // batch)), scratch(-(-rows // batch))
    z = scratch(programs * tiles.rows * tiles.units) if tiles.split_in > 1 else None
    next_z = scratch(tiles.split_out * tiles.rows * tiles.next_units) if following and tiles.split_out > 1 else None
    sums = scratch(4 * programs) if programs > 1 else None
    counter = torch.zeros(1, dtype=torch.int32, device=x.device) if programs > 1 else None
    velocity, velocity_bias = rule.velocity_weight, rule.velocity_bias
    launcher.launch(
        persistent, (programs,),
        active.weight, active.bias, velocity, velocity_bias, x, target, order,
        following and following.weight, following and following.bias, z, next_z, sums, counter, rule.lr, losses, norms,
        rows, batch, x.shape[0], active.n_in, active.n_out, following.n_out if following else 0,
        -(-active.n_in // tiles.split_in), -(-active.n_out // tiles.split_out),
        *active.weight.stride(), stride_of(active.bias), *((0, 0) if velocity is None else velocity.stride()),
        stride_of(velocity_bias), *x.stride(), stride_of(order),
        target.stride(0), 0 if target.dim() == 1 else target.stride(1),
        *((0, 0) if following is None else following.weight.stride()), stride_of(following and following.bias),
        active.low, active.high, following.low if following else 0.0, following.high if following else 0.0, rule.momentum,
        x_scale,
        KIND=active.kind, NEXT_KIND=following.kind if following else 0, LOSS=loss, CLASSES=target.dim() == 1,
        NESTEROV=rule.nesterov, PRECISION="ieee", SPLIT_OUT=tiles.split_out, SPLIT_IN=tiles.split_in,
        WARPS=tiles.num_warps, BLOCK_B=tiles.rows, BLOCK_OUT=tiles.units, BLOCK_IN=tiles.inputs,
        BLOCK_NEXT=tiles.next_units, BLOCK_PROGRAMS=triton.next_power_of_2(programs),
        num_warps=tiles.num_warps, num_stages=1, persistent=True,
    )  # fmt: skip
    return losses, norms
