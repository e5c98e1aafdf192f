"""The pages: what they say is what the rows say, published figures are the papers', and the command writes them."""

import gzip
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import test_cli
from support_reproduce import TINY, write_ccpp
from test_data import idx_bytes, small_arrays, write_files

from dante_kernels import data
from dante_kernels.reproduce import experiments, main, plots, probes, problems, published, report, search, summary
from dante_kernels.reproduce.problems import Spec
from dante_kernels.reproduce.search import Store

pytestmark = pytest.mark.usefixtures("one_thread")

dante = test_cli.dante
in_a_directory_of_its_own = test_cli.in_a_directory_of_its_own
PUBLISHED = pathlib.Path(__file__).parents[3] / "shared" / "PUBLISHED.md"


# Pages


@pytest.fixture
def tiny_experiment(monkeypatch):
    """An experiment of two cases, one without data, and one of speed alone, in the place of all others."""
    cases = (
        replace(TINY, seeds=(1, 2)),
        replace(TINY, name="away", title="away", spec=Spec("cifar10")),
        replace(
            TINY, name="speed", title="random rows, for speed only", speed_only=True, epochs=1, methods=experiments.FOUR[2:]
        ),
    )
    made = experiments.Experiment("mlp", "Tiny nets", "nowhere", "Nothing was chosen.", cases)
    monkeypatch.setattr(main, "EXPERIMENTS", {"mlp": lambda scale: made})
    monkeypatch.delenv(data.CACHE_VARIABLE, raising=False)
    return made


def test_a_page_says_what_its_summary_says(tiny_experiment, tmp_path):
    pytest.importorskip("matplotlib")
    page, _ = main.reproduce("all", full=False, directory=tmp_path, output=tmp_path, jobs=1, say=lambda line: None)
    assert page == tmp_path / "reproduction.md"
    found = json.loads((tmp_path / "mlp.json").read_text())
    rows = list(Store(tmp_path / "runs.jsonl").rows.values())
    lines = [line for line in page.read_text().splitlines() if line.startswith("| tiny | 6-5-3 |")]
    methods = found["cases"][0]["methods"]
    assert len(lines) == len(methods) + len(found["claims"])
    for line, method in zip(lines, methods, strict=False):
        losses = [r["test_loss"] for r in rows if r["job"]["part"] == "final" and r["method"] == method["method"]]
        losses = (
            losses[:2] if method["method"] in ("dante", "sgd") else [v for v in losses if v in method["values"]["test_loss"]]
        )
        assert sorted(method["values"]["test_loss"]) == sorted(losses)
        mean, spread = np.mean(losses), np.std(losses, ddof=1)
        assert f"| {mean:.4g} ± {spread:.2g} |" in line
        assert f"| {method['rates'][0]:g}{'!' * method['edge']} |" in line
    assert (tmp_path / "reproduction" / "mlp.png").read_bytes()[:4] == b"\x89PNG"
    assert "](reproduction/mlp.png)" in page.read_text()
    assert f"a quick run: {experiments.Scale(False).rows:,} training rows of pictures" in page.read_text()


def test_what_draws_is_asked_for_before_anything_is_trained(tiny_experiment, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(data.MissingExtraError, match=r"drawing the pictures needs matplotlib"):
        main.reproduce("mlp", full=False, directory=None, output=tmp_path / "out", jobs=1, say=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_second_run_in_a_folder_is_refused(dante, tiny_experiment):
    pytest.importorskip("fcntl")
    pathlib.Path("here").mkdir()
    with search.only_one(pathlib.Path("here")):
        status, out, err = dante("reproduce", "mlp", "--output", "here")
    assert (status, out, err) == (1, "", "dante: here: another run is writing into this folder\n")


def test_a_part_of_kmnist_has_rows_of_its_own(tiny_experiment, tmp_path, monkeypatch):
    """Trained first on the 5 of 6 images, then on all: nothing of the first run is taken in the second."""
    monkeypatch.setattr(problems, "KMNIST_ROWS", 5)
    case = replace(TINY, spec=Spec("kmnist"), widths=(9, 5, 4), methods=experiments.FOUR[1:2])
    made = replace(tiny_experiment, cases=(case,))
    monkeypatch.setattr(main, "EXPERIMENTS", {"mlp": lambda scale: made})
    settings = {"full": False, "output": tmp_path, "jobs": 1, "say": lambda line: None}
    x, y, x_test, y_test = small_arrays()
    (tmp_path / "part" / "kmnist").mkdir(parents=True)
    for file, array in zip(problems.KMNIST_PART, (x[:5], y[:5], x_test, y_test), strict=True):
        (tmp_path / "part" / "kmnist" / file).write_bytes(gzip.compress(idx_bytes(array)))
    write_files(tmp_path / "whole" / "kmnist", [x, y, x_test, y_test])
    counts = []
    for folder in ("part", "whole", "part"):
        main.reproduce("mlp", directory=tmp_path / folder, **settings)
        counts.append(len(Store(tmp_path / "runs.jsonl").rows))
    assert counts[0] < counts[1] == counts[2]


def test_absent_data_is_a_line_that_says_so_and_no_number(tiny_experiment, tmp_path):
    page, found = main.reproduce("mlp", full=False, directory=tmp_path / "no", output=tmp_path, jobs=1, say=lambda line: None)
    (line,) = [line for line in page.read_text().splitlines() if line.startswith("| away |")]
    assert "data absent: no cifar10/data_batch_1.bin" in line
    assert str(tmp_path) not in page.read_text()
    assert not re.search(r"\| *\d", line.split("data absent")[1])
    assert found[0]["cases"][1]["methods"] == []
    assert summary.failures(found[0]) == []


def test_a_rival_is_a_line_with_its_figure_and_nothing_of_ours(tiny_experiment, tmp_path, monkeypatch):
    known = [
        published.Rival("mlp", "tiny", "AM-Tiny", 0.978, "3.1 times SGD's", "its code"),
        published.Rival("mlp", "speed", "TinyLAM", None, "0.25", "its paper"),
    ]
    monkeypatch.setattr(published, "RIVALS", known)
    page, _ = main.reproduce("mlp", full=False, directory=None, output=tmp_path, jobs=1, say=lambda line: None)
    lines = [line for line in page.read_text().splitlines() if "not run here" in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|") if cell.strip()] for line in lines]
    assert cells == [
        ["tiny", "6-5-3", "AM-Tiny: not run here", "97.8 % (its code)", "3.1 times SGD's"],
        ["random rows, for speed only", "6-5-3", "TinyLAM: not run here", "(its paper)", "0.25"],
    ]


def test_a_quick_page_says_what_only_a_full_run_has():
    assert experiments.only_full("t-sweep") == ["mnist 784-600-400-200-100-50-10"]
    for name, make in experiments.EXPERIMENTS.items():
        both = ({(case.title, case.net) for case in make(experiments.Scale(full)).cases} for full in (False, True))
        quick, full = both
        assert {f"{title} {net}" for title, net in full - quick} == set(experiments.only_full(name))
        store = Store(pathlib.Path("nowhere"))
        absent = {
            (case.name, split): problems.Lack("x", False)
            for case in make(experiments.Scale(False)).cases
            for split in case.splits
        }
        made = summary.summarise(make(experiments.Scale(False)), False, store, absent)
        text = report.page(name, [made])
        assert all(each in text.split("Only with `--full`:")[1] for each in made["only_full"])


def test_random_rows_have_seconds_and_no_quality(tiny_experiment, tmp_path):
    page, _ = main.reproduce("mlp", full=False, directory=None, output=tmp_path, jobs=1, say=lambda line: None)
    lines = [line for line in page.read_text().splitlines() if line.startswith("| random rows, for speed only |")]
    assert len(lines) == 2
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert [cell for cell in cells[3:-3] if cell] == ["speed only", "1"]
        assert float(cells[-1]) > 0


def summarised(values, baseline=None, name="c"):
    """A case's summary whose methods have these test losses, with accuracies that order them alike; None is diverged."""
    methods = [
        {
            "method": method, "status": "diverged" if losses is None else "done",
            "values": {
                "test_loss": list(losses or ()), "svm_accuracy": [-loss for loss in losses or ()],
                "test_accuracy": [1 - loss / 10 for loss in losses or ()],
                "baseline": [baseline] * len(losses or ()) if baseline else [],
            },
        }
        for method, losses in values.items()
    ]  # fmt: skip
    nothing = summary.nothing_learnt(methods, 10)
    case = {"name": name, "title": name, "net": "n", "speed_only": False, "classes": 10, "methods": methods}
    return case | {"nothing_learnt": nothing}


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict", "not_worse", "cell"),
    [
        ((1, 2), (2, 3.5), "yes", 2, "yes"),
        ((2, 3.5), (1, 2), "no", 0, "**no**"),
        ((1, 3), (2, 3), "level", 2, "level"),
        ((2, 3), (1, 3), "level", 1, "level"),
        ((1, 2), (1, 2), "level", 2, "level"),
        ((1,), (2,), "one seed", 1, "one seed: ahead"),
        ((2,), (1,), "one seed", 0, "one seed: behind"),
        (None, (1, 2), "no comparison", None, "no comparison: dante diverged"),
        (None, None, "no comparison", None, "no comparison: dante diverged and sgd diverged"),
    ],
)
def test_a_claim_is_judged_by_the_mean_against_its_spread(ours, theirs, verdict, not_worse, cell):
    for metric in ("test_loss", "svm_accuracy"):
        claim = summary._claim(metric, summarised({"dante": ours, "sgd": theirs}), "dante", "sgd")
        assert (claim["verdict"], claim["not_worse"]) == (verdict, not_worse)
        assert report._claim_row(claim)[-1] == cell
        json.dumps(claim, allow_nan=False)


@pytest.mark.parametrize(
    ("losses", "learnt"), [((0.5, 0.7), True), ((0.2, 1.2), False), ((0.95,), True), ((1.05,), False), ((1.1, 1.2), False)]
)
def test_there_is_no_verdict_where_nothing_was_learnt(losses, learnt):
    """Answering with the mean costs 1; 0.2 and 1.2 are better by 0.3, which is within their spread."""
    values = {"dante": losses, "sgd": [2.0] * len(losses)}
    case = summarised(values, baseline=1.0)
    claim = summary._claim("test_loss", case, "dante", "sgd")
    assert case["nothing_learnt"] is not learnt
    assert claim["why"] == ("sgd learnt nothing" if learnt else "nothing learnt, ahead")
    assert (report._nothing_learnt(case) is None) is learnt


def test_dante_that_is_behind_is_so_where_nothing_was_learnt_too():
    case = summarised({"dante": (1.4, 1.5), "sgd": (1.05, 1.1)}, baseline=1.0)
    assert case["nothing_learnt"]
    assert summary._claim("test_loss", case, "dante", "sgd")["verdict"] == "no"


def test_trainings_that_came_to_more_than_the_mean_are_named():
    case = summarised({"dante": (0.2, 0.3, 0.4), "sgd": (0.5, 1.4, 0.6), "adam": (2.0, 3.0, 4.0)}, baseline=1.0)
    for method in case["methods"]:
        method["title"] = method["method"].upper()
    assert report._unsteady(case) == "\nOn c n some trainings came to more than answering with the mean: 1 of 3 of SGD."
    case["methods"][1]["values"]["test_loss"] = [0.5, 0.6, 0.6]
    assert report._unsteady(case) is None


def test_there_is_no_verdict_for_dante_beside_a_method_that_learnt_nothing():
    """Of ten classes 30 % are no more than a guess; 31 % are. A seed that learnt is enough."""
    for guess, seeds, verdict in ((0.299, 2, "no verdict"), (0.31, 2, "yes"), (0.299, 1, "yes")):
        loss = 10 * (1 - guess)
        case = summarised({"dante": (1, 2), "sgd": (loss, loss if seeds == 2 else 6.5)})
        claim = summary._claim("test_loss", case, "dante", "sgd")
        assert claim["verdict"] == verdict
        assert claim["why"] == ("sgd learnt nothing" if verdict == "no verdict" else "")
        assert summary._claim("test_loss", case, "sgd", "dante")["verdict"] == "no"  # whoever learnt nothing is behind
    assert summarised({"dante": (8.6, 8.7), "sgd": (9, 8.6)})["nothing_learnt"]
    of_two = {"values": {"test_accuracy": [0.74], "baseline": []}}
    assert not summary.learnt(of_two, 2, spreads=0)
    assert summary.learnt({"values": {"test_accuracy": [0.76], "baseline": []}}, 2, spreads=0)
    regression = summarised({"dante": (0.2, 0.3), "sgd": (1.0, 1.1)}, baseline=1.0)
    assert summary._claim("test_loss", regression, "dante", "sgd")["why"] == "sgd learnt nothing"
    unsteady = summarised({"dante": (0.2, 0.3), "sgd": (0.5, 1.4)}, baseline=1.0)  # better by 0.05, within its spread
    assert summary._claim("test_loss", unsteady, "dante", "sgd")["verdict"] == "yes"


def test_the_verdicts_are_counted_and_all_but_yes_are_listed():
    cases = [
        summarised({"dante": (1, 2), "sgd": (2, 3.5)}, name="a"),
        summarised({"dante": (2, 3.5), "sgd": (1, 2)}, name="b"),
        summarised({"dante": (1, 3), "sgd": (2, 3)}, name="c"),
        summarised({"dante": (1,), "sgd": (2,)}, name="d"),
        summarised({"dante": (2, 3), "sgd": (2, 4)}, baseline=1.0, name="e"),
        summarised({"dante": (2, 3), "sgd": None}, name="f"),
    ]
    (line,) = report.verdicts([summary._claim("test_loss", case, "dante", "sgd") for case in cases])
    assert line == (
        "`dante` against `sgd`: holds in 1 of 6, level in 1 (c n), the other stays ahead in 1 (b n), "
        "one seed in 1 (d n: ahead), no verdict in 1 (e n: nothing learnt, ahead), no comparison in 1 (f n: sgd diverged)."
    )


@pytest.mark.parametrize("picture", ["widths", "reconstructions"])
def test_the_other_pictures_are_drawn(tmp_path, picture):
    pytest.importorskip("matplotlib")
    method = {
        "method": "dante", "status": "done", "mean": {"test_loss": 0.1}, "spread": {"test_loss": None}, "curve": [],
        "pictures": dict.fromkeys(("originals", "reconstructions"), [probes.text_of(bytes([0, 255, 16, 255]))] * 2),
    }  # fmt: skip
    case = {"title": "c", "net": "4-3-4", "speed_only": False, "methods": [method]}
    found = {"name": "x", "picture": picture, "cases": [case]}
    assert plots.draw(found, tmp_path).read_bytes()[:4] == b"\x89PNG"
    assert plots.draw({**found, "cases": [{**case, "methods": []}]}, tmp_path) is None


# What the experiments are made of


def test_published_figures_are_those_of_the_papers():
    def values(*wanted):
        return [figure.value for figure in published.of(*wanted)]

    assert values("table1", "mnist", "dante-heavy", "test_loss") == [0.020816]
    assert values("table2", "mnist", "alternating-sgd", "test_loss") == [0.032912, 0.044911, 0.035567]
    assert values("table3", "ccpp", "sgd", "test_loss") == [0.0003009]
    assert values("table4", "svmguide4", "dante", "svm_accuracy") == [0.8765]
    assert values("table4", "ionosphere", "sgd", "svm_accuracy") == [0.9622]
    assert values("mlp", "mnist", "dante", "test_loss") == []


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the papers' figures are not beside this checkout")
def test_every_published_figure_stands_in_the_list_of_the_papers():
    text = PUBLISHED.read_text(encoding="utf-8")
    for figure in published.FIGURES:
        shown = f"{100 * figure.value:.4g}" if figure.metric == "svm_accuracy" else f"{figure.value:.7f}"
        assert re.search(rf"\b{re.escape(shown.rstrip('0'))}0*\b", text), figure


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the papers' figures are not beside this checkout")
def test_every_figure_of_a_rival_stands_in_the_list_of_the_papers():
    lines = PUBLISHED.read_text(encoding="utf-8").splitlines()
    for rival in published.RIVALS:
        if rival.source == published.PUBLIC_CODE:
            accuracy, cost = f"{100 * rival.accuracy:.4g}", rival.seconds.split()[0]
            assert any(re.search(rf"(?<![\d.]){accuracy}\b", line) and f"{cost}x" in line for line in lines), rival
        elif rival.accuracy is None:
            place = (int(rival.case.split()[1]) // (11000 if rival.case.startswith("mnist") else 12000)) + 1
            rho = rival.title.split()[-1]
            rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith(f"| rho {rho} |")]
            assert rival.seconds in [row[place] for row in rows], rival
        else:
            shown = {0.81: "ADMM peaks near 81 %", 0.8: '"soars to 0.7 early, then rises steadily towards 0.8 or more"'}
            assert any(shown[rival.accuracy] in line for line in lines), rival


def test_every_rival_has_its_row():
    for rival in published.RIVALS:
        for full in (False, True):
            made = experiments.EXPERIMENTS[rival.experiment](experiments.Scale(full))
            assert rival.case in {case.name for case in made.cases}, rival


def test_every_published_figure_has_its_row():
    for full in (False, True):
        made = {name: make(experiments.Scale(full)) for name, make in experiments.EXPERIMENTS.items()}
        for figure in published.FIGURES:
            cases = {case.name: case for case in made[figure.experiment].cases}
            assert figure.method in {method.name for method in cases[figure.case].methods}, figure


def test_experiments_hold_together():
    for full in (False, True):
        for name, make in experiments.EXPERIMENTS.items():
            made = make(experiments.Scale(full))
            assert made.name == name
            names = [case.name for case in made.cases]
            assert len(set(names)) == len(names)
            for case in made.cases:
                assert len({method.name for method in case.methods}) == len(case.methods)
                assert not {*search.SEARCH_SEEDS} & {*case.seeds, *(case.splits if len(case.splits) > 1 else ())}
                for method in case.methods:
                    assert method.inner_steps or not method.layerwise or case.epochs % method.inner_epochs == 0, (
                        name,
                        case.name,
                    )
                if name in ("table3", "table4"):
                    assert max(len(case.seeds), len(case.splits)) >= 5


# The command


def test_the_command_writes_a_page_and_goes_on_from_its_rows(dante, tiny_experiment, monkeypatch):
    pytest.importorskip("matplotlib")
    status, out, err = dante("reproduce", "mlp", "--jobs", 1, "--output", "here")
    assert status == 0
    assert out.splitlines()[-1] == str(pathlib.Path("here/mlp.md"))
    assert "`dante` against `sgd`: holds in" in out
    assert "tiny" in pathlib.Path("here/mlp.md").read_text() or "6-5-3" in pathlib.Path("here/mlp.md").read_text()
    assert err.count("\n") == len(pathlib.Path("here/runs.jsonl").read_text().splitlines())
    page = pathlib.Path("here/mlp.md").read_bytes()
    assert dante("reproduce", "mlp", "--jobs", 1, "--output", "here", "--quiet") == (0, "here/mlp.md\n", "")
    assert pathlib.Path("here/mlp.md").read_bytes() == page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("table9", "name: expected all or one of mlp, sigmoid, cross-entropy"),
        ("mlp --jobs 0", "--jobs: expected at least 1, got 0"),
        ("mlp --data-dir nowhere", "--data-dir: expected a folder that is there, got 'nowhere'"),
        ("mlp --output file", "--output: expected a folder, got 'file'"),
    ],
)
def test_a_mistake_is_answered_by_one_line(dante, arguments, says):
    pathlib.Path("file").write_text("")
    status, out, err = dante("reproduce", *arguments.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_what_fails_ends_with_status_1_and_a_page(dante, tiny_experiment, monkeypatch):
    real = search.train

    def fail(*arguments, **settings):
        if not arguments[4].layerwise:
            raise RuntimeError("no luck")
        return real(*arguments, **settings)

    monkeypatch.setattr(search, "train", fail)
    status, _, err = dante("reproduce", "mlp", "--jobs", 1, "--output", "here", "--quiet")
    assert status == 1
    assert "SGD (constant rate): in the search of a rate: RuntimeError: no luck" in err
    assert "Failed: tiny 6-5-3, SGD (constant rate)" in pathlib.Path("here/mlp.md").read_text()


def test_damaged_data_ends_with_status_1_while_the_others_go_on(dante, tiny_experiment):
    pathlib.Path("data/cifar10").mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pathlib.Path(f"data/cifar10/{name}.bin").write_bytes(b"short")
    status, _, err = dante("reproduce", "mlp", "--jobs", 1, "--output", "here", "--data-dir", "data", "--quiet")
    says = "cifar10/data_batch_1.bin: expected records of 3073 bytes, got a file of 5 bytes"
    assert (status, err) == (1, f"dante: mlp: away 6-5-3: {says}\n")
    page = pathlib.Path("here/mlp.md").read_text()
    assert f"| away | 6-5-3 | data damaged: {says} |" in page
    assert f"Failed: away 6-5-3: {says}" in page
    assert page.count("| tiny | 6-5-3 |") == 6


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_the_processes_and_keeps_what_is_done(tmp_path):
    command = [sys.executable, "-m", "dante_kernels.cli", "reproduce", "table3", "--jobs", "2", "--output", str(tmp_path)]
    write_ccpp(tmp_path, 3000)
    run = subprocess.Popen(
        [*command, "--full", "--data-dir", str(tmp_path)], stderr=subprocess.PIPE, text=True,
        cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    rows = tmp_path / "runs.jsonl"
    begin = time.monotonic()
    while not (rows.exists() and rows.read_text().count("\n") >= 2):
        assert time.monotonic() - begin < 120
        assert run.poll() is None
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 130, err
    assert err.splitlines()[-1] == "dante: interrupted"
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert len(Store(rows).rows) >= 2


def test_the_committed_rows_are_a_whole_quick_run_and_make_the_committed_page():
    """But for the colour pictures, which the run did not have."""
    root = pathlib.Path(__file__).resolve().parents[2]
    store = Store(root / "bench" / "results" / "reproduction-quick.jsonl")
    page = (root / "docs" / "reproduction.md").read_text()
    for make in experiments.EXPERIMENTS.values():
        experiment = make(experiments.Scale(full=False))
        here = [case for case in experiment.cases if case.spec.data not in ("cifar10", "svhn", "tiny-imagenet")]
        for one in (found for case in here for found in search.searches(case)):
            jobs, _, _ = one.state(store.rows)
            assert not jobs, f"{experiment.name}: {one.case.name} {one.method.name}"
        made = summary.summarise(replace(experiment, cases=tuple(here)), False, store, {})
        for line in report.page("all", [made]).splitlines():
            if line.startswith("| ") and "---" not in line:
                assert line in page
