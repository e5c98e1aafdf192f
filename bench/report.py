"""The rows: what each field is, the table that is printed, and the JSON and CSV files."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KINDS = ("step", "pass", "quality", "scaling", "against")
STATUSES = ("timed", "wrong result", "not here", "failed", "not reached", "slower", "not slower")
REGIMES = ("latency", "compute", "memory")
# Field: (types, what it is). Every row has every field; None stands where there is nothing to say.
FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "kind": ((str,), "step, pass, quality (time to quality), scaling or against (another commit)"),
    "date": ((str,), "ISO 8601"),
    "commit": (
        (str,),
        "of the package that was measured, with -dirty where files were changed or added, and "
        "-stale-extension where the C++ extension is older than its sources; a version where it is no checkout",
    ),
    "device": ((str,), "name of the processor or GPU"),
    "versions": ((str,), "of Python and of the packages that were measured"),
    "precision": ((str,), "torch.get_float32_matmul_precision()"),
    "threads": ((int, type(None)), "cores and threads on the CPU"),
    "peak": ((float, type(None)), "FLOP/s of the device with so many threads, measured"),
    "bandwidth": ((float, type(None)), "bytes/s of main memory, measured"),
    "net": ((str,), "widths from input to output"),
    "batch": ((int,), "rows in a mini-batch"),
    "rows": ((int,), "of the data"),
    "work": ((str,), "what was done in the time"),
    "cache": ((str,), "warm, or cold where the GPU's L2 was swept before each sample"),
    "method": ((str,), "who did it"),
    "status": ((str,), "timed; or why there is no time"),
    "note": ((str, type(None)), "more of that"),
    "error": ((float, type(None)), "distance from the float64 result, in parts of the way that training went"),
    "rate": ((float, type(None)), "learning rate"),
    "repeats": ((int, type(None)), "samples"),
    "median": ((float, type(None)), "seconds"),
    "p20": ((float, type(None)), "seconds"),
    "p80": ((float, type(None)), "seconds"),
    "spread": ((float, type(None)), "(p80 - p20) / median"),
    "noisy": ((bool, type(None)), "the spread exceeds 15 %"),
    "ratio": (
        (float, type(None)),
        "median over the samples of this method's time over that of dante's operators; against: over the other commit's",
    ),
    "samples_per_second": (
        (float, type(None)),
        "rows of an epoch times the epochs of a round, over the median: a row counts once, not once for each layer's turn",
    ),
    "limit_fraction": (
        (float, type(None)),
        "the least time that the machine would need (limits.py), over the median; above 1 the note says so",
    ),
    "regime": ((str, type(None)), "what bounds this workload: latency, compute or memory"),
    "exponent": ((float, type(None)), "of the cost along an axis, fitted (scaling)"),
}


def environment(device: Any, package: Path) -> Row:
    """The fields that all rows of a process share; `package` is the folder that holds dante_kernels."""
    import torch

    from dante_kernels import cli

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    names = ("torch", "triton", "jax", "scikit-learn", "numpy")
    versions = [f"python {platform.python_version()}", *(f"{name} {v}" for name in names if (v := version(name)))]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_of(package) or version("dante_kernels") or "unknown",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cli._cpu_model(),
        "versions": ", ".join(versions),
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def stale_extension(folder: Path) -> bool:
    """Whether the C++ extension in a checkout was built before a file of its csrc was last written."""
    built = [path.stat().st_mtime for path in (folder / "dante_kernels").glob("_C*.so")]
    sources = [path.stat().st_mtime for path in (folder / "csrc").rglob("*") if path.is_file()]
    return bool(built and sources) and max(built) < max(sources)


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out in a folder, if it is a checkout's top."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.resolve():
            return None
        changed = git("status", "--porcelain", "--", "dante_kernels", "csrc", "bench", "setup.py", ":!bench/results")
        marks = ("-dirty" if changed else "") + ("-stale-extension" if stale_extension(folder) else "")
        return git("rev-parse", "HEAD")[:12] + marks
    except (OSError, subprocess.CalledProcessError):
        return None


def finite(value: Any) -> Any:
    """The same, but None for a number that JSON has no word for: inf and NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def complete(row: Row) -> Row:
    """The row with every field, in order.

    Raises:
        ValueError, TypeError: naming the field that is unknown, of a wrong type or missing beside a time.
    """
    unknown = row.keys() - FIELDS.keys()
    if unknown:
        raise ValueError(f"row: expected the fields of FIELDS, got {sorted(unknown)} too")
    whole = {name: finite(row.get(name)) for name in FIELDS}
    for name, (types, _) in FIELDS.items():
        if not isinstance(whole[name], types) or (isinstance(whole[name], bool) and bool not in types):
            raise TypeError(f"row, {name}: expected {' or '.join(t.__name__ for t in types)}, got {whole[name]!r}")
    for name, known in (("kind", KINDS), ("status", STATUSES), ("regime", (*REGIMES, None))):
        if whole[name] not in known:
            raise ValueError(f"row, {name}: expected one of {known}, got {whole[name]!r}")
    timed = whole["status"] == "timed"
    if timed != (whole["median"] is not None) or timed != (whole["noisy"] is not None):
        raise ValueError(f"row: expected a time where the status is timed and nowhere else, got {whole}")
    return whole


def write(stem: Path, rows: list[Row], curves: list[Row]) -> list[Path]:
    """`stem`.json with rows and curves, and `stem`.csv with the rows; gives their paths."""
    rows = [complete(row) for row in rows]
    stem.parent.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".csv")
    fields = {name: text for name, (_, text) in FIELDS.items()}
    curves = [curve | {"points": [{k: finite(v) for k, v in point.items()} for point in curve["points"]]} for curve in curves]
    results = {"fields": fields, "rows": rows, "curves": curves}
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    put(as_json, json.dumps(results, indent=1, allow_nan=False) + "\n")
    put(as_csv, table.getvalue())
    return [as_json, as_csv]


def put(path: Path, text: str) -> None:
    """Write the file through another one, so that it is there whole, or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", newline="") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def seconds_text(value: float) -> str:
    """With a fitting unit."""
    for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def setting(row: Row) -> str:
    """Where a row comes from, in words."""
    threads = "" if row["threads"] is None else f", {row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{row['device']}, commit {row['commit']}, precision {row['precision']}{threads}"


def show(rows: list[Row]) -> None:
    """Print one table; ratios are the method's time over ours, so above 1 ours is faster."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    titles = list(dict.fromkeys(setting(r) for r in rows))
    table = Table(box=box.SIMPLE, pad_edge=False, title="; ".join(titles), title_justify="left")
    table.add_column("method")
    for title in ("median", "spread", "samples/s", "time / ours", "of the limit", "dante bound by"):
        table.add_column(title, justify="right", no_wrap=True)
    last = None
    for r in rows:
        threads = "" if r["threads"] is None else f", {r['threads']} thread{'s' * (r['threads'] > 1)}"
        cold = ", cold L2" if r["cache"] == "cold" else ""
        head = f"{r['kind']}: {r['net']}, batch {r['batch']}, {r['work']}{threads}{cold}"
        if head != last:
            table.add_section()
            table.add_row(head, style="bold")
        last = head
        if r["status"] != "timed":
            table.add_row(f"  {r['method']}: {r['status']}, {r['note']}", style="dim" if r["status"] == "not here" else "red")
            continue
        table.add_row(
            f"  {r['method']}" + (f" ({r['note']})" if r["note"] else ""),
            seconds_text(r["median"]),
            f"{r['spread']:.0%}{' noisy' if r['noisy'] else ''}",
            "" if r["samples_per_second"] is None else f"{r['samples_per_second']:,.0f}",
            "" if r["ratio"] is None else f"{r['ratio']:.2f}",
            "" if r["limit_fraction"] is None else f"{r['limit_fraction']:.0%}",
            r["regime"] or "",
        )
    console.print(table)
