# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM108 - an `if` on a constexpr is decided at compile time, and stands apart from the others
"""Device functions that the kernels share: phi and its subgradient, the losses, matrix products, row look-up.

All arithmetic is float32. Divisions are correctly rounded; `tl.exp` is the hardware's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import activations, losses

SIGMOID = tl.constexpr(activations.SIGMOID)
TANH = tl.constexpr(activations.TANH)
MSE = tl.constexpr(losses.MSE)
CROSS_ENTROPY = tl.constexpr(losses.CROSS_ENTROPY)

# The interpreter multiplies the bit patterns of bfloat16 operands, so there they are rounded, then widened again.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def divide(x, y):
    """x / y, correctly rounded; x a tensor."""
    return tl.div_rn(x, tl.zeros_like(x) + y)


@triton.jit
def quotients(x, y):
    """x / y, rounded as `divide` does it, of a tensor by a number y whose square is neither 0 nor infinite.

    A product with 1 / y and its remainder: four operations that the compiler can mix with others. A compiled division has
    as many, but also a test and a branch for the ends of float32's range, and so each element waits for the one before it.
    Where |x| is below 2^-100 the remainder underflows, and the last place may be another; -0.0 becomes 0.0.
    """
    reciprocal = divide(tl.full([], 1.0, tl.float32), y)
    q = x * reciprocal
    return tl.fma(tl.fma(q, -y, x), reciprocal, q)


@triton.jit
def log1p(e):
    """log(1 + e) for e in [0, 1], to about an ulp: 2 atanh(u) with u = e / (2 + e) <= 1/3, as a series."""
    u = divide(e, 2.0 + e)
    s = u * u
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15)))))))
    return 2.0 * u * series


@triton.jit
def log_of_sum(s):
    """log(s) for s >= 1, without the loss of digits that a fast logarithm has near 1."""
    return tl.where(s < 2.0, log1p(tl.minimum(s - 1.0, 1.0)), tl.log(s))


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), without overflow: exp(-z) may be inf, whose reciprocal is 0."""
    e = 1.0 + tl.exp(-z)
    return divide(tl.zeros_like(e) + 1.0, e)


@triton.jit
def sigmoid_slope(z):
    """sigmoid'(z) = e / (1 + e)^2 with e = exp(-|z|), which does not cancel where the sigmoid saturates."""
    e = tl.exp(-tl.abs(z))
    return divide(e, (1.0 + e) * (1.0 + e))


@triton.jit
def tanh(z):
    """tanh(z): an odd polynomial (Cephes' tanhf) below 0.625, where the exponential form would cancel."""
    s = z * z
    p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s - 3.33332819422e-1
    e = 1.0 + tl.exp(2.0 * tl.abs(z))
    far = 1.0 - divide(tl.zeros_like(e) + 2.0, e)
    return tl.where(tl.abs(z) < 0.625, z + z * s * p, tl.where(z < 0, -far, far))


@triton.jit
def phi(z, low, high, KIND: tl.constexpr):
    """The activation: sigmoid, tanh, or the generalized ReLU, low * z for z <= 0 and high * z above; NaN stays NaN."""
    if KIND == SIGMOID:
        h = sigmoid(z)
    elif KIND == TANH:
        h = tanh(z)
    else:
        h = tl.where(z > 0, high * z, low * z)
    return h


@triton.jit
def slope(z, low, high, KIND: tl.constexpr):
    """The subgradient g(z); the generalized ReLU has low for z < 0 and high from 0 on."""
    if KIND == SIGMOID:
        g = sigmoid_slope(z)
    elif KIND == TANH:
        g = 4.0 * sigmoid_slope(2.0 * z)
    else:
        g = tl.where(z < 0, tl.zeros_like(z) + low, tl.zeros_like(z) + high)
    return g


@triton.jit
def residual(h, t, scale, LOSS: tl.constexpr):
    """dJ/dh of an element-wise loss; `scale` is the mean's factor (2 / elements for mse, 1 / elements for bce)."""
    if LOSS == MSE:
        r = (h - t) * scale
    else:
        r = (sigmoid(h) - t) * scale
    return r


@triton.jit
def element_loss(h, t, LOSS: tl.constexpr):
    """One element's contribution to an element-wise loss, before the mean."""
    if LOSS == MSE:
        v = (h - t) * (h - t)
    else:
        # tl.minimum(x, 1) lets no NaN vanish: where h is NaN, so is h * t.
        v = log1p(tl.minimum(tl.exp(-tl.abs(h)), 1.0)) + (tl.where(h > 0, h, 0.0) - h * t)
    return v


@triton.jit
def target_tile(p_target, row, m_row, column, m_column, stride_row, stride_column, n, CLASSES: tl.constexpr):
    """Targets as values (rows, columns): loaded, or one-hot of class indices, where a class outside 0..n-1 gives NaN.

    Elements outside the masks are 0.
    """
    if CLASSES:
        index = tl.load(p_target + row * stride_row, mask=m_row, other=0)
        valid = (index >= 0) & (index < n)
        t = tl.where(index[:, None] == column[None, :], 1.0, 0.0)
        t = tl.where(valid[:, None], t, float("nan"))
        t = tl.where(m_row[:, None] & m_column[None, :], t, 0.0)
    else:
        p = p_target + row[:, None] * stride_row + column[None, :].to(tl.int64) * stride_column
        t = tl.load(p, mask=m_row[:, None] & m_column[None, :], other=0.0)
    return t


@triton.jit
def source_rows(p_order, stride_order, position, m_position, rows):
    """Which rows of x and target stand at these positions of the pass, as int64, and which of them exist.

    Without an order (None) a position is its own row. A row number outside 0..rows-1 does not exist: it must not be
    read, and all that is computed from it must become NaN.
    """
    if p_order is None:
        row = position
    else:
        row = tl.load(p_order + position * stride_order, mask=m_position, other=0)
    exists = (row >= 0) & (row < rows)
    return row, exists


@triton.jit
def load_x(p_x, mask, x_scale):
    """A tile of x, 0 outside the mask: uint8 as float32 times x_scale, rounded once; any other dtype as it is."""
    x = tl.load(p_x, mask=mask, other=0)
    if x.dtype == tl.uint8:
        x = x.to(tl.float32) * x_scale
    return x


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with float32 accumulation. PRECISION is ieee, tf32x3, tf32 or bf16 (operands rounded to bfloat16).

    For tf32x3 Triton adds each block's product to `acc` with an ordinary rounded addition, not inside the matrix unit,
    which truncates: over a long inner dimension truncations add up (tests/kernels/test_precision.py has figures).
    """
    if PRECISION == "bf16":
        if INTERPRETED:
            a_narrow = a.to(tl.bfloat16).to(tl.float32)
            b_narrow = b.to(tl.bfloat16).to(tl.float32)
        else:
            a_narrow = a.to(tl.bfloat16)
            b_narrow = b.to(tl.bfloat16)
        acc = tl.dot(a_narrow, b_narrow, acc, input_precision="ieee")
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_sum(tile):
    """The sum of all elements, as one reduction: two nested ones of a dot's result do not compile for sm_100 in 3.7."""
    return tl.sum(tile)


@triton.jit
def sum_of(p_partials, count, BLOCK: tl.constexpr):
    """The sum of `count` numbers in memory, in their type and in an order that depends on `count` alone."""
    acc = tl.zeros([BLOCK], p_partials.dtype.element_ty)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        acc += tl.load(p_partials + at, mask=at < count, other=0.0)
    return tl.sum(acc, axis=0)
