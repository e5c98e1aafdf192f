"""The part of the study behind docs/defaults.md that is beside AM-Adam's figures: longer trainings, at last on all rows.

How long and how fast is chosen by the accuracy over 10,000 rows kept from training, with one seed; the choice is then trained
on all rows with three. `cases` has these once the rows of the choice are there, so the command is given twice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import dante_kernels as dk
from dante_kernels import data
from dante_kernels.reproduce import runs
from dante_kernels.reproduce.problems import Problem

from .defaults_rows import Row, case, of

NET = ("mnist", "784-100-100-10", "leaky_relu", "mse")
CHOICES = ((32, 0.003), (32, 0.002), (16, 0.003))  # rounds and rate
SGD_RATE = 1.0  # the better of 0.3 and 1 in the shorter trainings


def chosen(rows: list[Row]) -> tuple[int, float] | None:
    """The rounds and the rate of the best held-out accuracy; None while a choice has no row."""
    found = {choice: of(rows, data=NET[0], net=NET[1], settings={"rounds": choice[0]}, rate=choice[1]) for choice in CHOICES}
    if not all(found.values()):
        return None
    return max(CHOICES, key=lambda choice: found[choice][0]["validation_accuracy"])


def cases(rows: list[Row]) -> Iterator[Row]:
    """All trainings, as far as they are known."""
    yield from (case(*NET, "dante", rate, 0, rounds=rounds) for rounds, rate in CHOICES)
    if choice := chosen(rows):
        for method, rate in (("dante", choice[1]), ("sgd", SGD_RATE)):
            yield from (case(*NET, method, rate, seed, rounds=choice[0], rows="all") for seed in range(3))


def train(row: Row, split: data.Dataset) -> Row:
    """The row with what came of it."""
    everything = "rows" in row["settings"]
    kept = len(split.x_train) * (6 if everything else 5) // 6
    x, y, loss, rounds = split.x_train[:kept], split.y_train[:kept], row["loss"], row["settings"]["rounds"]
    widths, begin = tuple(int(width) for width in row["net"].split("-")), time.perf_counter()
    if row["method"] == "sgd":
        problem = Problem(row["data"], x, y, split.x_test, split.y_test)
        found = runs.train(problem, widths, row["activation"], loss, "sgd-cosine", row["rate"], row["seed"], rounds)
        return row | {name: found[name] for name in ("test_loss", "test_accuracy", "seconds")}
    model = runs.build(widths, row["activation"], row["activation"], row["seed"])
    blocks = dk.RoundRobin(rounds=rounds, inner_epochs=1, inner_steps=20)
    dk.fit(model, x, y, loss=loss, schedule=blocks, lr=row["rate"], relative_lr=True, momentum=0.9, seed=row["seed"])
    seconds, test = time.perf_counter() - begin, runs.evaluate(model, split.x_test, split.y_test, loss)
    held = (None, None) if everything else runs.evaluate(model, split.x_train[kept:], split.y_train[kept:], loss)
    names = ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy", "seconds")
    return row | dict(zip(names, (*held, *test, seconds), strict=True))


def tables(rows: list[Row]) -> str:
    """The choice, and what came of it, in Markdown."""
    rows = of(rows, data=NET[0], net=NET[1])
    lines = [f"| {NET[1]}, rounds | rate | held-out accuracy, 50,000 rows trained on |", "| --- " * 3 + "|"]
    for rounds, rate in CHOICES:
        found = of(rows, settings={"rounds": rounds}, rate=rate)
        held = f"{100 * found[0]['validation_accuracy']:.2f} %" if found else "not run"
        lines.append(f"| {rounds} | {rate:g} | {held} |")
    head = "| seeds 0 to 2, all rows | rate | passes of each layer | test accuracy | seconds | seconds a pass |"
    lines += ["", head, "| --- " * 6 + "|"]
    choice = chosen(rows)
    for method, name in (("dante", "DANTE"), ("sgd", "SGD with momentum")):
        found = [row for row in of(rows, method=method) if choice and row["settings"] == {"rounds": choice[0], "rows": "all"}]
        if len(found) < 3:
            lines.append(f"| {name}" + " | not run" * 5 + " |")
            continue
        hits, seconds = [100 * row["test_accuracy"] for row in found], statistics.median(row["seconds"] for row in found)
        passes = found[0]["settings"]["rounds"]
        lines.append(
            f"| {name} | {found[0]['rate']:g} | {passes} | {statistics.mean(hits):.2f} ± {statistics.stdev(hits):.2f} % | "
            f"{seconds:.0f} | {seconds / passes:.2f} |"
        )
    return "\n".join(lines)
