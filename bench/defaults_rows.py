"""The rows behind docs/defaults.md, one for each training, and the best rate among them."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from dante_kernels import activations
from dante_kernels.training import directions
from dante_kernels.training.schedules import INNER_STEPS

ROWS = Path(__file__).parent / "results" / "defaults.jsonl"
NAMES = ("data", "net", "activation", "loss", "method", "rate", "seed", "settings")  # what tells trainings apart
Row = dict[str, Any]
IN_PARALLEL: Row = {"inner_steps": INNER_STEPS, "parallel": True}


def case(*values: Any, **settings: Any) -> Row:
    """A training that is still to be made: the values of `NAMES` but the last, and what is changed."""
    return dict(zip(NAMES, (*values, settings), strict=True))


def usual(net: str, activation: str, loss: str) -> tuple[float, Row]:
    """The rate and the settings that `dk.fit` takes for classes where nothing is given."""
    rate, settings = in_turn(net, activation, loss)
    return rate, settings | IN_PARALLEL


def in_turn(net: str, activation: str, loss: str) -> tuple[float, Row]:
    """The same in blocks of 20, one layer after the other."""
    hidden = [(int(width), activations.NAMES[activation]) for width in net.split("-")[1:-1]]
    bound = directions.usual_max_norm(hidden, loss, classes=True)
    rate = directions.usual_lr(hidden, loss)
    return rate, {"direction": "nesterov"} | ({"max_norm": bound} if math.isfinite(bound) else {})


def read() -> list[Row]:
    """The rows that are there."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def key(row: Row) -> str:
    """The same for the same training."""
    return json.dumps([row[name] for name in NAMES])


def of(rows: list[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def best(rows: list[Row], otherwise: float) -> float:
    """The rate of the least validation loss, averaged over those seeds that every rate has."""
    by_rate = {rate: of(rows, rate=rate) for rate in {row["rate"] for row in rows}}
    most = max((len(found) for found in by_rate.values()), default=0)
    whole = {
        rate: statistics.mean(row["validation_loss"] for row in found)
        for rate, found in by_rate.items()
        if len(found) == most and all(row["validation_loss"] is not None for row in found)
    }
    return min(whole, key=lambda rate: whole[rate], default=otherwise)
