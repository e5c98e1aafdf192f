"""What the machine could do at most, measured, and how much of it a workload needs.

The limit of a row is the larger of two times: its arithmetic at the peak, and its traffic at the bandwidth of main memory,
where data and weights do not fit into the last cache. The regime of a workload is the largest of these two and the latency:
what our kernels need for as many steps of a net with two units in each layer.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from .workloads import Workload

ROOT = Path(__file__).resolve().parent.parent
BUSY = 3  # a limit that was measured on a busy machine may be so many times too low
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # Linux; elsewhere 32 MiB are taken for the last one


class Limits(NamedTuple):
    """Of the device with so many threads: FLOP/s, None where it could not be measured, and bytes/s."""

    peak: float | None
    bandwidth: float


def of(device: torch.device, threads: int | None) -> Limits:
    """Measure them."""
    if device.type == "cpu":
        core = cores_peak().get("peak")
        peak = None if core is None else core * 1e9 * (threads or 1)
    else:
        a = torch.randn(8192, 8192, device=device)
        peak = 2 * 8192**3 / _seconds(lambda: a @ a, device)
    source = torch.zeros(2 ** (26 if device.type == "cpu" else 29), device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    return Limits(peak, bandwidth)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    samples = []
    for _ in range(7):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - begin)
    return min(samples)  # a limit is the best that was seen


def cores_peak() -> dict[str, float]:
    """What one core can do, from cpu_product.cpp: its peak and the products alone, in GFLOP/s.

    Empty where there is no compiler, or it or the program fails: then the peak is not known.
    """
    if not shutil.which("g++"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "cpu_product"
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", f"-I{ROOT / 'csrc' / 'cpu'}"]
        try:
            subprocess.run(["g++", *flags, ROOT / "bench" / "cpu_product.cpp", "-o", program], check=True)
            done = subprocess.run([program], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return {}
        found: dict[str, float] = json.loads(done.stdout)
        return found


def cache_bytes(device: torch.device) -> int:
    """The last cache before main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    texts = [path.read_text().strip() for path in CPU_CACHES.glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=2**25)


def steps(kind: str, workload: Workload, family: str) -> int:
    """Mini-batches of a sample, over all layers' turns."""
    if kind == "step":
        return 1
    turns = workload.trained if family == "sngd" else 1
    return workload.rows // workload.batch * workload.epochs * turns


def samples(kind: str, workload: Workload) -> int:
    """Rows of a sample: each once an epoch, however many layers take their turn on it, so that it fits the ratio of times."""
    return workload.batch if kind == "step" else workload.rows * workload.epochs


def flops(kind: str, workload: Workload, family: str) -> float:
    """Operations that a sample needs.

    SNGD: for each active layer its prefix once, and in every epoch two products for it and two for each layer of its
    suffix. SGD: three products a layer, two for the first.
    """
    sizes = [n_in * n_out for n_in, n_out in pairwise(workload.widths)]
    rows, epochs = (workload.batch, 1) if kind == "step" else (workload.rows, workload.epochs)
    if family != "sngd":
        return rows * epochs * (6 * sum(sizes) - 2 * sizes[0])
    actives = range(1 if kind == "step" else workload.trained)
    return rows * sum(2 * sum(sizes[:active]) + 4 * epochs * sum(sizes[active:]) for active in actives)


def traffic(kind: str, workload: Workload, family: str, device: torch.device) -> float:
    """Bytes that a sample moves from and to main memory: none where data and weights stay in the last cache; else the rows
    once a visit, and weights that do not fit three times a step (read, read again and written by the update)."""
    weights = 4 * sum(n_in * n_out + n_out for n_in, n_out in pairwise(workload.widths))
    rows = workload.batch if kind == "step" else workload.rows
    data, cache = 4 * rows * workload.widths[0], cache_bytes(device)
    if data + weights <= cache:
        return 0
    actives = 1 if kind == "step" or family != "sngd" else workload.trained  # each reads its own input
    moved = 4 * samples(kind, workload) * sum(workload.widths[:actives])
    return moved + (3 * weights * steps(kind, workload, family) if weights > cache else 0)


def bound(kind: str, workload: Workload, family: str, device: torch.device, known: Limits) -> tuple[float, float] | None:
    """(seconds of arithmetic, seconds of traffic) at least; None where the peak is not known."""
    if known.peak is None:
        return None
    return flops(kind, workload, family) / known.peak, traffic(kind, workload, family, device) / known.bandwidth


def fraction(kind: str, workload: Workload, family: str, device: torch.device, known: Limits, seconds: float) -> float | None:
    """The limit over the time that was measured; None where the peak is not known."""
    least = bound(kind, workload, family, device, known)
    return None if least is None else max(least) / seconds


def too_fast(fraction: float | None) -> dict[str, str]:
    """The fields that say so of a time below the limit, by its fraction: none where it is not."""
    if fraction is None or fraction <= 1:
        return {}
    if fraction > BUSY:
        return {"status": "wrong result", "note": f"{fraction:.3g} of the machine's limit: work is put off; not timed"}
    return {
        "note": f"{fraction:.2f} of the machine's limit: work is put off, or the machine was busy when its limit was measured"
    }


def regime(kind: str, workload: Workload, device: torch.device, known: Limits, latency: float | None) -> str | None:
    """latency, compute or memory; None where the peak or our kernels' latency of a step is not known."""
    least = bound(kind, workload, "sngd", device, known)
    if least is None or latency is None:
        return None
    times = {"latency": latency * steps(kind, workload, "sngd"), "compute": least[0], "memory": least[1]}
    return max(times, key=lambda name: times[name])
