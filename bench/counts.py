"""What a step of our CPU kernels makes the processor do, counted by Linux' perf: ``python -m bench.counts`` prints a table.

For each workload of `dante bench pass`, on one thread: instructions and misses of the L1 data cache, a step, beside the vector
multiply-adds that its products need at eight numbers each (AVX2). They are the difference of a process that makes many passes
and one that makes few, so that its start is not among them. Time, and so cycles, are `dante bench`'s to measure.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys

import torch

from . import limits, workloads

EVENTS = ("instructions:u", "L1-dcache-load-misses:u")
FEW, WORK = 2, 1e11  # passes of the one process; operations, about a second, that the other does besides
LANES = 8


def run(index: int, passes: int) -> None:
    """So many passes of a workload; the process that is counted."""
    torch.set_num_threads(1)
    problem, order = workloads.random_problem(workloads.PASSES[index], torch.device("cpu"))
    method = workloads.make(workloads.METHODS[workloads.OURS], problem)
    method.reset()
    for _ in range(passes):
        method.round(method.convert(order))


def counted(index: int, passes: int) -> list[float]:
    """The events of a process that makes so many passes."""
    code = f"from bench import counts; counts.run({index}, {passes})"
    command = ["perf", "stat", "-x", ",", "-e", ",".join(EVENTS), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return [float(line.split(",")[0]) for line in done.stderr.splitlines() if line.count(",") > 3]


def main() -> None:
    """The command."""
    if not shutil.which("perf"):
        raise SystemExit("bench.counts: needs Linux' perf")
    print("| net | batch | work | multiply-adds | instructions | a multiply-add | L1 misses |")
    print("| --- " * 7 + "|")
    for index, workload in enumerate(workloads.PASSES):
        steps = limits.steps("pass", workload, "sngd")
        operations = limits.flops("pass", workload, "sngd")
        passes = math.ceil(WORK / operations)
        few, more = counted(index, FEW), counted(index, FEW + passes)
        instructions, misses = ((b - a) / passes / steps for a, b in zip(few, more, strict=True))
        least = operations / steps / (2 * LANES)
        print(
            f"| {workload.net} | {workload.batch} | {workload.what} | {least:,.0f} | {instructions:,.0f} "
            f"| {instructions / least:.1f} | {misses:,.0f} |"
        )


if __name__ == "__main__":
    main()
