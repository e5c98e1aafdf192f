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
from dante_kernels.training.directions import RELATIVE_LR, RELATIVE_LR_CROSS_ENTROPY
from dante_kernels.training.schedules import default_rounds, usual

from .defaults_rows import IN_PARALLEL, Row, best, case, of
from .defaults_rows import usual as usual_of_classes

NETS = {"airfoil": "5-100-1", "fires": "29-100-1", "ccpp": "4-100-1"}
CLASSES = {"ionosphere": "34-100-2", "svmguide4": "10-100-6", "vehicle": "18-100-4"}  # with cross-entropy
SEEDS = range(1, 6)  # each with a split of its own
RATES = {"dante": (0.0004, 0.0013, RELATIVE_LR, 0.013), "sgd": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)}
RATES_OF_CLASSES = {"dante": (0.0005, 0.0016, RELATIVE_LR_CROSS_ENTROPY, 0.016), "sgd": (0.003, 0.01, 0.03, 0.1, 0.3)}
SETTINGS: dict[str, Row] = {"dante": {"direction": "nesterov"}, "sgd": {}}
PARALLEL: Row = {**SETTINGS["dante"], **IN_PARALLEL}


def cases() -> Iterator[Row]:
    """All trainings: every rate with every split."""
    for name, net in CLASSES.items():
        for method, rates in RATES_OF_CLASSES.items():
            for rate, seed in itertools.product(rates, SEEDS):
                yield case(name, net, "leaky_relu", "cross_entropy", method, rate, seed, **_settings_of_classes(net, method))
    for name, net in NETS.items():
        for method, rates in RATES.items():
            for rate, seed in itertools.product(rates, SEEDS):
                yield case(name, net, "leaky_relu", "mse", method, rate, seed, **SETTINGS[method])
        yield from (case(name, net, "leaky_relu", "mse", "dante", RELATIVE_LR, seed, **PARALLEL) for seed in SEEDS)


def train(row: Row, directory: Path) -> Row:
    """The row with what came of it; an error of the network is None where the training diverged."""
    problem = problems.load(Spec(row["data"], split=row["seed"]), directory)
    searched, _, _ = _trained(row, problems.for_search(problem, row["seed"]))
    loss, accuracy, seconds = _trained(row, problem)
    found = {"validation_loss": searched, "test_loss": loss, "seconds": seconds}
    if row["data"] in CLASSES:
        return row | found | {"test_accuracy": accuracy}
    return row | found | {"mean_loss": float((problem.y_test - problem.y.mean(0)).square().mean()) * problem.unit}


def _settings_of_classes(net: str, method: str) -> Row:
    return usual_of_classes(net, "leaky_relu", "cross_entropy")[1] if method == "dante" else {}


def _trained(row: Row, problem: Problem) -> tuple[float | None, float | None, float]:
    """(error of the network, its accuracy where there are classes, seconds)."""
    widths, batch = tuple(int(width) for width in row["net"].split("-")), 100
    begin = time.process_time()
    if row["method"] == "sgd":
        epochs = default_rounds(len(problem.x), batch)
        found = runs.train(
            problem, widths, row["activation"], row["loss"], "sgd-cosine", row["rate"], row["seed"], epochs, batch_size=batch,
            output="identity",
        )  # fmt: skip
        return found["test_loss"], found["test_accuracy"], time.process_time() - begin
    model = runs.build(widths, row["activation"], "identity", row["seed"])
    blocks = usual(default_rounds(len(problem.x), batch), parallel=row["settings"].get("parallel", False))
    steps = {name: value for name, value in row["settings"].items() if name not in IN_PARALLEL}
    dk.fit(
        model, problem.x, problem.y, loss=row["loss"], schedule=blocks, lr=row["rate"], relative_lr=True, momentum=0.9,
        seed=row["seed"], **steps,
    )  # fmt: skip
    seconds, (loss, accuracy) = time.process_time() - begin, runs.evaluate(model, problem.x_test, problem.y_test, row["loss"])
    return loss * problem.unit, accuracy, seconds


def _converged(rows: list[Row]) -> list[Row]:
    """Those of the rates at which no training diverged."""
    diverged = {row["rate"] for row in rows if row["validation_loss"] is None or row["test_loss"] is None}
    return [row for row in rows if row["rate"] not in diverged]


def table(rows: list[Row]) -> str:
    """Test losses over the splits, in Markdown."""
    titles = ["data, net", "DANTE with nothing set", "in parallel", "DANTE's best rate", "SGD's best rate", "the mean's"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]

    def shown(found: list[Row], name: str = "test_loss") -> str:
        if len(found) < len(SEEDS):
            return "not run"
        return f"{statistics.mean(row[name] for row in found):.4g} ± {statistics.stdev(row[name] for row in found):.2g}"

    for name, net in NETS.items():
        ours, theirs = (_converged(of(rows, data=name, method=method, settings=SETTINGS[method])) for method in RATES)
        default, parallel = of(ours, rate=RELATIVE_LR), of(rows, data=name, settings=PARALLEL, rate=RELATIVE_LR)
        ends = [f"{best(side, 0):g}: {shown(of(side, rate=best(side, 0)))}" for side in (ours, theirs)]
        cells = (shown(default), shown(parallel), *ends, shown(default, "mean_loss"))
        lines.append(f"| {name} {net} | {' | '.join(cells)} |")

    def both(found: list[Row]) -> str:
        if len(found) < len(SEEDS):
            return "not run"
        hits = [100 * row["test_accuracy"] for row in found]
        return f"{shown(found)} / {statistics.mean(hits):.1f} ± {statistics.stdev(hits):.1f} %"

    lines += ["", "| data, net | DANTE with nothing set | DANTE's best rate | SGD's best rate |", "| --- " * 4 + "|"]
    for name, net in CLASSES.items():
        sides = [_converged(of(rows, data=name, method=m, settings=_settings_of_classes(net, m))) for m in RATES_OF_CLASSES]
        ends = [f"{best(side, 0):g}: {both(of(side, rate=best(side, 0)))}" for side in sides]
        lines.append(f"| {name} {net} | {both(of(sides[0], rate=RELATIVE_LR_CROSS_ENTROPY))} | {' | '.join(ends)} |")
    return "\n".join(lines)
