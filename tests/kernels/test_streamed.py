"""The streamed plan: G is never stored, the norm comes from Gram matrices, the update makes the next forward product."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support import ACTIVATIONS, LOSSES, Problem, as_float32, assert_error_rule, make_problem
from torch import Tensor

from dante_kernels import kernels, losses, reference
from dante_kernels.kernels import fused, launcher, streamed, tiling
from dante_kernels.ops import Layer
from dante_kernels.ops.layer import flatten

LR = 0.3


@pytest.fixture(autouse=True)
def streamed_plan(monkeypatch):
    """This plan for every shape; fresh memory is full of NaN, so that a kernel which reads what nobody wrote is seen."""
    monkeypatch.setenv("DANTE_GPU_PLAN", "streamed")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


@pytest.fixture
def library(monkeypatch):
    """torch.mm makes the products that this plan may leave to it, whatever their size; a list of their shapes."""
    monkeypatch.setattr(tiling, "library", lambda *layer: True)
    shapes, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out: shapes.append((*a.shape, b.shape[1])) or mm(a, b, out=out))
    return shapes


@pytest.fixture
def passes(monkeypatch):
    """The `Streamed` of every call."""
    found, run = [], streamed.Streamed.run
    monkeypatch.setattr(streamed.Streamed, "run", lambda self, rule: found.append(self) or run(self, rule))
    return found


def velocities(p: Problem, momentum: float) -> tuple[Tensor | None, Tensor | None]:
    zeros = (torch.zeros_like(p.weight), None if p.bias is None else torch.zeros_like(p.bias))
    return zeros if momentum else (None, None)


def epoch(p: Problem, batch: int, order=None, momentum=0.0, nesterov=False, velocity=None):
    """What a pass changes and returns: weight, bias, velocities, losses, norms."""
    velocity = velocity or velocities(p, momentum)
    result = kernels.sngd_epoch_(
        p.weight, p.bias, p.x, p.target, order, batch, *flatten(p.suffix, p.activation), losses.code(p.loss),
        torch.tensor(LR), *velocity, momentum, nesterov, p.x_scale,
    )  # fmt: skip
    return [t for t in (p.weight, p.bias, *velocity, *result) if t is not None]


def truth(p: Problem, batch: int, dtype: torch.dtype, order=None, momentum=0.0, nesterov=False):
    q = p.to(dtype)
    velocity = velocities(q, momentum)
    result = reference.sngd_epoch_(
        q.weight, q.bias, q.x, q.target, order, batch, q.suffix, q.activation, losses.code(q.loss),
        torch.tensor(LR, dtype=dtype), *velocity, momentum, nesterov,
    )  # fmt: skip
    return [t for t in (q.weight, q.bias, *velocity, *result) if t is not None]


def assert_pass_is_right(p: Problem, batch: int, **how) -> list[Tensor]:
    expected = [truth(p, batch, dtype, **how) for dtype in (torch.float32, torch.float64)]
    got = epoch(p, batch, **how)
    for i, (ours, theirs, exact) in enumerate(zip(got, *expected, strict=True)):
        assert_error_rule(f"result {i}", ours, theirs, exact)
    return got


@pytest.mark.parametrize("widths", [(3,), (33, 12), (17, 21, 10)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_pass_is_right_for_every_activation_loss_and_depth(activation, loss, widths):
    p = make_problem(seed=len(widths), rows=19, n_in=41, widths=widths, activation=activation, loss=loss)
    assert_pass_is_right(p, 12)


@pytest.mark.parametrize(
    ("rows", "batch", "n_in", "widths"),
    [(1, 1, 1, (1,)), (7, 3, 200, (70, 3)), (90, 60, 130, (129,)), (150, 70, 33, (20, 3)), (35, 35, 330, (90,))], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_odd_shapes_tails_and_mini_batches_without_look_ahead_or_gram_matrices(rows, batch, n_in, widths, bias):
    p = make_problem(seed=5, rows=rows, n_in=n_in, widths=widths, bias=bias, class_indices=False)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    assert_pass_is_right(p, batch, order=order, momentum=0.9, nesterov=bias)


@pytest.mark.parametrize("programs", [1, 3, 512])
def test_slices_of_several_tiles_and_fewer_programs_than_tiles(monkeypatch, programs):
    monkeypatch.setattr(tiling, "STREAMED_PROGRAMS", programs)
    assert_pass_is_right(make_problem(seed=3, rows=30, n_in=300, widths=(70, 4)), 20)
    monkeypatch.setattr(tiling, "by_gram", lambda *sizes: False)
    assert_pass_is_right(make_problem(seed=3, rows=30, n_in=300, widths=(70, 4)), 20)


@pytest.mark.parametrize("batch", [20, 70])
@pytest.mark.parametrize("loss", LOSSES)
def test_products_by_the_library_are_right(library, loss, batch):
    p = make_problem(seed=4, rows=2 * batch + 3, n_in=60, widths=(40, 50, 9), loss=loss)
    assert_pass_is_right(p, batch, order=torch.arange(2 * batch + 3).flip(0))
    # Forward through each layer, but the active one where the update before has done it, and back through the suffix.
    steps = [shape[0] for shape in library if shape[1:] == (50, 40)]
    assert steps == [batch, batch, 3]
    assert [shape for shape in library if shape[1:] == (60, 40)] == ([(70, 60, 40)] * 2 if batch == 70 else [])
    assert len(library) == (4 * 3 + 2 if batch == 70 else 4 * 3)


@pytest.mark.parametrize("by_library", [False, True])
@pytest.mark.parametrize("batch", [20, 70])
def test_a_pass_gives_the_bits_of_its_steps(batch, by_library, request):
    if by_library:
        request.getfixturevalue("library")
    rows = 2 * batch + 5
    p = make_problem(seed=9, rows=rows, n_in=100, widths=(80, 10))
    q, velocity = p.clone(), velocities(p, 0.9)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    together = epoch(p, batch, order, momentum=0.9)
    for step, chosen in enumerate(order.split(batch)):
        single = make_problem(seed=9, rows=rows, n_in=100, widths=(80, 10))
        single.weight, single.bias, single.x, single.target = q.weight, q.bias, p.x[chosen], p.target[chosen]
        *_, loss, norm = epoch(single, len(chosen), momentum=0.9, velocity=velocity)
        assert torch.equal(torch.cat([loss, norm]), torch.stack([together[-2][step], together[-1][step]]))
    for one, other in zip(together, (q.weight, q.bias, *velocity), strict=False):
        assert torch.equal(one, other)


def test_two_passes_give_the_same_bits():
    p = make_problem(seed=8, rows=13, n_in=100, widths=(70, 40), loss="cross_entropy")
    for one, other in zip(epoch(p.clone(), 10), epoch(p.clone(), 10), strict=True):
        assert torch.equal(one, other)


def strided(t: Tensor, *, transposed: bool) -> Tensor:
    """The same values in memory with a gap after every element, rows or columns first."""
    shape = (t.shape[1], t.shape[0], 3) if transposed else (*t.shape, 3)
    view = torch.full(shape, 7.0, dtype=t.dtype).select(2, 1)
    return (view.t() if transposed else view).copy_(t)


@pytest.mark.parametrize("by_library", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("transposed", [False, True])
def test_strides_bfloat16_and_uint8_give_the_bits_of_contiguous_float32(transposed, dtype, by_library, request):
    if by_library:
        request.getfixturevalue("library")
    p = make_problem(seed=6, rows=40, n_in=70, widths=(20, 3), class_indices=False, uint8=dtype == torch.uint8)
    p.x = p.x.to(dtype)
    q = p.clone()
    p = as_float32(p)
    q.weight, q.target = strided(p.weight, transposed=transposed), strided(p.target, transposed=transposed)
    q.x = strided(q.x, transposed=transposed)
    q.bias = torch.full((20, 2), 7.0)[:, 0].copy_(p.bias)
    q.suffix = [Layer(strided(p.suffix[0].weight, transposed=transposed), *p.suffix[0][1:])]
    velocity = strided(torch.zeros(20, 70), transposed=not transposed), torch.zeros(20)
    for one, other in zip(epoch(p, 12, momentum=0.9), epoch(q, 12, momentum=0.9, velocity=velocity), strict=True):
        if by_library:  # torch's products may sum another layout in another order
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(one, other)
    storage = torch.as_strided(q.weight, (q.weight.untyped_storage().nbytes() // 4,), (1,), 0)
    assert (storage == 7.0).sum() >= 2 * q.weight.numel()


@pytest.mark.parametrize("by_library", [False, True])
@pytest.mark.parametrize("spoil", ["x", "weight", "label", "negative label", "order", "negative order", "far order"])
@pytest.mark.parametrize(("widths", "loss"), [((6, 3), "mse"), ((5,), "binary_cross_entropy"), ((4, 40), "cross_entropy")])
def test_what_is_not_finite_skips_its_step_and_no_other(spoil, widths, loss, by_library, request):
    if by_library:
        request.getfixturevalue("library")
    p = make_problem(seed=0, rows=9, n_in=5, widths=widths, loss=loss, class_indices=True, activation="relu")
    order = torch.arange(9)
    if spoil.endswith("label"):
        p.target[4] = -1 if "negative" in spoil else widths[-1]
    elif spoil.endswith("order"):
        # A read of the far one would end the process.
        order[4] = {"order": 9, "negative order": -3, "far order": 2**45}[spoil]
    elif spoil == "x":
        p.x[4, 2] = torch.nan
    else:
        p.weight[1, 1] = torch.nan
    before = p.clone()
    *_, values, norms = epoch(p, 3, order)
    finite = [False] * 3 if spoil == "weight" else [True, False, True]
    assert norms.isfinite().tolist() == values.isfinite().tolist() == finite
    if spoil == "weight":
        assert torch.equal(p.weight.view(torch.int32), before.weight.view(torch.int32))
        assert torch.equal(p.bias, before.bias)
    else:
        epoch(before, 3, order[:3])
        epoch(before, 3, order[6:])
        assert torch.equal(p.weight, before.weight)
        assert torch.equal(p.bias, before.bias)


def test_a_zero_gradient_skips_the_update():
    p = make_problem(seed=0, rows=6, n_in=20, widths=(13,), activation="identity", class_indices=False)
    p.target, velocity = torch.zeros(6, 13), (torch.ones(13, 20), torch.ones(13))
    p.weight.zero_()
    p.bias.zero_()
    *_, values, norms = epoch(p, 3, momentum=0.9, velocity=velocity)
    assert not torch.cat([values, norms, p.weight.flatten(), p.bias]).any()
    assert (torch.cat([velocity[0].flatten(), velocity[1]]) == 1).all()


def given_residual(d: Tensor, x: Tensor, bias: bool) -> Problem:
    """A linear layer with W = 0 whose D = dJ/dZ under mse is d."""
    n_out, n_in = d.shape[1], x.shape[1]
    zero = torch.zeros(n_out) if bias else None
    return Problem(torch.zeros(n_out, n_in), zero, x, -d * d.numel() / 2, [], ACTIVATIONS["identity"], "mse")


def by_squares(passes) -> bool:
    """Whether the last call's last norm came from tiles of G: then more programs than the first have squares."""
    return bool(passes[-1].partials[1:].any())


# (how D cancels over the rows, whether the terms of the Gram sum cancel too much for float64)
CANCELLING = [(1e-1, False), (1e-3, False), (1e-6, True), (0.0, True)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("left", "too_much"), CANCELLING)
def test_the_norm_is_right_where_the_rows_cancel(passes, left, too_much, bias):
    generator = torch.Generator().manual_seed(3)
    x, d = torch.randn(8, 150, generator=generator), torch.randn(8, 128, generator=generator)
    if left == 0:  # small integers, of which nothing rounds
        x, d = (2 * x).round(), (2 * d).round()
    # Duplicates of rows with opposite residuals, but for what is left.
    d = torch.cat([d, -d + left * torch.randn(8, 128, generator=generator)])
    p = given_residual(d, x.repeat(2, 1), bias)
    assert tiling.by_gram(128, 150, 16)
    got = assert_pass_is_right(p, 16)
    if left == 0:
        assert got[-1] == 0
        assert not p.weight.any()
    else:
        assert by_squares(passes) == too_much


@pytest.mark.parametrize(
    ("size_x", "size_d", "gram"), [(1e-12, 1, True), (1, 1e-18, False), (1e15, 1, True), (1e-30, 1e20, True), (1e17, 1, False)]
)
def test_the_norm_of_tiny_and_huge_values_is_the_fused_plan_s(passes, monkeypatch, size_x, size_d, gram):
    generator = torch.Generator().manual_seed(4)
    x, d = torch.randn(12, 150, generator=generator) * size_x, torch.randn(12, 100, generator=generator) * size_d
    norms = [epoch(given_residual(d, x, False), 12)[-1]]
    assert by_squares(passes) != gram
    monkeypatch.setenv("DANTE_GPU_PLAN", "fused")
    norms.append(epoch(given_residual(d, x, False), 12)[-1])
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_a_norm_out_of_float32_s_range_skips_its_step(size):
    p = given_residual(torch.full((4, 20), size), torch.ones(4, 30), False)
    *_, norms = epoch(p, 4)
    assert norms == 0 or norms == torch.inf
    assert not p.weight.any()


def test_gram_matrices_of_a_short_last_mini_batch_fit_their_memory(monkeypatch):
    monkeypatch.setattr(tiling, "GRAM_PROGRAMS", 8)
    monkeypatch.setattr(tiling, "GRAM_SHARE", 16)
    p = make_problem(seed=2, rows=33 + 32, n_in=200, widths=(200,), class_indices=False)
    layers = fused.chain(p.weight, p.bias, *flatten(p.suffix, p.activation))
    scratch = streamed.Streamed(layers, p.x, p.target, None, 33, losses.code(p.loss))
    needed = [sum(scratch._gram_slices(rows)) * rows * rows for rows in (33, 32)]
    assert needed[1] > needed[0]
    assert scratch.gram.numel() == needed[1]
    assert_pass_is_right(p, 33)


def test_it_agrees_with_the_fused_plan(monkeypatch):
    results = []
    for name in ("streamed", "fused"):
        monkeypatch.setenv("DANTE_GPU_PLAN", name)
        results.append(epoch(make_problem(seed=12, rows=50, n_in=140, widths=(65, 10)), 20, momentum=0.5))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["high", "medium"])
def test_lower_precision_rounds_operands_only(name):
    before = torch.get_float32_matmul_precision()
    p = make_problem(seed=12, rows=30, n_in=140, widths=(70, 10), activation="tanh")
    exact = truth(p, 30, torch.float64)
    try:
        torch.set_float32_matmul_precision(name)
        got = epoch(p, 30)
    finally:
        torch.set_float32_matmul_precision(before)
    # The interpreter computes tf32 products in float32; bfloat16 operands have 8 bits.
    error = max((a.double() - b).norm() / b.norm() for a, b in zip(got, exact, strict=True))
    assert error <= 8 * 2.0 ** -(24 if name == "high" else 8)
    assert name == "high" or error >= 2.0**-14


def test_no_gradient_is_stored_and_a_step_is_so_many_launches(monkeypatch, passes):
    names = []
    monkeypatch.setattr(launcher, "launch", lambda kernel, grid, *a, **k: names.append(kernel.__name__))
    epoch(make_problem(seed=1, rows=40, n_in=784, widths=(100, 10)), 20)
    step = ["product", "product", "product", "gram", "gram_terms", "squares", "update", "gather", "advance"]
    assert names == ["gather", "advance", *step, *(name for name in step if name != "gather")]
    assert not hasattr(passes[0], "grad")
    scratch = [t for t in vars(passes[0]).values() if isinstance(t, Tensor)]
    assert max(t.numel() for t in scratch) < 784 * 100


@pytest.mark.parametrize(("name", "n_in", "n_out"), [("auto", 3072, 1024), ("streamed", 30, 3), ("fused", 3072, 1024)])
def test_it_runs_where_the_model_chooses_it_or_it_is_wanted(monkeypatch, name, n_in, n_out):
    launched, nothing = [], (torch.zeros(1), torch.zeros(1))
    monkeypatch.setattr(streamed, "run", lambda *call: launched.append("streamed") or nothing)
    monkeypatch.setattr(fused, "run", lambda *call: launched.append("fused") or nothing)
    monkeypatch.setenv("DANTE_GPU_PLAN", name)
    epoch(make_problem(seed=1, rows=20, n_in=n_in, widths=(n_out, 5)), 20)
    assert launched == ["fused" if name == "fused" else "streamed"]


def test_the_library_is_asked_for_large_layers_at_lower_precision_only():
    before = torch.get_float32_matmul_precision()
    try:
        for name in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(name)
            assert tiling.library(3072, 12288) == (name != "highest")
            assert not tiling.library(100, 784)
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_program_has_whole_tiles_and_every_input_a_program():
    for n_in, n_out in pairwise((1, 31, 33, 500, 3072, 12288, 70_000, 10)):
        tiles = tiling.streamed_product(n_out, n_in)
        share = tiling.streamed_share(n_out, n_in, tiles)
        assert share % tiles.columns == 0
        assert -(-n_out // tiles.rows) * -(-n_in // share) <= max(tiling.STREAMED_PROGRAMS, -(-n_out // tiles.rows))
