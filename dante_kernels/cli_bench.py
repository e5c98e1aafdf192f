"""The command `dante bench`: hands over to `bench/`, which is part of a checkout and not of the installed package."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

with contextlib.suppress(ImportError):  # `cli.main` says what to install
    import typer

# Every option is for the benchmarks to read, --help too.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(context: typer.Context) -> None:
    """Time this package against its peers; from a checkout. dante bench --help says how."""
    try:
        raise SystemExit(run(context.args))
    except KeyboardInterrupt:
        print("dante: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def run(arguments: list[str]) -> int:
    """Run the benchmarks beside this package, or else those of the working directory, on this package; the exit status."""
    places = (Path(__file__).resolve().parents[1], Path.cwd())
    folder = next((place for place in places if (place / "bench" / "app.py").is_file()), None)
    if folder is None:
        text = "the benchmarks are part of a checkout of dante_kernels, not of the installed package; go to its top folder"
        print(f"dante: bench: {text} and run dante bench there", file=sys.stderr)
        return 1
    sys.path.insert(0, str(folder))
    status: int = importlib.import_module("bench.app").main(arguments)
    return status
