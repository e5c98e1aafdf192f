"""The study behind docs/defaults.md: `dk.fit` in short blocks against SGD with momentum, at equal numbers of weights updated.

``python -m bench.defaults --data-dir DIR`` trains what bench/results/defaults.jsonl has no row of yet, in the order of `cases`
(about two hours on one core for all), and ``--table`` prints the tables. DIR has a folder of IDX files for each data set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dante_kernels as dk
from dante_kernels import data
from dante_kernels.reproduce import runs
from dante_kernels.reproduce.problems import Problem

ROWS = Path(__file__).parent / "results" / "defaults.jsonl"
Row = dict[str, Any]
EPOCHS, BATCH = 8, 100
ONE, TWO, THREE, FIVE = "784-100-10", "784-400-200-10", "784-400-200-100-10", "784-600-400-200-100-50-10"
DANTE_RATES = {"leaky_relu": (0.001, 0.002, 0.003, 0.005), "sigmoid": (0.001, 0.002, 0.003, 0.005)}
SGD_RATES = {
    ("leaky_relu", "mse"): (0.1, 0.3, 1.0, 3.0),
    ("leaky_relu", "cross_entropy"): (0.01, 0.03, 0.1, 0.3),
    ("sigmoid", "mse"): (0.03, 0.1, 0.3, 1.0),
    ("sigmoid", "cross_entropy"): (0.03, 0.1, 0.3, 1.0),
}
GRIDS = [
    *(("mnist", net, "leaky_relu", loss) for loss in ("mse", "cross_entropy") for net in (ONE, TWO, THREE)),
    *(("mnist", net, "sigmoid", loss) for loss in ("mse", "cross_entropy") for net in (ONE, TWO)),
    *(("fashion-mnist", net, "leaky_relu", loss) for loss in ("mse", "cross_entropy") for net in (ONE, THREE)),
    ("mnist", FIVE, "leaky_relu", "mse"),
]
# One setting changed at a time, with the rate that it then takes.
VARIANTS: list[tuple[float, Row]] = [
    (0.003, {"inner_steps": 5}),
    (0.003, {"inner_steps": 60}),
    (0.003, {"inner_steps": 600}),
    (0.02, {"momentum": 0.0}),
    (0.003, {"reset_momentum": True}),
    (0.03, {"relative_lr": False}),
    (0.003, {"direction": "nesterov"}),
]


def cases() -> Iterator[Row]:
    """All trainings: the grids of rates, more seeds, and the variants."""

    def case(data_set: str, net: str, activation: str, loss: str, method: str, rate: float, seed: int, **settings: Any) -> Row:
        names = ("data", "net", "activation", "loss", "method", "rate", "seed", "settings")
        return dict(zip(names, (data_set, net, activation, loss, method, rate, seed, settings), strict=True))

    for grid in GRIDS:
        yield from (case(*grid, "dante", rate, 0) for rate in DANTE_RATES[grid[2]])
        yield from (case(*grid, "sgd", rate, 0) for rate in SGD_RATES[grid[2], grid[3]])
    for net in (ONE, "784-250-10", "784-600-10", "784-100-100-10", TWO, THREE):
        yield from (case("mnist", net, "leaky_relu", "mse", "dante", 0.003, seed) for seed in range(3))
        yield from (case("mnist", net, "leaky_relu", "mse", "sgd", rate, seed) for rate in (0.3, 1.0) for seed in range(3))
    for net, loss, (rate, change) in itertools.product((ONE, THREE), ("mse", "cross_entropy"), VARIANTS):
        yield case("mnist", net, "leaky_relu", loss, "dante", rate, 0, **change)


def key(row: Row) -> str:
    """The same for the same training."""
    return json.dumps([row[name] for name in ("data", "net", "activation", "loss", "method", "rate", "seed", "settings")])


def train(row: Row, split: data.Dataset) -> Row:
    """The row with what came of it; trained on five sixths of the training rows, validated on the rest."""
    rows, loss, activation = len(split.x_train) * 5 // 6, row["loss"], row["activation"]
    problem = Problem(row["data"], split.x_train[:rows], split.y_train[:rows], split.x_test, split.y_test)
    widths = tuple(int(width) for width in row["net"].split("-"))

    def validate(model: nn.Module, _: Problem) -> Row:
        value, accuracy = runs.evaluate(model, split.x_train[rows:], split.y_train[rows:], loss)
        return {"validation_loss": value, "validation_accuracy": accuracy}

    names = ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy", "seconds")
    if row["method"] == "sgd":
        found = runs.train(
            problem, widths, activation, loss, "sgd-cosine", row["rate"], row["seed"], EPOCHS, batch_size=BATCH, probe=validate
        )
        return row | {name: found.get(name) for name in names}
    model, start = runs.build(widths, activation, activation if loss == "mse" else "identity", row["seed"]), time.perf_counter()
    settings = {"relative_lr": True, "momentum": 0.9, **row["settings"]}
    turns = dk.RoundRobin(rounds=EPOCHS, inner_epochs=1, inner_steps=settings.pop("inner_steps", 20))
    x, y = problem.x, problem.y
    dk.fit(model, x, y, loss=loss, schedule=turns, lr=row["rate"], batch_size=BATCH, seed=row["seed"], **settings)
    seconds, test = time.perf_counter() - start, runs.evaluate(model, split.x_test, split.y_test, loss)
    return row | validate(model, problem) | dict(zip(names[2:], (*test, seconds), strict=True))


def read() -> list[Row]:
    """The rows that are there."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def tables() -> str:
    """The tables of docs/defaults.md, in Markdown."""
    rows = read()

    def of(**wanted: Any) -> list[Row]:
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    def shown(found: list[Row]) -> str:
        if not found:
            return "not run"
        loss = statistics.mean(row["test_loss"] for row in found)
        return f"{loss:.5f} / {100 * statistics.mean(row['test_accuracy'] for row in found):.2f} %"

    def best(found: list[Row]) -> Row:
        return min((row for row in found if row["validation_loss"] is not None), key=lambda row: row["validation_loss"])

    lines = ["| data, net | activation, loss | DANTE at 0.003 | DANTE's best rate | SGD's best rate |", "| --- " * 5 + "|"]
    for data_set, net, activation, loss in GRIDS:
        grid = of(data=data_set, net=net, activation=activation, loss=loss, seed=0, settings={})
        ours, theirs = ([row for row in grid if row["method"] == method] for method in ("dante", "sgd"))
        default = shown([row for row in ours if row["rate"] == 0.003])
        ends = [f"{best(side)['rate']:g}: {shown([best(side)])}" for side in (ours, theirs)]
        lines.append(f"| {data_set} {net} | {activation}, {loss} | {default} | {ends[0]} | {ends[1]} |")
    nets = list(dict.fromkeys(row["net"] for row in rows if row["seed"] == 2))
    lines += [
        "",
        "| mnist, mse, leaky_relu, seeds 0 to 2 | DANTE at 0.003 | SGD at the better of 0.3 and 1 |",
        "| --- " * 3 + "|",
    ]
    for net in nets:
        same = {"data": "mnist", "net": net, "activation": "leaky_relu", "loss": "mse", "settings": {}}
        sgd = [of(**same, method="sgd", rate=rate) for rate in (0.3, 1.0)]
        whole = [found for found in sgd if len(found) == 3]
        least = min(whole, key=lambda found: sum(row["validation_loss"] for row in found), default=[])
        rate = f"{least[0]['rate']:g}: " if least else ""
        lines.append(f"| {net} | {shown(of(**same, method='dante', rate=0.003))} | {rate}{shown(least)} |")
    changes = [(0.003, {}), *VARIANTS]
    columns = [(net, loss) for net in (ONE, THREE) for loss in ("mse", "cross_entropy")]
    lines += ["", "| changed | " + " | ".join(f"{net}, {loss}" for net, loss in columns) + " |", "| --- " * 5 + "|"]
    for rate, change in changes:
        name = ", ".join(f"{k}={v!r}" for k, v in change.items()) or "nothing"
        same = {"data": "mnist", "activation": "leaky_relu", "method": "dante", "seed": 0, "rate": rate, "settings": change}
        cells = [shown(of(**same, net=net, loss=loss)) for net, loss in columns]
        lines.append(f"| {name}{'' if rate == 0.003 else f', rate {rate:g}'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    p = argparse.ArgumentParser("python -m bench.defaults", description=__doc__)
    p.add_argument("--data-dir", type=Path, help="has a folder of IDX files for each of mnist and fashion-mnist")
    p.add_argument("--table", action="store_true", help="only print the tables of the rows that are there")
    a = p.parse_args()
    if a.table:
        print(tables())
        return
    if a.data_dir is None:
        p.error("--data-dir: expected a folder")
    torch.set_num_threads(1)
    splits: dict[str, data.Dataset] = {}
    done = {key(row) for row in read()}
    for row in cases():
        if key(row) in done:
            continue
        name = row["data"]
        if name not in splits:
            splits[name] = data.load(name, a.data_dir / name)
        done.add(key(row))
        with ROWS.open("a") as file:
            file.write(json.dumps(train(row, splits[name])) + "\n")


if __name__ == "__main__":
    main()
