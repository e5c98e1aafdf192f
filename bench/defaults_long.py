"""The part of the study behind docs/defaults.md that is beside AM-Adam's figures: longer trainings, at last on all rows.

How long and how fast is chosen by the accuracy over 10,000 rows kept from training, with one seed; the choice is then trained
on all rows with five. `cases` chooses among the rows that are there, so the command is given twice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import dante_kernels as dk
from dante_kernels import data
from dante_kernels.reproduce import runs
from dante_kernels.reproduce.problems import Problem
from dante_kernels.training import schedules

from .defaults_rows import IN_PARALLEL, Row, case, of, usual

BATCH = 100
NET = ("mnist", "784-100-100-10", "leaky_relu", "mse")
# Rate, and what is set beside it. The first is what `fit` takes, and is compared with SGD's.
RATE, USUAL = usual(*NET[1:])
CHOICES: tuple[tuple[float, Row], ...] = (
    (RATE, {"rounds": 12} | USUAL),
    (RATE, {"rounds": 16} | USUAL),
    (RATE, {"rounds": 24} | USUAL),
    (RATE, {"rounds": 32} | USUAL),
    (0.0028, {"rounds": 32} | USUAL),
    (0.0056, {"rounds": 24, "batch_size": 200} | USUAL),
    (0.008, {"rounds": 24, "batch_size": 200} | USUAL),
)
SEEDS = range(5)
SGD_RATE = 1.0  # the better of 0.3 and 1 in the shorter trainings


def chosen(rows: list[Row]) -> tuple[float, Row]:
    """The choice of the best held-out accuracy of those that have a row."""
    found = {i: of(rows, **_shared(), settings=settings, rate=rate) for i, (rate, settings) in enumerate(CHOICES)}
    accuracy = {i: rows[0]["validation_accuracy"] for i, rows in found.items() if rows}
    return CHOICES[max(accuracy, key=lambda i: accuracy[i], default=0)]


def _shared() -> Row:
    return dict(zip(("data", "net", "activation", "loss"), NET, strict=True))


def _on_all_rows(rows: list[Row]) -> list[tuple[str, float, Row]]:
    """Method, rate and settings of the trainings on all rows."""
    first, best = CHOICES[0], chosen(rows)
    ways = [("dante", *first), ("sgd", SGD_RATE, {"rounds": first[1]["rounds"]})] + [("dante", *best)] * (best != first)
    return [(method, rate, settings | {"rows": "all"}) for method, rate, settings in ways]


def cases(rows: list[Row]) -> Iterator[Row]:
    """All trainings, those on all rows by the choice that the rows make."""
    yield from (case(*NET, "dante", rate, 0, **settings) for rate, settings in CHOICES)
    for method, rate, settings in _on_all_rows(rows):
        yield from (case(*NET, method, rate, seed, **settings) for seed in SEEDS)


def train(row: Row, split: data.Dataset) -> Row:
    """The row with what came of it."""
    everything = "rows" in row["settings"]
    kept = len(split.x_train) * (6 if everything else 5) // 6
    x, y, loss = split.x_train[:kept], split.y_train[:kept], row["loss"]
    rounds, batch = row["settings"]["rounds"], row["settings"].get("batch_size", BATCH)
    widths, begin = tuple(int(width) for width in row["net"].split("-")), time.process_time()
    if row["method"] == "sgd":
        problem = Problem(row["data"], x, y, split.x_test, split.y_test)
        found = runs.train(
            problem, widths, row["activation"], loss, "sgd-cosine", row["rate"], row["seed"], rounds, batch_size=batch
        )
        return row | {name: found[name] for name in ("test_loss", "test_accuracy", "seconds")}
    model = runs.build(widths, row["activation"], row["activation"], row["seed"])
    blocks = schedules.usual(rounds, parallel=True)
    steps = {name: row["settings"][name] for name in USUAL.keys() - IN_PARALLEL.keys()}
    dk.fit(
        model, x, y, loss=loss, schedule=blocks, lr=row["rate"], relative_lr=True, momentum=0.9, batch_size=batch,
        seed=row["seed"], **steps,
    )  # fmt: skip
    seconds, test = time.process_time() - begin, runs.evaluate(model, split.x_test, split.y_test, loss)
    held = (None, None) if everything else runs.evaluate(model, split.x_train[kept:], split.y_train[kept:], loss)
    names = ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy", "seconds")
    return row | dict(zip(names, (*held, *test, seconds), strict=True))


def tables(rows: list[Row]) -> str:
    """The choice, and what came of it, in Markdown."""
    rows = of(rows, **_shared())
    lines = [f"| {NET[1]}: passes of each layer | mini-batch | rate | held-out accuracy |", "| --- " * 4 + "|"]

    def head(rate: float, settings: Row) -> str:
        return f"{settings['rounds']} | {settings.get('batch_size', BATCH)} | {rate:g}"

    for rate, settings in CHOICES:
        found = of(rows, settings=settings, rate=rate)
        held = f"{100 * found[0]['validation_accuracy']:.2f} %" if found else "not run"
        lines.append(f"| {head(rate, settings)} | {held} |")
    title = "| all rows, seeds 0 to 4 | passes of each layer | mini-batch | rate | test accuracy | seconds | of them a pass |"
    lines += ["", title, "| --- " * 7 + "|"]
    for method, rate, settings in _on_all_rows(rows):
        found = of(rows, method=method, rate=rate, settings=settings)
        cells = ["not run"] * 3
        if len(found) == len(SEEDS):
            hits, seconds = [100 * row["test_accuracy"] for row in found], statistics.median(row["seconds"] for row in found)
            accuracy = f"{statistics.mean(hits):.2f} ± {statistics.stdev(hits):.2f} %"
            cells = [accuracy, f"{seconds:.0f}", f"{seconds / settings['rounds']:.1f}"]
        name = {"dante": "DANTE", "sgd": "SGD with momentum"}[method]
        lines.append(f"| {name} | {head(rate, settings)} | {' | '.join(cells)} |")
    return "\n".join(lines)
