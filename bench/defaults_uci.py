"""The part of the study behind docs/defaults.md over small tables: nothing set, against SGD with momentum and the mean.

The problems are those of `dante reproduce table3`: its splits, scaling and units. A rate is judged by training without a
part of the training rows; the test loss is of a second training, on all of them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import dante_kernels as dk
from dante_kernels.reproduce import problems, runs
from dante_kernels.reproduce.problems import Problem, Spec
from dante_kernels.training.directions import RELATIVE_LR_MSE
from dante_kernels.training.schedules import default_rounds, usual

from .defaults_rows import IN_PARALLEL, Row, best, case, of

NETS = {"airfoil": "5-100-1", "fires": "29-100-1", "ccpp": "4-100-1"}
SEEDS = range(1, 6)  # each with a split of its own
RATES = {"dante": (0.0004, 0.0013, RELATIVE_LR_MSE, 0.013), "sgd": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)}
SETTINGS: dict[str, Row] = {"dante": {"direction": "nesterov", **IN_PARALLEL}, "sgd": {}}


def cases() -> Iterator[Row]:
    """All trainings: every rate with every split."""
    for name, net in NETS.items():
        for method, rates in RATES.items():
            for rate, seed in itertools.product(rates, SEEDS):
                yield case(name, net, "leaky_relu", "mse", method, rate, seed, **SETTINGS[method])


def train(row: Row, directory: Path) -> Row:
    """The row with what came of it; an error of the network is None where the training diverged."""
    problem = problems.load(Spec(row["data"], split=row["seed"]), directory)
    searched, _, _ = _trained(row, problems.for_search(problem, row["seed"]))
    loss, mean, seconds = _trained(row, problem)
    return row | {"validation_loss": searched, "test_loss": loss, "mean_loss": mean, "seconds": seconds}


def _trained(row: Row, problem: Problem) -> tuple[float | None, float, float]:
    """(error of the network, error of answering with the training rows' mean, seconds)."""
    widths, batch = tuple(int(width) for width in row["net"].split("-")), 100
    mean = float((problem.y_test - problem.y.mean(0)).square().mean()) * problem.unit
    begin = time.process_time()
    if row["method"] == "sgd":
        epochs = default_rounds(len(problem.x), batch)
        found = runs.train(
            problem, widths, row["activation"], row["loss"], "sgd-cosine", row["rate"], row["seed"], epochs, batch_size=batch,
            output="identity",
        )  # fmt: skip
        return found["test_loss"], mean, time.process_time() - begin
    model = runs.build(widths, row["activation"], "identity", row["seed"])
    blocks = usual(default_rounds(len(problem.x), batch), parallel=True)
    steps = {name: value for name, value in row["settings"].items() if name not in IN_PARALLEL}
    dk.fit(
        model, problem.x, problem.y, schedule=blocks, lr=row["rate"], relative_lr=True, momentum=0.9, seed=row["seed"], **steps
    )
    seconds, (loss, _) = time.process_time() - begin, runs.evaluate(model, problem.x_test, problem.y_test, row["loss"])
    return loss * problem.unit, mean, seconds


def _converged(rows: list[Row]) -> list[Row]:
    """Those of the rates at which no training diverged."""
    diverged = {row["rate"] for row in rows if row["validation_loss"] is None or row["test_loss"] is None}
    return [row for row in rows if row["rate"] not in diverged]


def table(rows: list[Row]) -> str:
    """Test losses over the splits, in Markdown."""
    head = "| data, net | DANTE with nothing set | DANTE's best rate | SGD's best rate | answering with the mean |"
    lines = [head, "| --- " * 5 + "|"]

    def shown(found: list[Row], name: str = "test_loss") -> str:
        if len(found) < len(SEEDS):
            return "not run"
        return f"{statistics.mean(row[name] for row in found):.4g} ± {statistics.stdev(row[name] for row in found):.2g}"

    for name, net in NETS.items():
        ours, theirs = (_converged(of(rows, data=name, method=method, settings=SETTINGS[method])) for method in RATES)
        default = of(ours, rate=RELATIVE_LR_MSE)
        ends = [f"{best(side, 0):g}: {shown(of(side, rate=best(side, 0)))}" for side in (ours, theirs)]
        lines.append(f"| {name} {net} | {shown(default)} | {ends[0]} | {ends[1]} | {shown(default, 'mean_loss')} |")
    return "\n".join(lines)
