"""The library plan: torch.mm for G and the larger products of the fused step."""

from __future__ import annotations

import itertools

import pytest
import torch
from passes import assert_pass_is_right, epoch
from support import LOSSES, make_problem

from dante_kernels.kernels import cost, launcher, plan, tiling


@pytest.fixture(autouse=True)
def made(monkeypatch) -> list[object]:
    """This plan for every shape; what it launches: shapes of torch.mm and names of kernels, in order."""
    monkeypatch.setenv("DANTE_GPU_PLAN", "library")
    found, mm, launch = [], torch.mm, launcher.launch
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out: found.append((*a.shape, b.shape[1])) or mm(a, b, out=out))
    monkeypatch.setattr(
        launcher, "launch", lambda kernel, *rest, **options: found.append(kernel.__name__) or launch(kernel, *rest, **options)
    )
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_torch_makes_g_and_the_products_of_layers_that_are_worth_a_launch(made, loss):
    p = make_problem(seed=4, rows=27, n_in=200, widths=(100, 170, 9), loss=loss)
    assert [tiling.worth_a_launch(n, k, 24) for k, n in ((200, 100), (100, 170), (170, 9))] == [True, True, False]
    assert_pass_is_right(p, 24, order=torch.arange(27).flip(0), momentum=0.9)
    step = [
        "gather", (24, 200, 100), "product", (24, 100, 170), "product", "product",
        "product", (24, 170, 100), "product", (100, 24, 200), "gradient", "update",
    ]  # fmt: skip
    assert made == step + [tuple(3 if size == 24 else size for size in one) if type(one) is tuple else one for one in step]


def test_a_short_last_mini_batch_may_have_fewer_products_by_torch(made, monkeypatch):
    monkeypatch.setattr(tiling, "MANY_ROWS", 10)
    assert_pass_is_right(make_problem(seed=5, rows=24, n_in=30, widths=(12, 5)), 20)
    products = [one for one in made if type(one) is tuple]
    assert products == [(20, 30, 12), (20, 12, 5), (20, 5, 12), (12, 20, 30), (12, 4, 30)]


@pytest.mark.parametrize(("widths", "loss"), [((784, 100, 10), 0), ((784,), 0), ((60, 784), 1), ((400, 300, 20, 10), 0)])
def test_the_model_counts_the_launches_that_are_made(made, widths, loss, monkeypatch):
    p = make_problem(seed=0, rows=5, n_in=70, widths=widths, loss=LOSSES[loss])
    epoch(p, 5)
    assert cost.library(plan.Shape((70, *widths), 5, loss), plan.H200).launches == len(made)


def test_no_plan_that_is_chosen_is_slower_than_the_plain_composition_by_the_model():
    nets = [
        (784, 100, 10), (784, 10), (784, 400, 10), (784, 100, 100, 10), (784, 400, 200, 10), (784, 400, 200, 100, 10),
        (784, 600, 400, 200, 100, 50, 10), (1024, 400, 1024), (3072, 512, 10), (12288, 3072, 1536, 768, 384, 200), (5, 3, 1),
        (300, 1), (5, 100, 1),
    ]  # fmt: skip
    chosen = set()
    for widths, batch, precision, momentum in itertools.product(
        nets, (1, 20, 100, 500, 2000, 4000, 20000, 60000), ("highest", "high", "medium"), (False, True)
    ):
        shape = plan.Shape(widths, batch, momentum=momentum, precision=precision)
        found = plan.choose(shape, plan.H200, plan.H200.multiprocessors)
        chosen.add(found.plan)
        assert found.microseconds <= cost.plain(shape, plan.H200).microseconds
    assert chosen == set(plan.SERVED)
