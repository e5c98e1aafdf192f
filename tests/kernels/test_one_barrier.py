"""What only the persistent kernel's form with one barrier a step has: inputs split, and the norm from Gram matrices.

Interpreted dots are plain float32, whatever precision the tiles name: what is proved here is all but the matrix units.
"""

from __future__ import annotations

import pytest
import torch
from interleave import interleaved
from one_pass import MEET, ONLY_ARRIVE, WAIT, assert_pass_is_right, ends, mutant, run
from one_pass import one_barrier_tiles as tiles
from passes import arguments_of, truth
from support import Problem, assert_error_rule, make_problem
from test_persistent import GRAM_SHAPES
from triton.runtime import interpreter

from dante_kernels.kernels import barrier, one_launch, plan
from dante_kernels.kernels.fused import Call


@pytest.mark.parametrize("case", [*[(*shape, 32) for shape in GRAM_SHAPES], (392, (100, 10), 64)], ids=str)
def test_unfair_schedules_give_the_same_bits(case, unfair):
    n_in, widths, inputs = case
    p = make_problem(seed=7, rows=45, n_in=n_in, widths=widths)
    results = [assert_pass_is_right(p.clone(), 20, tiles(p, 20, inputs), seed=seed) for seed in unfair]
    assert all(torch.equal(results[0], other) for other in results[1:])


def cancelling(seed: int = 12, left: float = 1e-4) -> Problem:
    """The second mini-batch of 20 rows is ten rows and three times the same ones, whose D cancel theirs but for so much."""
    p = make_problem(seed=seed, rows=60, n_in=70, widths=(20,), activation="identity", bias=False, class_indices=False)
    p.x[30:40] = 3 * p.x[20:30]
    out = p.x @ p.weight.t()
    push = torch.randn(10, 20, generator=torch.Generator().manual_seed(seed))
    p.target[20:30], p.target[30:40] = out[20:30] + push, out[30:40] - push * (1 + left) / 3
    return p


def norm_after_cancelling(p: Problem, module=None, seed: int = 0) -> torch.Tensor:
    """The norm of that mini-batch alone, from the weights at the start."""
    rows = torch.arange(20, 40)
    settings = {} if module is None else {"module": module}
    return run(p.clone(), 20, tiles(p, 20), seed=seed, order=rows, **settings)[1]


def test_a_norm_of_terms_that_cancel_is_taken_from_the_gradient():
    p = cancelling()
    rows = torch.arange(20, 40)
    theirs, exact = (truth(p, 20, dtype, order=rows)[-1] for dtype in (torch.float32, torch.float64))
    assert_error_rule("norm", norm_after_cancelling(p), theirs, exact)
    assert_pass_is_right(p, 20, tiles(p, 20))  # before and after it the Gram norm serves


def test_without_the_check_that_norm_would_be_wrong(tmp_path):
    module = mutant(tmp_path, "            if not trusted:\n", 0, "            if False:\n")
    p = cancelling()
    assert not abs(norm_after_cancelling(p, module) / norm_after_cancelling(p) - 1).item() < 1e-3  # NaN where s^2 is negative


def barriers_of(p: Problem, monkeypatch, order=None) -> float:
    """Grid barriers a step of a pass over these rows in mini-batches of 20."""
    builder, arrived = interpreter.interpreter_builder, []
    original = type(builder).create_atomic_rmw

    def create_atomic_rmw(self, op, pointer, value, *rest):
        arrived.append(value.data.any())
        return original(self, op, pointer, value, *rest)

    monkeypatch.setattr(type(builder), "create_atomic_rmw", create_atomic_rmw)
    how = tiles(p, 20)
    _, norms = run(p, 20, how, order=order)
    monkeypatch.undo()
    return sum(arrived) / how.split_in / len(norms)


def test_a_step_has_one_barrier(monkeypatch):
    assert barriers_of(make_problem(seed=7, rows=45, n_in=150, widths=(37, 10)), monkeypatch) == 1


@pytest.mark.parametrize(("ratio", "barriers"), [(50, 1), (80, 2)])
def test_the_gram_norm_is_trusted_up_to_64_times_its_square(ratio, barriers, monkeypatch):
    def bound_over_square(left: float) -> float:
        p, rows = cancelling(left=left).to(torch.float64), slice(20, 40)
        x, d = p.x[rows], p.x[rows] @ p.weight.t() - p.target[rows]
        return ((x.norm(dim=1) * d.norm(dim=1)).sum() / (d.t() @ x).norm()).item() ** 2

    low, high = 1e-4, 10.0  # more left over, less cancels
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if bound_over_square(middle) > ratio else (low, middle)
    assert bound_over_square(low) == pytest.approx(ratio, rel=1e-3)
    assert barriers_of(cancelling(left=low), monkeypatch, torch.arange(20, 40)) == barriers


def test_with_bfloat16_products_the_gram_norm_keeps_its_digits():
    """All numbers are exact in bfloat16, but for D and the Gram matrices."""
    p = make_problem(seed=14, rows=20, n_in=70, widths=(20,), activation="identity", class_indices=False)
    generator = torch.Generator().manual_seed(0)
    p.x, p.target = (torch.randint(-8, 9, t.shape, generator=generator) / 8 for t in (p.x, p.target))
    p.weight.copy_(torch.randint(-8, 9, p.weight.shape, generator=generator) / 8)
    p.bias.zero_()
    exact = truth(p, 20, torch.float64)[-1]
    _, norms = run(p, 20, tiles(p, 20)._replace(precision="bf16"))
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("target", "norm"), [(0.0, 0.0), (1e-17, None), (1e22, float("inf"))])
def test_norms_that_are_nothing_or_beyond_what_squares_can_be(target, norm):
    """0 where G is 0; and where s^2 leaves the range that the Gram norm is trusted in, what G's squares say."""
    p = make_problem(seed=13, rows=20, n_in=70, widths=(20,), activation="identity", loss="mse", class_indices=False)
    p.weight.zero_(), p.bias.zero_(), p.target.fill_(target)
    exact = truth(p, 20, torch.float64)[-1]
    _, norms = run(p, 20, tiles(p, 20), rule=(torch.ones(20, 70), torch.ones(20), 0.9, True))
    expected = exact.float() if norm is None else torch.tensor([norm])
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)
    assert (p.weight == 0).all() == (norm is not None)


MUTANTS = {
    "no wait for Z": (WAIT, 0, "sense = ~sense\n", False),
    "no barrier for Z": ("arrive(p_counter, program, PROGRAMS)\n", 0, "pass\n", False),
    "one half of the exchange buffer": ("(step % 2) * (SPLIT_IN * z_slice)", 0, "0", False),
    "no wait for the exact norm": (MEET, 7, ONLY_ARRIVE, True),
    "no barrier for the exact norm": (MEET, 7, "pass\n", True),
    "no bias in the norm": ("gram += 1.0\n", 0, "pass\n", False),
    "rows of the next mini-batch too soon": ("ahead_m_row, ahead_x\n", 0, "ahead_m_row, x\n", False),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_schedules_see_what_is_missing(name, schedules, tmp_path, monkeypatch):
    monkeypatch.setattr("interleave.TURNS", 3000)
    old, nth, new, cancels = MUTANTS[name]
    module = mutant(tmp_path, old, nth, new)
    p = cancelling() if cancels else make_problem(seed=11, rows=60, n_in=150, widths=(12, 7))
    right = p.clone()
    run(right, 20, tiles(p, 20))
    for seed in schedules:
        barrier._counters.clear()
        q = p.clone()
        seen = not ends(lambda q=q, seed=seed: run(q, 20, tiles(q, 20), seed=seed, module=module))
        assert seen or not torch.equal(q.weight, right.weight)
    barrier._counters.clear()


def test_models_side_by_side_have_the_bits_of_each_alone():
    problems = [make_problem(seed=seed, rows=45, n_in=70, widths=(37, 10), class_indices=True) for seed in range(3)]
    alone = [p.clone() for p in problems]
    expected = [run(p, 20, tiles(p, 20)) for p in alone]

    calls = [Call(*arguments_of(p, 20)) for p in problems]
    with interleaved(1) as grids:
        results = one_launch.run(
            [one_launch.model(c) for c in calls], calls[0].layers, 20, calls[0].loss, 0.0, False, 1.0, tiles(problems[0], 20)
        )
    assert grids == [9]
    for p, q, got, wanted in zip(problems, alone, results, expected, strict=True):
        assert torch.equal(p.weight, q.weight)
        assert torch.equal(torch.stack(got), torch.stack(wanted))


def test_the_model_chooses_it_where_tf32_is_allowed():
    def chosen(widths, batch, precision, momentum=False, device=plan.H200, most=132):
        shape = plan.Shape(tuple(widths), batch, momentum=momentum, precision=precision)
        return plan.persistent(shape, most, device)

    for precision in ("high", "medium"):
        how = chosen([784, 100, 64], 20, precision)
        assert how.one_barrier
        assert (how.split_out, how.split_in, how.precision) == (1, 13, "tf32" if precision == "high" else "bf16")
        how = chosen([300, 100, 20], 5, precision, momentum=True)
        assert how.one_barrier
        assert how.split_in == 10
    # With at most 16 units after it, tiles for the matrix units exchange less, and wait more often.
    assert [chosen([784, 100, 10], 20, "high", device=plan.H200._replace(barrier=b)).one_barrier for b in (0.7, 1)] == [
        False,
        True,
    ]
    for how in (
        chosen([784, 100, 64], 20, "highest"),
        chosen([784, 100, 64], 33, "high"),
        chosen([784, 129, 64], 20, "high"),
        chosen([784, 100, 64], 20, "high", most=12),
        chosen([784, 100, 64], 20, "high", device=plan.H200._replace(hopper=False)),
        chosen([20, 15, 10], 20, "high"),
    ):
        assert how is None or not how.one_barrier
