"""Seconds to a test accuracy on a GPU, by the cost model: passes are counted on the CPU, a step's time is modelled.

``python -m bench.gpu_seconds --data-dir DIR`` trains on MNIST, whose files DIR has, what bench/results/passes.jsonl has no row
of yet (some half an hour on one core for all), and prints the table of docs/plans.md; ``--table`` only prints. Each training
has a cosine of its own length: so the passes that a method needs are those of its shortest training that comes to the accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dante_kernels as dk
from dante_kernels import data
from dante_kernels.kernels import cost, plan
from dante_kernels.reproduce import runs
from dante_kernels.reproduce.problems import Problem

from .defaults_rows import IN_PARALLEL, in_turn

Row = dict[str, Any]
ROWS = Path(__file__).parent / "results" / "passes.jsonl"
TARGETS = {"784-100-10": 0.98, "784-400-200-100-10": 0.985}
BATCH, SAMPLES = 100, 60_000
PASSES = (4, 6, 8, 10, 12, 16)
SEEDS = range(3)
NAMES = {"dante": "DANTE", "parallel": "DANTE in parallel", "sgd": "SGD with momentum"}
NAMES |= {"mse": "MSE", "cross_entropy": "cross-entropy"}
# Methods, their loss and rate: DANTE with what `fit` takes, in blocks of 20 in turn and in those that it takes for classes; SGD
# with momentum at its best rate of the study of the defaults (docs/defaults.md).
WAYS = {
    "784-100-10": (
        ("dante", "mse", None),
        ("dante", "cross_entropy", None),
        ("parallel", "mse", None),
        ("parallel", "cross_entropy", None),
        ("sgd", "mse", 1.0),
        ("sgd", "cross_entropy", 0.1),
    ),
    "784-400-200-100-10": (
        ("dante", "mse", None),
        ("parallel", "mse", None),
        ("sgd", "mse", 1.0),
        ("sgd", "cross_entropy", 0.03),
    ),
}
BLOCKS = {"dante": {"inner_steps": 20}, "parallel": IN_PARALLEL}


def accuracies(rows: list[Row], net: str, way: tuple, passes: int) -> list[float]:
    """Test accuracies of a training's seeds, as far as there are rows."""
    wanted = [net, *way, passes]
    return [row["test_accuracy"] for row in rows if [row[k] for k in ("net", "method", "loss", "rate", "passes")] == wanted]


def enough(rows: list[Row], net: str, way: tuple) -> int | None:
    """The fewest passes after which the seeds' mean accuracy is the target; None where no training comes to it."""
    for passes in PASSES:
        found = accuracies(rows, net, way, passes)
        if len(found) == len(SEEDS) and statistics.mean(found) >= TARGETS[net]:
            return passes
    return None


def train(net: str, way: tuple, passes: int, seed: int, split: data.Dataset) -> Row:
    """A training's row."""
    method, loss, rate = way
    widths = tuple(int(width) for width in net.split("-"))
    if method == "sgd":
        problem = Problem("mnist", split.x_train, split.y_train, split.x_test, split.y_test)
        found = runs.train(problem, widths, "leaky_relu", loss, "sgd-cosine", rate, seed, passes, batch_size=BATCH)
        accuracy = found["test_accuracy"]
    else:
        model = runs.build(widths, "leaky_relu", "leaky_relu" if loss == "mse" else "identity", seed)
        lr, settings = in_turn(net, "leaky_relu", loss)
        blocks = dk.RoundRobin(rounds=passes, inner_epochs=1, **BLOCKS[method])
        steps = {"lr": lr, "relative_lr": True, "momentum": 0.9, "batch_size": BATCH, "seed": seed}
        dk.fit(model, split.x_train, split.y_train, loss=loss, schedule=blocks, **steps, **settings)
        _, accuracy = runs.evaluate(model, split.x_test, split.y_test, loss)
    return {"net": net, "method": method, "loss": loss, "rate": rate, "passes": passes, "seed": seed, "test_accuracy": accuracy}


def missing(rows: list[Row], nets: list[str]) -> Iterator[tuple[str, tuple, int, int]]:
    """What is still to be trained: of every method longer and longer trainings, until one comes to the accuracy."""
    for net in nets:
        for way in WAYS[net]:
            for passes in PASSES:
                if enough(rows, net, way) is not None:
                    break
                for seed in SEEDS[len(accuracies(rows, net, way, passes)) :]:
                    yield net, way, passes, seed


def microseconds(net: str, method: str, precision: str) -> float:
    """What a mini-batch takes by the model: a step of each layer with its part of a block, or a plain step of SGD."""
    widths = tuple(int(width) for width in net.split("-"))
    shapes = [plan.Shape(widths[i:], BATCH, momentum=True, precision=precision) for i in range(len(widths) - 1)]
    if method == "sgd":
        return cost.plain(shapes[0], plan.H200).microseconds
    block = BLOCKS[method]["inner_steps"]
    whole = plan.blocks(shapes[0], block, plan.H200.multiprocessors)
    if whole is not None:  # a round is one launch
        return len(shapes) * whole.microseconds
    steps = [plan.choose(shape, plan.H200, plan.H200.multiprocessors).microseconds for shape in shapes]
    return sum(steps) + len(steps) * cost.block(shapes[0], block, plan.H200) / block


def table(rows: list[Row]) -> str:
    """What each method needs for each net, or how far its longest training came."""
    head = "| net, test accuracy | method | passes | test accuracy reached | ms, highest | ms, high |"
    lines = [head, "| --- " * 6 + "|"]
    for net, target in TARGETS.items():
        for way in WAYS[net]:
            needed = enough(rows, net, way)
            hits = [100 * hit for hit in accuracies(rows, net, way, needed or PASSES[-1])]
            name = f"{NAMES[way[0]]}, {NAMES[way[1]]}"
            name += f", {way[2]:g}" if way[2] else ""
            times = [
                f"{'' if needed else '> '}{(needed or PASSES[-1]) * SAMPLES // BATCH * microseconds(net, way[0], p) / 1000:.0f}"
                for p in ("highest", "high")
            ]
            reached = f"{statistics.mean(hits):.2f} ± {statistics.stdev(hits):.2f} %" if len(hits) > 1 else "not run"
            count = str(needed) if needed else f"> {PASSES[-1]}"
            lines.append(f"| {net}, {100 * target:g} % | {name} | {count} | {reached} | {' | '.join(times)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--net", choices=list(TARGETS), action="append", help="only this net")
    parser.add_argument("--table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    rows = read()
    if not arguments.table:
        split = data.load("mnist", arguments.data_dir)
        for job in missing(rows, arguments.net or list(TARGETS)):
            row = train(*job, split)
            rows.append(row)
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows))


def read() -> list[Row]:
    """The rows that are there."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


if __name__ == "__main__":
    main()
