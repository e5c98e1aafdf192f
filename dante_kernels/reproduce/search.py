"""Choosing a rate for every method in the same way, and running many trainings side by side, so that a broken run goes on.

The rates are 1 and 3 times the powers of ten. A search tries some around the method's start on one seed, trained on a part of
the training rows and judged on the rest of them, and goes on at the edge while the best lies there. The best is tried on a
second seed and then counts by the worse of both, until the best is one that was tried on both: one seed alone often chooses a
rate at the edge of stability. The final trainings use the chosen rate on all training rows, other seeds, and are judged on
the test rows. What to do next is computed from the rows that are there, so a second start goes on where the first one ended.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import dante_kernels as dk

from ..activations import NAMES
from ..training import directions
from . import probes, problems
from .problems import Spec
from .runs import METRICS, Method, Row, train

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SEARCH_SEEDS = (0, 1000)  # no final training has one of them
RUNS = "runs.jsonl"
_JOB = {"spec", "widths", "method", "rate", "seed", "epochs", "batch", "part"}  # of every row's job
_DONE = ("test_loss", "seconds", "weights_updated")  # numbers of every training that came to its end
NEEDED = {"job", "method", "made_by", "status", *METRICS} - {"svm_accuracy"}  # of every row of a file
POINTS = 25  # of a curve that are kept in a row


def rate_of(index: int) -> float:
    """The rates by their index: 0 is 1, 1 is 3, 2 is 10, -1 is 0.3 and so on."""
    return float(f"{(1, 3)[index % 2]}e{index // 2}")


@dataclass(frozen=True)
class Case:
    """One net on one data set, trained by several methods.

    Attributes:
        name: the case's name in `published.FIGURES` where it has one there; unique within its experiment.
        title: for the page.
        spec: the data; its split is replaced by each of `splits`.
        widths, activation, loss, epochs, batch, output: as for `runs.train`.
        methods: of this case, by unique names.
        seeds: of the final trainings.
        splits: of the rows; with more than one, each has its own search and one final training, whose seed is the split.
        rates, most: how many rates a search begins with, and how many it tries at most.
        shift: added to `start` of the methods whose step follows the gradient's length, which follows the loss's factor.
        probe: name of a function in `probes` that adds to a final training's row.
        speed_only: no search: one training at the first rate, of which only the seconds mean something.
    """

    name: str
    title: str
    spec: Spec
    widths: tuple[int, ...]
    methods: tuple[Method, ...]
    epochs: int
    activation: str = "leaky_relu"
    loss: str = "mse"
    batch: int = 100
    output: str | None = None
    seeds: tuple[int, ...] = (1,)
    splits: tuple[int, ...] = (0,)
    rates: int = 3
    most: int = 6
    shift: int = 0
    probe: str | None = None
    speed_only: bool = False

    @property
    def net(self) -> str:
        """The widths as text."""
        return "-".join(map(str, self.widths))


@dataclass(frozen=True)
class Job:
    """One training: all that its row depends on, apart from where the files lie.

    A row of a training that was not `followed` has the last point of its curve alone; all else in it is the same.
    """

    spec: Spec
    widths: tuple[int, ...]
    activation: str
    loss: str
    output: str | None
    method: Method
    rate: float
    seed: int
    epochs: int
    batch: int
    part: str  # "search" or "final"
    probe: str | None
    followed: bool

    @property
    def settings(self) -> dict[str, Any]:
        """All of it but what the method is called on a page, and what has its default, so that rows outlive a new field.

        A default of `Spec` and `Method` must therefore stay as it is. `fit`'s bound stands there as a number, so that no row
        outlives another one; None is none.
        """
        content = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "followed"}
        method = {name: value for name, value in _changed(self.method).items() if name not in ("name", "title", "start")}
        if self.method.bounded:
            hidden = [(width, NAMES[self.activation]) for width in self.widths[1:-1]]
            bound = directions.usual_max_norm(hidden, self.loss, classes=True)
            method["bounded"] = bound if math.isfinite(bound) else None
        return content | {"spec": _changed(self.spec), "method": method}

    @property
    def key(self) -> str:
        """The same for the same training."""
        return _key(self.settings)


def _changed(instance: Spec | Method) -> dict[str, Any]:
    """Its fields that have not their defaults."""
    values = {field.name: (getattr(instance, field.name), field.default) for field in fields(instance)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def run_job(job: Job, directory: Path | None) -> Row:
    """A job's row; whatever goes wrong in it becomes a row of the status ``"failed"`` that says what."""
    head = {
        "method": job.method.name,
        "made_by": f"dante_kernels {dk.__version__}, torch {torch.__version__}",
        "job": job.settings,
    }
    try:
        problem = problems.load(job.spec, directory)
        if job.part == "search":
            problem = problems.for_search(problem, job.spec.split)
        row = train(
            problem, job.widths, job.activation, job.loss, job.method, job.rate, job.seed, job.epochs,
            batch_size=job.batch, output=job.output, followed=job.followed,
            probe=probes.PROBES[job.probe] if job.probe else None,
        )  # fmt: skip
    except Exception as error:  # one training must not end all others
        return head | {"status": "failed", "note": " ".join(f"{type(error).__name__}: {error}".split())}
    curve = row.pop("curve")
    return head | row | ({} if job.part == "search" else {"curve": thinned(curve)})


def thinned(points: list[Any]) -> list[Any]:
    """At most `POINTS` of them, evenly chosen, first and last among them."""
    if len(points) <= POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[Path]:
    """The path of the rows' file in this folder, while no other process has the folder, where the platform can tell.

    Raises:
        BlockingIOError: where another run has it.
    """
    path = folder / RUNS
    with open(path, "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(f"{folder}: another run is writing into this folder") from error
            except OSError:  # a file system without locks
                pass
        yield path


def _row(line: str) -> Row | None:
    """The row of a line; None where it is none, or lacks what pages are made of."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    job = row.get("job") if isinstance(row, dict) else None
    if not isinstance(job, dict):
        return None
    needed = NEEDED | ({"curve"} if job.get("part") == "final" else set())
    if job.get("probe") == "svm" and row.get("status") == "done":
        needed |= {"svm_accuracy"}
    whole = needed <= row.keys() and job.keys() >= _JOB and row["status"] in ("done", "diverged")
    if not whole or not _could_be(row):
        return None
    return row if row["status"] == "diverged" or None not in map(row.get, _DONE) else None


def _could_be(row: Row) -> bool:
    """Whether what pages are made of can be what a training left."""
    names, widths, curve = (row["method"], row["made_by"]), row["job"]["widths"], row.get("curve", [])
    if not all(isinstance(name, str) for name in names) or not isinstance(widths, list) or not isinstance(curve, list):
        return False
    if len(widths) < 2 or not all(isinstance(width, int) and width > 0 for width in widths):
        return False
    numbers = {name: row[name] for name in METRICS if row.get(name) is not None}
    most = {"test_accuracy": 1, "svm_accuracy": 1}
    if not all(_is_number(value) and 0 <= value <= most.get(name, math.inf) for name, value in numbers.items()):
        return False
    return all(isinstance(p, list) and len(p) == 5 and all(v is None or _is_number(v) for v in p) for p in curve)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class Store:
    """Rows by their jobs' keys, in a file of one JSON object a line that only grows.

    Args:
        path: the file; its rows are read where it exists. A last line that was cut short, or one that is no row or lacks a
            part of one, is passed over and its job is done again.

    Raises:
        ValueError: where the file is no text; names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        try:
            content = path.read_text(encoding="utf-8") if path.exists() else ""
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected a text in UTF-8 with a row a line, got another file ({error})") from error
        for row in map(_row, content.splitlines()):
            if row is not None:
                self.rows[_key(row["job"])] = row
        self.cut = bool(content) and not content.endswith("\n")
        self.failed = False

    def add(self, row: Row) -> None:
        """Keep a row; one that failed only until the end of this run."""
        self.rows[_key(row["job"])] = row
        if row["status"] == "failed":
            self.failed = True
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" * self.cut + json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n")
        self.cut = False


@dataclass(frozen=True)
class Search:
    """The trainings of one method on one split of a case."""

    case: Case
    method: Method
    split: int

    def job(self, index: int, seed: int, part: str) -> Job:
        """The training at a rate's index."""
        case = self.case
        spec = replace(case.spec, split=self.split)
        return Job(
            spec, case.widths, case.activation, case.loss, case.output, self.method, rate_of(index), seed, case.epochs,
            case.batch, part, case.probe if part == "final" else None,
            followed=part == "final" and (self.split, seed) == (case.splits[0], self.seeds[0]),
        )  # fmt: skip

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the final trainings."""
        return self.case.seeds if len(self.case.splits) == 1 else (self.split,)

    @property
    def first(self) -> int:
        """Index of the rate around which the search begins."""
        return self.method.start + (self.case.shift if self.method.rule == "sgd" else 0)

    @property
    def begins_with(self) -> range:
        """Indices of the rates that are tried in any case."""
        lowest = self.first - (self.case.rates - 1) // 2
        return range(lowest, lowest + self.case.rates)

    def least(self) -> list[Job]:
        """The trainings of a search that ends as soon as it can, the rate chosen being the first."""
        finals = [self.job(self.first, seed, "final") for seed in self.seeds]
        if self.case.speed_only:
            return finals
        tried = [self.job(index, SEARCH_SEEDS[0], "search") for index in self.begins_with]
        return [*tried, self.job(self.first, SEARCH_SEEDS[1], "search"), *finals]

    def state(self, rows: dict[str, Row]) -> tuple[list[Job], int | None, bool]:
        """(trainings to do next, the chosen rate's index or None, whether it stands at the edge of what was tried)."""
        if self.case.speed_only:
            return self._missing(self.least(), rows), self.first, False
        tried = self.begins_with
        asked = [(index, SEARCH_SEEDS[0]) for index in tried]
        while True:
            jobs = {each: self.job(*each, "search") for each in asked}
            if missing := self._missing(jobs.values(), rows):
                return missing, None, False
            worst = {i: max(_badness(rows[job.key]) for (j, _), job in jobs.items() if j == i) for i in tried}
            best = min(tried, key=lambda index: (worst[index], index))
            edge = best in (tried[0], tried[-1])
            if edge and len(tried) < self.case.most:
                asked.append((best - 1 if best == tried[0] else best + 1, SEARCH_SEEDS[0]))
                tried = range(min(tried[0], asked[-1][0]), max(tried[-1], asked[-1][0]) + 1)
            elif not math.isfinite(worst[best]):
                return [], None, False
            elif (best, SEARCH_SEEDS[1]) not in asked:
                asked.append((best, SEARCH_SEEDS[1]))
            else:
                return self._missing([self.job(best, seed, "final") for seed in self.seeds], rows), best, edge

    @staticmethod
    def _missing(jobs: Iterable[Job], rows: dict[str, Row]) -> list[Job]:
        return [job for job in jobs if job.key not in rows]


def _badness(row: Row) -> float:
    return float(row["test_loss"]) if row["status"] == "done" else math.inf


def searches(case: Case) -> list[Search]:
    """All that a case is made of, in the order of its methods."""
    return [Search(case, method, split) for method in case.methods for split in case.splits]


Runner = Callable[[list[Job]], Iterator[Row]]


@contextlib.contextmanager
def workers(count: int, directory: Path | None) -> Iterator[Runner]:
    """What runs jobs and gives their rows as they end: in `count` processes of one thread each, or in this one where it is 1.

    Left by an exception, such as Ctrl-C, trainings in progress are ended and no row is made of them.
    """
    if count == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield lambda jobs: (run_job(job, directory) for job in jobs)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=_begin_worker) as pool:

        def run(jobs: list[Job]) -> Iterator[Row]:
            for done in as_completed([pool.submit(run_job, job, directory) for job in jobs]):
                yield done.result()

        try:
            yield run
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)


def complete(
    cases: list[Case], store: Store, run: Runner, directory: Path | None, say: Callable[[str], Any]
) -> dict[tuple[str, int], problems.Lack]:
    """Do all trainings of these cases that are not in the store yet.

    Returns:
        Why there is no data for a case and split, or none that can be read; without these, all rows are there afterwards.
    """
    every = [search for case in cases for search in searches(case)]
    absent: dict[tuple[str, int], problems.Lack] = {}
    while True:
        wanted: dict[str, Job] = {}
        for search in every:
            if (search.case.name, search.split) in absent:
                continue
            jobs = search.state(store.rows)[0]
            lack = problems.lack(jobs[0].spec, directory) if jobs else None
            if lack is not None:
                absent[search.case.name, search.split] = lack
                continue
            wanted |= {job.key: job for job in jobs}
        if not wanted:
            return absent
        for number, row in enumerate(run(list(wanted.values())), 1):
            store.add(row)
            say(f"{number}/{len(wanted)} {describe(row)}")


def describe(row: Row) -> str:
    """A row in a line."""
    job = row["job"]
    net = "-".join(map(str, job["widths"]))
    text = f"{job['spec']['data']} {net} {row['method']} rate {job['rate']:g} seed {job['seed']} ({job['part']}): "
    if row["status"] != "done":
        return text + str(row.get("note", row["status"]))
    accuracy = row.get("svm_accuracy") or row["test_accuracy"]
    return (
        text + f"loss {row['test_loss']:.6g}{'' if accuracy is None else f', accuracy {accuracy:.2%}'}, {row['seconds']:.1f} s"
    )
