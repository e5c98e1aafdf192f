"""One setting changed at a time in blocks of 20 steps, one layer after the other, on small nets over three seeds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

from .defaults_rows import Row, case, in_turn, of

SEEDS = range(3)
SIGMOID = (0.003, {"direction": "nesterov"})  # for either loss, without a bound, which the table is the reason for
GRIDS = [
    *itertools.product(
        ("mnist", "fashion-mnist"),
        ("784-100-10", "784-100-100-10"),
        ("leaky_relu", "sigmoid"),
        ("mse", "cross_entropy"),
    )
]


def changes(net: str, activation: str, loss: str) -> dict[str, tuple[float, Row]]:
    """Rate and settings by what the table calls them; nothing changed comes first."""
    rate, settings = in_turn(net, activation, loss) if activation == "leaky_relu" else SIGMOID
    heavy_ball = {name: value for name, value in settings.items() if name != "direction"}
    made = {
        "nothing": (rate, settings),
        "rate times 0.7": (round(0.7 * rate, 4), settings),
        "rate times 1.4": (round(1.4 * rate, 4), settings),
        "blocks of 5": (rate, settings | {"inner_steps": 5}),
        "blocks of 60": (rate, settings | {"inner_steps": 60}),
        "blocks of a pass": (rate, settings | {"inner_steps": 500}),
        "output layer first": (rate, settings | {"order": "output first"}),
        "heavy ball": (rate, heavy_ball),
        "momentum from zero in each block": (rate, settings | {"reset_momentum": True}),
        "no momentum, rate times 6": (round(6 * rate, 4), heavy_ball | {"momentum": 0.0}),
        "first round at 0.3 of the rate": (rate, settings | {"lr_schedule": "warm-up"}),
        "growing mini-batches": (rate, settings | {"batches": "growing"}),
        "He's initial weights": (rate, settings | {"initialisation": "He"}),
        "orthogonal initial weights": (rate, settings | {"initialisation": "orthogonal"}),
    }
    if "max_norm" in settings:
        unbounded = {name: value for name, value in settings.items() if name != "max_norm"}
        parts = {"half of the bound": 0.5, "twice the bound": 2}
        made |= {"no bound": (rate, unbounded)}
        made |= {name: (rate, settings | {"max_norm": part * settings["max_norm"]}) for name, part in parts.items()}
    return made


def cases() -> Iterator[Row]:
    """All trainings."""
    for grid in GRIDS:
        yield from (case(*grid, "dante", r, seed, **s) for seed in SEEDS for r, s in changes(*grid[1:]).values())


def tables(rows: list[Row]) -> str:
    """Of each activation: the test loss with nothing changed, and how many times that it is with each change; means."""
    made = []
    for activation in ("leaky_relu", "sigmoid"):
        grids = [grid for grid in GRIDS if grid[2] == activation]
        titles = [f"{data}, {loss}, {net}" for data, net, _, loss in grids]
        lines = [f"| {activation}: changed | {' | '.join(titles)} |", "| --- " * (len(grids) + 1) + "|"]
        usuals = [_losses(rows, grid, "nothing") for grid in grids]
        shown = [f"{statistics.mean(v):.4f} ± {100 * statistics.stdev(v) / statistics.mean(v):.0f} %" for v in usuals]
        lines.append(f"| nothing | {' | '.join(shown)} |")
        for name in [*changes("784-100-10", activation, "mse")][1:]:
            changed = [_losses(rows, grid, name) for grid in grids]
            ratios = [statistics.mean(v) / statistics.mean(own) for v, own in zip(changed, usuals, strict=True)]
            lines.append(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
        made.append("\n".join(lines))
    return "\n\n".join(made)


def _losses(rows: list[Row], grid: tuple[str, str, str, str], name: str) -> list[float]:
    """The test losses of the seeds."""
    data, net, activation, loss = grid
    rate, settings = changes(net, activation, loss)[name]
    same = {"data": data, "net": net, "activation": activation, "loss": loss, "method": "dante", "rate": rate}
    return [row["test_loss"] for row in of(rows, **same, settings=settings) if row["seed"] in SEEDS]
