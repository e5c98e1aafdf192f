"""Time this package against its peers: steps, passes, time to quality, scaling, and one commit against another.

Kinds: step (one mini-batch), pass (a round of DANTE against as many weights updated by SGD and its kin), quality (seconds to
a test accuracy, each at its best rate of a stated grid). Each method's result is compared with a float64 run before it is
timed; all are timed in one process, in turn, warm, with the data on the device. One table is printed, and rows go to
OUTPUT/bench-*.json and .csv. Ratios are a method's time over that of dante's operators.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .process import child, measure_here, texts_of

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
KINDS = ("step", "pass", "quality")
DATA = ("digits", "mnist", "fashion-mnist", "kmnist")
PRECISIONS = ("highest", "high", "medium")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dante bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kinds", nargs="*", metavar="KIND", help="step, pass, quality; step and pass where none is named")
    p.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, few repeats and a low target, to see that all of it works; no torch.compile",
    )
    p.add_argument("--scaling", action="store_true", help="cost against width, mini-batch, depth and rows, instead of kinds")
    p.add_argument("--against", metavar="COMMIT", help="compare with that commit, instead of with peers; status 1 where slower")
    p.add_argument("--plot", type=Path, metavar="FILE", help="only draw the pictures of a JSON file, into --pictures")
    p.add_argument("--pictures", type=Path, metavar="DIR", help="draw pictures of pass and quality there, PNG and SVG")
    p.add_argument("--output", type=Path, metavar="DIR", default=ROOT / "bench" / "results", help="default: bench/results")
    p.add_argument("--methods", metavar="TEXT", help="only methods with one of these texts, separated by ;, and dante")
    p.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu or cuda")
    p.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="on the CPU: processes bound to so many cores; default 1"
    )
    p.add_argument("--isa", choices=("avx512", "avx2", "generic"), help="instruction set of the C++ kernels")
    p.add_argument("--precision", choices=PRECISIONS, default="highest", help="torch's float32_matmul_precision")
    p.add_argument("--rows", type=int, default=6000, help="rows of a pass; a quarter of it for wide nets")
    p.add_argument("--repeats", type=int, default=9, help="samples of each row; seeds of a time to quality")
    p.add_argument("--data", choices=DATA, default="digits", help="for quality; default digits")
    p.add_argument("--data-dir", type=Path, help="directory of its IDX files")
    p.add_argument("--rounds", type=int, default=15, help="for quality: rounds at most")
    p.add_argument("--target", type=float, help="for quality: the test accuracy, such as 0.97; default by data set")
    p.add_argument("--child", help=argparse.SUPPRESS)  # settings of a measuring process, as JSON
    return p


def main(arguments: list[str]) -> int:
    """Run the command; the exit status. Status 1: a row is wrong or failed, or slower than --against's commit."""
    with signals_end_it():
        try:
            return run(arguments)
        except BrokenPipeError:  # nobody reads on; Python itself would complain once more while it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1


@contextmanager
def signals_end_it() -> Iterator[None]:
    """SIGTERM and SIGHUP are a SystemExit, so that what was measured is written and nothing is left behind; not under nohup."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread()  # elsewhere Python sets no handlers
    heeded = [n for n in (signal.SIGTERM, signal.SIGHUP) if here and signal.getsignal(n) != signal.SIG_IGN]
    old = {number: signal.signal(number, end) for number in heeded}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run(arguments: list[str]) -> int:
    """`main`, without care for how it ends."""
    p = parser()
    a = p.parse_args(arguments)
    if a.child:
        return measure_here(json.loads(a.child))
    from . import report, workloads

    unknown = [kind for kind in a.kinds if kind not in KINDS]
    if unknown:
        p.error(f"KIND: expected step, pass or quality, got {unknown[0]!r}")
    ignored = [f"--{name}" for name in ("pictures", "methods", "data_dir", "target") if getattr(a, name) is not None]
    ignored += ["--threads with more than one number"] * (len(a.threads) > 1)
    if a.against and ignored:
        p.error(f"--against: does not go with {', '.join(ignored).replace('_', '-')}")
    if bool(a.kinds) + a.scaling + bool(a.against) + bool(a.plot) > 1:
        p.error("expected kinds, --scaling, --against or --plot, got more than one of them")
    if a.pictures and importlib.util.find_spec("matplotlib") is None:
        p.error('--pictures: needs matplotlib: pip install "dante_kernels[bench]"')
    if a.pictures and (a.scaling or a.kinds == ["step"]):
        p.error("--pictures: expected pass or quality among what is measured, which they are of")
    if a.plot:
        if not a.pictures:
            p.error("--plot: goes with --pictures DIR")
        try:
            results = json.loads(a.plot.read_text())
            rows, curves = [report.complete(row) for row in results["rows"]], results["curves"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            p.error(f"--plot: expected a JSON file of these benchmarks, got {str(a.plot)!r}: {error}")
        return draw({"rows": rows, "curves": curves}, a.pictures)
    if a.repeats < 2:
        p.error(f"--repeats: expected at least 2, got {a.repeats}")
    if a.target is not None and not 0 < a.target <= 1:
        p.error(f"--target: expected an accuracy above 0 and at most 1, such as 0.97, got {a.target:g}")
    if a.rows < 1 or a.rounds < 1:
        p.error("--rows, --rounds: expected at least 1")
    strangers = [text for text in texts_of(a.methods) if not any(text in name for name in workloads.METHODS)]
    if strangers:
        p.error(f"--methods: expected parts of {'; '.join(workloads.METHODS)}; got {strangers[0]!r}")
    runs = [settings_of(a, threads) for threads in thread_counts(p, a)]
    if a.isa:
        os.environ["DANTE_CPU_ISA"] = a.isa
    for name in ("output", "pictures"):
        try_to_write(p, name, getattr(a, name))
    if a.against:
        return against_commit(a.against, runs[0], a.output)
    return with_peers(a, runs)


def try_to_write(p: argparse.ArgumentParser, name: str, folder: Path | None) -> None:
    """Make the folder and a file in it, before anything is measured for it."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        p.error(f"--{name}: expected a folder to write to, got {str(folder)!r}: {error}")


def thread_counts(p: argparse.ArgumentParser, a: argparse.Namespace) -> list[int | None]:
    """One run for each: numbers of cores, or one run on a GPU. Settles a.device."""
    import torch

    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.device.split(":")[0] not in ("cpu", "cuda"):
        p.error(f"--device: expected auto, cpu or cuda, got {a.device!r}")
    if a.device.startswith("cuda"):
        if not torch.cuda.is_available():
            p.error(f"--device: got {a.device!r}, but torch sees no CUDA device")
        return [None]
    if not hasattr(os, "sched_setaffinity"):
        p.error("on the CPU this binds processes to cores, which it can only do on Linux")
    cores = len(os.sched_getaffinity(0))
    if not all(1 <= threads <= cores for threads in a.threads):
        p.error(f"--threads: expected 1 to {cores}, as many as there are cores, got {a.threads}")
    return list(a.threads)


def settings_of(a: argparse.Namespace, threads: int | None) -> Row:
    """What a measuring process is told."""
    kinds = ["scaling"] if a.scaling else (a.kinds or ["step", "pass"])
    quick = {"rows": min(a.rows, 200), "repeats": 3, "rounds": 2, "target": 0.2} if a.quick else {}
    names = ("quick", "device", "isa", "precision", "rows", "repeats", "methods", "data", "rounds", "target")
    settings = {name: getattr(a, name) for name in names}
    return {"mode": "rows", "kinds": kinds, "threads": threads, "data_dir": a.data_dir and str(a.data_dir), **settings, **quick}


def with_peers(a: argparse.Namespace, runs: list[Row]) -> int:
    """Measure, print, write and draw."""
    from . import report, scaling, workloads

    latest: dict[tuple[Any, ...], Row] = {}  # a time to quality comes again after each seed
    drawn: dict[tuple[int, str], Row] = {}
    try:
        for number, settings in enumerate(runs):
            for message in child(settings):
                if "row" not in message:
                    drawn[number, message["curve"]["method"]] = message["curve"]
                    continue
                row = report.complete(message["row"])
                key = number, *(row[name] for name in ("kind", "net", "batch", "rows", "work", "cache", "method"))
                before = latest.get(key)
                latest[key] = row
                if before is None or before["status"] != row["status"]:
                    print(f"{row['kind']} {row['net']} batch {row['batch']}: {row['method']}: {row['status']}", file=sys.stderr)
    finally:  # what was measured before a failure or Ctrl-C is kept, first of all in files
        rows, curves = list(latest.values()), list(drawn.values())
        scaling.add_exponents(rows, a.quick)
        if rows:
            paths = write(a.output, "-".join(runs[0]["kinds"]), rows, curves, a.quick)
            if importlib.util.find_spec("rich") is None:
                print('dante bench: no table without rich: pip install "dante_kernels[bench]"', file=sys.stderr)
            else:
                report.show(rows)
            print(*paths, sep="\n", flush=True)
    if a.pictures:
        draw({"rows": rows, "curves": curves}, a.pictures)
    complaints = [f"{r['method']}: {r['status']}: {r['note']}" for r in rows if r["status"] in ("wrong result", "failed")]
    complaints += scaling.superlinear(rows)
    if not any(r["method"] == workloads.OURS and r["status"] in ("timed", "not reached") for r in rows):
        complaints.append(f"{workloads.OURS} itself could not be measured")
    for complaint in complaints:
        print(f"dante bench: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def write(folder: Path, what: str, rows: list[Row], curves: list[Row], quick: bool) -> list[Path]:
    """Write the rows to files of a name of their own; gives their paths."""
    from . import report

    about = (what, rows[0]["device"].lower(), rows[0]["date"][:19].replace(":", ""), rows[0]["commit"], *["quick"] * quick)
    stem = folder / re.sub(r"[^\w.]+", "-", "-".join(("bench", *about)))
    return report.write(stem, rows, curves)


def draw(results: Row, folder: Path) -> int:
    """The pictures of these rows and curves."""
    from . import pictures

    for path in pictures.draw(results, folder):
        print(path)
    return 0


def against_commit(commit: str, settings: Row, output: Path) -> int:
    """Print each workload's verdict and write it; 1 where one is slower, 2 where not all could be measured."""
    import dante_kernels

    from . import against, report

    head = Path(dante_kernels.__file__).resolve().parent.parent
    verdicts: list[Any] = []
    base_commit = commit
    try:
        with against.checkout(commit, head) as base:
            base_commit = report.commit_of(base) or commit
            for so_far in against.compare({"base": base, "head": head}, settings, settings["repeats"]):
                verdicts = so_far
    except (ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"dante bench: {error}", file=sys.stderr)
        return 2
    finally:
        if verdicts:
            show_verdicts(verdicts, settings, output, head, commit, base_commit)
    return int(any(v.slower for *_, v in verdicts))


def show_verdicts(verdicts: list[Any], settings: Row, output: Path, head: Path, commit: str, base_commit: str) -> None:
    """Write and print them."""
    import torch

    from . import against, report

    shared = report.environment(torch.device(settings["device"]), head)
    shared |= {"threads": settings["threads"], "precision": settings["precision"]}
    paths = write(output, "against", against.rows_of(verdicts, shared, base_commit), [], settings["quick"])
    print(f"time of {shared['commit']} over that of {base_commit} ({commit}): median, 95 % interval; {report.setting(shared)}")
    for kind, w, v in verdicts:
        name = f"{kind}: {w.net}, batch {w.batch}, {'one step' if kind == 'step' else w.what}"
        print(f"{v.ratio:6.3f}  {v.low:.3f} to {v.high:.3f}  {name}{'  SLOWER' if v.slower else ''}{against.once(v)}")
    print(*paths, sep="\n", flush=True)
