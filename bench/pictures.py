"""The pictures of measured rows and curves, as PNG and SVG: times over ours, and loss against weights updated and seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import report

Row = dict[str, Any]
# Colours of the bars by the first words of a method's name.
COLOURS = {
    "dante": "#0072B2",
    "dk.fit": "#0072B2",
    "JAX": "#D55E00",
    "torch": "#555555",
    "scikit": "#CC79A7",
    "CUDA": "#009E73",
}
DASHES = ("-", "--", ":", "-.")  # of the methods of a family, one after the other, and then again with the next marker
MARKERS = ("", "o", "s")


def colour(method: str) -> str:
    """Of the first word that COLOURS has."""
    return next((c for start, c in COLOURS.items() if method.startswith(start)), "#555555")


def draw(results: Row, folder: Path) -> Iterator[Path]:
    """Draw what the results have rows or curves for; gives the files' paths."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: small files
    matplotlib.rcParams["svg.hashsalt"] = "dante"  # the same results give the same file
    timed = [r for r in results["rows"] if r["status"] == "timed" and r["kind"] == "pass" and r["ratio"] is not None]
    figures = {}
    if timed:
        figures["bench-ratio"] = ratios(timed)
    if results["curves"]:
        quality = [r for r in results["rows"] if r["kind"] == "quality"]
        figures["bench-loss"] = losses(results["curves"], footer(quality))
    if not figures:
        raise SystemExit("dante bench: no pass and no curve to draw; measure pass or quality")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            figure.savefig(path, dpi=80, metadata={"Date": None} if suffix == "svg" else None)
            yield path


def footer(rows: list[Row]) -> str:
    """Where these rows come from."""
    settings = "; ".join(dict.fromkeys(report.setting(r) for r in rows))
    return f"{settings}; {rows[0]['date'][:10]}"


def ratios(rows: list[Row]) -> Any:
    """Bars of each method's time over ours, one panel a workload."""
    from matplotlib.figure import Figure

    groups: dict[str, list[Row]] = {}
    for r in rows:
        threads = f", {r['threads']} thread{'s' * (r['threads'] > 1)}" if r["threads"] else ""
        groups.setdefault(f"{r['net']}, batch {r['batch']}\n{r['work']}{threads}", []).append(r)
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    most = max(map(len, groups.values()))
    figure = Figure(figsize=(4.2 * columns, 0.9 + lines * (0.8 + 0.22 * most)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, (title, group) in zip(axes, groups.items(), strict=False):
        names = [r["method"] + (" (noisy)" if r["noisy"] else "") for r in group]
        values = [r["ratio"] for r in group]
        bars = axis.barh(names, values, color=[colour(r["method"]) for r in group])
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 1.15 * max(values))
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    for axis in list(figure.axes)[len(groups) :]:
        axis.remove()
    figure.supxlabel(f"time over that of dante's operators\n(above 1: dante is faster); {footer(rows)}", fontsize=8)
    return figure


def losses(curves: list[Row], where: str) -> Any:
    """Test loss against weights updated, as the papers plot it, and against seconds; not of scikit-learn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    first = {c["family"]: c for c in reversed(curves) if c["family"] != "mlp"}  # one line a family: they update alike
    for i, c in enumerate(reversed(first.values())):
        style = {"label": f"{c['family']}, rate {c['rate']:g}", "color": f"C{i}"}
        left.plot([p["weights_updated"] / 1e6 for p in c["points"]], [p["loss"] for p in c["points"]], **style)
    for place, family in enumerate(reversed(first)):
        for i, c in enumerate(c for c in curves if c["family"] == family):
            marker = MARKERS[i // len(DASHES) % len(MARKERS)]
            style = {"label": c["method"], "color": f"C{place}", "linestyle": DASHES[i % len(DASHES)], "marker": marker}
            points = [p["seconds"] for p in c["points"]], [p["loss"] for p in c["points"]]
            right.plot(*points, **style, linewidth=1.2, markersize=3)
    left.set(xlabel="weights updated, in millions, each change counted", ylabel="test loss (MSE)", yscale="log")
    right.set(xlabel="seconds of training", xscale="log")
    left.legend(fontsize=7)
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{curves[0]['data']}, {curves[0]['net']}, each family at its best rate, first seed", fontsize=10)
    figure.supxlabel(where, fontsize=8)
    return figure
