"""How the cost of a round grows: against width, mini-batch, depth and rows, with the exponent fitted along each axis."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from .workloads import OURS, Workload

Row = dict[str, Any]
METHODS = [OURS, "torch SGD, foreach", "JAX scan SGD"]
# In rows, the exponent above which a cost counts as more than proportional: over the two largest decades, and between the
# last two values. Where data leave a cache, between some values before, the time of a row grows once: there it may be STEP.
LINEAR = 1.1
STEP = 1.5

# Axis: (values, how the exponent is to be read, the workload at a value)
AXES: dict[str, tuple[tuple[int, ...], str, Any]] = {
    "width": ((64, 128, 256, 512, 1024, 2048, 4096), "2: as the weights", lambda n: Workload((n, n, 10), 100, 2, rows=400)),
    "batch": ((1, 4, 16, 64, 256, 1024, 4096), "at most 0", lambda n: Workload((784, 100, 10), n, 2, rows=4096)),
    "depth": (
        (1, 2, 4, 8), "DANTE 2 (each layer's pass goes through the layers behind it), SGD 1",
        lambda n: Workload((100,) * (n + 1) + (10,), 100, n + 1, rows=2000),
    ),
    "rows": ((1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000), "1", lambda n: Workload((64, 100, 10), 100, 2, rows=n)),
}  # fmt: skip
QUICK = {"width": (16, 32), "batch": (10, 100), "depth": (1, 2), "rows": (100, 200)}


def exponent(values: list[int], seconds: list[float]) -> float:
    """The slope of log seconds against log value, by least squares over the upper half, where overheads no longer hide it."""
    upper = slice(len(values) // 2 if len(values) > 3 else 0, None)
    return slope(values[upper], seconds[upper])


def slope(values: list[int], seconds: list[float]) -> float:
    """Of log seconds against log value, by least squares."""
    x, y = [math.log(v) for v in values], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def study(quick: bool) -> list[tuple[str, Workload]]:
    """What is measured: (axis and value, such as "width 64"; a round of this)."""
    found = [
        (f"{axis} {value}", at(value)) for axis, (values, _, at) in AXES.items() for value in (QUICK[axis] if quick else values)
    ]
    return [(work, w.sized(min(w.rows, 200)) if quick else w) for work, w in found]


def add_exponents(rows: list[Row], quick: bool) -> None:
    """Write the exponent into the row of each axis's last value, if that was timed."""
    for axis, (values, expected, _) in AXES.items():
        last = (QUICK[axis] if quick else values)[-1]
        timed = [r for r in rows if r["kind"] == "scaling" and r["status"] == "timed" and r["work"].startswith(f"{axis} ")]
        for row in (r for r in timed if r["work"] == f"{axis} {last}"):
            same = [r for r in timed if (r["method"], r["threads"]) == (row["method"], row["threads"])]
            found = sorted((int(r["work"].split()[1]), r["median"]) for r in same)
            if len(found) > 1:
                row["exponent"] = exponent(*map(list, zip(*found, strict=True)))
                row["note"] = f"exponent {row['exponent']:.2f}, expected {expected}"


def superlinear(rows: list[Row]) -> list[str]:
    """Where our cost grows more than in proportion to the rows, in words; nothing where a time was noisy."""
    ours = [r for r in rows if r["method"] == OURS and r["status"] == "timed" and r["work"].startswith("rows ")]
    found = []
    for threads in dict.fromkeys(r["threads"] for r in ours):
        some = sorted((r["rows"], r["median"], r["noisy"]) for r in ours if r["threads"] == threads)
        if len(some) < 2 or any(noisy for *_, noisy in some):
            continue
        large = [(value, seconds) for value, seconds, _ in some if 100 * value >= some[-1][0]]
        spans = [(*pair, LINEAR if pair[1] is some[-1] else STEP) for pair in pairwise(some)]
        looks = [([a[:2], b[:2]], most) for a, b, most in spans] + [(large, LINEAR)]
        for points, most in looks:
            power = slope(*map(list, zip(*points, strict=True)))
            if power > most:
                found.append(f"from {points[0][0]} to {points[-1][0]} rows the cost grows with their power {power:.2f}")
    return list(dict.fromkeys(found))
