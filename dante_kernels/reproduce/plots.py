"""The pictures of an experiment, from its summary: curves against weights updated, loss against width, reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from ..data import require
from . import probes
from .runs import Row

# As in the papers DANTE is blue and SGD green; others take the colours that are left, in order.
COLOURS = {"dante": "#0072B2", "dante-short": "#56B4E9", "sgd": "#117733", "sgd-cosine": "#88CC66"}
OTHERS = ("#D55E00", "#CC79A7", "#E69F00", "#555555", "#882255", "#44AA99", "#999933", "#AA4499", "#332288", "#000000")
PANELS = ((2, "training loss"), (4, "test accuracy"), (3, "test loss"))  # places in a curve's points


def ready() -> Any:
    """matplotlib.

    Raises:
        MissingExtraError: where it is not installed.
    """
    return require("matplotlib", "bench", "drawing the pictures")


def draw(summary: Row, folder: Path) -> Path | None:
    """Draw what the summary has a picture for, as NAME.png in the folder; None where nothing was trained.

    Raises:
        MissingExtraError: where matplotlib is not installed.
    """
    cases = [case for case in summary["cases"] if case["methods"] and not case["speed_only"]]
    if summary["picture"] is None or not cases:
        return None
    ready().use("Agg")
    figure = _KINDS[summary["picture"]](cases)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{summary['name']}.png"
    figure.savefig(path, dpi=65, metadata={"Software": None})
    return path


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    plt = require("matplotlib.figure", "bench", "drawing the pictures")
    figure = plt.Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _colours(cases: list[Row]) -> dict[str, str]:
    """A colour for each method."""
    names = dict.fromkeys(method["method"] for case in cases for method in case["methods"])
    others = cycle(OTHERS)
    return {name: COLOURS.get(name) or next(others) for name in names}


def _curves(cases: list[Row]) -> Any:
    """A row of panels for each case, a line for each method's first seed."""
    panels = [p for p in PANELS if any(point[p[0]] is not None for c in cases for m in c["methods"] for point in m["curve"])]
    figure, axes = _figure(len(cases), max(1, len(panels)), (3.6, 2.3))
    colours = _colours(cases)
    for case, row in zip(cases, axes, strict=True):
        for (place, title), axis in zip(panels, row, strict=False):
            for method in case["methods"]:
                points = [(p[0], p[place]) for p in method["curve"] if p[place] is not None]
                if points:
                    axis.plot(
                        *zip(*points, strict=True), ".-", markersize=3, color=colours[method["method"]], label=method["method"]
                    )
            axis.set_title(f"{case['title']} {case['net']}: {title}", fontsize=7)
            axis.set_yscale("linear" if place == 4 else "log")
            axis.tick_params(labelsize=6, which="both")
            axis.set_xlabel("weights updated", fontsize=6)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7)
    return figure


def _widths(cases: list[Row]) -> Any:
    """Final test loss against the number of hidden units, with the spread over the seeds."""
    figure, axes = _figure(1, 1, (5, 3.4))
    axis = axes[0][0]
    for name, colour in _colours(cases).items():
        found = [(case, m) for case in cases for m in case["methods"] if m["method"] == name and m["status"] == "done"]
        units = [int(case["net"].split("-")[1]) for case, _ in found]
        losses = [m["mean"]["test_loss"] for _, m in found]
        axis.errorbar(units, losses, [m["spread"]["test_loss"] or 0 for _, m in found], fmt="o-", color=colour, label=name)
    axis.set_xscale("log")
    axis.set_xlabel("hidden units")
    axis.set_ylabel("test loss")
    axis.legend()
    return figure


def _reconstructions(cases: list[Row]) -> Any:
    """The test pictures, and below what each method's net makes of them."""
    found = [method for case in cases for method in case["methods"] if method["pictures"]]
    if not found:
        return _curves(cases)
    rows = [("original", found[0]["pictures"]["originals"])]
    rows += [(method["method"], method["pictures"]["reconstructions"]) for method in found]
    figure, axes = _figure(len(rows), len(rows[0][1]), (0.8, 0.85))
    for (name, pictures), line in zip(rows, axes, strict=True):
        for text, axis in zip(pictures, line, strict=True):
            pixels = probes.pixels_of(text)
            side = round(len(pixels) ** 0.5)
            axis.imshow([pixels[i * side : (i + 1) * side] for i in range(side)], cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", fontsize=8)
    return figure


_KINDS: dict[str, Callable[[list[Row]], Any]] = {"curves": _curves, "widths": _widths, "reconstructions": _reconstructions}
