"""What a run will take before it is started: its trainings, their weights updated, and hours from rows that are there."""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from . import problems
from .experiments import EXPERIMENTS, Scale
from .problems import Spec
from .search import Job, Store, searches

HEAD = """# What `dante reproduce {name} --{scale}` takes

Made by `dante reproduce {name} --{scale} --plan`. Do not edit.

Trainings at the least: a search that goes on beyond its first {rates} rates has more; a quick run of all makes 1.4 times as
many. Those that two experiments share are counted in the first. Hours of one core are an estimate: seconds of an update of all
weights in the trainings that are in the folder's rows, of the same net, mini-batch and side (layer by layer or all at once) or
the nearest in size, scaled by weights and mini-batch; loading and judging left out. "Done" counts methods of a net, and splits,
whose rows are all there. No figure counts what data are absent for, those that a run would fetch among them.

| experiment | trainings, at least | weights updated | hours of one core, estimated | done | data absent |
| --- | --- | --- | --- | --- | --- |"""


def plan(name: str, full: bool, directory: Path | None, store: Store) -> str:
    """The page that says what an experiment, or all of them, will take; nothing is trained.

    Args:
        name: a name of `EXPERIMENTS`, or ``"all"``.
        full: the scale.
        directory: of the data; see `problems.load`.
        store: rows, of any scale, from which the hours are estimated; those of this run count as done.
    """
    pace, seen, lines = Pace(store), set[str](), []
    totals: list[float] = [0] * 5
    for each in EXPERIMENTS if name == "all" else (name,):
        jobs: dict[str, tuple[Job, int]] = {}
        absent, done, asked = set[str](), 0, 0
        for case in EXPERIMENTS[each](Scale(full)).cases:
            for search in searches(case):
                if problems.lack(case.spec, directory):
                    absent.add(case.spec.data)
                    continue
                asked += 1
                done += not search.state(store.rows)[0]
                jobs |= {job.key: (job, steps(job, directory)) for job in search.least() if job.key not in seen}
        seen |= jobs.keys()
        figures: list[float] = [
            len(jobs),
            sum(count * size(job.widths) for job, count in jobs.values()),
            sum(pace.seconds(job, count) for job, count in jobs.values()) / 3600,
            done,
            asked,
        ]
        totals = [a + b for a, b in zip(totals, figures, strict=True)]
        lines.append(_line(each, figures, ", ".join(sorted(absent))))
    lines += [_line("all", totals, "")] if name == "all" else []
    head = HEAD.format(name=name, scale="full" if full else "quick", rates=Scale(full).rates)
    return "\n".join([head, *lines]) + "\n"


def _line(name: str, figures: list[float], absent: str) -> str:
    trainings, weights, hours, done, asked = figures
    text = "unknown" if math.isnan(hours) else f"{hours:.2g}" if hours < 10 else f"{hours:.0f}"
    return f"| {name} | {trainings:,} | {weights:.3g} | {text} | {done} of {asked} | {absent} |"


def steps(job: Job, directory: Path | None) -> int:
    """How often a training updates all weights."""
    rows = _rows(replace(job.spec, split=0), directory)
    return job.epochs * math.ceil((problems.kept_rows(rows) if job.part == "search" else rows) / job.batch)


@functools.cache
def _rows(spec: Spec, directory: Path | None) -> int:
    """For training; splits do not differ in it."""
    return len(problems.load(spec, directory).x)


def size(widths: tuple[int, ...] | list[int]) -> int:
    """Weights and biases."""
    return sum((n_in + 1) * n_out for n_in, n_out in pairwise(widths))


class Pace:
    """Seconds of an update of all weights, from the rows of trainings that were done."""

    def __init__(self, store: Store) -> None:
        found: dict[tuple[bool, tuple[int, ...], int], list[float]] = {}
        for row in store.rows.values():
            if row["status"] == "done":
                job, count = row["job"], row["weights_updated"] / size(row["job"]["widths"])
                key = (job["method"].get("layerwise", True), tuple(job["widths"]), job["batch"])
                found.setdefault(key, []).append(row["seconds"] / count)
        self._medians = {key: statistics.median(values) for key, values in found.items()}

    def seconds(self, job: Job, count: int) -> float:
        """Of a training that updates all weights so often; NaN where there is no row of its side."""

        def distance(key: tuple[bool, tuple[int, ...], int]) -> tuple[bool, float]:
            return key[1:] != (job.widths, job.batch), abs(math.log(work / (size(key[1]) * key[2])))

        work = size(job.widths) * job.batch
        nearest = min((key for key in self._medians if key[0] == job.method.layerwise), key=distance, default=None)
        if nearest is None:
            return math.nan
        return count * self._medians[nearest] * work / (size(nearest[1]) * nearest[2])
