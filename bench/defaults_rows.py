"""The rows behind docs/defaults.md, one for each training, and the best rate among them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "results" / "defaults.jsonl"
NAMES = ("data", "net", "activation", "loss", "method", "rate", "seed", "settings")  # what tells trainings apart
Row = dict[str, Any]


def case(*values: Any, **settings: Any) -> Row:
    """A training that is still to be made: the values of `NAMES` but the last, and what is changed."""
    return dict(zip(NAMES, (*values, settings), strict=True))


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
