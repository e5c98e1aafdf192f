"""The search: rates are chosen without the test rows, in the same way for all, and a broken run goes on from its rows."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from support_reproduce import SPEC, TINY, blobs, fake

from dante_kernels.activations import NAMES
from dante_kernels.reproduce import experiments, problems, runs, search, summary
from dante_kernels.reproduce.search import Search, Store
from dante_kernels.training import directions

pytestmark = pytest.mark.usefixtures("one_thread")


def search_with(losses, case=TINY, again=None):
    """A search in which the rate of each index has a loss, with the second seed that of `again`.

    (the indices tried with the first seed, the chosen one, whether at the edge, those tried with the second, in order).
    """
    found, rows, tried = Search(case, experiments.FOUR[0], 0), {}, {seed: [] for seed in search.SEARCH_SEEDS}
    while True:
        jobs, chosen, edge = found.state(rows)
        if not jobs:
            return sorted(tried[0]), chosen, edge, tried[search.SEARCH_SEEDS[1]]
        for job in jobs:
            index = next(i for i in range(-20, 20) if search.rate_of(i) == job.rate)
            if job.part == "search":
                tried[job.seed].append(index)
            losses_of = again if again and job.seed != 0 else losses
            rows[job.key] = fake(job, losses_of(index) if job.part == "search" else 0.5)


# The search


def test_rates_are_1_and_3_times_powers_of_ten():
    assert [search.rate_of(i) for i in range(-5, 3)] == [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]


def test_the_rate_with_the_least_held_out_loss_is_chosen():
    assert search_with(lambda i: abs(i + 2)) == ([-3, -2, -1], -2, False, [-2])


@pytest.mark.parametrize(("best", "tried"), [(-4, [-5, -4, -3, -2, -1]), (0, [-3, -2, -1, 0, 1])])
def test_a_search_goes_on_while_the_best_stands_at_the_edge(best, tried):
    assert search_with(lambda i: abs(i - best), replace(TINY, most=6)) == (tried, best, False, [best])
    assert search_with(lambda i: abs(i - best), replace(TINY, most=4))[2] is True


@pytest.mark.parametrize(("best", "tried"), [(-2, [-3, -2, -1]), (-1, [-2, -1, 0]), (-4, [-5, -4, -3, -2, -1])])
def test_a_search_that_begins_with_two_rates_tries_those_on_both_sides_of_the_best(best, tried):
    assert search_with(lambda i: abs(i - best), replace(TINY, rates=2, most=6)) == (tried, best, False, [best])


def test_rates_that_diverge_are_never_chosen():
    assert search_with(lambda i: None if i > -3 else -i)[1] == -3
    assert search_with(lambda i: None) == ([-4, -3, -2, -1], None, False, [])


@pytest.mark.parametrize("bad", [9.0, None])
def test_a_rate_counts_by_the_worse_of_two_seeds(bad):
    """-2 is the best with the first seed, and bad with the second; then -3 is the best."""
    again = {-2: bad, -3: 0.4}
    assert search_with({-3: 0.3, -2: 0.1, -1: 0.5, -4: 0.6}.get, again=again.get) == ([-4, -3, -2, -1], -3, False, [-2, -3])
    # -3 is worse with the second seed too, but still better than what -1 is with one
    assert search_with({-3: 0.3, -2: 0.1, -1: 0.5, -4: 0.6}.get, again={-2: 0.45, -3: 0.49}.get)[1:] == (-2, False, [-2, -3])


def test_no_more_is_trained_twice_than_decides():
    """-3 has not been tried again, and needs not: with one seed it is already worse than -2 with two."""
    assert search_with({-3: 0.3, -2: 0.1, -1: 0.5}.get, again={-2: 0.2}.get) == ([-3, -2, -1], -2, False, [-2])


def test_what_was_trained_twice_does_not_change_where_the_search_went():
    """-1 was the best at the edge, so 0 was tried; when -1 falls, 0 is the second best and not forgotten."""
    first = {-3: 0.5, -2: 0.4, -1: 0.1, 0: 0.2, 1: 0.3}
    again = {-1: None, 0: 0.2}
    assert search_with(first.get, replace(TINY, most=5), again.get) == ([-3, -2, -1, 0, 1], 0, False, [-1, 0])


def test_every_method_is_searched_with_as_many_rates():
    for full in (False, True):
        for make in experiments.EXPERIMENTS.values():
            for case in make(experiments.Scale(full)).cases:
                if not case.speed_only:
                    counts = {len(found.state({})[0]) for found in search.searches(case)}
                    assert counts == {5 if full else 2}, case.name


def test_a_search_never_sees_a_test_row():
    problem = blobs()
    held = problems.for_search(problem, 0)
    rows = {tuple(row) for row in torch.cat([held.x, held.x_test]).tolist()}
    assert rows == {tuple(row) for row in problem.x.tolist()}
    assert len(held.x_test) == round(0.15 * len(problem.x))
    assert len(held.x) + len(held.x_test) == len(problem.x)
    assert not torch.equal(held.x_test, problems.for_search(problem, 1).x_test)
    images = problem._replace(y=problem.x, y_test=problem.x_test, labels=problem.y, labels_test=problem.y_test)
    held = problems.for_search(images, 0)
    assert held.y is held.x
    assert held.y_test is held.x_test
    assert len(held.labels) == len(held.x)


def test_jobs_differ_in_all_that_a_row_depends_on_and_in_no_name():
    found = Search(TINY, experiments.FOUR[0], 0)
    job = found.job(0, 1, "final")
    for change in ({"seed": 2}, {"rate": 0.5}, {"epochs": 6}, {"spec": replace(SPEC, rows=39)}, {"part": "search"}):
        assert replace(job, **change).key != job.key
    assert replace(job, method=replace(job.method, momentum=0.5)).key != job.key
    assert replace(job, method=replace(job.method, name="another", title="another", start=4)).key == job.key


def test_a_row_is_not_that_of_another_bound(monkeypatch):
    bounded = Search(TINY, runs.METHODS["dante-short"], 0).job(0, 1, "final")
    key = bounded.key
    assert json.loads(key)["method"]["bounded"] == directions.usual_max_norm([(5, NAMES["leaky_relu"])], "mse", classes=True)
    assert json.loads(replace(bounded, activation="sigmoid").key)["method"]["bounded"] is None
    monkeypatch.setitem(directions.GROWTH, "generalized_relu", (3.0, 0.0))
    assert bounded.key != key


def test_only_the_training_whose_curve_is_drawn_is_followed():
    found = search.searches(replace(TINY, seeds=(1, 2)))[0]
    assert [found.job(0, seed, part).followed for seed, part in ((1, "final"), (2, "final"), (0, "search"))] == [1, 0, 0]
    splits = search.searches(replace(TINY, splits=(1, 2)))[:2]
    assert [each.job(0, each.split, "final").followed for each in splits] == [True, False]
    assert replace(found.job(0, 1, "final"), followed=False).key == found.job(0, 1, "final").key


def test_small_tables_get_a_search_and_a_seed_for_each_split():
    case = replace(TINY, splits=(1, 2, 3))
    found = search.searches(case)
    assert len(found) == 3 * len(case.methods)
    assert {(job.spec.split, job.seed) for s in found for job in [s.job(0, s.seeds[0], "final")]} == {(1, 1), (2, 2), (3, 3)}


# Rows


def run_all(case, store, counter=None):
    """Complete a case in this process; why it is absent."""

    def run(jobs):
        for job in jobs:
            if counter is not None:
                counter.append(job)
            yield search.run_job(job, None)

    return search.complete([case], store, run, None, lambda line: None)


def test_rows_survive_an_interruption_and_are_gone_on_from(tmp_path):
    path, first, second, both = tmp_path / "runs.jsonl", [], [], []
    assert run_all(TINY, Store(tmp_path / "whole.jsonl"), both) == {}

    def broken(jobs):
        for number, job in enumerate(jobs):
            if number == 5:
                raise KeyboardInterrupt
            first.append(job)
            yield search.run_job(job, None)

    with pytest.raises(KeyboardInterrupt):
        search.complete([TINY], Store(path), broken, None, lambda line: None)
    path.write_text(path.read_text()[:-9])  # the last row is cut short
    run_all(TINY, Store(path), second)
    assert len(first) + len(second) == len(both) + 1
    assert {job.key for job in (*first, *second)} == {job.key for job in both}
    assert run_all(TINY, Store(path), third := []) == {}
    assert third == []
    timeless = [
        {k: {**r, "seconds": 0, "curve": 0} for k, r in Store(p).rows.items()} for p in (path, tmp_path / "whole.jsonl")
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    "lost", ["job", "method", "made_by", "status", "test_loss", "seconds", "curve", "svm_accuracy", "not an object", "no job"]
)
def test_a_row_without_what_is_needed_is_passed_over(tmp_path, lost):
    path, case = tmp_path / "runs.jsonl", replace(TINY, probe="svm")
    rows = [fake(Search(case, experiments.FOUR[0], 0).job(i, 1, "final"), 0.5) | {"svm_accuracy": 0.5} for i in (0, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(Store(path).rows) == 2
    broken = {"not an object": [1], "no job": rows[0] | {"job": 1}}.get(lost, {k: v for k, v in rows[0].items() if k != lost})
    path.write_text(json.dumps(broken) + "\n" + json.dumps(rows[1]) + "\n")
    assert [row["job"]["rate"] for row in Store(path).rows.values()] == [3.0]


@pytest.mark.parametrize(
    "change", [
        {"test_loss": math.nan}, {"test_loss": math.inf}, {"test_loss": "abc"}, {"test_loss": None}, {"seconds": None},
        {"weights_updated": "many"}, {"status": "whatever"}, {"status": "failed"}, {"job": {"part": "final", "probe": None}},
        {"test_loss": -1.0}, {"test_loss": True}, {"test_accuracy": 5.0}, {"made_by": 1}, {"curve": None}, {"curve": "abc"},
        {"curve": [[1, 2]]}, {"curve": [[1, 2, 3, 4, "a"]]}, {"test_loss": 10**400},
    ], ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_a_row_with_what_cannot_be_is_passed_over(tmp_path, change):
    path = tmp_path / "runs.jsonl"
    rows = [fake(Search(TINY, experiments.FOUR[0], 0).job(i, 1, "final"), 0.5) for i in (0, 1)]
    path.write_text(json.dumps(rows[0] | change) + "\n" + json.dumps(rows[1]) + "\n")
    assert [row["job"]["rate"] for row in Store(path).rows.values()] == [3.0]


@pytest.mark.parametrize("widths", ["a", [1], [6, 0, 3], [6, "5", 3]])
def test_a_row_of_no_net_is_passed_over(tmp_path, widths):
    path = tmp_path / "runs.jsonl"
    row = fake(Search(TINY, experiments.FOUR[0], 0).job(0, 1, "final"), 0.5)
    path.write_text(json.dumps(row | {"job": row["job"] | {"widths": widths}}) + "\n")
    assert not Store(path).rows


def test_a_rate_that_diverged_is_the_worst_whatever_its_loss():
    found = Search(TINY, experiments.FOUR[0], 0)
    rows = {}
    for index in found.begins_with:
        for seed in search.SEARCH_SEEDS:
            job = found.job(index, seed, "search")
            rows[job.key] = fake(job, 0.5 + abs(index)) | (
                {"status": "diverged", "test_loss": 1e-4} if index == found.first else {}
            )
    assert found.state(rows)[1] != found.first


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "runs.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/runs\.jsonl: expected a text in UTF-8"):
        Store(tmp_path / "runs.jsonl")


def test_a_folder_has_one_run_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with search.only_one(tmp_path):
        with pytest.raises(BlockingIOError, match=rf"^{tmp_path}: another run"), search.only_one(tmp_path):
            pass
        (tmp_path / "other").mkdir()
        with search.only_one(tmp_path / "other"):
            pass
    with search.only_one(tmp_path) as path:
        assert path == tmp_path / "runs.jsonl"


def test_final_trainings_use_all_rows_and_another_seed_than_the_search(tmp_path):
    run_all(replace(TINY, methods=TINY.methods[:1], batch=5), store := Store(tmp_path / "runs.jsonl"))
    parts = {
        part: {row["job"]["seed"] for row in store.rows.values() if row["job"]["part"] == part} for part in ("search", "final")
    }
    assert parts == {"search": set(search.SEARCH_SEEDS), "final": {1}}
    counts = {part: {row["weights_updated"] for row in store.rows.values() if row["job"]["part"] == part} for part in parts}
    weights = 6 * 5 + 5 + 5 * 3 + 3
    assert counts == {"search": {5 * math.ceil(34 / 5) * weights}, "final": {5 * math.ceil(40 / 5) * weights}}


def test_what_fails_is_said_and_is_tried_again(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of\nluck")

    case = replace(TINY, methods=TINY.methods[:1])
    experiment = experiments.Experiment("tiny", "Tiny", "nowhere", "", (case,))
    with monkeypatch.context() as patch:
        patch.setattr(search, "train", fail)
        run_all(case, store := Store(tmp_path / "runs.jsonl"))
    found = summary.summarise(experiment, False, store, {})
    assert summary.failures(found) == [
        "tiny 6-5-3, DANTE as published (T = 5, constant rate): in the search of a rate: RuntimeError: out of luck"
    ]
    run_all(case, store := Store(tmp_path / "runs.jsonl"))
    assert summary.failures(summary.summarise(experiment, False, store, {})) == []


def test_a_training_that_fails_in_a_search_is_said_though_another_rate_was_chosen(tmp_path, monkeypatch):
    def fail_at_some(problem, widths, activation, loss, method, rate, *rest, **more):
        if rate == 0.3:
            raise MemoryError
        return runs.train(problem, widths, activation, loss, method, rate, *rest, **more)

    case = replace(TINY, methods=TINY.methods[:1])
    monkeypatch.setattr(search, "train", fail_at_some)
    run_all(case, store := Store(tmp_path / "runs.jsonl"))
    found = summary.summarise(experiments.Experiment("tiny", "Tiny", "nowhere", "", (case,)), False, store, {})
    assert found["cases"][0]["methods"][0]["status"] == "done"
    (said,) = summary.failures(found)
    assert said.endswith("in the search of a rate: MemoryError:")


def test_processes_give_the_rows_of_one(tmp_path):
    job = Search(TINY, experiments.FOUR[0], 0).job(-3, 1, "final")
    jobs = [job, replace(job, seed=2), replace(job, method=runs.METHODS["sgd"])]
    rows = []
    for count in (1, 2):
        with search.workers(count, None) as run:
            rows.append({(row["method"], row["job"]["seed"]): row["test_loss"] for row in run(jobs)})
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3


def test_rows_are_plain_json():
    job = Search(TINY, experiments.FOUR[0], 0).job(0, 1, "final")
    assert json.loads(json.dumps(asdict(job)))["widths"] == [6, 5, 3]
    json.dumps(search.run_job(job, None), allow_nan=False)


def test_a_long_curve_keeps_its_ends_and_its_order():
    assert search.thinned([1, 2, 3]) == [1, 2, 3]
    kept = search.thinned(list(range(100)))
    assert (kept[0], kept[-1], len(kept)) == (0, 99, search.POINTS)
    assert kept == sorted(set(kept))
