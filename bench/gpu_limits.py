# mypy: allow-untyped-defs, allow-untyped-decorators
"""What a GPU can do at most, measured for the cost model's table (`dante_kernels.kernels.cost.Device`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from dante_kernels.kernels import barrier, launcher, plan
from dante_kernels.kernels.barrier import meet
from dante_kernels.training.run import matmul_precision


@triton.jit
def barriers(p_counter, p_signs, count, PROGRAMS: tl.constexpr):
    """`count` grid barriers; each program's last sign to `signs`."""
    program = tl.program_id(0)
    sense = tl.load(p_counter, volatile=True)
    for _ in range(0, count):
        sense = meet(p_counter, program, sense, PROGRAMS)
    tl.store(p_signs + program, sense)


@triton.jit
def read(p, p_sum, rounds, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program reads SIZE floats `rounds` times, past L1."""
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, rounds):
        for start in range(0, SIZE, BLOCK):
            total += tl.load(p + start + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(p_sum, tl.sum(total, axis=0))


@triton.jit
def nothing(p):
    """A launch that stores one number."""
    tl.store(p, 0.0)


def microseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of a call's time, the device's work included."""
    times = []
    for repeat in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= 2:  # the first ones compile and warm up
            times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def barrier_microseconds(device: torch.device, programs: int, repeats: int, count: int) -> float:
    """Of one grid barrier of so many programs: what `count` of them take beyond one."""
    counter = torch.zeros(barrier.SPACING, dtype=torch.int32, device=device)  # of its own: none that a broken launch has left
    signs = torch.empty(programs, dtype=torch.int32, device=device)

    def run(barriers_: int) -> Callable[[], None]:
        return lambda: launcher.launch(
            barriers, (programs,), counter, signs, barriers_, PROGRAMS=programs, num_warps=8, num_stages=1, persistent=True
        )

    many, one = (microseconds(run(n), device, repeats) for n in (count + 1, 1))
    return (many - one) / count


def line(points: dict[int, float]) -> tuple[float, float]:
    """(value at 0, slope) of the least squares line through (program count, microseconds)."""
    x, y = torch.tensor(list(points)), torch.tensor(list(points.values()))
    slope = ((x - x.double().mean()) * (y - y.mean())).sum() / ((x - x.double().mean()) ** 2).sum()
    return (y.mean() - slope * x.double().mean()).item(), slope.item()


def launch_microseconds(device: torch.device, repeats: int, count: int) -> float:
    """Of one launch behind another in a CUDA graph; without a GPU, of one from Python."""
    out = torch.empty(1, device=device)

    def launches(n: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(n):
                launcher.launch(nothing, (1,), out, num_warps=4, num_stages=1)

        if device.type != "cuda":
            return run
        from bench.peers.cuda_graph import graph_of

        return graph_of(run).replay

    many, one = (microseconds(launches(n), device, repeats) for n in (count + 1, 1))
    return (many - one) / count


def measure(device: torch.device, few: bool = False) -> dict[str, Any]:
    """The numbers of `cost.Device` that can be measured by themselves, in its units, beside those that the model has.

    With `few` on a CPU, interpreted, it is a rehearsal, whose numbers mean nothing.
    """
    assumed = plan.device_of(device)
    repeats, count = (1, 2) if few else (20, 1000)
    everyone = assumed.multiprocessors
    groups = [1] if few else sorted({2, 4, 8, 13, 16, 28, 49, 64, 98, everyone})
    by_programs = {n: barrier_microseconds(device, n, repeats, count) for n in groups}
    found: dict[str, float] = {}
    if len(by_programs) > 1:
        found["barrier"], found["barrier_program"] = line(by_programs)
    found["launch"] = launch_microseconds(device, repeats, 3 if few else 200)

    size, rounds = (2048, 1) if few else (2**21, 4)
    data, total = torch.zeros(size, device=device), torch.empty(1, device=device)

    def read_all(n: int) -> Callable[[], None]:
        return lambda: launcher.launch(read, (1,), data, total, n, SIZE=size, BLOCK=2048, num_warps=8, num_stages=1)

    more, one = (microseconds(read_all(n), device, repeats) for n in (rounds + 1, 1))
    found["l2_per_multiprocessor"] = 4 * size * rounds / 1e6 / (more - one)

    source = torch.zeros(2**10 if few else 2**28, device=device)
    target = torch.empty_like(source)
    found["memory"] = 2 * 4 * source.numel() / 1e6 / microseconds(lambda: target.copy_(source), device, repeats)

    n = 32 if few else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    for name, switch, dtype in (
        ("streamed_fma", "highest", torch.float32), ("tf32", "high", torch.float32), ("bf16", "high", torch.bfloat16),
        ("float64", "highest", torch.float64),
    ):  # fmt: skip
        left, right = a.to(dtype), b.to(dtype)
        with matmul_precision(switch):
            took = microseconds(lambda left=left, right=right: left @ right, device, repeats)  # type: ignore[misc]
        found[name] = n**3 / 1e6 / took / everyone
    return {
        "barrier_by_programs": by_programs,
        "device": {name: {"assumed": getattr(assumed, name), "measured": value} for name, value in found.items()},
    }
