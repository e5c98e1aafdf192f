"""What an experiment's rows come to: means and spreads over the seeds, beside what was published. Fit for JSON."""

from __future__ import annotations

import statistics

from . import published
from .experiments import PAIRS, Experiment, only_full
from .problems import Lack
from .runs import METRICS, Row
from .search import SEARCH_SEEDS, Case, Search, Store, rate_of

# "level" is within the spread of the difference over the seeds, whichever is ahead; a single seed has no spread.
VERDICTS = ("yes", "level", "no", "one seed", "no verdict", "no comparison")


def summarise(experiment: Experiment, full: bool, store: Store, absent: dict[tuple[str, int], Lack]) -> Row:
    """All that a page says of an experiment.

    Args:
        experiment: with its cases.
        full: the scale.
        store: the rows.
        absent: why there is no data for a case and split, or none that can be read, from `search.complete`.
    """
    cases = [_case(experiment, case, store, absent) for case in experiment.cases]
    return {
        "name": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "text": experiment.text,
        "metric": experiment.metric,
        "picture": experiment.picture,
        "full": full,
        "only_full": [] if full else only_full(experiment.name),
        "made_by": sorted({method["made_by"] for case in cases for method in case["methods"] if method["made_by"]}),
        "cases": cases,
        "claims": [claim for case in cases for pair in PAIRS if (claim := _claim(experiment.metric, case, *pair))],
    }


def _case(experiment: Experiment, case: Case, store: Store, absent: dict[tuple[str, int], Lack]) -> Row:
    why = next((absent[case.name, split] for split in case.splits if (case.name, split) in absent), None)
    methods = [] if why else [_method(experiment.name, case, index, store) for index in range(len(case.methods))]
    return {
        "name": case.name,
        "title": case.title,
        "net": case.net,
        "rows": case.spec.rows,
        "epochs": case.epochs,
        "batch": case.batch,
        "speed_only": case.speed_only,
        "absent": why and why.reason,
        "damaged": why is not None and why.damaged,
        "classes": case.widths[-1],
        "nothing_learnt": nothing_learnt(methods, case.widths[-1]),
        "methods": methods,
        "rivals": [] if why else [rival._asdict() for rival in published.rivals(experiment.name, case.name)],
    }


def _method(experiment: str, case: Case, index: int, store: Store) -> Row:
    """A method's final trainings; those that diverged or failed count in `runs`, and their means are None."""
    method = case.methods[index]
    rows, rates, edges = [], [], []
    for split in case.splits:
        search = Search(case, method, split)
        _, chosen, edge = search.state(store.rows)
        edges.append(edge)
        if chosen is not None:
            rates.append(rate_of(chosen))
            rows += [store.rows[search.job(chosen, seed, "final").key] for seed in search.seeds]
    bad = [row for row in rows if row["status"] != "done"]
    good = not bad and len(rates) == len(case.splits)
    values = {metric: [row[metric] for row in rows if row.get(metric) is not None] if good else [] for metric in METRICS}
    return {
        "method": method.name,
        "title": method.title,
        "rates": sorted(set(rates)),
        "edge": any(edges),
        "runs": len(rows),
        "status": "done" if good else bad[0]["status"] if bad else "diverged",
        "note": next((row["note"] for row in bad if "note" in row), _note_of_searches(case, index, store)),
        "values": values,
        "mean": {metric: statistics.fmean(v) if v else None for metric, v in values.items()},
        "spread": {metric: statistics.stdev(v) if len(v) > 1 else None for metric, v in values.items()},
        "curve": rows[0]["curve"] if good and rows else [],
        "pictures": {key: rows[0][key] for key in ("originals", "reconstructions") if good and key in rows[0]},
        "made_by": "; ".join(sorted({row["made_by"] for row in rows})),
        "published": [f._asdict() for m in METRICS for f in published.of(experiment, case.name, method.name, m)],
    }


def _note_of_searches(case: Case, index: int, store: Store) -> str:
    """What failed in the searches, where it was no divergence: without it another rate might have been chosen."""
    searches = [Search(case, case.methods[index], split) for split in case.splits]
    jobs = (search.job(i, seed, "search") for search in searches for i in range(-40, 40) for seed in SEARCH_SEEDS)
    rows = (store.rows.get(job.key, {}) for job in jobs) if store.failed else ()
    return next((f"in the search of a rate: {row['note']}" for row in rows if "note" in row), "")


# A method whose every seed has at most this many times the accuracy of a guess has learnt nothing; of few classes, at most an
# accuracy halfway between a guess and all of them.
GUESS = 3


def learnt(method: Row, classes: int, spreads: float) -> bool:
    """Whether a method beats answering with the mean by more than so many spreads over its seeds, or, of classes, a guess."""
    values = method["values"]
    if values["baseline"]:
        gains = [base - loss for base, loss in zip(values["baseline"], values["test_loss"], strict=True)]
        return statistics.fmean(gains) > spreads * _spread(gains)
    accuracies = values["test_accuracy"]
    return not accuracies or max(accuracies) > min(GUESS, (1 + classes) / 2) / classes


def nothing_learnt(methods: list[Row], classes: int) -> bool:
    """Whether no method has learnt anything. A figure says nothing of the methods then."""
    known = [method for method in methods if method["values"]["test_loss"]]
    return bool(known) and not any(learnt(method, classes, spreads=1) for method in known)


def _spread(values: list[float]) -> float:
    """0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _claim(metric: str, case: Row, ours: str, theirs: str) -> Row | None:
    """Whether DANTE is at least as good as its SGD in the experiment's metric: the mean, and seed by seed.

    ``verdict`` is one of `VERDICTS`; None where the case has not both methods or no quality.
    """
    by_name = {method["method"]: method for method in case["methods"]}
    if case["speed_only"] or ours not in by_name or theirs not in by_name:
        return None
    claim: Row = {
        "metric": metric,
        "case": case["name"],
        "title": case["title"],
        "net": case["net"],
        "dante": ours,
        "sgd": theirs,
    }
    undone = [f"{name} {by_name[name]['status']}" for name in (ours, theirs) if by_name[name]["status"] != "done"]
    if undone:
        empty = dict.fromkeys(("means", "gain", "spread", "seeds", "not_worse"))
        return claim | empty | {"verdict": "no comparison", "why": " and ".join(undone)}
    a, b = by_name[ours]["values"][metric], by_name[theirs]["values"][metric]
    sign = 1 if metric == "test_loss" else -1
    gains = [sign * (y - x) for x, y in zip(a, b, strict=True)]
    gain = statistics.fmean(gains)
    why = ""
    if case["nothing_learnt"] and gain >= -_spread(gains):
        verdict, why = "no verdict", f"nothing learnt, {_place(gain)}"
    elif gain > 0 and not learnt(by_name[theirs], case["classes"], spreads=0):
        verdict, why = "no verdict", f"{theirs} learnt nothing"
    elif len(gains) == 1:
        verdict, why = "one seed", _place(gain)
    else:
        verdict = "level" if abs(gain) <= _spread(gains) else "yes" if gain > 0 else "no"
    return claim | {
        "means": [statistics.fmean(a), statistics.fmean(b)],
        "gain": gain,
        "spread": _spread(gains) if len(gains) > 1 else None,
        "seeds": len(gains),
        "not_worse": sum(gain >= 0 for gain in gains),
        "verdict": verdict,
        "why": why,
    }


def _place(gain: float) -> str:
    return "ahead" if gain > 0 else "behind" if gain < 0 else "equal"


def failures(summary: Row) -> list[str]:
    """What went wrong in an experiment, other than absent data and rates that were too high."""
    damaged = [f"{case['title']} {case['net']}: {case['absent']}" for case in summary["cases"] if case["damaged"]]
    return damaged + [
        f"{case['title']} {case['net']}, {method['title']}: {method['note']}"
        for case in summary["cases"]
        for method in case["methods"]
        if method["note"]
    ]
