"""The streamed plan: G is never stored, the norm comes from Gram matrices, the update makes the next forward product."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from passes import assert_pass_is_right, epoch
from support import ACTIVATIONS, LOSSES, Problem, make_problem
from torch import Tensor

from dante_kernels import losses
from dante_kernels.kernels import fused, launcher, streamed, tiling
from dante_kernels.ops.layer import flatten


@pytest.fixture(autouse=True)
def streamed_plan(monkeypatch):
    """This plan for every shape."""
    monkeypatch.setenv("DANTE_GPU_PLAN", "streamed")


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
    norms = [epoch(given_residual(d, x, False), 12)[1]]
    assert by_squares(passes) != gram
    monkeypatch.setenv("DANTE_GPU_PLAN", "fused")
    norms.append(epoch(given_residual(d, x, False), 12)[1])
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
