"""All kernels that `gpu_check.py` will launch, compiled by many processes at once into Triton's cache.

There are more than a thousand specializations, most of a second or more each: one after the other, as launches come to them,
that is more than the time of the whole command. So each worker makes all checks on the CPU, with launches that only compile,
under Triton's own look-up of what a launch needs; whoever comes to a kernel first has it. No GPU is needed: `python -m
bench.gpu_compile` says how many kernels there are and how long they take.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench import gpu_checks, gpu_timings
from dante_kernels import kernels
from dante_kernels.kernels import cost, launcher, plan
from dante_kernels.ops import backends


class Driver:
    """Stands in for Triton's driver of a GPU that is not asked: compiled is for its capability, and nothing is launched."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Worker:
    """Compiles what no other worker has begun; `folder` has a file for each kernel that one has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: set[str] = set()
        self.compiled = 0
        self.failed: dict[str, str] = {}

    def skip(self, *, key: Any, repr: str, **_: Any) -> bool:
        """Whether another one has this kernel, or this one had it: Triton's hook before it compiles."""
        name = hashlib.sha256(f"{key} {repr}".encode()).hexdigest()
        if name in self.asked:
            return True
        self.asked.add(name)
        try:
            os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return True
        self.compiled += 1
        return False

    def launch(
        self, kernel: Any, grid: Any, *args: Any, num_warps: int, num_stages: int, persistent: bool = False,
        all_registers: bool = False, **constants: Any,
    ) -> None:  # fmt: skip
        """Stands in for `launcher.launch`."""
        launcher.settle()
        options = launcher.options_of(persistent, all_registers)
        try:
            kernel.warmup(*args, grid=grid, num_warps=num_warps, num_stages=num_stages, **options, **constants)
        except Exception as error:
            self.failed[kernel.__name__] = f"{type(error).__name__}: {error}"[:500]


def launch_all() -> None:
    """Everything that the checks and the timings launch, on the CPU."""
    cpu = torch.device("cpu")
    for name, which in gpu_checks.names_and_plans():
        gpu_checks.make(name, gpu_checks.Setting(cpu, which, dry=True))
    gpu_timings.launch_all()


def work(folder: Path, capability: int, device: cost.Device) -> dict[str, Any]:
    """Be a worker of many for such a device: how many kernels it compiled, how long that took, and what failed."""
    begin = time.perf_counter()
    worker = Worker(folder)
    triton.runtime.driver.set_active(Driver(capability))
    triton.knobs.runtime.jit_cache_hook = worker.skip
    launcher.launch = worker.launch
    kernels._most_programs = lambda tensor: device.multiprocessors
    plan.device_of = lambda _: device
    backends._interpreted = lambda: True  # so that the backend takes CPU tensors
    empty = torch.empty
    torch.empty = lambda *args, **rest: empty(*args, **rest).zero_()  # norms that nothing has written are 0, never NaN
    launch_all()
    return {"kernels": worker.compiled, "seconds": time.perf_counter() - begin, "failed": worker.failed}


def compile_all(
    workers: int, capability: int = 90, device: cost.Device = plan.H200, timeout: float | None = None
) -> dict[str, Any]:
    """Compile with so many workers, for at most so many seconds: what came of it, in all."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder]
        command += ["--capability", str(capability), "--device", json.dumps(device)]
        # One thread each, and no GPU, of which they need none.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(workers)]
        reports, ended = [], True
        for process in running:
            left = None if timeout is None else max(0.0, timeout - (time.perf_counter() - begin))
            try:
                printed, _ = process.communicate(timeout=left)
                ended &= process.returncode == 0
                reports += [json.loads(line) for line in printed.splitlines()[-1:]]
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                ended = False
        begun = len(list(Path(folder).iterdir()))
    failed = {name: error for report in reports for name, error in report["failed"].items()}
    took = round(time.perf_counter() - begin, 1)
    return {"kernels": begun, "workers": workers, "seconds": took, "ended": ended, "failed": failed}


def main() -> int:
    """Compile for an H200 here, or be a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", type=json.loads, default=list(plan.H200), help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = cost.Device(*given.device)
    if given.folder:
        found = work(given.folder, given.capability, device)
    else:
        found = compile_all(given.workers, given.capability, device)
    print(json.dumps(found))
    return 1 if found["failed"] or not found.get("ended", True) else 0


if __name__ == "__main__":
    sys.exit(main())
