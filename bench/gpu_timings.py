"""What `gpu_check.py` times: an SNGD step by each of our plans and by torch in a CUDA graph, and many models side by side.

All in one process, interleaved, each problem at random. `dante bench pass --device cuda` is the comparison with torch.compile,
JAX and SGD, where every method is first held against float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from support import Problem, make_problem

import dante_kernels as dk
from bench import gpu_limits, workloads
from bench.defaults_rows import IN_PARALLEL, in_turn
from bench.peers import Method, NotHere
from bench.peers.cuda_graph import graph_of
from bench.workloads import Workload
from dante_kernels import kernels, losses, ops, reference
from dante_kernels.kernels import one_launch, plan
from dante_kernels.kernels.fused import Call
from dante_kernels.ops import Layer
from dante_kernels.ops.layer import flatten
from dante_kernels.reproduce.runs import build
from dante_kernels.training.run import matmul_precision

NETS = ((784, 100, 10), (784, 400, 200, 10), (3072, 512, 10), (12288, 3072, 1536, 768, 384, 200))
MODELS = (1, 8, 32)
SIDE_BY_SIDE = ((784, 100, 10), (784, 400, 200, 100, 10))  # in one launch; launches of their own, on streams
OURS = "SNGD by the plan"
BATCHES = (20, 100, 500)
STEPS = 20  # of a timed call
SWITCHES = ("highest", "high")  # "high" for tiles for matrix units
PLANS = ("auto", "fused", "streamed", "library")  # as DANTE_GPU_PLAN names them
ONE_BARRIER = "one barrier"
TIMED_PLANS = (*PLANS, "persistent", ONE_BARRIER)  # the persistent plan also where it is not chosen, since a model chose
BLOCKS = {"20 in turn": {"inner_steps": 20}, "3 in parallel": IN_PARALLEL}  # steps of a layer before the next one
BLOCKS_BATCH = 100
COMPILED = (
    "JAX scan SNGD",
    "JAX scan SGD",
    "torch.compile SNGD, reduce-overhead",
    "torch.compile SGD, reduce-overhead",
)  # as `workloads.METHODS` names them


@contextlib.contextmanager
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


def _persistent_serves(p: Problem, batch: int) -> bool:
    """Whether the persistent plan can make a pass without momentum."""
    weights = [p.weight, *(layer.weight for layer in p.suffix)]
    with chosen_plan("persistent"):
        try:
            kernels._choice(weights, True, batch, p.x.dtype, losses.code(p.loss), False)
        except ValueError:
            return False
    return True


@functools.lru_cache(maxsize=1)  # the largest has half a gigabyte
def _timed(widths: tuple[int, ...], batch: int, device: torch.device) -> Problem:
    n_in, *rest = widths
    return moved(make_problem(seed=1, rows=STEPS * batch, n_in=n_in, widths=tuple(rest), class_indices=True), device)


def _fresh(widths: tuple[int, ...], batch: int, device: torch.device) -> Problem:
    """What is timed: a first layer and those after it, of these widths, and rows for `STEPS` mini-batches, which all share."""
    timed = _timed(widths, batch, device)
    rest = dataclasses.replace(timed, x=torch.empty(0), target=torch.empty(0))
    return dataclasses.replace(moved(rest, device), x=timed.x, target=timed.target)


def ours(
    widths: tuple[int, ...], batch: int, device: torch.device, plans: Iterable[str], steps: int = STEPS
) -> dict[str, Callable[[], object]]:
    """Calls that make so many steps of SNGD on a first layer by each of these plans, where it serves."""
    order = torch.randperm(STEPS * batch, device=device)[: steps * batch]
    lr = torch.tensor(1e-3, device=device)

    def sngd_by(name: str, p: Problem) -> object:
        with chosen_plan(name):
            return ops.sngd_epoch_(*p.args[:4], order, batch, *p.args[4:], lr, backend="triton")

    calls: dict[str, Callable[[], object]] = {}
    for name in plans:
        p = _fresh(widths, batch, device)
        call = one_barrier(p, order, batch, lr) if name == ONE_BARRIER else functools.partial(sngd_by, name, p)
        if call is not None and (name != "persistent" or _persistent_serves(p, batch)):
            calls[f"{OURS} {name}"] = call
    return calls


def peers(widths: tuple[int, ...], batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Calls that make as many steps by torch in a CUDA graph: of SNGD on the first layer, and of SGD on the whole net."""
    order = torch.randperm(STEPS * batch, device=device)
    lr = torch.tensor(1e-3, device=device)

    def sngd_torch(p: Problem) -> object:
        return reference.sngd_epoch_(
            *p.args[:4], order, batch, p.suffix, p.activation, losses.code(p.loss), lr, None, None, 0.0, False
        )

    sgd = _fresh(widths, batch, device)
    parameters = [t.requires_grad_() for layer in ((sgd.weight, sgd.bias), *sgd.suffix) for t in layer[:2]]
    one_hot = torch.nn.functional.one_hot(sgd.target, widths[-1]).float()

    def sgd_torch() -> None:
        for start in range(0, STEPS * batch, batch):
            rows = order[start : start + batch]
            h = sgd.x[rows]
            for w, b in zip(parameters[::2], parameters[1::2], strict=True):
                h = torch.nn.functional.leaky_relu(torch.nn.functional.linear(h, w, b), 0.01)
            gradients = torch.autograd.grad(torch.nn.functional.mse_loss(h, one_hot[rows]), parameters)
            torch._foreach_add_([p.detach() for p in parameters], gradients, alpha=-1e-3)

    return {
        "torch SNGD in a CUDA graph": graph_of(functools.partial(sngd_torch, _fresh(widths, batch, device))).replay,
        "torch SGD in a CUDA graph": graph_of(sgd_torch).replay,
    }


def steps(device: torch.device, plans: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Microseconds a step of each competitor, ours by these plans, interleaved: median, p20 and p80."""
    for widths, precision, batch in itertools.product(NETS, SWITCHES, BATCHES):
        with matmul_precision(precision):
            calls = ours(widths, batch, device, plans) | peers(widths, batch, device)
            samples: dict[str, list[float]] = {name: [] for name in calls}
            for repeat in range(33):
                for name, call in calls.items():
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    call()
                    torch.cuda.synchronize()
                    if repeat >= 3:
                        samples[name].append((time.perf_counter() - begin) * 1e6 / STEPS)
        best = min(statistics.median(values) for name, values in samples.items() if not name.startswith(OURS))
        for name, values in samples.items():
            p20, *_, p80 = statistics.quantiles(values, n=5)
            median = statistics.median(values)
            net = "-".join(map(str, widths))
            print(f"{net:>16} batch {batch:>3} {precision:>7} {name:>26} {median:9.2f} us, best peer {best:.2f}", flush=True)
            yield {
                "net": net, "batch": batch, "precision": precision, "method": name, "us_per_step": median, "p20": p20,
                "p80": p80, "samples_per_second": batch * 1e6 / median,
            }  # fmt: skip


def compiled_peers(
    device: torch.device, names: Sequence[str] = COMPILED, nets: tuple[tuple[int, ...], ...] = NETS
) -> Iterator[dict[str, Any]]:
    """Microseconds a step of what is compiled for each shape, as long as there is time: the aims are ratios to the best of it.

    SNGD on the first layer and SGD on the whole net, `STEPS` steps in a call. That the methods are right is for `dante bench`.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # JAX would take most of the memory
    for precision, name, widths, batch in itertools.product(SWITCHES, names, nets, BATCHES):
        problem, order = workloads.random_problem(Workload(widths, batch, rows=STEPS * batch), device)
        with matmul_precision(precision):
            try:
                method = workloads.make(workloads.METHODS[name], problem)
                method.reset()
                rows = type(method).convert(order)

                def call(method: Method = method, rows: Any = rows) -> None:
                    method.round(rows)
                    method.wait()

                took = gpu_limits.microseconds(call, device, 20) / STEPS
            except NotHere as reason:
                print(f"{name}: {reason}", flush=True)
                continue
        net = "-".join(map(str, widths))
        print(f"{net:>16} batch {batch:>3} {precision:>7} {name:>36} {took:9.2f} us", flush=True)
        yield {"net": net, "batch": batch, "precision": precision, "method": name, "us_per_step": took}


def models(widths: tuple[int, ...], count: int, steps: int, device: torch.device) -> Callable[[], object]:
    """A call that makes so many steps of each of so many models of a net side by side, batch 20."""
    n_in, *rest = widths
    problems = [moved(make_problem(seed=seed, rows=20 * steps, n_in=n_in, widths=tuple(rest)), device) for seed in range(count)]
    names = ("weight", "bias", "x", "target", "suffix", "activation", "loss")
    calls = [dict(zip(names, p.args, strict=True), order=None, batch_size=20, lr=1e-3, backend="triton") for p in problems]
    return functools.partial(ops.sngd_epochs_, calls)


def many_models(
    device: torch.device, counts: tuple[int, ...] = MODELS, steps: int = 200, nets: tuple[tuple[int, ...], ...] = SIDE_BY_SIDE
) -> Iterator[dict[str, Any]]:
    """Samples a second of all models of a net side by side, batch 20, as a multiple of those of the first count."""
    for widths, precision in itertools.product(nets, SWITCHES):
        name, first = "-".join(map(str, widths)), 0.0
        for count in counts:
            with matmul_precision(precision):
                took = gpu_limits.microseconds(models(widths, count, steps, device), device, 5)
            each = count * 20 * steps * 1e6 / took
            first = first or each
            print(f"{count:>3} models of {name}, {precision}: {each / first:.2f} times", flush=True)
            yield {
                "net": name, "precision": precision, "models": count, "samples_per_second": each,
                "times_of_the_first": each / first,
            }  # fmt: skip


def rounds(
    device: torch.device,
    rows: int = 60_000,
    count: int = 4,
    peer: bool = True,
    nets: tuple[tuple[int, ...], ...] = SIDE_BY_SIDE,
) -> Iterator[dict[str, Any]]:
    """Microseconds of a mini-batch of 100 in `fit`'s short blocks, a step of every layer, and of SGD's step of the whole net.

    With the settings of docs/defaults.md, on as many rows of noise as MNIST has; the first rounds, which compile and record,
    are left out. With the passes to an accuracy (`gpu_seconds.py`) these are the seconds to it.
    """
    generator = torch.Generator().manual_seed(0)
    for widths, precision in itertools.product(nets, SWITCHES):
        name = "-".join(map(str, widths))
        x = torch.rand(rows, widths[0], generator=generator).to(device)
        y = torch.randint(0, widths[-1], (rows,), generator=generator).to(device)
        lr, settings = in_turn(name, "leaky_relu", "mse")
        found: dict[str, float] = {}
        for kind, blocks in BLOCKS.items():
            model = build(widths, "leaky_relu", "leaky_relu", seed=0).to(device)
            schedule = dk.RoundRobin(rounds=count, inner_epochs=1, **blocks)
            history = dk.fit(
                model, x, y, loss="mse", schedule=schedule, lr=lr, relative_lr=True, momentum=0.9, batch_size=BLOCKS_BATCH,
                seed=0, precision=precision, backend="triton", **settings,
            )  # fmt: skip
            seconds = [record.seconds for record in history.rounds[count // 2 :]]
            found[kind] = statistics.median(seconds) * 1e6 / -(-rows // BLOCKS_BATCH)
        if peer:
            with matmul_precision(precision):
                sgd = peers(widths, BLOCKS_BATCH, device)["torch SGD in a CUDA graph"]
                found["torch SGD in a CUDA graph"] = gpu_limits.microseconds(sgd, device, 20) / STEPS
        for kind, took in found.items():
            print(f"{name}, {precision}, {kind}: {took:.2f} us a mini-batch", flush=True)
            yield {"net": name, "precision": precision, "method": kind, "us_per_mini_batch": took}


def launch_all() -> None:
    """What all timings launch of ours, in few steps and on the CPU, for a launcher that only compiles."""
    cpu = torch.device("cpu")
    for widths, precision, batch in itertools.product(NETS, SWITCHES, BATCHES):
        with matmul_precision(precision):
            for call in ours(widths, batch, cpu, TIMED_PLANS, steps=2).values():
                call()
    for widths, precision, count in itertools.product(SIDE_BY_SIDE, SWITCHES, MODELS):
        with matmul_precision(precision):
            models(widths, count, 2, cpu)()
    with contextlib.redirect_stdout(io.StringIO()):
        for _ in rounds(cpu, rows=400, count=2, peer=False):
            pass
