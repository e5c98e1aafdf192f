"""The benchmarks: what is wrong is reported and not timed, and every row is what its schema says."""

import csv
import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench import app, limits, measure, quality, report, scaling, workloads
from bench.peers import torch_autograd, torch_plain
from bench.workloads import OURS, Workload
from dante_kernels import cli_bench

ROOT = pathlib.Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = Workload((12, 8, 4), batch=5, trained=2, rows=40)
KNOWN = limits.Limits(peak=1e11, bandwidth=1e10)
LINUX = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="binds processes to cores")


def rows_of(kind, names, workload=SMALL):
    return {row["method"]: row for row in measure.compare(kind, workload, CPU, names, 2, KNOWN)}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Fairness


def forget_to_clear_gradients(monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lambda self: None)


def leave_out_the_last_batch(monkeypatch):
    real = torch_autograd.ForeachSgd.round
    monkeypatch.setattr(torch_autograd.ForeachSgd, "round", lambda self, order: real(self, order[:-5]))


def leave_the_weights_alone(monkeypatch):
    monkeypatch.setattr(torch_autograd.ForeachSgd, "round", lambda self, order: None)


def give_nan(monkeypatch):
    real = torch_autograd.ForeachSgd.layers
    monkeypatch.setattr(torch_autograd.ForeachSgd, "layers", lambda self: [(w * torch.nan, b) for w, b in real(self)])


MISTAKES = [forget_to_clear_gradients, leave_out_the_last_batch, leave_the_weights_alone, give_nan]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_peer_with_a_wrong_result_is_reported_and_not_timed(monkeypatch, mistake):
    truths = measure.Truths("pass", *workloads.random_problem(SMALL, CPU))
    assert measure.checked("torch_autograd:ForeachSgd", truths)[0]["status"] == "timed"  # the truth is kept for the second
    for part in (*range(measure.TRIES), "most"):
        truths.layers_after("sgd", part)
    mistake(monkeypatch)
    row, method = measure.checked("torch_autograd:ForeachSgd", truths)
    assert row["status"] == "wrong result"
    assert method is None
    assert "not timed" in row["note"]


@pytest.mark.parametrize("place", ["torch_autograd:ForeachSgd", "torch_autograd:Adam", "ours:Operators"])
def test_a_peer_that_leaves_out_the_last_rows_of_many_is_wrong(monkeypatch, place):
    problem, order = workloads.random_problem(SMALL._replace(rows=2000), CPU)
    truths = measure.Truths("pass", problem, order)
    assert measure.checked(place, truths)[0]["status"] == "timed"
    kind = workloads.method_class(place)
    for part in (*range(measure.TRIES), "most"):
        truths.layers_after(kind.family, part)
    real = kind.round
    monkeypatch.setattr(kind, "round", lambda self, order: real(self, order[:1800] if len(order) > 1000 else order))
    row, method = measure.checked(place, truths)
    assert (row["status"], method) == ("wrong result", None)
    assert "without the last rows" in row["note"]


def test_a_cold_sample_is_swept_last_and_conversions_are_not_timed():
    calls = []
    problem, order = workloads.random_problem(SMALL, CPU)

    class Told(torch_plain.PlainSngd):
        def __getattribute__(self, name):
            if name in ("prepare", "reset", "round", "wait"):
                calls.append(name)
            return super().__getattribute__(name)

    measure.one_sample("pass", Told(replace(problem, rate=0.1)), order, before=lambda: calls.append("sweep"))
    assert [name for name in calls if name != "wait"] == ["prepare", "reset", "sweep", "round"]
    assert calls[-4:] == ["wait", "sweep", "round", "wait"]


def test_torch_peers_gather_the_rows_once_a_round(monkeypatch):
    gathered = []
    real = torch.Tensor.__getitem__
    monkeypatch.setattr(torch.Tensor, "__getitem__", lambda self, key: (gathered.append(len(key)), real(self, key))[1])
    problem, order = workloads.random_problem(SMALL, CPU)
    for place in ("torch_plain:PlainSngd", "torch_autograd:ForeachSgd"):
        method = workloads.make(place, problem)
        method.reset()
        method.round(order)
        assert gathered == [40, 40], place
        gathered.clear()


def test_a_norm_without_the_bias_is_a_wrong_result(monkeypatch):
    def step(active, suffix, x, t, lr):
        before = active[1].clone()
        real(active, suffix, x, t, lr)
        moved = (active[1] - before).norm() / lr
        active[1].copy_(before + (active[1] - before) / (1 - moved**2).sqrt())

    real = torch_plain.sngd_step
    truths = measure.Truths("step", *workloads.random_problem(SMALL, CPU))
    for part in range(measure.TRIES):
        truths.layers_after("sngd", part)
    monkeypatch.setattr(torch_plain, "sngd_step", step)
    row, _ = measure.checked("torch_plain:PlainSngd", truths)
    assert row["status"] == "wrong result"


@pytest.mark.parametrize(("part", "status"), [(0, "timed"), (None, "wrong result")])
def test_one_flip_at_the_kink_is_forgiven_and_another_loss_is_not(monkeypatch, part, status):
    truths = measure.Truths("pass", *workloads.random_problem(SMALL, CPU))
    for number in (*range(measure.TRIES), "most", None):
        truths.layers_after("sngd", number)
    real = truths.run
    monkeypatch.setattr(truths, "run", lambda method, now: truths.problem.start if now == part else real(method, now))
    assert measure.checked("torch_plain:PlainSngd", truths)[0]["status"] == status


def test_only_what_is_right_gets_a_time_in_the_table(monkeypatch):
    leave_the_weights_alone(monkeypatch)
    rows = rows_of("pass", ["torch SNGD", "torch SGD, foreach", "torch SGD", "CUDA graph SGD"])
    assert {name: row["status"] for name, row in rows.items()} == {
        "torch SNGD": "timed", "torch SGD, foreach": "wrong result", "torch SGD": "timed", "CUDA graph SGD": "not here",
    }  # fmt: skip
    assert all(("median" in row) == (row["status"] == "timed") for row in rows.values())


def test_a_peer_that_is_not_installed_or_breaks_is_a_row_that_says_so(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else real(name))
    monkeypatch.setattr(torch_autograd.FusedSgd, "update", lambda *_: 1 / 0)
    rows = rows_of("pass", ["JAX scan SGD", "torch SGD, fused", "torch SGD"])
    assert (rows["JAX scan SGD"]["status"], rows["JAX scan SGD"]["note"]) == ("not here", "jax is not installed")
    assert rows["torch SGD, fused"]["status"] == "failed"
    assert "ZeroDivisionError" in rows["torch SGD, fused"]["note"]
    assert rows["torch SGD"]["status"] == "timed"


def test_every_method_here_gives_its_familys_result():
    names = [name for name in SMALL.methods("pass") if "compile" not in name]
    statuses = {name: row["status"] for name, row in rows_of("pass", names, SMALL._replace(epochs=2)).items()}
    assert set(statuses.values()) <= {"timed", "not here"}, statuses
    assert {statuses[name] for name in ("torch SNGD", "torch SGD", "torch Adam, fused", "scikit-learn MLP")} == {"timed"}


def test_a_peer_that_breaks_while_it_is_timed_loses_only_its_own_row(monkeypatch):
    left = [8]
    real = torch_autograd.FusedSgd.reset

    def reset(self):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of memory")
        real(self)

    monkeypatch.setattr(torch_autograd.FusedSgd, "reset", reset)
    rows = list(measure.compare("pass", SMALL, CPU, [OURS, "torch SGD, fused", "torch SGD"], 20, KNOWN))
    assert [row["status"] for row in rows] == ["timed", "failed", "timed"]
    assert "out of memory" in rows[1]["note"]


def test_a_time_to_quality_survives_a_peer_that_breaks_in_a_timed_seed(monkeypatch):
    split, workload = quality.load("digits", None, 100)
    real = quality.curve

    def curve(method, split, rounds, seed, target=None):
        if seed == 2 and isinstance(method, torch_autograd.ForeachSgd):
            raise RuntimeError("out of memory")
        return real(method, split, rounds, seed, target)

    monkeypatch.setattr(quality, "curve", curve)
    pairs = list(quality.compare(split, workload, CPU, ["torch SGD", "torch SGD, foreach"], 2, 1, 0.01))
    assert [(row["status"], drawn is not None) for row, drawn in pairs] == [("timed", True), ("failed", False)]


def test_rows_measured_before_a_failure_are_written(monkeypatch, tmp_path, capsys):
    def child(settings):
        yield {"row": a_row(method="torch SGD")}
        raise SystemExit(3)

    monkeypatch.setattr(app, "child", child)
    with pytest.raises(SystemExit):
        app.main(["pass", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text())["rows"]) == 1
    assert path.name == "bench-pass-cpu-2026-01-01-abc.json"


def test_it_is_a_failure_where_dante_itself_has_no_row(monkeypatch, tmp_path, capsys):
    for method, status in (("torch SGD", 1), (OURS, 0)):
        monkeypatch.setattr(app, "child", lambda settings, m=method: [{"row": a_row(method=m)}])
        assert app.main(["pass", "--output", str(tmp_path)]) == status
        assert ("dante itself could not be measured" in capsys.readouterr().err) == bool(status)


def test_samples_are_taken_in_turn_and_the_first_does_not_count():
    calls = []
    samples = {name: lambda name=name: (calls.append(name), float(len(calls)))[1] for name in "abc"}
    seconds = measure.interleave(samples, repeats=8)
    turns = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(turns) == 9
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 3  # more orders than the three rotations
    assert seconds == {name: [i + 1.0 for i, called in enumerate(calls) if called == name][1:] for name in "abc"}


def test_a_spread_over_15_percent_is_marked():
    assert not measure.summary([1.0, 1.01, 1.02, 1.03, 1.04])["noisy"]
    found = measure.summary([1.0, 1.0, 1.1, 1.3, 1.4])
    assert found["noisy"]
    assert found["p20"] < found["median"] < found["p80"]
    few = measure.summary([1.0, 4.0])
    assert 1 <= few["p20"] <= few["p80"] <= 4


def test_a_sample_starts_from_the_same_weights():
    problem, order = workloads.random_problem(SMALL, CPU)
    for place in ("torch_plain:PlainSngd", "torch_autograd:Adam", "ours:Fit"):
        method = workloads.make(place, problem)
        measure.one_sample("pass", method, order)
        first = [t.clone() for layer in method.layers() for t in layer]
        measure.one_sample("pass", method, order)
        assert all(torch.equal(a, b) for a, b in zip(first, itertools.chain(*method.layers()), strict=True)), place


# Limits


def test_operations_and_traffic_are_counted_by_hand(monkeypatch):
    w = Workload((6, 4, 2), batch=5, trained=2, epochs=3, rows=10)
    assert limits.flops("pass", w, "sngd") == 10 * (3 * 4 * (24 + 8) + (2 * 24 + 3 * 4 * 8))
    assert limits.flops("pass", w, "sgd") == 10 * 3 * (6 * (24 + 8) - 2 * 24)
    assert limits.flops("step", w, "sngd") == 5 * 4 * (24 + 8)
    assert (limits.samples("pass", w), limits.samples("step", w)) == (10 * 3, 5)
    assert limits.traffic("pass", w, "sgd", CPU) == 0
    monkeypatch.setattr(limits, "cache_bytes", lambda device: 8)
    weights = 4 * (24 + 4 + 8 + 2)
    assert limits.traffic("pass", w, "sgd", CPU) == 4 * 6 * 30 + 3 * weights * 6
    assert limits.traffic("pass", w, "sngd", CPU) == 4 * (6 + 4) * 30 + 3 * weights * 6 * 2


def test_the_last_cache_is_read_from_the_machine(monkeypatch, tmp_path):
    for i, size in enumerate(("32K", "512K", "96M")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    monkeypatch.setattr(limits, "CPU_CACHES", tmp_path)
    assert limits.cache_bytes(CPU) == 96 * 2**20
    monkeypatch.setattr(limits, "CPU_CACHES", tmp_path / "none")
    assert limits.cache_bytes(CPU) == 2**25


def test_the_regime_is_what_takes_longest_and_the_fraction_is_of_the_hardwares_limit(monkeypatch):
    w = Workload((6, 4, 2), batch=5, rows=10)
    seconds = limits.flops("pass", w, "sngd") / KNOWN.peak
    assert limits.regime("pass", w, CPU, KNOWN, latency=0.6 * seconds) == "latency"  # two steps
    assert limits.regime("pass", w, CPU, KNOWN, latency=0.4 * seconds) == "compute"
    assert limits.fraction("pass", w, "sngd", CPU, KNOWN, 4 * seconds) == pytest.approx(0.25)
    assert limits.fraction("pass", w, "sngd", CPU, KNOWN, 0.9 * seconds) is None  # no limit, if it can be beaten
    monkeypatch.setattr(limits, "cache_bytes", lambda device: 8)
    assert limits.regime("pass", w, CPU, KNOWN, latency=0.4 * seconds) == "memory"
    assert limits.fraction("pass", w, "sngd", CPU, KNOWN._replace(peak=None), seconds) is None


# Rows and files


def a_row(**changes):
    timed = {"status": "timed", "median": 1.0, "p20": 0.9, "p80": 1.1, "spread": 0.2, "noisy": True, "repeats": 9}
    shared = {"date": "2026-01-01", "commit": "abc", "device": "cpu", "versions": "python", "precision": "highest"}
    what = {"kind": "pass", "net": "2-3", "batch": 1, "rows": 2, "work": "all", "cache": "warm", "method": OURS}
    return shared | what | timed | changes


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"colour": "red"}, ValueError, "colour"),
        ({"median": "1"}, TypeError, "median: expected float or NoneType, got '1'"),
        ({"batch": True}, TypeError, "batch"),
        ({"commit": None}, TypeError, "commit"),
        ({"kind": "sprint"}, ValueError, "kind"),
        ({"regime": "speed"}, ValueError, "regime"),
        ({"status": "wrong result"}, ValueError, "expected a time where the status is timed and nowhere else"),
        ({"median": None}, ValueError, "expected a time"),
    ],
)
def test_a_row_that_is_not_as_the_schema_says_is_refused(changes, error, says):
    with pytest.raises(error, match=says):
        report.complete(a_row(**changes))


def test_files_hold_every_field_of_every_row(tmp_path):
    paths = report.write(tmp_path / "new" / "rows", [a_row(), a_row(status="failed", median=None, noisy=None)], [])
    results = json.loads(paths[0].read_text())
    assert [list(row) for row in results["rows"]] == [list(report.FIELDS)] * 2
    assert results["fields"].keys() == report.FIELDS.keys()
    with paths[1].open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["timed", "failed"]


def test_what_is_not_finite_is_none_in_the_files(tmp_path):
    curve = {"points": [{"loss": math.nan, "seconds": 1.0}]}
    wrong = a_row(status="wrong result", median=None, noisy=None, error=math.inf)
    results = json.loads(report.write(tmp_path / "rows", [wrong], [curve])[0].read_text())
    assert results["rows"][0]["error"] is None
    assert results["curves"][0]["points"] == [{"loss": None, "seconds": 1.0}]


def test_the_commit_is_marked_for_every_change_and_for_an_old_extension(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    for name in ("dante_kernels/a.py", "csrc/a.cpp", "bench/a.py", "setup.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / ".gitignore").write_text("*.so\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    clean = report.commit_of(tmp_path)
    assert len(clean) == 12
    for name in ("bench/a.py", "setup.py", "bench/new.py", "dante_kernels/new.py"):
        (tmp_path / name).write_text("2")
        assert report.commit_of(tmp_path) == clean + "-dirty", name
        git("stash", "-qu")
    (tmp_path / "bench" / "results").mkdir()
    (tmp_path / "bench" / "results" / "rows.csv").write_text("rows")
    built = tmp_path / "dante_kernels" / "_C.abi3.so"
    built.write_text("")
    assert report.commit_of(tmp_path) == clean
    os.utime(built, (0, 0))
    assert report.commit_of(tmp_path) == clean + "-stale-extension"


def test_the_table_marks_what_is_noisy_wrong_or_not_here(capsys):
    rows = [a_row(), a_row(method="other", status="wrong result", note="far off", median=None, noisy=None)]
    report.show([report.complete(row) for row in rows])
    out = capsys.readouterr().out
    assert "20% noisy" in out
    assert "other: wrong result, far off" in out


# Time to quality and scaling


def test_a_time_to_quality_needs_every_run_to_reach_the_target():
    def run(*accuracies):
        return [{"accuracy": a, "seconds": i + 1.0, "weights_updated": i + 1} for i, a in enumerate(accuracies)]

    row = quality.outcome([run(0.5, 0.9), run(0.9), run(0.1, 0.9, 0.2)], 0.9, 0.3, (0.1, 0.3, 1.0))
    assert (row["status"], row["median"], row["repeats"]) == ("timed", 2.0, 3)
    row = quality.outcome([run(0.5, 0.9), run(0.8)], 0.9, 0.1, (0.1, 0.3, 1.0))
    assert row["status"] == "not reached"
    assert "median" not in row
    assert "1 of 2 runs" in row["note"]
    assert "edge" in row["note"]


def test_the_rate_is_the_one_with_the_fewest_updates_to_the_target_else_the_least_loss(monkeypatch):
    def ends(table):
        def curve(method, split, rounds, seed, target):
            updates, loss, accuracy = table[method.problem.rate]
            return [{"weights_updated": updates, "loss": loss, "accuracy": accuracy}]

        monkeypatch.setattr(quality, "curve", curve)
        return quality.best_rate(torch_plain.PlainSngd, None, SMALL, 3, 0.9, CPU)

    problem = workloads.random_problem(SMALL, CPU)[0]
    monkeypatch.setattr(quality, "problem_of", lambda split, w, rate, seed, device: replace(problem, rate=rate))
    rates = workloads.RATES["sngd"]
    table = dict.fromkeys(rates, (9, 0.1, 0.95)) | {rates[2]: (5, 0.2, 0.91), rates[0]: (3, 0.01, 0.89)}
    assert ends(table) == rates[2]
    table = dict.fromkeys(rates, (9, math.nan, 0.1)) | {rates[1]: (9, 0.2, 0.3), rates[3]: (9, 0.1, 0.2)}
    assert ends(table) == rates[3]


def test_every_family_has_a_grid_of_six_rates_and_a_truth():
    assert workloads.RATES.keys() == workloads.TRUTHS.keys()
    assert {len(rates) for rates in workloads.RATES.values()} == {6}
    for family, place in workloads.TRUTHS.items():
        assert workloads.method_class(place).family == family


def test_fit_and_the_operators_train_alike_in_short_turns():
    split, workload = quality.load("digits", None, 100)
    problem = replace(quality.problem_of(split, workload, 0.1, 1, CPU), block=2 * workload.batch)
    losses = []
    for place in ("ours:Fit", "torch_plain:PlainSngd"):
        method = workloads.method_class(place)(problem)
        losses.append([p["loss"] for p in quality.curve(method, split, 2, 1)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_exponents_are_fitted_to_the_upper_half_and_superlinear_rows_are_named():
    assert scaling.exponent([1, 10, 100, 1000], [5.0, 5.0, 7.0, 7e2]) == pytest.approx(2)
    rows = list(scaling.study(CPU, ["torch SGD, foreach"], 2, True, KNOWN))
    assert [row["work"] for row in rows if row.get("exponent") is not None] == ["width 32", "batch 100", "depth 2", "rows 200"]
    slow = {"net": "2-3", "method": OURS, "work": "rows 1000", "exponent": 1.5}
    assert scaling.superlinear([slow]) == ["2-3: the cost grows with the rows' power 1.50"]
    assert scaling.superlinear([slow | {"exponent": 1.02}, slow | {"work": "depth 8"}]) == []


# The command


@LINUX
def test_a_whole_name_is_that_method_alone_and_a_part_is_many(tmp_path):
    command = [sys.executable, "-m", "bench", "pass", "--quick", "--methods", "torch SGD; JAX", "--output", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.glob("*-quick.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == [OURS, "JAX scan SNGD", "torch SGD", "JAX scan SGD"]
    assert all(row["bandwidth"] > 0 for row in rows)
    assert rows[0]["commit"] in done.stdout


@LINUX
def test_quick_measures_everything_and_leaves_rows_and_pictures(tmp_path):
    arguments = ["step", "pass", "quality", "--quick", "--output", tmp_path / "rows", "--pictures", tmp_path / "pictures"]
    command = [sys.executable, "-m", "bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pass: 20-16-10, batch 10, every layer, 1 thread" in done.stdout
    (path,) = (tmp_path / "rows").glob("*.json")
    results = json.loads(path.read_text())
    found = {(row["kind"], row["method"]): report.complete(row) for row in results["rows"]}
    methods = [name for name in workloads.METHODS if "compile" not in name]
    assert found.keys() == set(itertools.product(("step", "pass", "quality"), methods))
    assert {found[kind, "torch SGD"]["status"] for kind in ("step", "pass", "quality")} == {"timed"}
    assert all(len(curve["points"]) == 2 for curve in results["curves"])
    drawn = {p.name: p.read_bytes()[:4] for p in (tmp_path / "pictures").iterdir()}
    assert drawn.keys() == {f"bench-{name}.{suffix}" for name in ("ratio", "loss") for suffix in ("png", "svg")}
    assert drawn["bench-ratio.png"] == b"\x89PNG"


def test_the_operators_micro_benchmarks_run():
    command = [sys.executable, "-m", "pytest", "bench/test_operators.py", "--benchmark-disable", "-k", "64-100-10-b20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]


def test_dante_bench_hands_its_arguments_over(capsys):
    with pytest.raises(SystemExit) as caught:
        cli_bench.run(["--help"])
    assert caught.value.code == 0
    assert "--against COMMIT" in capsys.readouterr().out


def test_dante_bench_without_a_checkout_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli_bench, "__file__", str(tmp_path / "site-packages" / "dante_kernels" / "cli_bench.py"))
    monkeypatch.chdir(tmp_path)
    assert cli_bench.run([]) == 1
    err = capsys.readouterr().err
    assert err.startswith("dante: bench: the benchmarks are part of a checkout")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("sprint", "KIND: expected step, pass or quality, got 'sprint'"),
        ("step --scaling", "expected kinds, --scaling, --against or --plot"),
        ("--plot x.json", "--plot: goes with --pictures"),
        ("--repeats 1", "--repeats: expected at least 2, got 1"),
        ("--threads 99999", "--threads: expected 1 to"),
        ("--device foo", "--device: expected auto, cpu or cuda, got 'foo'"),
        ("--methods nosuch", "got 'nosuch'"),
        ("--against HEAD --methods JAX --threads 1 1", "--against: does not go with --methods, --threads"),
        ("--plot nosuch.json --pictures x", "--plot: expected a JSON file of these benchmarks, got 'nosuch.json'"),
        (f"--plot {__file__} --pictures x", "--plot: expected a JSON file"),
    ],
)
def test_a_mistake_is_named(capsys, arguments, says):
    with pytest.raises(SystemExit) as caught:
        cli_bench.run(arguments.split())
    assert caught.value.code == 2
    assert says in capsys.readouterr().err
