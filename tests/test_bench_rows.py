"""The benchmarks' rows: limits counted by hand, files by the schema, times to quality, exponents."""

import csv
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from bench import defaults, gpu_seconds, limits, quality, report, scaling, workloads
from bench.peers import torch_plain
from bench.workloads import OURS, Workload

ROOT = pathlib.Path(__file__).parent.parent
CPU = torch.device("cpu")
KNOWN = limits.Limits(peak=1e11, bandwidth=1e10)
SMALL = Workload((12, 8, 4), batch=5, trained=2, rows=40)


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
    beaten = limits.fraction("pass", w, "sngd", CPU, KNOWN, 0.8 * seconds)
    assert beaten == pytest.approx(1.25)
    found = limits.too_fast(beaten)
    assert found.keys() == {"note"}
    assert "1.25 of the machine's limit" in found["note"]
    assert limits.too_fast(limits.BUSY + 0.1)["status"] == "wrong result"
    assert limits.too_fast(0.99) == limits.too_fast(None) == {}
    monkeypatch.setattr(limits, "cache_bytes", lambda device: 8)
    assert limits.regime("pass", w, CPU, KNOWN, latency=0.4 * seconds) == "memory"
    assert limits.fraction("pass", w, "sngd", CPU, KNOWN._replace(peak=None), seconds) is None


def test_a_compiler_that_fails_leaves_the_peak_unknown(monkeypatch):
    monkeypatch.setattr(limits.shutil, "which", lambda name: name)
    for failure in (subprocess.CalledProcessError(1, "g++"), OSError("no such file")):
        monkeypatch.setattr(limits.subprocess, "run", Mock(side_effect=failure))
        assert limits.cores_peak() == {}
    assert limits.of(CPU, 1).peak is None


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


def test_a_file_that_cannot_be_written_whole_is_as_it_was(monkeypatch, tmp_path):
    paths = report.write(tmp_path / "rows", [a_row()], [])
    before = [path.read_bytes() for path in paths]
    monkeypatch.setattr(report.os, "replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path / "rows", [a_row(), a_row()], [])
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)


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


def test_a_ratio_to_quality_is_a_method_s_time_over_ours():
    rows = [a_row(method="torch SGD", median=3.0), a_row(median=2.0), a_row(method="JAX", status="failed", median=None)]
    assert [row.get("ratio") for row in quality.with_ratios(rows)] == [1.5, 1.0, None]
    assert [row.get("ratio") for row in quality.with_ratios(rows[::2])] == [None, None]


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
    assert workloads.RATES.keys() == workloads.PLAIN.keys()
    assert {len(rates) for rates in workloads.RATES.values()} == {6}
    for family, place in workloads.PLAIN.items():
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
    rows = [
        a_row(kind="scaling", work=work, method=method, threads=threads, median=number + factor)
        for number, (work, _) in enumerate(scaling.study(True))
        for method, threads, factor in (("torch SGD", 1, 1), (OURS, 1, 1), (OURS, 2, 7))
    ]
    scaling.add_exponents(rows, True)
    given = [row for row in rows if row.get("exponent") is not None]
    assert [row["work"] for row in given[::3]] == ["width 32", "batch 100", "depth 2", "rows 200"]
    assert given[0]["exponent"] == given[1]["exponent"] == pytest.approx(math.log2(2))
    assert given[2]["exponent"] == pytest.approx(math.log2(8 / 7))


def a_round_of(rows, seconds, **changes):
    return a_row(kind="scaling", work=f"rows {rows}", rows=rows, median=seconds, noisy=False, threads=1) | changes


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        ([1, 3, 10, 30, 100, 300, 1000], []),
        ([1, 3, 10, 30, 130, 390, 1300], []),  # once out of a cache, a row costs 1.3 times as much
        ([1, 3, 10, 60, 200, 600, 2000], ["from 10000 to 30000 rows the cost grows with their power 1.63"]),
        ([1, 3, 10, 30, 100, 300, 1150], ["from 300000 to 1000000 rows the cost grows with their power 1.12"]),
        ([1, 3, 10, 36, 140, 490, 1700], ["from 10000 to 1000000 rows the cost grows with their power 1.12"]),
    ],
)
def test_superlinear_rows_are_named_and_a_step_out_of_a_cache_is_none(seconds, says):
    values, *_ = scaling.AXES["rows"]
    ours = [a_round_of(value, second) for value, second in zip(values, seconds, strict=True)]
    found = scaling.superlinear(ours)
    assert [text for text in found if text in says] == says
    assert bool(found) == bool(says)
    slow_only_elsewhere = [
        a_round_of(1000 * 10**i, 100.0**i, **c) for i in (0, 1) for c in ({"method": "torch SGD"}, {"threads": 2 + i})
    ]
    assert scaling.superlinear(slow_only_elsewhere) == []
    assert scaling.superlinear([a_round_of(1000, 1.0), a_round_of(2000, 9.0, noisy=True)]) == []


def test_the_documented_tables_are_the_measured_rows():
    """Each ratio of a peer in docs/performance.md, for 1 / 2 threads, is one of bench/results, and marked where either side is
    noisy."""
    rows = {}
    for path in (ROOT / "bench" / "results").glob("bench-*.json"):
        for row in json.loads(path.read_text())["rows"]:
            rows[row["net"], str(row["batch"]), row["work"], row["threads"], row["method"]] = row
    text, compared = (ROOT / "docs" / "performance.md").read_text(), 0
    for table in re.findall(r"^\| net \| batch \| work \| samples.*?\n\n", text, re.MULTILINE | re.DOTALL):
        header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().split("\n"))
        for net, batch, work, rate, limit, *ratios in lines:
            measured = [[rows[net, batch, work, threads, name] for threads in (1, 2)] for name in ["dante", *header[5:]]]
            stars = ["*" if row["noisy"] else "" for row in measured[0]]
            assert rate == " / ".join(f"{r['samples_per_second']:,.0f}{s}" for r, s in zip(measured[0], stars, strict=True))
            assert limit == " / ".join(f"{100 * row['limit_fraction']:.0f} %" for row in measured[0])
            for ratio, pair in zip(ratios, measured[1:], strict=True):
                either = [row["noisy"] or ours["noisy"] for row, ours in zip(pair, measured[0], strict=True)]
                assert ratio == " / ".join(f"{row['ratio']:.2f}{'*' * n}" for row, n in zip(pair, either, strict=True))
                compared += 1
    assert compared == 8 * 3 + 3 * 6 + 4 * 5
    scaling_rows = {(row["work"], row["method"]): row for row in rows.values() if row["kind"] == "scaling"}
    *_, table = re.findall(r"^\| cost against \|.*?\n\n", text, re.MULTILINE | re.DOTALL)
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().split("\n"))
    for work, ours, *ratios in lines:
        assert float(ours.strip("*").replace(",", "")) == pytest.approx(1000 * scaling_rows[work, OURS]["median"], rel=6e-3)
        noisy = scaling_rows[work, OURS]["noisy"]
        assert ours.endswith("*") == noisy
        others = [scaling_rows[work, name] for name in header[2:]]
        assert ratios == [f"{row['ratio']:.2f}{'*' * (noisy or row['noisy'])}" for row in others]
    measured = [work for work, name in scaling_rows if name == OURS]
    assert [work for work, *_ in lines] == measured
    for axis, (values, *_) in scaling.AXES.items():
        assert (
            {f"{axis} {values[0]}", f"{axis} {values[-1]}"}
            <= set(measured)
            <= {f"{a} {v}" for a in scaling.AXES for v in scaling.AXES[a][0]}
        )


def test_the_table_of_seconds_to_an_accuracy_is_that_of_its_rows():
    text, rows = (ROOT / "docs" / "plans.md").read_text(), gpu_seconds.read()
    assert gpu_seconds.table(rows) in text

    def least(net: str, method: str, precision: str) -> float:
        passes = [gpu_seconds.enough(rows, net, way) for way in gpu_seconds.WAYS[net] if way[0] == method]
        return min(count for count in passes if count) * gpu_seconds.microseconds(net, method, precision)

    below = {}
    for method, precision, net in itertools.product(("dante", "parallel"), ("highest", "high"), gpu_seconds.WAYS):
        below[method, precision, net] = 100 * (1 - least(net, method, precision) / least(net, "sgd", precision))
    turn = [f"{part:.2g}" for (method, *_), part in below.items() if method == "dante"]
    parallel = [f"{abs(part):.0f}" for (method, *_), part in below.items() if method == "parallel"]
    text = " ".join(text.split())
    assert "by {} and {} % of SGD's time (`highest`), {} and {} % (`high`)".format(*turn) in text
    less, more = parallel[::2], parallel[1::2]
    assert "takes {} and {} % less time than SGD's (`highest` and `high`) for 784-100-10".format(*less) in text
    assert "and {} and {} % more for 784-400-200-100-10".format(*more) in text


def test_the_tables_of_the_default_settings_are_those_of_their_rows():
    page = (ROOT / "docs" / "defaults.md").read_text()
    for table in defaults.tables().split("\n\n"):
        assert table in page
