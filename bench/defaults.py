"""The study behind docs/defaults.md: `dk.fit` in short blocks against SGD with momentum, at equal numbers of weights updated.

``python -m bench.defaults --data-dir DIR`` trains what bench/results/defaults.jsonl has no row of yet, in the order of `cases`
(about five hours on one core for all; ``--jobs`` trains side by side), and ``--table`` prints the tables. DIR has a folder of
IDX files for each data set of pictures, and the tables in `uci`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dante_kernels as dk
from dante_kernels import data
from dante_kernels.reproduce import runs
from dante_kernels.reproduce.problems import Problem

from . import defaults_changes, defaults_long, defaults_uci
from .defaults_rows import ROWS, Row, best, case, in_turn, key, of, read, usual

EPOCHS, BATCH = 8, 100
ONE, TWO, THREE, FIVE = "784-100-10", "784-400-200-10", "784-400-200-100-10", "784-600-400-200-100-50-10"
SGD_RATES = {
    ("leaky_relu", "mse"): (0.1, 0.3, 1.0, 3.0),
    ("leaky_relu", "cross_entropy"): (0.01, 0.03, 0.1, 0.3),
    ("sigmoid", "mse"): (0.03, 0.1, 0.3, 1.0),
    ("sigmoid", "cross_entropy"): (0.03, 0.1, 0.3, 1.0),
}
# Those with which DANTE's rate was searched too.
GRIDS = [
    *itertools.product(("mnist", "fashion-mnist"), (ONE, THREE), ("leaky_relu",), ("mse", "cross_entropy")),
    *itertools.product(("mnist", "fashion-mnist"), (ONE,), ("sigmoid",), ("mse", "cross_entropy")),
]
# The papers' nets with either data, activation and loss.
EVERY_NET = [
    (data_set, net, activation, loss)
    for net in (ONE, "784-250-10", "784-400-10", "784-600-10", "784-100-100-10", TWO, THREE, FIVE)
    for activation in ("leaky_relu", "sigmoid")
    for data_set in ("mnist", "fashion-mnist")
    for loss in ("mse", "cross_entropy")
]


def cosine(round_: float, rounds: float) -> float:
    """The rate's factor in a round, as `dk.fit` has it."""
    return (1 + math.cos(math.pi * round_ / rounds)) / 2


SCHEDULES: dict[str, str | Callable[[int, int], float]] = {
    "cosine": "cosine",
    "warm-up": lambda round_, rounds: 0.3 if round_ == 0 else cosine(round_ - 1, rounds - 1),
}
INITIALISATIONS: dict[str, Callable[[torch.Tensor], object]] = {
    "He": functools.partial(nn.init.kaiming_normal_, a=0.01, nonlinearity="leaky_relu"),
    "orthogonal": functools.partial(nn.init.orthogonal_, gain=nn.init.calculate_gain("leaky_relu", 0.01)),
}


class OutputFirst(dk.RoundRobin):
    """Every layer, from the output back to the input."""

    def phases(self, widths: list[int]) -> list[Any]:
        """One phase over all layers."""
        (phase,) = super().phases(widths)
        return [replace(phase, order=phase.order[::-1])]


def cases() -> Iterator[Row]:
    """All trainings: every net, SGD's further seeds once its rates have rows; rates of DANTE; and what the other files add."""
    rows = read()
    for grid in EVERY_NET:
        rate, settings = usual(*grid[1:])
        yield from (case(*grid, "dante", rate, seed, **settings) for seed in range(3))
        yield from (case(*grid, "sgd", rate, 0) for rate in SGD_RATES[grid[2:]])
        searched = of(rows, **grid_of(grid), method="sgd", seed=0)
        if {row["rate"] for row in searched} >= set(SGD_RATES[grid[2:]]):
            yield from (case(*grid, "sgd", best(searched, 0), seed) for seed in range(3))
    for grid in GRIDS:
        rate, settings = usual(*grid[1:])
        yield from (case(*grid, "dante", round(part * rate, 4), 0, **settings) for part in (0.7, 1, 1.4))
    for grid in (grid for grid in EVERY_NET if grid[2] == "leaky_relu"):
        rate, settings = in_turn(*grid[1:])
        yield from (case(*grid, "dante", rate, seed, **settings) for seed in range(3))
    yield from defaults_changes.cases()
    yield from defaults_long.cases(rows)
    yield from defaults_uci.cases()


def grid_of(grid: tuple[str, str, str, str]) -> Row:
    """What trainings of one net with no settings of their own share."""
    return dict(zip(("data", "net", "activation", "loss", "settings"), (*grid, {}), strict=True))


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
    model, start = runs.build(widths, activation, activation if loss == "mse" else "identity", row["seed"]), time.process_time()
    settings = {"relative_lr": True, "momentum": 0.9, **row["settings"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(row["seed"])
        initialise = INITIALISATIONS.get(settings.pop("initialisation", ""), lambda weight: None)
        for weight in (p for p in model.parameters() if p.dim() == 2):
            initialise(weight)
    kind = OutputFirst if settings.pop("order", "") else dk.RoundRobin
    parallel = settings.pop("parallel", False)
    lr_schedule, steps = SCHEDULES[settings.pop("lr_schedule", "cosine")], settings.pop("inner_steps", 20)
    # So many rounds of mini-batches of so many rows; two of half the size and eight of twice it make as many steps as eight.
    parts = [(2, BATCH // 2), (EPOCHS, 2 * BATCH)] if settings.pop("batches", "") else [(EPOCHS, BATCH)]
    done, steps_of_all = 0.0, sum(rounds / size for rounds, size in parts)
    for rounds, size in parts:
        if len(parts) > 1:
            begin, share = done / steps_of_all, rounds / size / steps_of_all
            lr_schedule = functools.partial(_part_of_cosine, begin, share)
            done += rounds / size
        dk.fit(
            model, problem.x, problem.y, loss=loss, lr=row["rate"], lr_schedule=lr_schedule, batch_size=size,
            schedule=kind(rounds=rounds, inner_epochs=1, inner_steps=steps, parallel=parallel), seed=row["seed"], **settings,
        )  # fmt: skip
    seconds, test = time.process_time() - start, runs.evaluate(model, split.x_test, split.y_test, loss)
    return row | validate(model, problem) | dict(zip(names[2:], (*test, seconds), strict=True))


def _part_of_cosine(begin: float, share: float, round_: int, rounds: int) -> float:
    return cosine(begin + share * round_ / rounds, 1)


def tables() -> str:
    """The tables of docs/defaults.md, in Markdown."""
    rows = read()

    def chosen(side: list[Row]) -> str:
        """The best rate, marked where it stands at the edge, and of how many."""
        rates = sorted({row["rate"] for row in side})
        rate = best(side, 0)
        return f"{rate:g}{'!' * (rate in rates[:1] + rates[-1:])} of {len(rates)}"

    def shown(found: list[Row], seeds: int = 1) -> str:
        if len(found) < seeds:
            return "not run"
        losses, hits = [row["test_loss"] for row in found], [100 * row["test_accuracy"] for row in found]
        if seeds == 1:
            return f"{losses[0]:.5f} / {hits[0]:.2f} %"
        ends = (f"{statistics.mean(v):.{n}f} ± {statistics.stdev(v):.{n}f}" for v, n in ((losses, 5), (hits, 2)))
        return " / ".join(ends) + " %"

    def of_grid(grid: tuple[str, str, str, str], method: str, settings: Row) -> list[Row]:
        return of(rows, **grid_of(grid) | {"settings": settings}, method=method)

    head = "| data, net | activation, loss | DANTE with nothing set | DANTE's best rate | SGD's best rate |"
    lines = [head, "| --- " * 5 + "|"]
    for grid in GRIDS:
        usual_rate, settings = usual(*grid[1:])
        ours, theirs = of(of_grid(grid, "dante", settings), seed=0), of(of_grid(grid, "sgd", {}), seed=0)
        ends = [f"{chosen(side)}: {shown(of(side, rate=best(side, 0)))}" for side in (ours, theirs)]
        default = shown(of(ours, rate=usual_rate))
        lines.append(f"| {grid[0]} {grid[1]} | {grid[2]}, {grid[3]} | {default} | {ends[0]} | {ends[1]} |")
    head = "| seeds 0 to 2 | activation, loss | DANTE with nothing set | SGD's best rate | DANTE, blocks of 20 in turn |"
    lines += ["", head, "| --- " * 5 + "|"]
    for grid in EVERY_NET:
        (usual_rate, settings), theirs = usual(*grid[1:]), of_grid(grid, "sgd", {})
        whole = [row for row in theirs if len(of(theirs, rate=row["rate"])) == 3]
        rate = best(whole, 0)
        ours = shown(of(of_grid(grid, "dante", settings), rate=usual_rate), 3)
        turns = shown(of(of_grid(grid, "dante", in_turn(*grid[1:])[1]), rate=usual_rate), 3) if grid[2] == "leaky_relu" else ""
        cells = f"{ours} | {rate:g}: {shown(of(whole, rate=rate), 3)} | {turns}"
        lines.append(f"| {grid[0]} {grid[1]} | {grid[2]}, {grid[3]} | {cells} |")
    return "\n".join([*lines, "", defaults_changes.tables(rows), "", defaults_long.tables(rows), "", defaults_uci.table(rows)])


@functools.cache
def _split(name: str, directory: Path) -> data.Dataset:
    return data.load(name, directory / name)


def _train_one(row: Row, directory: Path) -> Row:
    torch.set_num_threads(1)
    if row["data"] in defaults_uci.NETS | defaults_uci.CLASSES:
        return defaults_uci.train(row, directory)
    if "rounds" in row["settings"]:
        return defaults_long.train(row, _split(row["data"], directory))
    return train(row, _split(row["data"], directory))


def _left() -> list[Row]:
    """The trainings that have no row yet."""
    done = {key(row) for row in read()}
    return list({key(row): row for row in cases() if key(row) not in done}.values())


def main() -> None:
    """The command."""
    p = argparse.ArgumentParser("python -m bench.defaults", description=__doc__)
    p.add_argument("--data-dir", type=Path, help="has a folder of IDX files for each of mnist and fashion-mnist, and uci")
    p.add_argument("--jobs", type=int, default=1, help="trainings side by side, each on one core (default 1)")
    p.add_argument("--table", action="store_true", help="only print the tables of the rows that are there")
    a = p.parse_args()
    if a.table:
        print(tables())
        return
    if a.data_dir is None:
        p.error("--data-dir: expected a folder")
    with ProcessPoolExecutor(a.jobs, get_context("spawn")) as pool:
        while left := _left():
            # Some at a time, so that SGD's further seeds come right after its rates.
            for row in pool.map(functools.partial(_train_one, directory=a.data_dir), left[: 4 * a.jobs]):
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
