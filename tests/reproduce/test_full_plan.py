"""What a run will take: as many trainings as it makes at the least, and hours from rows that are there."""

import pathlib
from dataclasses import replace

import pytest
import test_cli
from support_reproduce import TINY, fake

from dante_kernels.reproduce import experiments, plan, search
from dante_kernels.reproduce.problems import Spec
from dante_kernels.reproduce.search import Store

pytestmark = pytest.mark.usefixtures("one_thread")

dante = test_cli.dante
in_a_directory_of_its_own = test_cli.in_a_directory_of_its_own
WEIGHTS = 7 * 5 + 6 * 3


@pytest.fixture
def tiny(monkeypatch):
    """One case that can be trained and one without data, in the place of all experiments."""
    cases = (replace(TINY, seeds=(1, 2)), replace(TINY, name="away", spec=Spec("cifar10")))
    made = experiments.Experiment("mlp", "Tiny nets", "nowhere", "Nothing was chosen.", cases)
    for module in (plan, experiments):
        monkeypatch.setattr(module, "EXPERIMENTS", {"mlp": lambda scale: made})
    return made


def line_of(text, name="mlp"):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def store_of(jobs, seconds=None):
    store = Store(pathlib.Path("nowhere"))
    for job in jobs:
        row = fake(job, 0.1) | {"weights_updated": 10 * WEIGHTS}
        store.rows[job.key] = row if seconds is None else row | {"seconds": seconds}
    return store


def test_a_plan_has_as_many_trainings_as_a_search_that_ends_at_once(tiny, tmp_path):
    """The first rate is the best in each: what is asked for then is what was planned."""
    name, trainings, weights, hours, done, absent = line_of(plan.plan("mlp", False, tmp_path, store_of([])))
    rows, asked = {}, 0
    searches = search.searches(tiny.cases[0])
    while jobs := [job for found in searches for job in found.state(rows)[0]]:
        asked += len(jobs)
        for job in jobs:
            rows[job.key] = fake(job, abs(job.rate - search.rate_of(job.method.start)))
    assert (name, int(trainings), absent, done, hours) == ("mlp", asked, "cifar10", "0 of 4", "unknown")
    # 40 rows, 34 in a search, in mini-batches of 10: 4 steps a pass in both, and 5 passes
    assert float(weights) == pytest.approx(asked * 5 * 4 * WEIGHTS, rel=5e-3)


def test_hours_are_the_seconds_of_the_rows_scaled(tiny, tmp_path):
    """Rows of 10 updates of all weights in 36 seconds, all at once and layer by layer."""
    other = [replace(found.job(3, 7, "final"), epochs=99) for found in search.searches(tiny.cases[0])]
    cells = line_of(plan.plan("mlp", False, tmp_path, store_of(other, 36.0)))
    assert float(cells[3]) == pytest.approx(int(cells[1]) * 5 * 4 * 3.6 / 3600, rel=0.05)


def test_the_nearest_net_is_scaled_by_weights_and_mini_batch():
    job = search.searches(TINY)[0].job(0, 1, "final")
    near, far = replace(job, widths=(13, 5, 3)), replace(job, widths=(600, 5, 3))
    store = store_of([near])
    (row,) = store.rows.values()
    row["weights_updated"] = 10 * plan.size(near.widths)
    assert plan.Pace(store).seconds(job, 10) == pytest.approx(WEIGHTS / plan.size(near.widths))
    store.rows |= store_of([far], 1e6).rows
    assert plan.Pace(store).seconds(replace(job, batch=20), 10) == pytest.approx(2 * WEIGHTS / plan.size(near.widths))


def test_rows_that_are_there_count_as_done(tiny, tmp_path):
    rows = {}
    for found in search.searches(tiny.cases[0])[:2]:
        while jobs := found.state(rows)[0]:
            rows |= {job.key: fake(job, 0.1) for job in jobs}
    store = store_of([])
    store.rows = rows
    assert line_of(plan.plan("mlp", False, tmp_path, store))[4] == "2 of 4"


def test_the_command_prints_the_plan_and_trains_nothing(dante, monkeypatch):
    monkeypatch.setattr(search, "train", lambda *a, **k: pytest.fail("trained"))
    status, out, err = dante("reproduce", "rivals", "--plan", "--output", "here", "--data-dir", ".")
    assert (status, err) == (0, "")
    assert line_of(out, "rivals")[1:] == ["0", "0", "0", "0 of 0", "fashion-mnist, mnist"]
    assert not pathlib.Path("here").exists()


def test_the_committed_plan_is_what_the_committed_rows_make(real_data):
    root = pathlib.Path(__file__).resolve().parents[2]
    made = plan.plan("table3", True, real_data, Store(root / "bench" / "results" / "reproduction-quick.jsonl"))
    text = (root / "docs" / "reproduction-plan.md").read_text(encoding="utf-8")
    assert "|".join(line_of(made, "table3")) == "|".join(line_of(text, "table3"))
    assert made.splitlines()[4:10] == text.splitlines()[4:10]
    assert [line.split(" | ")[0] for line in text.splitlines()[12:]] == [
        f"| {name}" for name in (*experiments.EXPERIMENTS, "all")
    ]
