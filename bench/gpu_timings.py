"""What `gpu_check.py` times: an SNGD step by each of our plans and by torch in a CUDA graph, and many models side by side.

All in one process, interleaved, each problem at random. `dante bench pass --device cuda` is the comparison with torch.compile,
JAX and SGD, where every method is first held against float64.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from support import Problem, make_problem

from bench import gpu_limits
from bench.peers.cuda_graph import graph_of
from dante_kernels import kernels, losses, ops, reference
from dante_kernels.kernels import one_launch, plan
from dante_kernels.kernels.fused import Call
from dante_kernels.ops import Layer
from dante_kernels.ops.layer import flatten
from dante_kernels.training.run import matmul_precision

TIMED = [
    *((widths, "highest") for widths in ((784, 100, 10), (784, 400, 200, 10), (3072, 512, 10))),
    *((widths, "high") for widths in ((784, 100, 10), (3072, 512, 10))),
]  # fmt: skip
MODELS = (1, 8, 32)
SIDE_BY_SIDE = ((784, 100, 10), (784, 400, 200, 100, 10))  # in one launch; launches of their own, on streams
OURS = "SNGD by the plan"
BATCHES = (20, 100, 500)
SWITCHES = ("highest", "high")  # "high" for tiles for matrix units
PLANS = ("auto", "fused", "streamed", "library")  # as DANTE_GPU_PLAN names them
ONE_BARRIER = "one barrier"


@contextmanager
def chosen_plan(name: str, graphs: str = "1") -> Iterator[None]:
    """The GPU kernels take this plan, with CUDA graphs ("1") or launch by launch ("0").

    "auto" is the fastest by the model; `ONE_BARRIER` the same without the persistent plan's other tiles for one layer and
    at most one after it.
    """
    others = {which: getattr(plan, which) for which in ("SHORT", "TALL", "LARGE", "MATRIX", "MATRIX_WIDE")}
    os.environ |= {"DANTE_GPU_PLAN": "auto" if name == ONE_BARRIER else name, "DANTE_CUDA_GRAPHS": graphs}
    if name == ONE_BARRIER:
        vars(plan).update(dict.fromkeys(others, ()))
        plan.choose.cache_clear()
        plan.blocks.cache_clear()
    try:
        yield
    finally:
        del os.environ["DANTE_GPU_PLAN"], os.environ["DANTE_CUDA_GRAPHS"]
        if name == ONE_BARRIER:
            vars(plan).update(others)
            plan.choose.cache_clear()
            plan.blocks.cache_clear()


def moved(problem: Problem, device: torch.device) -> Problem:
    """A copy of a problem on a device."""

    def move(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.to(device, copy=True)

    suffix = [Layer(move(w), move(b), phi) for w, b, phi in problem.suffix]
    return Problem(*(move(t) for t in problem.args[:4]), suffix, *problem.args[5:])


def one_barrier(p: Problem, order: torch.Tensor, batch: int, lr: torch.Tensor) -> Callable[[], object] | None:
    """A pass by the form with one barrier a step, its tiles chosen beforehand; None where it is not chosen even so."""
    call = Call(*p.args[:4], order, batch, *flatten(p.suffix, p.activation), losses.code(p.loss), lr)
    with chosen_plan(ONE_BARRIER):
        found = kernels._choice([layer.weight for layer in call.layers], True, batch, p.x.dtype, call.loss, False)
    if found.tiles is None or not found.tiles.one_barrier:
        return None
    model = one_launch.model(call)
    return functools.partial(one_launch.run, [model], call.layers, batch, call.loss, 0.0, False, 1.0, found.tiles)


def competitors(widths: tuple[int, ...], batch: int, device: torch.device) -> tuple[int, dict[str, Callable[[], object]]]:
    """(steps in a call, calls): each runs that many steps on a first layer (or the whole net, for SGD) of these widths."""
    count = 20
    n_in, *rest = widths

    def fresh() -> Problem:
        return moved(make_problem(seed=1, rows=count * batch, n_in=n_in, widths=tuple(rest), class_indices=True), device)

    order = torch.randperm(count * batch, device=device)
    lr = torch.tensor(1e-3, device=device)

    def sngd_by(name: str, p: Problem) -> object:
        with chosen_plan(name):
            return ops.sngd_epoch_(*p.args[:4], order, batch, *p.args[4:], lr, backend="triton")

    def sngd_torch(p: Problem) -> object:
        return reference.sngd_epoch_(
            *p.args[:4], order, batch, p.suffix, p.activation, losses.code(p.loss), lr, None, None, 0.0, False
        )

    sgd = fresh()
    parameters = [t.requires_grad_() for layer in ((sgd.weight, sgd.bias), *sgd.suffix) for t in layer[:2]]
    one_hot = torch.nn.functional.one_hot(sgd.target, widths[-1]).float()

    def sgd_torch() -> None:
        for start in range(0, count * batch, batch):
            rows = order[start : start + batch]
            h = sgd.x[rows]
            for w, b in zip(parameters[::2], parameters[1::2], strict=True):
                h = torch.nn.functional.leaky_relu(torch.nn.functional.linear(h, w, b), 0.01)
            gradients = torch.autograd.grad(torch.nn.functional.mse_loss(h, one_hot[rows]), parameters)
            torch._foreach_add_([p.detach() for p in parameters], gradients, alpha=-1e-3)

    calls: dict[str, Callable[[], object]] = {f"{OURS} {name}": functools.partial(sngd_by, name, fresh()) for name in PLANS}
    with_one_barrier = one_barrier(fresh(), order, batch, lr)
    if with_one_barrier:
        calls[f"{OURS} {ONE_BARRIER}"] = with_one_barrier
    calls["torch SNGD in a CUDA graph"] = graph_of(functools.partial(sngd_torch, fresh())).replay
    calls["torch SGD in a CUDA graph"] = graph_of(sgd_torch).replay
    return count, calls


def steps(device: torch.device) -> list[dict[str, Any]]:
    """Microseconds a step of each competitor, interleaved: median, p20 and p80."""
    rows = []
    for (widths, precision), batch in itertools.product(TIMED, BATCHES):
        with matmul_precision(precision):
            count, calls = competitors(widths, batch, device)
            samples: dict[str, list[float]] = {name: [] for name in calls}
            for repeat in range(33):
                for name, call in calls.items():
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    call()
                    torch.cuda.synchronize()
                    if repeat >= 3:
                        samples[name].append((time.perf_counter() - begin) * 1e6 / count)
            for name, values in samples.items():
                p20, *_, p80 = statistics.quantiles(values, n=5)
                median = statistics.median(values)
                rows.append(
                    {
                        "net": "-".join(map(str, widths)), "batch": batch, "precision": precision, "method": name,
                        "us_per_step": median, "p20": p20, "p80": p80, "samples_per_second": batch * 1e6 / median,
                    }
                )  # fmt: skip
            best = min(r["us_per_step"] for r in rows[-len(calls) :] if not r["method"].startswith(OURS))
            for r in rows[-len(calls) :]:
                print(f"{r['net']:>16} batch {batch:>3} {r['method']:>26} {r['us_per_step']:9.2f} us, best peer {best:.2f}")
    return rows


def many_models(
    device: torch.device, counts: tuple[int, ...] = MODELS, steps: int = 200, nets: tuple[tuple[int, ...], ...] = SIDE_BY_SIDE
) -> list[dict[str, Any]]:
    """Samples a second of all models of a net side by side, batch 20, as a multiple of those of the first count."""
    rows: list[dict[str, Any]] = []
    for (n_in, *widths), precision in itertools.product(nets, SWITCHES):
        name = "-".join(map(str, (n_in, *widths)))
        for count in counts:
            problems = [
                moved(make_problem(seed=seed, rows=20 * steps, n_in=n_in, widths=tuple(widths)), device)
                for seed in range(count)
            ]
            names = ("weight", "bias", "x", "target", "suffix", "activation", "loss")
            calls = [
                dict(zip(names, p.args, strict=True), order=None, batch_size=20, lr=1e-3, backend="triton") for p in problems
            ]
            with matmul_precision(precision):
                took = gpu_limits.microseconds(lambda calls=calls: ops.sngd_epochs_(calls), device, 5)  # type: ignore[misc]
            each = count * 20 * steps * 1e6 / took
            rows.append({"net": name, "precision": precision, "models": count, "samples_per_second": each})
            alike = [row["samples_per_second"] for row in rows if (row["net"], row["precision"]) == (name, precision)]
            rows[-1]["times_of_the_first"] = each / alike[0]
            print(f"{count:>3} models of {name}, {precision}: {each / alike[0]:.2f} times")
    return rows
