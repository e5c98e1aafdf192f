"""What rounding rests on: three tf32 products added by ordinary, rounded additions, and quotients without a division."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from support import assert_error_rule
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from dante_kernels.kernels import device, tiling

BLOCK = 32
Array = NDArray[np.float32]


@triton.jit
def quotients(p_x, p_y, p_q, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    tl.store(p_q + at, device.quotients(tl.load(p_x + at), tl.load(p_y)))


def fused(self: object, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """A fused multiply-add as a GPU rounds it, once; the interpreter's rounds the product too."""
    x_data, y_data, z_data = (a.data.astype(np.longdouble) for a in (x, y, z))
    return TensorHandle((x_data * y_data + z_data).astype(np.float32), z.dtype.scalar)


@pytest.mark.parametrize("norm", [1e-22, 0.3, 1.0, 1.9999999, 3.0, 1e19])
def test_quotients_are_rounded_as_a_division_rounds_them(norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterpreterBuilder, "create_fma", fused)
    rng = np.random.default_rng(7)
    y = np.float32(norm)
    x = (rng.uniform(-1, 1, 2**16) * 2.0 ** rng.integers(-20, 1, 2**16)).astype(np.float32) * y
    x[:3] = 0.0, y, -y
    got = torch.empty(len(x))
    quotients[(1,)](torch.from_numpy(x), torch.tensor([y]), got, BLOCK=len(x))
    np.testing.assert_array_equal(got.numpy(), x / y)


def to_tf32(a: Array) -> Array:
    """Rounded to nearest, ties away, to 10 bits of mantissa, as cvt.rna.tf32.f32 does."""
    return ((a.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def matrix_unit(a: Array, b: Array, acc: Array) -> Array:
    """acc + a b over 8 inner elements, exact inside, then truncated to float32: the pessimistic model of the hardware."""
    exact = acc + a.astype(np.float64) @ b.astype(np.float64)
    rounded = exact.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(exact), np.nextafter(rounded, np.float32(0)), rounded)


def three_products(a: Array, b: Array, *, rounded_additions: bool) -> torch.Tensor:
    a_big, b_big = to_tf32(a), to_tf32(b)
    a_small, b_small = to_tf32(a - a_big), to_tf32(b - b_big)
    acc = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for start in range(0, a.shape[1], BLOCK):
        block = np.zeros_like(acc) if rounded_additions else acc
        for p, q in ((a_small, b_big), (a_big, b_small), (a_big, b_big)):
            for k in range(start, start + BLOCK, 8):
                block = matrix_unit(p[:, k : k + 8], q[k : k + 8], block)
        acc = acc + block if rounded_additions else block
    return torch.from_numpy(acc)


@pytest.mark.parametrize("inner", [32, 512, 3072])
def test_three_tf32_products_keep_the_error_rule_where_blocks_are_added_with_rounding(inner: int) -> None:
    # Relative errors at 512 / 3072: torch 2.5e-7 / 2.7e-7, rounded 1.6e-7 / 2.3e-7, truncated 4.6e-6 / 2.9e-5.
    rng = np.random.default_rng(inner)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, inner), (inner, 64)))
    exact = torch.from_numpy(a).double() @ torch.from_numpy(b).double()
    torch32 = torch.from_numpy(a) @ torch.from_numpy(b)
    assert_error_rule("rounded", three_products(a, b, rounded_additions=True), torch32, exact)
    if inner > BLOCK:
        with pytest.raises(AssertionError):
            assert_error_rule("truncated", three_products(a, b, rounded_additions=False), torch32, exact)


def test_the_inner_block_of_large_layers_is_the_one_the_figures_are_for() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        for tiles, *dtype in (
            (tiling.step_product,),
            (tiling.forward_product,),
            (tiling.gradient_product, torch.float32),
        ):
            chosen = tiles(3072, 12288, *dtype)
            assert (chosen.precision, chosen.inner) == ("tf32x3", BLOCK)
            assert tiles(100, 784, *dtype).precision == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
