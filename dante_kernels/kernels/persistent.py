# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment"
# ruff: noqa: SIM102 - an `if` on a constexpr is decided at compile time, and stands apart from the others
"""Many steps of SNGD in one launch: the layer stays in registers, programs meet at grid barriers."""

from __future__ import annotations

import triton
import triton.language as tl

from . import barrier, tiling
from .barrier import arrive, meet, wait
from .device import CROSS_ENTROPY, MSE, divide, multiply_add, phi, slope
from .tile import (
    add_gradient,
    exchanged,
    forward_of_part,
    gradient_of_part,
    gram_squares,
    hidden,
    in_parallel,
    kept_part,
    last_layer,
    load_parts,
    load_rows,
    mini_batch,
    move,
    next_product,
    of_model,
    part,
    product,
    rows_of,
    squares_of,
    store_parts,
    sum_of_parts,
    through,
    with_bias,
)

SPACING = tl.constexpr(barrier.SPACING)

PIECE = tl.constexpr(tiling.PIECE)

_VARYING = ["rows", "batch", "steps", "x_rows", "stride_order", "stride_tr", "stride_tc"]


@triton.jit(do_not_specialize=_VARYING)
def persistent(
    p_weight, p_bias, p_velocity_weight, p_velocity_bias, p_x, p_target, p_order,
    p_next_weight, p_next_bias, p_next_velocity_weight, p_next_velocity_bias, p_lr, p_last_weight, p_last_bias,
    p_losses, p_norms, p_offsets, p_schedule, p_kept, p_z, p_next_z, p_sums, p_counter,
    rows, batch, steps, x_rows, n_in, n_out, n_next, n_last, share_in, share_out,
    stride_wo, stride_wi, stride_bias, stride_vo, stride_vi, stride_vbias, stride_xr, stride_xc, stride_order,
    stride_tr, stride_tc, stride_no, stride_ni, stride_nbias, stride_nvo, stride_nvi, stride_nvbias,
    stride_lo, stride_li, stride_lbias,
    low, high, next_low, next_high, last_low, last_high, momentum, x_scale,
    KIND: tl.constexpr, NEXT_KIND: tl.constexpr, LAST_KIND: tl.constexpr, LOSS: tl.constexpr, CLASSES: tl.constexpr,
    NESTEROV: tl.constexpr, RELATIVE: tl.constexpr, RESET: tl.constexpr, PARALLEL: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT_OUT: tl.constexpr, SPLIT_IN: tl.constexpr, SLICES: tl.constexpr, PARTS: tl.constexpr,
    ONE_TILE: tl.constexpr, ONE_BARRIER: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_NEXT: tl.constexpr, BLOCK_LAST: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """SNGD over mini-batches of up to `batch` rows on one of the last three layers, or on the last two of them in turn.

    A cooperative 1D grid of SPLIT_OUT SPLIT_IN programs for each model, all resident; models know nothing of each other.
    Program (u, i) keeps W[units of u, inputs of i], and its velocity, in registers from the first step to the last; u has
    `share_out` <= BLOCK_OUT units, i has `share_in` <= SLICES BLOCK_IN inputs. A tile is (SLICES, BLOCK_OUT, BLOCK_IN), a
    warp, or two, for each slice of the inputs: so its products are split over the inner dimension, and no warp holds all of W.
    With SLICES = 1, for one barrier, it is (BLOCK_OUT, BLOCK_IN). PARTS tiles of BLOCK_OUT / PARTS units each hold it. Of a
    next layer it keeps the columns of u's units. Up to three barriers a step, or five with two layers after the active one:

    - with SPLIT_IN > 1: the partial Z = X W^T of a unit group's programs are exchanged in `z`, and each of them adds up
      all of them;
    - with a next layer (p_next_weight) and SPLIT_OUT > 1: likewise its partial pre-activations, in `next_z`, from one
      program of each unit group;
    - with more than one program: (squares, loss) of each, in `sums`, for s^2 and the loss.

    Where a mini-batch is one tile of BLOCK_B rows (ONE_TILE), X and Z stay in registers over the step, and the rows of the
    next mini-batch are loaded while the last barrier is waited for. Otherwise tiles follow each other between the
    barriers; X is read twice, Z is added up once, by one program of the unit group for each tile, and read from memory. So
    is D, which takes the place of the program's own partial Z. The next step's partial Z is made when W has moved.

    With PARTS > 1 it is always so; the parts of W move in turn, and the velocity is kept in memory, in `kept`, for each program
    SLICES BLOCK_OUT BLOCK_IN numbers.

    With a layer after the next one (p_last_weight) it is always so, too. The next layer's weights are (SLICES, BLOCK_NEXT,
    BLOCK_OUT) and the last one's (SLICES, BLOCK_LAST, BLOCK_NEXT), two warps for each slice of the next layer's units. Its
    partial pre-activations are added up by all programs, PIECE at a time, with the bias; after one more barrier the program of
    a unit group to which a tile belongs takes it through the last layer and back to D, which after a fifth barrier, with
    SPLIT_IN > 1, the others of the group read.

    Every program adds up exchanged numbers in the same order. `sums` is used in turn by even and odd steps, since there may
    be no other barrier that keeps a fast program from its next step; the other buffers need no second half, since each
    program passes the last barrier before it stores to them again.

    ONE_BARRIER, with one tile of rows and SPLIT_OUT = 1, leaves out the last barrier: with the partial Z the programs exchange
    their part of X X^T, in `z` and there in turn, so each of them has all of D and the norm <D, (X X^T + 1) D> (the 1 with a
    bias). Only where that is not to be trusted, which all of them see alike, do they meet for the sums of G's squares.

    With `schedule` (steps, 4) int64 a step's row holds (first position, number of rows, active layer, block): both layers
    take their turns, each block with its rate lr[block], which is first multiplied, in memory too, by the layer's Frobenius
    norm at the block's start where RELATIVE, and from zero velocity where RESET. Where PARALLEL, a cycle is a block of the
    last layer and then one of the hidden layer, which sees the last layer as it was before the cycle. With `offsets` (models,
    POINTERS) int64 the first POINTERS pointers of each model lie that many elements after those of the call.

    x, target, order, strides, the loss and bad rows as in `layers.product`; for the cross-entropy an active last layer must lie
    whole in one program (SPLIT_OUT = 1). Loss and norm of step t to losses[t] and norms[t]. Where a norm is zero or not finite,
    that step changes nothing.
    """
    PROGRAMS: tl.constexpr = SPLIT_OUT * SPLIT_IN
    MOMENTUM: tl.constexpr = p_velocity_weight is not None
    HAS_NEXT: tl.constexpr = p_next_weight is not None
    HAS_LAST: tl.constexpr = p_last_weight is not None
    WIDE: tl.constexpr = BLOCK_NEXT * (SLICES if HAS_LAST else 1)
    ROUNDS: tl.constexpr = p_schedule is not None
    KEPT: tl.constexpr = MOMENTUM and PARTS > 1
    GRAM_PRECISION: tl.constexpr = "tf32" if PRECISION == "bf16" else PRECISION
    # Numbers of one model, or of one tile, are constants: the compiler would keep others in registers through all steps.
    model = tl.zeros([], tl.int32)
    program = tl.program_id(0)
    if p_offsets is not None:
        model = program // PROGRAMS
        program = program % PROGRAMS
    unit_group = program // SPLIT_IN
    input_group = program % SPLIT_IN
    tiles = tl.full([], 1, tl.int32)
    if not ONE_TILE:
        tiles = tl.cdiv(batch, BLOCK_B)
    z_size = tiles * BLOCK_B * BLOCK_OUT
    next_size = tiles * BLOCK_B * WIDE
    p_x = of_model(p_x, p_offsets, model, 4)
    p_target = of_model(p_target, p_offsets, model, 5)
    if p_order is not None:  # Triton 3.6 has no function return None
        p_order = of_model(p_order, p_offsets, model, 6)
    p_lr = of_model(p_lr, p_offsets, model, 11)
    if p_offsets is not None:
        if p_next_z is not None:
            p_next_z += model.to(tl.int64) * (SPLIT_OUT + HAS_LAST) * next_size
        if PROGRAMS > 1:
            p_sums += model * (5 * PROGRAMS)
            p_counter += model * SPACING
    if ONE_BARRIER:
        # Two halves of a slice from each program: Z, and after it X X^T.
        z_slice = z_size + BLOCK_B * BLOCK_B
        p_z += model.to(tl.int64) * (2 * SPLIT_IN) * z_slice
    elif p_z is not None:
        # A unit group's slices, and after them their sum.
        p_z += (model * SPLIT_OUT + unit_group).to(tl.int64) * (SPLIT_IN + 1) * z_size

    local_row = tl.arange(0, BLOCK_B)
    local_unit = tl.arange(0, BLOCK_OUT)
    local_input = tl.arange(0, BLOCK_IN)
    if SLICES > 1:
        local_input = tl.arange(0, SLICES)[:, None] * BLOCK_IN + local_input[None, :]
    unit, m_unit = part(unit_group, share_out, n_out, local_unit)
    column, m_column = part(input_group, share_in, n_in, local_input)
    unit_64 = unit.to(tl.int64)
    column_64 = column.to(tl.int64)
    following = tl.arange(0, BLOCK_NEXT)
    if HAS_LAST:
        following = tl.arange(0, SLICES)[:, None] * BLOCK_NEXT + following[None, :]
    m_next = following < n_next
    z_tile = local_row[:, None] * BLOCK_OUT + local_unit[None, :]
    next_tile = local_row[:, None] * WIDE + tl.expand_dims(following, -2)
    gram_tile = z_size + local_row[:, None] * BLOCK_B + local_row[None, :]
    every = tl.arange(0, BLOCK_PROGRAMS)
    m_every = every < PROGRAMS

    p_x_columns = p_x + tl.expand_dims(column_64, -2) * stride_xc
    p_w = of_model(p_weight, p_offsets, model, 0)
    w = load_parts(p_w, stride_wo, stride_wi, unit_group, share_out, n_out, column, m_column, PARTS, BLOCK_OUT)
    v = w
    bias = tl.zeros([BLOCK_OUT], tl.float32)
    v_bias = bias
    if MOMENTUM:
        p_v = of_model(p_velocity_weight, p_offsets, model, 2)
        v = load_parts(p_v, stride_vo, stride_vi, unit_group, share_out, n_out, column, m_column, PARTS, BLOCK_OUT)
        if KEPT:
            p_kept += tl.program_id(0).to(tl.int64) * (SLICES * BLOCK_OUT * BLOCK_IN)
            for i in tl.static_range(PARTS):
                tl.store(kept_part(p_kept, i, v[i]), v[i])
    if p_bias is not None:
        bias = tl.load(of_model(p_bias, p_offsets, model, 1) + unit_64 * stride_bias, mask=m_unit, other=0.0)
        if MOMENTUM:
            v_bias = tl.load(of_model(p_velocity_bias, p_offsets, model, 3) + unit_64 * stride_vbias, mask=m_unit, other=0.0)
    next_w = tl.zeros([BLOCK_NEXT, BLOCK_OUT], tl.float32)
    next_bias = tl.zeros([BLOCK_NEXT], tl.float32)
    if HAS_NEXT:
        following_64 = following.to(tl.int64)
        p_next_w = of_model(p_next_weight, p_offsets, model, 7)
        # With a layer after it (SLICES, BLOCK_NEXT, BLOCK_OUT), two warps for each slice of its units.
        p_next_w += tl.expand_dims(following_64, -1) * stride_no + unit_64 * stride_ni
        m_next_w = tl.expand_dims(m_next, -1) & m_unit
        next_w = tl.load(p_next_w, mask=m_next_w, other=0.0)
        if p_next_bias is not None:
            p_next_b = of_model(p_next_bias, p_offsets, model, 8)
            if not HAS_LAST:
                next_bias = tl.load(p_next_b + following_64 * stride_nbias, mask=m_next, other=0.0)
    if HAS_LAST:
        last_unit = tl.arange(0, BLOCK_LAST)
        m_last = last_unit < n_last
        p_last_w = of_model(p_last_weight, p_offsets, model, 12)
        p_last_w += last_unit.to(tl.int64)[:, None] * stride_lo + tl.expand_dims(following_64, -2) * stride_li
        last_w = tl.load(p_last_w, mask=m_last[:, None] & tl.expand_dims(m_next, -2), other=0.0)
        last_bias = tl.zeros([BLOCK_LAST], tl.float32)
        if p_last_bias is not None:
            p_last_b = of_model(p_last_bias, p_offsets, model, 13) + last_unit.to(tl.int64) * stride_lbias
            last_bias = tl.load(p_last_b, mask=m_last, other=0.0)
    next_v = next_w
    next_v_bias = next_bias
    if ROUNDS and MOMENTUM:
        p_next_v = of_model(p_next_velocity_weight, p_offsets, model, 9)
        p_next_v += following.to(tl.int64)[:, None] * stride_nvo + unit_64[None, :] * stride_nvi
        next_v = tl.load(p_next_v, mask=m_next_w, other=0.0)
        if p_next_bias is not None:
            next_v_bias = tl.load(
                of_model(p_next_velocity_bias, p_offsets, model, 10) + following.to(tl.int64) * stride_nvbias,
                mask=m_next,
                other=0.0,
            )

    sense = tl.zeros([], tl.int32)
    if PROGRAMS > 1:
        sense = tl.load(p_counter, volatile=True)
    lr = tl.load(p_lr)
    current = tl.full([], -1, tl.int32)
    acted = tl.zeros([], tl.int32)
    other_w = next_w
    other_bias = next_bias
    first, count, layer, block = mini_batch(p_schedule, 0, steps, rows, batch)
    if ONE_TILE:
        row, exists, m_row = rows_of(p_order, stride_order, first, count, 0, x_rows, BLOCK_B)
        x = load_rows(p_x_columns, stride_xr, row, m_row & exists, m_column, x_scale)
    else:
        p_own = p_z + input_group * z_size
        for i in tl.static_range(PARTS):
            forward_of_part(
                i, w[i], p_own, p_x_columns, p_order, stride_order, stride_xr, first, count, tiles, x_rows,
                m_column, x_scale, BLOCK_B, BLOCK_OUT, PARTS, PRECISION,
            )  # fmt: skip

    for step in range(0, steps):
        if ROUNDS:
            if block != current:
                current = block
                if PARALLEL:
                    # A copy of it: as it was before the cycle, or, while the steps work with that, as it is now.
                    next_w, other_w = in_parallel(next_w, other_w, acted, layer)
                    next_bias, other_bias = in_parallel(next_bias, other_bias, acted, layer)
                lr = tl.load(p_lr + block)
                if RELATIVE:
                    squares = squares_of(w, bias, input_group == 0, p_bias is not None)
                    next_squares = squares_of((next_w,), next_bias, program == 0, p_next_bias is not None)
                    squares = tl.where(layer == 0, squares, tl.where(input_group == 0, next_squares, 0.0))
                    if PROGRAMS > 1:
                        tl.store(p_sums + 4 * PROGRAMS + program, squares)
                        sense = meet(p_counter, program, sense, PROGRAMS)
                        squares = tl.sum(exchanged(p_sums + 4 * PROGRAMS + every, m_every), axis=0)
                    lr *= tl.where(squares == 0.0, 1.0, tl.sqrt_rn(squares))
                    if program == 0:
                        tl.store(p_lr + block, lr)
                if RESET:
                    v = (tl.where(layer == 0, 0.0, v[0]),)
                    v_bias = tl.where(layer == 0, 0.0, v_bias)
                    next_v = tl.where(layer == 1, 0.0, next_v)
                    next_v_bias = tl.where(layer == 1, 0.0, next_v_bias)

        elements = count.to(tl.float32)
        if LOSS != CROSS_ENTROPY:
            elements *= n_last if HAS_LAST else (n_next if HAS_NEXT else n_out)
        scale = divide(tl.full([], 2.0 if LOSS == MSE else 1.0, tl.float32), elements)
        loss = tl.zeros([], tl.float32)
        if ONE_TILE:
            z = product(x, w[0], PRECISION)
            if ONE_BARRIER:
                gram = multiply_add(x, tl.trans(x), tl.zeros([BLOCK_B, BLOCK_B], tl.float32), GRAM_PRECISION)
                m_z = m_row[:, None] & (local_unit // 16 * 16 < n_out)[None, :]
                m_gram = m_row[:, None]
                p_half = p_z + (step % 2) * (SPLIT_IN * z_slice)
                tl.store(p_half + program * z_slice + z_tile, z, mask=m_z)
                tl.store(p_half + program * z_slice + gram_tile, gram, mask=m_gram)
                arrive(p_counter, program, PROGRAMS)
                ahead, ahead_count, ahead_layer, ahead_block = mini_batch(p_schedule, step + 1, steps, rows, batch)
                ahead_row, ahead_exists, ahead_m_row = rows_of(p_order, stride_order, ahead, ahead_count, 0, x_rows, BLOCK_B)
                ahead_x = load_rows(p_x_columns, stride_xr, ahead_row, ahead_m_row & ahead_exists, m_column, x_scale)
                sense = wait(p_counter, sense)
                z = sum_of_parts(p_half + z_tile, m_z, z_slice, SPLIT_IN)
                gram = sum_of_parts(p_half + gram_tile, m_gram, z_slice, SPLIT_IN)
            elif SPLIT_IN > 1:
                tl.store(p_z + input_group * z_size + z_tile, z, mask=m_row[:, None])
                sense = meet(p_counter, program, sense, PROGRAMS)
                z = sum_of_parts(p_z + z_tile, m_row[:, None], z_size, SPLIT_IN)
            z = with_bias(z, bias, exists)
            last_z = z
            if HAS_NEXT:
                last_z = next_product(hidden(z, m_unit, low, high, KIND), next_w, PRECISION)
                if SPLIT_OUT > 1:
                    if input_group == 0:
                        tl.store(p_next_z + unit_group * next_size + next_tile, last_z, mask=m_row[:, None])
                    sense = meet(p_counter, program, sense, PROGRAMS)
                    last_z = sum_of_parts(p_next_z + next_tile, m_row[:, None], next_size, SPLIT_OUT)
                last_z = with_bias(last_z, next_bias, exists)
        else:
            if SPLIT_IN > 1:
                sense = meet(p_counter, program, sense, PROGRAMS)
            else:
                tl.debug_barrier()
            for tile in range(input_group, tiles, SPLIT_IN):
                row, exists, m_row = rows_of(p_order, stride_order, first, count, tile, x_rows, BLOCK_B)
                p_tile = p_z + tile * (BLOCK_B * BLOCK_OUT) + z_tile
                z = with_bias(sum_of_parts(p_tile, None, z_size, SPLIT_IN), bias, exists)
                tl.store(p_tile + SPLIT_IN * z_size, z)
                if HAS_NEXT:
                    p_next_tile = p_next_z + unit_group * next_size + tile * (BLOCK_B * WIDE) + next_tile
                    h = hidden(z, m_unit, low, high, KIND)
                    if HAS_LAST:
                        tl.store(p_next_tile, through(h, tl.permute(next_w, (0, 2, 1)), PRECISION))
                    else:
                        tl.store(p_next_tile, next_product(h, next_w, PRECISION))
            if PROGRAMS > 1:
                sense = meet(p_counter, program, sense, PROGRAMS)
            else:
                tl.debug_barrier()
            if HAS_LAST:
                for piece in range(program, tiles * (BLOCK_B * WIDE // PIECE), PROGRAMS):
                    at = piece * PIECE + tl.arange(0, PIECE)
                    next_z = sum_of_parts(p_next_z + at, None, next_size, SPLIT_OUT)
                    if p_next_bias is not None:
                        next_unit = at % WIDE
                        next_z += tl.load(p_next_b + next_unit.to(tl.int64) * stride_nbias, mask=next_unit < n_next, other=0.0)
                    tl.store(p_next_z + SPLIT_OUT * next_size + at, next_z)
                if PROGRAMS > 1:
                    sense = meet(p_counter, program, sense, PROGRAMS)
                else:
                    tl.debug_barrier()
                for tile in range(input_group, tiles, SPLIT_IN):
                    row, exists, m_row = rows_of(p_order, stride_order, first, count, tile, x_rows, BLOCK_B)
                    p_next_tile = p_next_z + SPLIT_OUT * next_size + tile * (BLOCK_B * WIDE) + next_tile
                    next_z = exchanged(p_next_tile, None)
                    last_z = product(hidden(next_z, m_next, next_low, next_high, NEXT_KIND), last_w, PRECISION)
                    d, value = last_layer(
                        with_bias(last_z, last_bias, exists), p_target, row, exists, m_row, last_unit, m_last,
                        stride_tr, stride_tc, n_last, scale, last_low, last_high, LAST_KIND, LOSS, CLASSES,
                    )  # fmt: skip
                    loss += value
                    next_d = through(d, last_w, PRECISION) * slope(next_z, next_low, next_high, NEXT_KIND)
                    next_d = tl.where(tl.expand_dims(m_next, -2), next_d, 0.0)
                    back = product(next_d, tl.permute(next_w, (0, 2, 1)), PRECISION)
                    p_tile = p_z + SPLIT_IN * z_size + tile * (BLOCK_B * BLOCK_OUT) + z_tile
                    z = exchanged(p_tile, None)
                    m_z = m_row[:, None] & m_unit[None, :]
                    tl.store(p_tile, tl.where(m_z, back * slope(z, low, high, KIND), 0.0))
                if SPLIT_IN > 1:
                    sense = meet(p_counter, program, sense, PROGRAMS)
                else:
                    tl.debug_barrier()

        next_grad = tl.zeros([BLOCK_NEXT, BLOCK_OUT], tl.float32)
        next_grad_bias = tl.zeros([BLOCK_NEXT], tl.float32)
        d = tl.zeros([BLOCK_B, BLOCK_OUT], tl.float32)
        grad_bias = tl.zeros([BLOCK_OUT], tl.float32)
        if not HAS_LAST:
            for tile in range(0, 1 if ONE_TILE else tiles):
                if not ONE_TILE:
                    row, exists, m_row = rows_of(p_order, stride_order, first, count, tile, x_rows, BLOCK_B)
                    z = tl.load(p_z + SPLIT_IN * z_size + tile * (BLOCK_B * BLOCK_OUT) + z_tile, cache_modifier=".cg")
                    last_z = z
                    if HAS_NEXT:
                        p_next_tile = p_next_z + tile * (BLOCK_B * WIDE) + next_tile
                        last_z = with_bias(sum_of_parts(p_next_tile, None, next_size, SPLIT_OUT), next_bias, exists)
                if HAS_NEXT:
                    d, value = last_layer(
                        last_z, p_target, row, exists, m_row, following, m_next, stride_tr, stride_tc, n_next, scale,
                        next_low, next_high, NEXT_KIND, LOSS, CLASSES,
                    )  # fmt: skip
                    m_z = m_row[:, None] & m_unit[None, :]
                    if ROUNDS:
                        # A gradient that is not wanted is that of a D of zeros: a branch would make some specialization spill.
                        h = tl.where(m_z, phi(z, low, high, KIND), 0.0)
                        last_d = tl.where(layer == 1, d, 0.0)
                        next_grad = multiply_add(tl.trans(last_d), h, next_grad, PRECISION)
                        next_grad_bias += tl.sum(last_d, axis=0)
                        m_z = m_z & (layer == 0)
                    back = multiply_add(d, next_w, tl.zeros([BLOCK_B, BLOCK_OUT], tl.float32), PRECISION)
                    d = tl.where(m_z, back * slope(z, low, high, KIND), 0.0)
                else:
                    d, value = last_layer(
                        last_z, p_target, row, exists, m_row, unit, m_unit, stride_tr, stride_tc, n_out, scale,
                        low, high, KIND, LOSS, CLASSES,
                    )  # fmt: skip
                loss += value
                grad_bias += tl.sum(d, axis=0)
                if not ONE_TILE:
                    tl.store(p_own + tile * (BLOCK_B * BLOCK_OUT) + z_tile, d)
            if not ONE_TILE:
                tl.debug_barrier()

        squares = tl.zeros([], tl.float32)
        trusted = squares > 0
        grad = ()
        if ONE_TILE:
            grad = (add_gradient(d, x, tl.zeros_like(w[0]), PRECISION),)
            if ONE_BARRIER:
                if p_bias is not None:
                    gram += 1.0
                squares, trusted = gram_squares(d, gram, GRAM_PRECISION)
        else:
            p_d = p_z + SPLIT_IN * z_size if HAS_LAST else p_own
            if HAS_LAST:
                for tile in range(0, tiles):
                    grad_bias += tl.sum(exchanged(p_d + tile * (BLOCK_B * BLOCK_OUT) + z_tile, None), axis=0)
            for i in tl.static_range(PARTS):
                of_part = gradient_of_part(
                    i, tl.zeros_like(w[i]), p_d, p_x_columns, p_order, stride_order, stride_xr, first,
                    tl.where(layer == 0, count, 0), tiles, x_rows, m_column, x_scale, BLOCK_B, BLOCK_OUT, PARTS, PRECISION,
                )  # fmt: skip
                grad += (of_part,)

        acted = layer
        if ONE_BARRIER:
            if not trusted:
                own = squares_of(grad, grad_bias, program == 0, p_bias is not None)
                tl.store(p_sums + program, own)
                sense = meet(p_counter, program, sense, PROGRAMS)
                squares = tl.sum(exchanged(p_sums + every, m_every), axis=0)
            first, count, layer, block = ahead, ahead_count, ahead_layer, ahead_block
            row, exists, m_row, x = ahead_row, ahead_exists, ahead_m_row, ahead_x
        else:
            squares = squares_of(grad, grad_bias, input_group == 0, p_bias is not None)
            if ROUNDS:
                # Of the layer that is not active a gradient of zeros was made, NaN where x is infinite.
                own = squares_of((next_grad,), next_grad_bias, program == 0, p_next_bias is not None)
                squares = tl.where(acted == 0, squares, tl.where(input_group == 0, own, 0.0))
            if PROGRAMS > 1:
                counted = unit_group == 0 if HAS_LAST else (program == 0 if HAS_NEXT else input_group == 0)
                p_half = p_sums + (step % 2) * (2 * PROGRAMS)
                tl.store(p_half + program, squares)
                tl.store(p_half + PROGRAMS + program, tl.where(counted, loss, 0.0))
                arrive(p_counter, program, PROGRAMS)
            first, count, layer, block = mini_batch(p_schedule, step + 1, steps, rows, batch)
            if ONE_TILE:
                row, exists, m_row = rows_of(p_order, stride_order, first, count, 0, x_rows, BLOCK_B)
                x = load_rows(p_x_columns, stride_xr, row, m_row & exists, m_column, x_scale)
            if PROGRAMS > 1:
                sense = wait(p_counter, sense)
                squares = tl.sum(exchanged(p_half + every, m_every), axis=0)
                loss = tl.sum(exchanged(p_half + PROGRAMS + every, m_every), axis=0)
            elif not ONE_TILE:
                tl.debug_barrier()
        norm = tl.sqrt_rn(squares)
        if program == 0:
            tl.store(of_model(p_norms, p_offsets, model, 15) + step, norm)
            tl.store(of_model(p_losses, p_offsets, model, 14) + step, divide(loss, elements))
        # NaN is neither above 0 nor below infinity.
        moves = (norm > 0) & (norm < float("inf"))
        now = moves & (acted == 0)
        new_w = ()
        new_v = ()
        for i in tl.static_range(PARTS):
            v_part = v[i]
            if KEPT:
                v_part = tl.load(kept_part(p_kept, i, w[i]))
            w_part, v_part = move(w[i], v_part, grad[i], norm, lr, momentum, now, MOMENTUM, NESTEROV)
            if KEPT:
                tl.store(kept_part(p_kept, i, w[i]), v_part)
            new_w += (w_part,)
            new_v += (v_part,)
            if not ONE_TILE:
                # At once, for the next step: the compiler would put off what nothing needs yet, and keep both of it till then.
                forward_of_part(
                    i, w_part, p_own, p_x_columns, p_order, stride_order, stride_xr, first, count, tiles, x_rows,
                    m_column, x_scale, BLOCK_B, BLOCK_OUT, PARTS, PRECISION,
                )  # fmt: skip
        w = new_w
        if not KEPT:
            v = new_v
        if p_bias is not None:
            bias, v_bias = move(bias, v_bias, grad_bias, norm, lr, momentum, now, MOMENTUM, NESTEROV)
        if ROUNDS:
            now = moves & (acted == 1)
            next_w, next_v = move(next_w, next_v, next_grad, norm, lr, momentum, now, MOMENTUM, NESTEROV)
            if p_next_bias is not None:
                next_bias, next_v_bias = move(
                    next_bias, next_v_bias, next_grad_bias, norm, lr, momentum, now, MOMENTUM, NESTEROV
                )

    # Addresses and masks once more, with a 0 that the compiler can't see: else it would keep the first in registers throughout.
    zero = tl.minimum(steps, 0)
    again = model + zero
    unit, m_unit = part(unit_group, share_out + zero, n_out, local_unit)
    column, m_column = part(input_group, share_in + zero, n_in, local_input)
    unit_64 = unit.to(tl.int64)
    column_64 = column.to(tl.int64)
    p_w = of_model(p_weight, p_offsets, again, 0)
    store_parts(w, p_w, stride_wo, stride_wi, unit_group, share_out + zero, n_out, column, m_column, PARTS, BLOCK_OUT)
    if MOMENTUM:
        if KEPT:
            tl.debug_barrier()
            v = ()
            for i in tl.static_range(PARTS):
                v += (tl.load(kept_part(p_kept, i, w[i])),)
        p_v = of_model(p_velocity_weight, p_offsets, again, 2)
        store_parts(v, p_v, stride_vo, stride_vi, unit_group, share_out + zero, n_out, column, m_column, PARTS, BLOCK_OUT)
    if p_bias is not None:
        if input_group == 0:
            tl.store(of_model(p_bias, p_offsets, again, 1) + unit_64 * stride_bias, bias, mask=m_unit)
            if MOMENTUM:
                tl.store(of_model(p_velocity_bias, p_offsets, again, 3) + unit_64 * stride_vbias, v_bias, mask=m_unit)
    if ROUNDS:
        if PARALLEL:
            next_w = tl.where(acted == 0, other_w, next_w)
            next_bias = tl.where(acted == 0, other_bias, next_bias)
        m_next_w = m_next[:, None] & m_unit[None, :] & (input_group == 0)
        p_next_w = of_model(p_next_weight, p_offsets, again, 7)
        p_next_w += following.to(tl.int64)[:, None] * stride_no + unit_64[None, :] * stride_ni
        tl.store(p_next_w, next_w, mask=m_next_w)
        if MOMENTUM:
            p_next_v = of_model(p_next_velocity_weight, p_offsets, again, 9)
            p_next_v += following.to(tl.int64)[:, None] * stride_nvo + unit_64[None, :] * stride_nvi
            tl.store(p_next_v, next_v, mask=m_next_w)
        if p_next_bias is not None:
            if program == 0:
                tl.store(
                    of_model(p_next_bias, p_offsets, again, 8) + following.to(tl.int64) * stride_nbias, next_bias, mask=m_next
                )
                if MOMENTUM:
                    p_next_vb = of_model(p_next_velocity_bias, p_offsets, again, 10) + following.to(tl.int64) * stride_nvbias
                    tl.store(p_next_vb, next_v_bias, mask=m_next)
