"""Time to quality: seconds of training until a test accuracy is reached, each method at the best rate of its family's grid.

The search and what is timed differ in the seed, of the initial weights and of the rows' order, so no method is timed on the
run that chose its rate. Methods of a family give the same weights, which is checked, so its first method here
searches for all. The best rate is the one that reaches the target with the fewest weights updated; where none does, the one
with the least test loss.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dante_kernels import data

from . import limits, measure, workloads
from .peers import Method, Problem, loss_and_hits
from .workloads import RATES, Workload

Row = dict[str, Any]
TARGETS = {"digits": 0.95, "mnist": 0.97, "fashion-mnist": 0.85, "kmnist": 0.85}
NETS = {"digits": ((64, 100, 10), 20)}  # the others: 784-100-10 with mini-batches of 100
BLOCK = 60  # SNGD's turns in steps: short ones train best


def load(name: str, directory: Path | None, most: int | None) -> tuple[data.Dataset, Workload]:
    """A data set in whole mini-batches, `most` rows at most, and its workload."""
    split = data.load(name, directory)
    widths, batch = NETS.get(name, ((784, 100, 10), 100))
    rows = min(len(split.x_train), most or 2**62) // batch * batch
    split = split._replace(x_train=split.x_train[:rows], y_train=split.y_train[:rows])
    return split, Workload(widths, batch, trained=len(widths) - 1, rows=rows)


def problem_of(split: data.Dataset, workload: Workload, rate: float, seed: int, device: torch.device) -> Problem:
    """Training data on the device, and initial weights of this seed."""
    generator = torch.Generator().manual_seed(seed)
    problem = workloads.problem_of(split.x_train, split.y_train, workload, generator, device)
    return replace(problem, rate=rate, block=BLOCK * workload.batch)


def curve(method: Method, split: data.Dataset, rounds: int, seed: int, target: float | None = None) -> list[Row]:
    """Loss and accuracy after each round, against weights updated and seconds of training alone; ends at the target.

    The method is warmed up by a round first.
    """
    rows, device = len(split.x_train), method.problem.x.device
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(rows, generator=generator).to(device) for _ in range(rounds)]
    method.reset()
    method.round(type(method).convert(orders[0]))
    method.reset()
    method.wait()
    weights = sum(n_in * n_out + n_out for n_in, n_out in pairwise(method.problem.widths))
    points, seconds = [], 0.0
    for done, order in enumerate(orders, 1):
        rows_in_turn = type(method).convert(order)
        begin = time.perf_counter()
        method.round(rows_in_turn)
        method.wait()
        seconds += time.perf_counter() - begin + measure.left_over(method)
        loss, accuracy = loss_and_hits(method.family, method.layers(), split.x_test, split.y_test)
        updates = done * weights * (rows // method.problem.batch)
        points.append({"weights_updated": updates, "seconds": seconds, "loss": loss, "accuracy": accuracy})
        if target is not None and accuracy >= target:
            break
    return points


def best_rate(
    kind: type[Method], split: data.Dataset, workload: Workload, rounds: int, target: float, device: torch.device
) -> float:
    """The rate of the family's grid by the rule above; the search's seed is 0."""

    def badness(rate: float) -> tuple[float, float]:
        method = kind(problem_of(split, workload, rate, 0, device))
        points = curve(method, split, rounds, 0, target)
        if points[-1]["accuracy"] >= target:
            return points[-1]["weights_updated"], points[-1]["loss"]
        loss = points[-1]["loss"]
        return float("inf"), loss if loss == loss else float("inf")  # a run that diverged is the worst

    return min(RATES[kind.family], key=badness)


def compare(
    split: data.Dataset,
    workload: Workload,
    device: torch.device,
    names: list[str],
    repeats: int,
    rounds: int,
    target: float,
    known: limits.Limits,
    watch: measure.Watch | None = None,
) -> Iterator[list[tuple[Row, Row | None]]]:
    """(row, curve) for each method: seconds to the target over the seeds so far, and the first seed's whole run.

    Given after each seed from the second on, so that little is lost where it is interrupted.
    """
    watch = watch or measure.Watch()
    order = torch.randperm(workload.rows, generator=torch.Generator().manual_seed(0)).to(device)
    truths = measure.Truths("pass", problem_of(split, workload, float("nan"), 0, device), order)
    chosen: dict[str, float] = {}
    methods: dict[str, Method] = {}
    rows: dict[str, Row] = {}
    for name in names:
        row, method = measure.watched(name, truths, watch)
        if method is None:
            rows[name] = row
            continue
        kind = type(method)
        try:
            if kind.family not in chosen:
                chosen[kind.family] = best_rate(kind, split, workload, rounds, target, device)
            methods[name] = kind(problem_of(split, workload, chosen[kind.family], 0, device))
        except Exception as failure:  # as in measure.checked
            rows[name] = measure.failed(failure)
    runs: dict[str, list[list[Row]]] = {name: [] for name in methods}
    draw = random.Random(0)
    for seed in range(1, repeats + 1):
        start = problem_of(split, workload, 1, seed, device).start
        with measure.still():
            for name in draw.sample(list(methods), len(methods)):
                if name in rows:
                    continue
                watch.at(name)
                methods[name].problem = replace(methods[name].problem, start=start)
                try:
                    runs[name].append(curve(methods[name], split, rounds, seed, None if seed == 1 else target))
                except Exception as failure:
                    rows[name] = measure.failed(failure)
        if seed == 1:
            continue
        pairs: list[tuple[Row, Row | None]] = []
        for name in names:
            head = {
                "kind": "quality", "net": workload.net, "batch": workload.batch, "rows": workload.rows, "method": name,
                "work": f"{split.name} to {target:.1%} test accuracy", "cache": "warm",
            }  # fmt: skip
            if name in rows:
                pairs.append((head | rows[name], None))
                continue
            family = methods[name].family
            rate = chosen[family]
            about = {
                "method": name,
                "family": family,
                "net": workload.net,
                "rate": rate,
                "grid": RATES[family],
                "data": split.name,
            }
            row = outcome(runs[name], target, rate, RATES[family])
            a_round = sum(points[-1]["seconds"] for points in runs[name]) / sum(map(len, runs[name]))
            fast = limits.too_fast(limits.fraction("pass", workload, family, device, known, a_round))
            if "status" in fast:
                row = {"rate": rate} | fast
            elif fast:
                row["note"] += f"; {fast['note']}"
            pairs.append((head | row, about | {"points": runs[name][0]}))
        yield pairs


def outcome(runs: list[list[Row]], target: float, rate: float, grid: tuple[float, ...]) -> Row:
    """What the runs of a method come to; a time only where every run reached the target."""
    reached = [next((p for p in points if p["accuracy"] >= target), None) for points in runs]
    edge = " (the grid's edge)" if rate in (grid[0], grid[-1]) else ""
    found: Row = {"rate": rate}
    times = [p["seconds"] for p in reached if p is not None]
    if len(times) < len(runs):
        best = max(p["accuracy"] for points in runs for p in points)
        note = f"{len(times)} of {len(runs)} runs at rate {rate:g}{edge}; best accuracy {best:.2%}"
        return found | {"status": "not reached", "note": note}
    updates = sorted(p["weights_updated"] for p in reached if p is not None)[len(runs) // 2]
    note = f"rate {rate:g}{edge}, {updates / 1e6:.3g} million updates"
    return found | {"status": "timed", "note": note} | measure.summary(times)


def with_ratios(rows: list[Row]) -> list[Row]:
    """Each row with its median over that of our operators."""
    ours = next((r["median"] for r in rows if r["method"] == workloads.OURS and r["status"] == "timed"), None)
    return [r | {"ratio": r["median"] / ours} if ours and r["status"] == "timed" else r for r in rows]
