"""Micro-benchmarks of each operator by backend and plan, for pytest-benchmark: `pytest bench/test_operators.py`.

They are for comparing one operator with itself: `--benchmark-save=NAME`, later `--benchmark-compare`. Comparisons with peers
are `python -m bench`'s. What an operator computes is checked against float64 before it is timed.
"""

from __future__ import annotations

import pytest
import torch

from bench import measure, workloads
from bench.peers import Problem
from bench.peers.ours import FusedPlan, Operators
from dante_kernels import ops
from dante_kernels.ops import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(64, 100, 10), (784, 100, 10), (784, 400, 200, 10), (3072, 512, 10)]
BATCHES = (20, 100, 500)
STEPS = 20


@pytest.fixture(
    params=[(shape, batch) for shape in SHAPES for batch in BATCHES], ids=lambda p: f"{'-'.join(map(str, p[0]))}-b{p[1]}"
)
def problem(request) -> Problem:
    widths, batch = request.param
    return workloads.random_problem(workloads.Workload(widths, batch, rows=STEPS * batch), DEVICE)[0]


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request) -> str:
    reason = backends.why_not(request.param, DEVICE, torch.float32)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def layer_and_suffix(p: Problem) -> tuple:
    (weight, bias), *rest = p.start
    return weight, bias, [ops.Layer(w, b, "leaky_relu") for w, b in rest]


def timed(benchmark, run) -> None:
    """With the device's work in the time."""

    def whole():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(whole)


def assert_close(got: list, exact: list) -> None:
    for a, b in zip(got, exact, strict=True):
        assert float((a.double() - b).norm()) <= 1e-4 * float(b.norm())


def test_layer_forward(benchmark, problem, backend):
    def run(p: Problem, with_backend: str):
        weight, bias, _ = layer_and_suffix(p)
        return ops.layer_forward(p.x[: p.batch], weight, bias, "leaky_relu", backend=with_backend)

    assert_close([run(problem, backend)], [run(problem.double(), "reference")])
    timed(benchmark, lambda: run(problem, backend))


def test_layer_gradient(benchmark, problem, backend):
    def run(p: Problem, with_backend: str):
        weight, bias, suffix = layer_and_suffix(p)
        rows = slice(p.batch)
        return ops.layer_gradient(weight, bias, p.x[rows], p.y[rows], suffix, "leaky_relu", "mse", backend=with_backend)

    assert_close(run(problem, backend), run(problem.double(), "reference"))
    timed(benchmark, lambda: run(problem, backend))


@pytest.mark.parametrize("method", [Operators, FusedPlan])
@pytest.mark.parametrize("kind", ["step", "pass"])
def test_sngd(benchmark, problem, kind, method):
    """`sngd_step_` on a mini-batch, and `sngd_epoch_` on all of them, as `python -m bench` runs them."""
    order = torch.arange(len(problem.x), device=DEVICE)
    place = f"ours:{method.__name__}"
    row, running = measure.checked(place, measure.Truths(kind, problem, order))
    if row["status"] == "not here":
        pytest.skip(row["note"])
    assert row["status"] == "timed", row
    p, rows = running.problem, slice(problem.batch)
    if kind == "pass":
        timed(benchmark, lambda: running.round(order))
    else:
        timed(benchmark, lambda: running.step(p.x[rows], p.y[rows], p.one_hot[rows]))
