"""What the plans of several launches a step keep that make a mini-batch of x first: streamed and library."""

from __future__ import annotations

import pytest
import torch
from passes import NO_MOMENTUM, SPOILED, assert_pass_is_right, changed, epoch, rule_of, spoil, strided, truth
from support import ACTIVATIONS, LOSSES, as_float32, make_problem

from dante_kernels.kernels import tiling
from dante_kernels.ops import Layer


@pytest.fixture(autouse=True, params=["streamed", "library"])
def by_library(request, monkeypatch) -> bool:
    """Both plans in turn; whether torch.mm makes the products, whatever their size."""
    monkeypatch.setenv("DANTE_GPU_PLAN", request.param)
    monkeypatch.setattr(tiling, "worth_a_launch", lambda *sizes: True)
    return request.param == "library"


# Every activation with every loss, and each of them with every depth.
DEPTHS = [(3,), (33, 12), (17, 21, 10)]
COMBINED = [(a, loss, DEPTHS[(i + j) % 3]) for i, a in enumerate(ACTIVATIONS) for j, loss in enumerate(LOSSES)]


@pytest.mark.parametrize(("activation", "loss", "widths"), COMBINED, ids=str)
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


@pytest.mark.parametrize("batch", [20, 70])
def test_a_pass_gives_the_bits_of_its_steps(batch):
    rows = 2 * batch + 5
    p = make_problem(seed=9, rows=rows, n_in=100, widths=(80, 10))
    q, rules = p.clone(), [rule_of(p, 0.9) for _ in range(2)]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    losses_, norms = epoch(p, batch, order, rules[0])
    for step, chosen in enumerate(order.split(batch)):
        single = make_problem(seed=9, rows=rows, n_in=100, widths=(80, 10))
        single.weight, single.bias, single.x, single.target = q.weight, q.bias, p.x[chosen], p.target[chosen]
        loss, norm = epoch(single, len(chosen), rule=rules[1])
        assert torch.equal(torch.cat([loss, norm]), torch.stack([losses_[step], norms[step]]))
    for one, other in zip((p.weight, p.bias, *rules[0][:2]), (q.weight, q.bias, *rules[1][:2]), strict=True):
        assert torch.equal(one, other)


def test_two_passes_give_the_same_bits():
    p = make_problem(seed=8, rows=13, n_in=100, widths=(70, 40), loss="cross_entropy")
    q = p.clone()
    assert all(map(torch.equal, epoch(p, 10), epoch(q, 10)))
    assert torch.equal(p.weight, q.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("transposed", [False, True])
def test_strides_bfloat16_and_uint8_give_the_bits_of_contiguous_float32(transposed, dtype, by_library):
    p = make_problem(seed=6, rows=40, n_in=70, widths=(20, 3), class_indices=False, uint8=dtype == torch.uint8)
    p.x = p.x.to(dtype)
    q = p.clone()
    p = as_float32(p)
    q.weight, q.target = strided(p.weight, transposed=transposed), strided(p.target, transposed=transposed)
    q.x = strided(q.x, transposed=transposed)
    q.bias = torch.full((20, 2), 7.0)[:, 0].copy_(p.bias)
    q.suffix = [Layer(strided(p.suffix[0].weight, transposed=transposed), *p.suffix[0][1:])]
    rules = rule_of(p, 0.9), (strided(torch.zeros(20, 70), transposed=not transposed), torch.zeros(20), 0.9, False)
    results = [changed(r, rule, epoch(r, 12, rule=rule)) for r, rule in zip((p, q), rules, strict=True)]
    for one, other in zip(*results, strict=True):
        if by_library:  # torch's products may sum another layout in another order
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(one, other)
    storage = torch.as_strided(q.weight, (q.weight.untyped_storage().nbytes() // 4,), (1,), 0)
    assert (storage == 7.0).sum() >= 2 * q.weight.numel()


@pytest.mark.parametrize("what", SPOILED)
@pytest.mark.parametrize(("widths", "loss"), [((6, 3), "mse"), ((5,), "binary_cross_entropy"), ((4, 40), "cross_entropy")])
def test_what_is_not_finite_skips_its_step_and_no_other(what, widths, loss):
    p = make_problem(seed=0, rows=9, n_in=5, widths=widths, loss=loss, class_indices=True, activation="relu")
    order = torch.arange(9)
    spoil(p, order, what)
    before = p.clone()
    values, norms = epoch(p, 3, order)
    finite = [False] * 3 if what == "weight" else [True, False, True]
    assert norms.isfinite().tolist() == values.isfinite().tolist() == finite
    if what == "weight":
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
    values, norms = epoch(p, 3, rule=(*velocity, 0.9, False))
    assert not torch.cat([values, norms, p.weight.flatten(), p.bias]).any()
    assert (torch.cat([velocity[0].flatten(), velocity[1]]) == 1).all()


def test_it_agrees_with_the_fused_plan(monkeypatch):
    problems = [make_problem(seed=12, rows=50, n_in=140, widths=(65, 10)) for _ in range(2)]
    rules = [rule_of(p, 0.5) for p in problems]
    results = [epoch(problems[0], 20, rule=rules[0])]
    monkeypatch.setenv("DANTE_GPU_PLAN", "fused")
    results.append(epoch(problems[1], 20, rule=rules[1]))
    results = [changed(p, rule, result) for p, rule, result in zip(problems, rules, results, strict=True)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["high", "medium"])
def test_lower_precision_rounds_operands_only(name, by_library):
    before = torch.get_float32_matmul_precision()
    p = make_problem(seed=12, rows=30, n_in=140, widths=(70, 10), activation="tanh")
    exact = truth(p, 30, torch.float64)
    try:
        torch.set_float32_matmul_precision(name)
        got = changed(p, NO_MOMENTUM, epoch(p, 30))
    finally:
        torch.set_float32_matmul_precision(before)
    # The interpreter computes tf32 products in float32; bfloat16 operands have 8 bits.
    error = max((a.double() - b).norm() / b.norm() for a, b in zip(got, exact, strict=True))
    assert error <= 8 * 2.0 ** -(24 if name == "high" else 8)
    assert name == "high" or by_library or error >= 2.0**-14  # torch.mm computes in float32 here
