"""Prove and time the GPU kernels: one command, no arguments, under 8 minutes.

    python bench/gpu_check.py

First all kernels are compiled, by a process for each core (`gpu_compile.py`). Then correctness (`gpu_checks.py`), of each plan
by itself: every operator against the float64 reference on the CPU by the error rule of the tests, equality of a pass with its
steps, 200 repeats bitwise while another stream keeps the device busy; then short blocks and models in one launch, capture and
replay of passes and of short blocks as CUDA graphs, and compute-sanitizer on small cases where it is installed. Then the
numbers that the cost model assumes, measured (`gpu_limits.py`), and timings (`gpu_timings.py`): of a plan only where all of
its checks hold, and none where a check that is not of one plan fails.

Every check is a process of its own with a time limit, some at once: one that hangs, or that breaks its CUDA context, takes no
other one with it. Results go to bench/results/ as JSON with device, versions and commit, written anew after each part, so that
what is there stays where the command is ended. ``--device cpu`` with TRITON_INTERPRET=1 is a rehearsal without a GPU, some
minutes long: a few of the checks, in this process, no timings.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from support import make_problem

from bench import gpu_checks, gpu_compile, gpu_limits, gpu_timings
from bench.gpu_timings import ONE_BARRIER, PLANS, TIMED_PLANS, chosen_plan, moved
from dante_kernels.kernels import plan
from dante_kernels.ops import backends

AT_ONCE = 6  # checks at the same time
CHECK_SECONDS = 150.0  # that one may take
MEASURED = ("limits", "timings", "rounds", "many_models", "compiled_peers")  # the last one ends with the time
SANITIZERS = ("memcheck", "racecheck")
FOUND = 9  # the exit status of a sanitizer that has found something
Row = dict[str, Any]


def check_sanitizer(at: gpu_checks.Setting) -> str:
    """What compute-sanitizer is given: small cases under every plan."""
    for which, case in itertools.product(PLANS, list(gpu_checks.cases(few=True))[::3]):
        with chosen_plan(which):
            gpu_checks.results_of(moved(make_problem(**case), at.device), "triton", 0.9)
    return "clean"


def perform(part: str, which: str, device: torch.device) -> Iterator[Row]:
    """The rows of one part: the outcome of a check, limits, or timings by the plans in `which`."""
    if part == "limits":
        found = gpu_limits.measure(device)
        for name, number in found["device"].items():
            print(f"{name}: assumed {number['assumed']}, measured {number['measured']:.4g}", flush=True)
        yield found
    elif part == "timings":
        yield from gpu_timings.steps(device, which.split(","))
    elif part == "many_models":
        yield from gpu_timings.many_models(device)
    elif part == "compiled_peers":
        yield from gpu_timings.compiled_peers(device)
    elif part == "rounds":
        yield from gpu_timings.rounds(device)
    else:
        at = gpu_checks.Setting(device, which, few=device.type == "cpu")
        try:
            yield {"status": "passed", "what": check_sanitizer(at) if part in SANITIZERS else gpu_checks.make(part, at)}
        except gpu_checks.Skipped as reason:
            yield {"status": "skipped", "what": str(reason)}
        except Exception as error:  # a report of what failed is the point of this script
            traceback.print_exc()
            yield {"status": "failed", "what": f"{type(error).__name__}: {error}"[:2000]}


def in_a_process(part: str, which: str, device: torch.device, seconds: float) -> tuple[list[Row], str]:
    """`perform` in a process of its own: its rows as far as they came, and what went wrong, or nothing."""
    tool: list[str] = []
    if part in SANITIZERS:
        found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if device.type != "cuda" or found is None:
            return [{"status": "skipped", "what": "compute-sanitizer is not available"}], ""
        tool = [found, "--tool", part, "--error-exitcode", str(FOUND)]
    with tempfile.TemporaryDirectory() as folder:
        rows, errors = Path(folder) / "rows", Path(folder) / "errors"
        rows.touch()
        command = [*tool, sys.executable, __file__, "--device", str(device), "--part", part, "--of", which, "--rows", rows]
        with errors.open("w") as stderr:
            process = subprocess.Popen(command, stderr=stderr, start_new_session=True)
            try:
                status = process.wait(max(1.0, seconds))
                wrong = f"exit status {status}: {errors.read_text()[-1500:]}" if status else ""
            except BaseException as reason:
                os.killpg(process.pid, signal.SIGKILL)  # a sanitizer's program, too, which would go on using the GPU
                process.wait()
                if not isinstance(reason, subprocess.TimeoutExpired):
                    raise
                wrong = f"no end after {seconds:.0f} s"
        whole_lines, _, _ = rows.read_text().rpartition("\n")
        return [json.loads(line) for line in whole_lines.splitlines()], wrong


def outcome(part: str, which: str, device: torch.device, seconds: float) -> Row:
    """Make a check, on a GPU in a process of its own; what came of it."""
    begin = time.perf_counter()
    if device.type == "cpu" and part not in SANITIZERS:
        rows, wrong = list(perform(part, which, device)), ""
    else:
        rows, wrong = in_a_process(part, which, device, seconds)
    if wrong:
        # Of a slow tool that was not finished, or one that does not serve this device, nothing is known.
        unknown = part in SANITIZERS and not wrong.startswith(f"exit status {FOUND}:") and not rows
        rows = [{"status": "skipped" if unknown else "failed", "what": wrong}]
    return rows[-1] | {"seconds": round(time.perf_counter() - begin, 1)}


def sound_plans(checks: dict[str, Row]) -> list[str]:
    """The plans that may be timed: those none of whose checks failed, and none at all where a check of no one plan did.

    What is chosen is made of the others' kernels, so it may not be timed where one of them failed; the persistent plan is
    checked where it is chosen, or has one barrier.
    """
    failed = [name for name, row in checks.items() if row["status"] == "failed"]
    of_a_plan = {which: [name for name in failed if name.endswith(f", {which}")] for which in (*PLANS, ONE_BARRIER)}
    if len(failed) > sum(map(len, of_a_plan.values())):
        return []
    sound = {which for which, names in of_a_plan.items() if not names and (which != "auto" or not failed)}
    return [which for which in TIMED_PLANS if which in sound or (which == "persistent" and {"auto", ONE_BARRIER} <= sound)]


def environment(device: torch.device) -> dict[str, str]:
    """What the results belong to."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def run_all(device: torch.device, path: Path, seconds: float) -> bool:
    """All parts within so many seconds, the report written to `path` after each; whether every check held."""
    end = time.perf_counter() + seconds

    def left() -> float:
        return end - time.perf_counter()

    report: dict[str, Any] = {"environment": environment(device), "checks": {}} | {part: [] for part in MEASURED}

    def write() -> None:
        path.write_text(json.dumps(report, indent=1) + "\n")

    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        cores = os.cpu_count() or 1
        report["compiled"] = gpu_compile.compile_all(cores, 10 * major + minor, plan.device_of(device), seconds / 2)
        print(f"compiled: {report['compiled']}", flush=True)
        write()
    parts = [*gpu_checks.names_and_plans(), *((tool, "auto") for tool in SANITIZERS)]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE if device.type == "cuda" else 1) as pool:
        jobs = {
            # Those that wait for a place have the time that is left when they get it.
            pool.submit(lambda part=part, which=which: outcome(part, which, device, min(CHECK_SECONDS, left()))): (part, which)
            for part, which in parts
        }
        for job in concurrent.futures.as_completed(jobs):
            part, which = jobs[job]
            name = f"{part}, {which}" if part in gpu_checks.OF_A_PLAN else part
            report["checks"][name] = row = job.result()
            print(f"{name}: {row['status']} ({row['what']}), {row['seconds']} s", flush=True)
            write()
    sound = sound_plans(report["checks"])
    for part in MEASURED if device.type == "cuda" else ():
        if part != "limits" and (not sound or (part in ("rounds", "many_models") and "auto" not in sound)):
            print(f"no {part}: a speed is not reported while a check fails", file=sys.stderr)
            continue
        report[part], wrong = in_a_process(part, ",".join(sound), device, left())
        if wrong:
            report.setdefault("unfinished", {})[part] = wrong
            print(f"{part}: {wrong}", file=sys.stderr)
        write()
    return all(row["status"] != "failed" for row in report["checks"].values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, then the timings; exit status 0 only where every check held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the results file")
    parser.add_argument("--seconds", type=float, default=460.0, help="after which nothing new is begun (default 460)")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # one part, whose rows go to a file
    parser.add_argument("--of", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    reason = backends.why_not("triton", device, torch.float32)
    if reason is None and device.type == "cuda" and not torch.cuda.is_available():
        reason = "no CUDA device is visible to torch"
    if reason is not None:
        print(f"the triton backend cannot be used: {reason}", file=sys.stderr)
        return 2
    if given.part:
        with given.rows.open("a") as file:
            for row in perform(given.part, given.of, device):
                print(json.dumps(row), file=file, flush=True)
        return 0
    given.output.mkdir(parents=True, exist_ok=True)
    what = environment(device)
    name = what["device"].lower().replace(" ", "-").replace(",", "")
    path = given.output / f"gpu-check-{name}-{what['date']}.json"
    passed = run_all(device, path, given.seconds)
    print(f"results: {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
