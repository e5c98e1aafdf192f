"""How the cost of a round grows: against width, mini-batch, depth and rows, with the exponent fitted along each axis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from . import limits, measure
from .workloads import OURS, Workload

Row = dict[str, Any]
METHODS = [OURS, "torch SGD, foreach", "JAX scan SGD"]
LINEAR = 1.1  # the exponent above which a cost counts as more than proportional

# Axis: (values, how the exponent is to be read, the workload at a value)
AXES: dict[str, tuple[tuple[int, ...], str, Any]] = {
    "width": ((64, 128, 256, 512, 1024, 2048, 4096), "2: as the weights", lambda n: Workload((n, n, 10), 100, 2, rows=400)),
    "batch": ((1, 4, 16, 64, 256, 1024, 4096), "at most 0", lambda n: Workload((784, 100, 10), n, 2, rows=4096)),
    "depth": (
        (1, 2, 4, 8), "DANTE 2 (each layer's pass goes through the layers behind it), SGD 1",
        lambda n: Workload((100,) * (n + 1) + (10,), 100, n + 1, rows=2000),
    ),
    "rows": ((1000, 10_000, 100_000, 1_000_000), "1", lambda n: Workload((64, 100, 10), 100, 2, rows=n)),
}  # fmt: skip
QUICK = {"width": (16, 32), "batch": (10, 100), "depth": (1, 2), "rows": (100, 200)}


def exponent(values: list[int], seconds: list[float]) -> float:
    """The slope of log seconds against log value, by least squares over the upper half, where overheads no longer hide it."""
    upper = slice(len(values) // 2 if len(values) > 3 else 0, None)
    x, y = [math.log(v) for v in values[upper]], [math.log(s) for s in seconds[upper]]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def study(device: torch.device, names: list[str], repeats: int, quick: bool, known: limits.Limits) -> Iterator[Row]:
    """A row for each axis, value and method; the last value's row of a method carries the exponent."""
    for axis, (values, expected, workload_at) in AXES.items():
        costs: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
        for value in QUICK[axis] if quick else values:
            workload = workload_at(value)
            if quick:
                workload = workload.sized(min(workload.rows, 200))
            for row in measure.compare("pass", workload, device, names, repeats, known):
                row |= {"kind": "scaling", "work": f"{axis} {value}"}
                if row["status"] == "timed":
                    found = costs[row["method"]]
                    found.append((value, row["median"]))
                    if value == (QUICK[axis] if quick else values)[-1] and len(found) > 1:
                        row["exponent"] = exponent(*map(list, zip(*found, strict=True)))
                        row["note"] = f"exponent {row['exponent']:.2f}, expected {expected}"
                yield row


def superlinear(rows: list[Row]) -> list[str]:
    """Our exponents against rows that are more than proportional, in words; none where a time was noisy."""
    ours = [r for r in rows if r["method"] == OURS and r["work"].startswith("rows ")]
    bad = [r for r in ours if (r["exponent"] or 0) > LINEAR and not any(other["noisy"] for other in ours)]
    return [f"{r['net']}: the cost grows with the rows' power {r['exponent']:.2f}" for r in bad]
