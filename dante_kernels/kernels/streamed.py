# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM102 - an `if` on a constexpr is decided at compile time, and stands apart from the others
"""The streamed plan, for layers that do not fit on chip: G is never stored, and W is read and written once a step.

The norm comes from Gram matrices; the update forms tiles of G in registers and multiplies the tiles of W that it has just
computed with the next mini-batch. Where torch's precision switch allows the library to be fast, other products are torch.mm.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launcher, tiling
from .device import multiply_add, sum_of, tile_sum
from .fused import Call, Layer, Pass, Update, ceil, stride_of
from .step import PARTIALS, column_sums, descend, gradient_tile

# Terms of the Gram sum may cancel to this part of their absolute values: float64 then still has eight digits.
CANCELLED = tl.constexpr(2.0**-24)
# Between these the squared norm, and the squares of G's elements that matter in it, are ordinary float32 numbers.
LEAST, LARGEST = tl.constexpr(1e-24), tl.constexpr(1e37)


@triton.jit(do_not_specialize=["rows", "share", "slices_x"])
def gram(
    p_x, p_d, p_gram, rows, n_in, n_out, share, slices_x,
    BLOCK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Partial X X^T and D D^T, the tiles on and below the diagonal, in float64: float32 products are exact in it.

    A grid of (T, T, slices), T = ceil(rows / BLOCK). The first slices_x slices of `gram` (slices, rows, rows) hold products
    over `share` columns of X (rows, n_in) each, the others of D (rows, n_out), both contiguous. Bytes: X and D read T times,
    `gram` written half.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    other = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) <= tl.program_id(0):
        part = tl.program_id(2)
        from_x = part < slices_x
        width = tl.where(from_x, n_in, n_out)
        begin = tl.where(from_x, part, part - slices_x) * share
        end = tl.minimum(begin + share, width)
        p_rows = tl.where(from_x, p_x, p_d)
        p_row = p_rows + row.to(tl.int64)[:, None] * width
        p_other = p_rows + other.to(tl.int64)[None, :] * width
        acc = tl.zeros([BLOCK, BLOCK], tl.float64)
        for first in range(begin, end, BLOCK_INNER):
            column = first + tl.arange(0, BLOCK_INNER)
            m_column = column < end
            a = tl.load(p_row + column[None, :], mask=(row < rows)[:, None] & m_column[None, :], other=0.0)
            b = tl.load(p_other + column[:, None], mask=m_column[:, None] & (other < rows)[None, :], other=0.0)
            acc = tl.dot(a.to(tl.float64), b.to(tl.float64), acc, out_dtype=tl.float64)
        at = (part.to(tl.int64) * rows + row[:, None]) * rows + other[None, :]
        tl.store(p_gram + at, acc, mask=(row < rows)[:, None] & (other < rows)[None, :])


@triton.jit(do_not_specialize=["rows", "slices_x", "slices"])
def gram_terms(p_gram, p_terms, rows, slices_x, slices, one, BLOCK: tl.constexpr):
    """Each program's sum of (<x_i, x_j> + one) <d_i, d_j>, and of the absolute values, to `terms` (2, programs), float64.

    i >= j, off the diagonal twice; one = 1 where the layer has a bias, else 0. A 1D grid of ceil(rows^2 / BLOCK) programs,
    which add up the slices in order.
    """
    size = rows.to(tl.int64) * rows
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = at // rows
    other = at % rows
    mask = (at < size) & (other <= row)
    k = tl.zeros([BLOCK], tl.float64) + one
    m = tl.zeros([BLOCK], tl.float64)
    for part in range(0, slices):
        value = tl.load(p_gram + part * size + at, mask=mask, other=0.0)
        k += tl.where(part < slices_x, value, 0.0)
        m += tl.where(part < slices_x, 0.0, value)
    term = tl.where(mask, k * m * tl.where(other == row, 1.0, 2.0), 0.0)
    tl.store(p_terms + tl.program_id(0), tl.sum(term, axis=0))
    tl.store(p_terms + tl.num_programs(0) + tl.program_id(0), tl.sum(tl.abs(term), axis=0))


@triton.jit(do_not_specialize=["rows", "terms"])
def squares(
    p_d, p_x, p_terms, p_partials, rows, terms, n_out, n_in,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """`partials`, one of each program of a 1D grid, whose sum is s^2: that of the Gram terms where it can be trusted.

    Every program decides so from the same numbers. Where they cancel to less than CANCELLED, lie outside of LEAST..LARGEST or
    are not finite, and where there are none (None), the programs form all tiles of G = D^T X and strips of D's column sums in
    turn, in registers, and sum their squares as `step.gradient` does.
    """
    program = tl.program_id(0)
    strips = tl.cdiv(n_out, BLOCK_OUT)
    tiles_in = tl.cdiv(n_in, BLOCK_IN)
    tiles = strips * tiles_in
    todo = tiles
    if BIAS:
        todo += strips
    total = tl.zeros([], tl.float32)
    if p_terms is not None:
        exact = sum_of(p_terms, terms, PARTIALS)
        magnitude = sum_of(p_terms + terms, terms, PARTIALS)
        trusted = (exact >= magnitude * CANCELLED) & (exact >= LEAST) & (exact <= LARGEST)
        todo = tl.where(trusted, 0, todo)
        total = tl.where(trusted & (program == 0), exact, 0.0).to(tl.float32)
    for tile in range(program, todo, tl.num_programs(0)):
        if tile < tiles:
            out = (tile // tiles_in) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            column = (tile % tiles_in) * BLOCK_IN + tl.arange(0, BLOCK_IN)
            grad = gradient_tile(
                p_d, p_x, None, 0, rows, rows, out, column, n_out, n_in, n_in, 1, 0, 1.0,
                PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_B,
            )  # fmt: skip
            total += tile_sum(grad * grad)
        else:
            out = (tile - tiles) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            grad_bias = column_sums(p_d, rows, out, n_out, BLOCK_OUT)
            total += tl.sum(grad_bias * grad_bias, axis=0)
    tl.store(p_partials + program, total)


@triton.jit(do_not_specialize=["step", "rows", "next_rows"])
def advance(
    p_weight, p_bias, p_velocity_weight, p_velocity_bias, p_d, p_x, p_next, p_z, p_norms, p_lr,
    step, rows, next_rows, n_out, n_in, share,
    stride_wo, stride_wi, stride_bias, stride_vo, stride_vi, stride_vbias, momentum,
    NESTEROV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_NEXT: tl.constexpr,
):  # fmt: skip
    """W <- W - lr D^T X / s in place, without G, likewise the bias, and partial Z = X W^T of the next mini-batch.

    A 1D grid: ceil(n_out / BLOCK_OUT) strips of outputs x ceil(n_in / share) slices of inputs, then, where there is a bias, a
    program for each strip of it. A program goes over its slice in tiles of W: G's tile over all rows in registers, the tile's
    update (`descend`, with the velocity), then its product with the next rows, summed in registers over the slice, to
    z (slices, next_rows, n_out); without next rows (None) that is left out. X and the next rows are contiguous. s is
    norms[step]; where it is zero or not finite, W stays and only z is made: so a norm of 0 is a plain forward product.

    Bytes: W (and V) read and written once; X and D mostly from L2, once for every strip and tile; z slices times its size.
    """
    program = tl.program_id(0)
    strips = tl.cdiv(n_out, BLOCK_OUT)
    slices = tl.cdiv(n_in, share)
    norm = tl.load(p_norms + step)
    # NaN is neither above 0 nor below infinity.
    moves = (norm > 0) & (norm < float("inf"))
    lr = tl.load(p_lr)
    if program < strips * slices:
        out = (program // slices) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        begin = (program % slices) * share
        row = out[:, None].to(tl.int64)
        following = tl.arange(0, BLOCK_NEXT)
        z = tl.zeros([BLOCK_NEXT, BLOCK_OUT], tl.float32)
        for first in range(begin, tl.minimum(begin + share, n_in), BLOCK_IN):
            column = first + tl.arange(0, BLOCK_IN)
            column_64 = column[None, :].to(tl.int64)
            mask = (out < n_out)[:, None] & (column < n_in)[None, :]
            at = row * stride_wo + column_64 * stride_wi
            if moves:
                grad = gradient_tile(
                    p_d, p_x, None, 0, rows, rows, out, column, n_out, n_in, n_in, 1, 0, 1.0,
                    PRECISION, BLOCK_OUT, BLOCK_IN, BLOCK_B,
                )  # fmt: skip
                velocity_at = row * stride_vo + column_64 * stride_vi
                w = descend(p_weight, at, p_velocity_weight, velocity_at, mask, grad, norm, lr, momentum, NESTEROV)
            else:
                w = tl.load(p_weight + at, mask=mask, other=0.0)
            if p_next is not None:
                m_next = (following < next_rows)[:, None] & (column < n_in)[None, :]
                x = tl.load(p_next + following[:, None].to(tl.int64) * n_in + column_64, mask=m_next, other=0.0)
                z = multiply_add(x, tl.trans(w), z, PRECISION)
        if p_next is not None:
            m_z = (following < next_rows)[:, None] & (out < n_out)[None, :]
            position = (program % slices).to(tl.int64) * next_rows + following[:, None]
            tl.store(p_z + position * n_out + out[None, :], z, mask=m_z)
    else:
        if p_bias is not None:
            if moves:
                out = (program - strips * slices) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
                grad_bias = column_sums(p_d, rows, out, n_out, BLOCK_OUT)
                at, velocity_at = out.to(tl.int64) * stride_bias, out.to(tl.int64) * stride_vbias
                descend(p_bias, at, p_velocity_bias, velocity_at, out < n_out, grad_bias, norm, lr, momentum, NESTEROV)


class Streamed(Pass):
    """The streamed plan of one call. Scratch beside that of `Pass`, without G: two mini-batches of x, Gram matrices, partial Z.

    How a mini-batch is computed depends on its own rows, so that a short last one is computed like a call of its own.
    """

    def _gradient_scratch(self) -> None:
        active, rows = self.chain[0], self.batch_size
        n_out, n_in = active.n_out, active.n_in
        self.w_tiles = tiling.streamed_product(n_out, n_in)
        self.share = tiling.streamed_share(n_out, n_in, self.w_tiles)
        self.strips, self.slices = ceil(n_out, self.w_tiles.rows), ceil(n_in, self.share)
        tiles = self.strips * (ceil(n_in, self.w_tiles.columns) + (active.bias is not None))
        self.programs = min(tiles, tiling.STREAMED_PROGRAMS)
        self.partials = self._scratch(self.programs)
        self.inputs = [self._scratch(rows, n_in) for _ in range(2)]
        self.gathered = self.inputs[0]
        self.z = self._scratch(self.slices * min(rows, tiling.NEXT_ROWS) * n_out)
        # A short last mini-batch may have more slices than the others.
        by_gram = [r for r in {rows, self.rows % rows} if r and tiling.by_gram(n_out, n_in, r)]
        elements = [sum(self._gram_slices(r)) * r * r for r in by_gram]
        self.gram = self._scratch(max(elements, default=0), dtype=torch.float64)
        self.terms = self._scratch(2 * ceil(rows * rows, tiling.GRAM_TERMS) if by_gram else 0, dtype=torch.float64)

    def _gram_slices(self, rows: int) -> tuple[int, int]:
        """How many slices of `gram` belong to X, and how many to D."""
        active = self.chain[0]
        _, share = tiling.gram_tiles(rows, active.n_out, active.n_in)
        return ceil(active.n_in, share), ceil(active.n_out, share)

    def _by_library(self, layer: Layer, rows: int) -> bool:
        return tiling.library(layer.n_out, layer.n_in)

    def _product(self, i: int, epilogue: int, start: int, rows: int, slices: Tensor | None = None) -> None:
        if i == 0 and rows <= tiling.NEXT_ROWS:
            n_out = self.chain[0].n_out
            slices = self.z[: self.slices * rows * n_out].view(self.slices, rows, n_out)
        super()._product(i, epilogue, start, rows, slices)

    def _squares(self, d: Tensor, rows: int) -> None:
        """Partial sums of s^2, from the Gram matrices where they serve."""
        active, x, tiles, terms = self.chain[0], self.gathered, self.w_tiles, 0
        n_out, n_in = active.n_out, active.n_in
        if by_gram := tiling.by_gram(n_out, n_in, rows):
            block, share = tiling.gram_tiles(rows, n_out, n_in)
            of_x, of_d = self._gram_slices(rows)
            along, terms = ceil(rows, block), ceil(rows * rows, tiling.GRAM_TERMS)
            launcher.launch(
                gram, (along, along, of_x + of_d), x, d, self.gram, rows, n_in, n_out, share, of_x,
                BLOCK=block, BLOCK_INNER=tiling.GRAM_INNER, num_warps=8, num_stages=3,
            )  # fmt: skip
            launcher.launch(
                gram_terms, (terms,), self.gram, self.terms, rows, of_x, of_x + of_d, float(active.bias is not None),
                BLOCK=tiling.GRAM_TERMS, num_warps=4, num_stages=1,
            )  # fmt: skip
        launcher.launch(
            squares, (self.programs,),
            d, x, self.terms if by_gram else None, self.partials, rows, terms, n_out, n_in,
            BIAS=active.bias is not None, PRECISION=tiles.precision,
            BLOCK_OUT=tiles.rows, BLOCK_IN=tiles.columns, BLOCK_B=tiles.inner,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, all_registers=True,
        )  # fmt: skip

    def _advance(self, rule: Update, d: Tensor, rows: int, norms: Tensor, at: int, start: int, next_rows: int) -> None:
        """The step with norms[at], and the forward product of the `next_rows` rows at `start`, which are gathered here."""
        (weight, bias, *_), tiles, x = self.chain[0], self.w_tiles, self.gathered
        if next_rows:
            # In the one of the two buffers that the current mini-batch does not have.
            self.gathered = self._gather(self.inputs[start // self.batch_size % 2], start, next_rows)
        looks_ahead = 0 < next_rows <= tiling.NEXT_ROWS
        velocity, velocity_bias = rule.velocity_weight, rule.velocity_bias
        launcher.launch(
            advance, (self.strips * (self.slices + (bias is not None)),),
            weight, bias, velocity, velocity_bias, d, x, self.gathered if looks_ahead else None, self.z, norms, rule.lr,
            at, rows, next_rows, *weight.shape, self.share,
            *weight.stride(), stride_of(bias), *((0, 0) if velocity is None else velocity.stride()), stride_of(velocity_bias),
            rule.momentum, NESTEROV=rule.nesterov, PRECISION=tiles.precision,
            BLOCK_OUT=tiles.rows, BLOCK_IN=tiles.columns, BLOCK_B=tiles.inner, BLOCK_NEXT=tiling.next_block(next_rows),
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, all_registers=True,
        )  # fmt: skip

    def run(self, rule: Update) -> tuple[Tensor, Tensor]:
        """All mini-batches in turn; (losses, norms), one of each a step."""
        starts = range(0, self.rows, self.batch_size)
        losses, norms = (self._scratch(len(starts)) for _ in range(2))
        # A step by a norm of 0 changes nothing, and leaves the first mini-batch's forward product as every later one's is made.
        self._advance(rule, self.h[-1], 0, torch.zeros_like(norms[:1]), 0, 0, self.batch_size)
        for at, start in enumerate(starts):
            following = start + self.batch_size
            rows = min(self.batch_size, self.rows - start)
            d = self.residual(start, rows)
            self._squares(d, rows)
            self.update(None, rows, losses, norms, at)
            self._advance(rule, d, rows, norms, at, following, max(0, min(self.batch_size, self.rows - following)))
        return losses, norms


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """All mini-batches of a `Call`, step by step, in place; (losses, norms), one of each a step."""
    call = Call(*arguments)
    return Streamed(call.layers, call.x, call.target, call.order, call.batch_size, call.loss, call.x_scale).run(call.rule)
