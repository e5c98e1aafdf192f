"""Runs experiments and writes what came of them into a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import plots, problems, report, summary
from .experiments import EXPERIMENTS, Scale
from .problems import Lack
from .runs import Row
from .search import Case, Store, complete, only_one, workers


def reproduce(
    name: str, *, full: bool, directory: Path | None, output: Path, jobs: int, say: Callable[[str], Any]
) -> tuple[Path, list[Row]]:
    """Run an experiment, or all of them, and write the page.

    Args:
        name: a name of `EXPERIMENTS`, or ``"all"``.
        full: as published, or small.
        directory: of the data; see `problems.load`.
        output: a folder, made where it is not there. It gets ``runs.jsonl``, a row for each training, which a later start
            goes on from; and for each experiment ``NAME.json``, its summary; the page ``NAME.md`` (``reproduction.md`` of
            all); and pictures in ``reproduction/``.
        jobs: how many processes train side by side.
        say: called with a line after each training.

    Returns:
        (the page's path, the summaries).

    Raises:
        ValueError: for an unknown name.
        OSError: where the folder cannot be written to, or another run writes into it.
        MissingExtraError: where matplotlib is needed and not installed, before anything is trained.
    """
    if name != "all" and name not in EXPERIMENTS:
        raise ValueError(f"experiment: expected all or one of {', '.join(EXPERIMENTS)}, got {name!r}")
    chosen = {each: EXPERIMENTS[each](Scale(full)) for each in (EXPERIMENTS if name == "all" else (name,))}
    if any(experiment.picture for experiment in chosen.values()):
        plots.ready()
    output.mkdir(parents=True, exist_ok=True)
    done = []

    def complete_one(each: str, store: Store, cases: tuple[Case, ...]) -> dict[tuple[str, int], Lack]:
        return complete(list(cases), store, run, directory, lambda line: say(f"{each}: {line}"))

    with only_one(output) as path, workers(jobs, directory) as run:
        store = Store(path)
        for each, experiment in chosen.items():
            experiment = replace(
                experiment,
                cases=tuple(replace(case, spec=problems.as_there(case.spec, directory)) for case in experiment.cases),
            )
            absent = complete_one(each, store, experiment.cases)
            found = summary.summarise(experiment, full, store, absent)
            (output / f"{each}.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            plots.draw(found, output / "reproduction")
            done.append(found)
        page = output / ("reproduction.md" if name == "all" else f"{name}.md")
        page.write_text(report.page(name, done), encoding="utf-8")
    return page, done
