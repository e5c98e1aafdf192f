"""Two commits of this package against each other: the same harness runs both, each in processes of its own, in turn.

A workload is slower where the median of the paired ratios is above 1.05 and the 95 % interval of that median above 1, and
where this is seen again when it is measured a second time. Processes are started anew several times, since where memory
comes to lie can alone make a difference of several percent that no repetition in one process would show.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import measure, report, workloads
from .workloads import OURS, Workload

ROOT = Path(__file__).resolve().parent.parent
SLOWER = 1.05
STARTS = 3  # how often both sides' processes are started anew


class Verdict(NamedTuple):
    """New time over old time: the median over the pairs, its 95 % interval, and whether that is slower beyond noise.

    `looks` is how often it was measured: what is slower and was looked at once is not yet known to be.
    """

    pairs: int
    ratio: float
    low: float
    high: float
    slower: bool
    looks: int = 1


def judge(pairs: list[float], looks: int = 1) -> Verdict:
    """The verdict on paired ratios; the interval is the sign test's, free of any assumption on how noise is distributed."""
    ordered, n = sorted(pairs), len(pairs)
    left, tail = 0, 0.5**n
    while left < n // 2 and tail <= 0.025:  # P(Binomial(n, 1/2) <= left) <= 2.5 %
        left += 1
        tail += math.comb(n, left) * 0.5**n
    low, high = (ordered[left - 1], ordered[n - left]) if left else (0.0, math.inf)
    ratio = statistics.median(ordered)
    return Verdict(n, ratio, low, high, ratio > SLOWER and low > 1, looks)


class Side:
    """A process that measures the package in a folder, one sample for each request."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        command = [sys.executable, str(ROOT / "bench" / "__main__.py"), "--child", json.dumps(settings | {"mode": "serve"})]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        expected = {"bench": str(ROOT), "dante_kernels": str(folder.resolve())}  # one harness for both sides
        served = self.ask("places")
        if served != expected:
            self.close()
            raise RuntimeError(f"--against: expected the packages {expected}, got {served}")

    def ask(self, *request: Any) -> Any:
        """The answer of `serve`; RuntimeError where the process says what is wrong, or is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the measuring process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def cases(quick: bool, rows: int, device: torch.device) -> list[tuple[str, Workload]]:
    """What both sides are measured on."""
    return [(kind, w.sized(rows)) for kind in ("step", "pass") for w in workloads.of(kind, quick, device)]


def serve(requests: Iterator[str], answer: Any, device: Any, quick: bool, rows: int) -> None:
    """Answer each line: ["places"] by the folders that hold bench and dante_kernels, ["sample", i] by seconds of case i.

    A case is checked against float64 before its first time.
    """
    import dante_kernels

    known: dict[int, Any] = {}
    for line in requests:
        what, *arguments = json.loads(line)
        if what == "places":
            modules = {"bench": __file__, "dante_kernels": dante_kernels.__file__}
            answer({"value": {name: str(Path(file).resolve().parent.parent) for name, file in modules.items()}})
            continue
        (i,) = arguments
        kind, workload = cases(quick, rows, device)[i]
        if i not in known:
            problem, order = workloads.random_problem(workload, device)
            row, method = measure.checked(workloads.METHODS[OURS], measure.Truths(kind, problem, order))
            if method is None:
                answer({"error": f"{workload.net}, batch {workload.batch}: {row['status']}: {row['note']}"})
                continue
            known[i] = method, order
            measure.one_sample(kind, *known[i])
        answer({"value": measure.one_sample(kind, *known[i])})


def pairs_of(
    sides: dict[str, Path], settings: dict[str, Any], wanted: list[int], repeats: int
) -> Iterator[dict[int, list[float]]]:
    """New time over old time of each wanted case so far, each time one is done; `repeats` for each start of the processes."""
    ratios: dict[int, list[float]] = {i: [] for i in wanted}
    for _ in range(STARTS):
        with contextlib.ExitStack() as stack:
            running = {}
            for name, folder in sides.items():
                running[name] = stack.enter_context(contextlib.closing(Side(folder, settings)))
            for i in wanted:
                for turn in range(repeats):
                    names = ("base", "head") if turn % 2 else ("head", "base")
                    seconds = {name: running[name].ask("sample", i) for name in names}
                    ratios[i].append(seconds["head"] / seconds["base"])
                yield ratios


def compare(sides: dict[str, Path], settings: dict[str, Any], repeats: int) -> Iterator[list[tuple[str, Workload, Verdict]]]:
    """(kind, workload, verdict) for each case so far, each time one is done, lest all is lost where this is ended early.

    `sides` names the folders of "base" and "head".
    """
    many = cases(settings["quick"], settings["rows"], torch.device(settings["device"]))
    verdicts: dict[int, Verdict] = {}
    wanted = list(range(len(many)))
    for looks in (1, 2):
        for ratios in pairs_of(sides, settings, wanted, repeats) if wanted else ():
            whole = {i: pairs for i, pairs in ratios.items() if len(pairs) == STARTS * repeats}
            some = ratios if looks == 1 else whole  # a second look that is not whole proves nothing
            verdicts |= {i: judge(pairs, looks) for i, pairs in some.items() if pairs}
            yield [(*many[i], verdict) for i, verdict in verdicts.items()]
        wanted = [i for i, verdict in verdicts.items() if verdict.slower]


def once(verdict: Verdict) -> str:
    """Says so of what was slower in one look, and had no second one."""
    return "; looked at only once" if verdict.slower and verdict.looks == 1 else ""


def rows_of(verdicts: list[tuple[str, Workload, Verdict]], shared: dict[str, Any], base: str) -> list[dict[str, Any]]:
    """A row for each verdict; `shared` has the fields of the head, `base` is the other side's commit."""
    return [
        shared
        | {
            "kind": "against", "net": w.net, "batch": w.batch, "rows": w.rows, "cache": "warm", "method": OURS,
            "work": f"{kind}: {'one step' if kind == 'step' else w.what}", "status": "slower" if v.slower else "not slower",
            "note": f"over {base}: 95 % interval {v.low:.3f} to {v.high:.3f}" + once(v), "ratio": v.ratio, "repeats": v.pairs,
        }
        for kind, w, v in verdicts
    ]  # fmt: skip


@contextlib.contextmanager
def checkout(commit: str, package: Path) -> Iterator[Path]:
    """A temporary worktree of the commit, its C++ extension built, or copied from `package` where csrc is the same.

    Raises:
        ValueError: where there is no such commit, or the extension in `package` is not that of its sources.
    """

    def git(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=check)

    found = git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}", check=False)
    if found.returncode:
        raise ValueError(f"--against: expected a commit of the repository at {ROOT}, got {commit!r}")
    if report.stale_extension(package):
        raise ValueError(f"--against: the C++ extension in {package} is older than csrc: build it first")
    built = list((package / "dante_kernels").glob("_C*.so"))
    sources = ("--", "csrc", "setup.py")
    changed = git("diff", "--quiet", found.stdout.strip(), *sources, check=False).returncode
    added = git("ls-files", "--others", "--exclude-standard", *sources).stdout  # diff does not see these
    same = package == ROOT and not changed and not added
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        git("worktree", "add", "--detach", str(folder), found.stdout.strip())
        try:
            if same and built:
                shutil.copy(built[0], folder / "dante_kernels")
            else:
                command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                subprocess.run(command, cwd=folder, env=os.environ | {"DANTE_BUILD_EXT": "1"}, check=True)
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))
