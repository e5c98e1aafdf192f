"""Time whole passes on the CPU: the C++ kernels against JAX's `lax.scan` and torch eager, in one process, interleaved.

    python bench/cpu_epoch.py [--threads 1 2] [--rows 6000] [--repeats 9] [--output FILE]

Each thread count runs in a process of its own, bound to that many cores before anything is imported, since JAX takes as
many threads as it sees. Each method's result is compared with a float64 pass before anything is timed; a method that
computes something else is reported and not timed. Prints the median of samples/s with its spread, the ratios, and for the
C++ kernels the GFLOP/s with their part of what the cores can do (cpu_product.cpp, where there is a g++).
`--isa avx2` and the like force the C++ kernels' instruction set.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
RATE = 0.01

# name, widths, mini-batch, what is done: a pass over one layer, every layer in turn, or T passes per layer against SGD
WORKLOADS = [
    ("784-100-10", (784, 100, 10), 20, "first layer"),
    ("784-100-10", (784, 100, 10), 100, "first layer"),
    ("784-100-10", (784, 100, 10), 500, "first layer"),
    ("784-400-200-10", (784, 400, 200, 10), 100, "every layer"),
    ("784-100-10", (784, 100, 10), 100, "T = 5 against SGD"),
    ("3072-512-10", (3072, 512, 10), 100, "first layer"),
    ("64-100-10", (64, 100, 10), 20, "first layer"),
]


def work(widths: tuple[int, ...], batch: int, kind: str, rows: int) -> tuple[dict[str, Callable[[], Any]], Callable[[], Any]]:
    """(methods by name, the float64 truth): each call starts from the same weights and gives the trained ones as tensors."""
    import jax.numpy as jnp
    import torch
    from peers import jax_scan, torch_plain

    from dante_kernels import ops

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, widths[0], generator=generator)
    y = torch.randint(0, widths[-1], (rows,), generator=generator)
    order = torch.randperm(rows, generator=generator)
    start = [
        (
            torch.randn(n_out, n_in, generator=generator) / n_in**0.5,
            torch.randn(n_out, generator=generator) / n_in**0.5,
        )
        for n_in, n_out in pairwise(widths)
    ]
    every, epochs = kind != "first layer", 5 if "T = 5" in kind else 1
    actives = range(len(start) if every else 1)

    def fresh(dtype: torch.dtype = torch.float32) -> torch_plain.Layers:
        return [(w.to(dtype, copy=True), b.to(dtype, copy=True)) for w, b in start]

    def ours() -> torch_plain.Layers:
        layers = fresh()
        for active in actives:
            h = x
            for w, b in layers[:active]:
                h = ops.layer_forward(h, w, b, "leaky_relu", backend="cpp")
            suffix = [ops.Layer(w, b, "leaky_relu") for w, b in layers[active + 1 :]]
            for _ in range(epochs):
                ops.sngd_epoch_(*layers[active], h, y, order, batch, suffix, "leaky_relu", "mse", RATE, backend="cpp")
        return layers

    def plain(dtype: torch.dtype = torch.float32) -> torch_plain.Layers:
        layers = fresh(dtype)
        for active in actives:
            h = x.to(dtype)
            for w, b in layers[:active]:
                h = torch.nn.functional.leaky_relu(torch.nn.functional.linear(h, w, b), 0.01)
            for _ in range(epochs):
                torch_plain.sngd_epoch(layers, active, h, y, order, batch, RATE)
        return layers

    def torch_sgd(dtype: torch.dtype = torch.float32) -> torch_plain.Layers:
        layers = fresh(dtype)
        for _ in range(epochs):
            torch_plain.sgd_epoch(layers, x.to(dtype), y, order, batch, RATE)
        return layers

    jx, jy, jorder = (jnp.asarray(t.numpy()) for t in (x, y, order))

    def jax_fresh() -> list[tuple[Any, Any]]:
        return [(jnp.array(w.numpy()), jnp.array(b.numpy())) for w, b in start]

    def as_torch(layers: list[tuple[Any, Any]]) -> torch_plain.Layers:
        return [(torch.tensor(w.__array__()), torch.tensor(b.__array__())) for w, b in layers]

    def jax_sngd() -> torch_plain.Layers:
        layers = jax_fresh()
        for active in actives:
            h = jax_scan.prefix(layers[:active], jx) if active else jx
            for _ in range(epochs):
                layers[active] = jax_scan.sngd_epoch(layers[active], layers[active + 1 :], h, jy, jorder, batch, RATE)
        return as_torch(layers)

    def jax_sgd() -> torch_plain.Layers:
        layers = jax_fresh()
        for _ in range(epochs):
            layers = jax_scan.sgd_epoch(layers, jx, jy, jorder, batch, RATE)
        return as_torch(layers)

    if "SGD" in kind:
        peers = {"JAX scan, SGD": jax_sgd, "torch autograd, SGD": torch_sgd}
    else:
        peers = {"JAX scan, SNGD": jax_sngd, "torch eager, SNGD": plain}
    truths = {name: torch_sgd if "SGD" in name.replace("SNGD", "") else plain for name in ("C++", *peers)}
    return {"C++": ours, **peers}, lambda name: truths[name](torch.float64)


def core_limits() -> dict[str, Any]:
    """What one core can do, from cpu_product.cpp: its peak and the products alone, in GFLOP/s; empty without a compiler."""
    if not shutil.which("g++"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "cpu_product"
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", f"-I{ROOT / 'csrc' / 'cpu'}"]
        subprocess.run(["g++", *flags, ROOT / "bench" / "cpu_product.cpp", "-o", program], check=True)
        return json.loads(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


def row_flops(widths: tuple[int, ...], actives: range, epochs: int) -> int:
    """Operations that DANTE needs for a row: for each active layer its prefix once, and in every epoch two products for it
    and two for each layer of its suffix."""
    sizes = [n_in * n_out for n_in, n_out in pairwise(widths)]
    return sum(2 * sum(sizes[:active]) + 4 * epochs * sum(sizes[active:]) for active in actives)


def measure(threads: int, rows: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each workload and method, on as many cores as threads."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
    import torch

    torch.set_num_threads(threads)
    limits = core_limits()
    print(json.dumps(limits), file=sys.stderr)
    peak = limits.get("peak")
    table = []
    for name, widths, batch, kind in WORKLOADS:
        n = max(batch, rows if widths[0] < 3000 else rows // 4) // batch * batch
        methods, truth = work(widths, batch, kind, n)
        right = {}
        for method, run in methods.items():
            got, exact = run(), truth(method)
            moved = sum((e - w).norm() for (e, _), (w, _) in zip(exact, got, strict=True))
            right[method] = bool(moved < 1e-3 * sum(e.norm() for e, _ in exact))
        samples: dict[str, list[float]] = {method: [] for method in methods if right[method]}
        for _ in range(repeats):
            for method in samples:
                begin = time.perf_counter()
                methods[method]()
                samples[method].append(time.perf_counter() - begin)
        epochs = 5 if "T = 5" in kind else 1
        for method in methods:
            every = kind != "first layer" and not method.endswith(", SGD")
            passes = epochs * (len(widths) - 1 if every else 1)
            row: dict[str, Any] = {
                "net": name, "batch": batch, "what": kind, "threads": threads, "method": method, "right": right[method],
            }  # fmt: skip
            if right[method]:
                p20, *_, p80 = statistics.quantiles(samples[method], n=5)
                median = statistics.median(samples[method])
                row |= {"seconds": median, "p20": p20, "p80": p80, "samples_per_second": n * passes / median}
                paired = [mine / theirs for mine, theirs in zip(samples[method], samples["C++"], strict=True)]
                row["ratio"] = statistics.median(paired)
                if method == "C++":
                    actives = range(len(widths) - 1 if kind != "first layer" else 1)
                    row["gflops"] = row_flops(widths, actives, epochs) * n / median / 1e9
                    row["of_peak"] = peak and row["gflops"] / (peak * threads)
            table.append(row)
            print(json.dumps(row), flush=True)
    return table


def show(rows: list[dict[str, Any]]) -> None:
    """The table as Markdown; a ratio is the peer's time over ours, and a spread over 15 % is marked."""
    print("| net | batch | what | threads | method | samples/s | ratio | spread | GFLOP/s, of peak |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        head = f"| {r['net']} | {r['batch']} | {r['what']} | {r['threads']} | {r['method']} |"
        if not r["right"]:
            print(f"{head} wrong result, not timed | | | |")
            continue
        spread = (r["p80"] - r["p20"]) / r["seconds"]
        rate = f"{r['gflops']:.0f}" if "gflops" in r else ""
        rate += f", {r['of_peak']:.0%}" if r.get("of_peak") else ""
        noisy = " (noisy)" if spread > 0.15 else ""
        print(f"{head} {r['samples_per_second']:,.0f} | {r['ratio']:.2f} | {spread:.0%}{noisy} | {rate} |")


def main() -> None:
    """Measure for each thread count in a process of its own, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--isa", choices=("avx512", "avx2", "generic"))
    parser.add_argument("--output", type=Path, help="write the rows to this JSON file too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats: expected at least 2")
    if not hasattr(os, "sched_setaffinity"):
        parser.error("this benchmark binds processes to cores, which it can only do on Linux")
    cores = len(os.sched_getaffinity(0))
    if not all(1 <= threads <= cores for threads in arguments.threads):
        parser.error(f"--threads: expected 1 to {cores}, as many as there are cores")
    if arguments.isa:
        os.environ["DANTE_CPU_ISA"] = arguments.isa
    if arguments.child:
        measure(arguments.threads[0], arguments.rows, arguments.repeats)
        return
    rows = []
    for threads in arguments.threads:
        command = [sys.executable, __file__, "--child", "--threads", str(threads)]
        command += ["--rows", str(arguments.rows), "--repeats", str(arguments.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += [json.loads(line) for line in done.stdout.splitlines()]
    show(rows)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
