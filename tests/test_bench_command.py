"""The command `dante bench`: what it measures, leaves behind, and says of mistakes."""

import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from test_bench_rows import a_row

from bench import app, process, report, scaling, workloads
from bench.workloads import OURS
from dante_kernels import cli_bench

ROOT = pathlib.Path(__file__).parent.parent
LINUX = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="binds processes to cores")


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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)  # as it is promised
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pass: 20-16-10, batch 10, every layer, 1 thread" in done.stdout
    (path,) = (tmp_path / "rows").glob("*.json")
    results = json.loads(path.read_text())
    found = {(row["kind"], row["method"]): report.complete(row) for row in results["rows"]}
    methods = [name for name in workloads.METHODS if "compile" not in name]
    assert found.keys() == set(itertools.product(("step", "pass", "quality"), methods))
    assert {found[kind, "torch SGD"]["status"] for kind in ("step", "pass", "quality")} == {"timed"}
    assert all(len(curve["points"]) == 2 for curve in results["curves"])
    assert all(curve["grid"] == list(workloads.RATES[curve["family"]]) for curve in results["curves"])
    drawn = {p.name: p.read_bytes()[:4] for p in (tmp_path / "pictures").iterdir()}
    assert drawn.keys() == {f"bench-{name}.{suffix}" for name in ("ratio", "loss") for suffix in ("png", "svg")}
    assert drawn["bench-ratio.png"] == b"\x89PNG"


@pytest.mark.parametrize("kind", ["step", "scaling"])
def test_rows_that_have_no_picture_leave_no_folder(tmp_path, kind):
    path, _ = report.write(tmp_path / "rows", [a_row(kind=kind)], [])
    with pytest.raises(SystemExit, match="no pass and no curve to draw"):
        app.main(["--plot", str(path), "--pictures", str(tmp_path / "pictures")])
    assert not (tmp_path / "pictures").exists()


def test_the_operators_micro_benchmarks_run():
    command = [sys.executable, "-m", "pytest", "bench/test_operators.py", "--benchmark-disable", "-k", "64-100-10-b20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]


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


def test_a_signal_is_an_end_that_keeps_the_rows(monkeypatch, tmp_path, capsys):
    def child(settings):
        yield {"row": a_row(method="torch SGD")}
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(app, "child", child)
    for number in (signal.SIGTERM, signal.SIGHUP):
        before = signal.signal(number, signal.SIG_DFL)  # under nohup it would be ignored
        try:
            with pytest.raises(SystemExit) as caught:
                app.main(["pass", "--output", str(tmp_path / str(number))])
            assert signal.getsignal(number) is signal.SIG_DFL
        finally:
            signal.signal(number, before)
        assert caught.value.code == 128 + number
        assert len(list((tmp_path / str(number)).glob("bench-*"))) == 2


def test_a_measuring_process_ends_with_its_parent(monkeypatch, tmp_path):
    (tmp_path / "bench").mkdir()
    program = "import json, os, time\nprint(json.dumps(os.getpid()), flush=True)\ntime.sleep(60)\n"
    (tmp_path / "bench" / "__main__.py").write_text(program)
    monkeypatch.setattr(process, "ROOT", tmp_path)
    messages = process.child({})
    number, begin = next(messages), time.monotonic()
    with pytest.raises(SystemExit):
        messages.throw(SystemExit(143))
    assert time.monotonic() < begin + 30
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def stand_in(monkeypatch, folder, program):
    """Measuring processes run this first, then what they would."""
    (folder / "bench").mkdir()
    path = f"import sys; sys.path[0] = {str(ROOT)!r}\n"
    (folder / "bench" / "__main__.py").write_text(f"{path}{program}\nfrom bench import app\nsys.exit(app.main(sys.argv[1:]))\n")
    monkeypatch.setattr(process, "ROOT", folder)


@LINUX
def test_a_peer_that_kills_the_process_loses_only_its_own_rows(monkeypatch, tmp_path, capsys):
    program = """
import os, signal
from bench import limits, workloads
from bench.peers import torch_autograd
limits.of = lambda *_: limits.Limits(1e12, 1e10)
workloads.of = lambda kind, quick, device: [workloads.QUICK, workloads.QUICK._replace(batch=20)]
real = torch_autograd.ForeachSgd.round
def round(self, order):
    if self.problem.batch == 20:
        os.kill(os.getpid(), signal.SIGSEGV)
    real(self, order)
torch_autograd.ForeachSgd.round = round
"""
    stand_in(monkeypatch, tmp_path, program)
    arguments = ["pass", "--quick", "--methods", "torch SGD, foreach;torch SNGD", "--output", str(tmp_path / "rows")]
    assert app.main(arguments) == 1
    (path,) = (tmp_path / "rows").glob("*.json")
    found = {(row["batch"], row["method"]): row for row in json.loads(path.read_text())["rows"]}
    statuses = {key: row["status"] for key, row in found.items() if key[1] != OURS}
    assert statuses == {
        (10, "torch SNGD"): "timed", (10, "torch SGD, foreach"): "timed",
        (20, "torch SNGD"): "timed", (20, "torch SGD, foreach"): "failed",
    }  # fmt: skip
    says = "ended the measuring process by SIGSEGV in pass: 20-16-10, batch 20, every layer"
    assert found[20, "torch SGD, foreach"]["note"] == f"{says}; left out since"
    assert f"dante bench: torch SGD, foreach {says}\n" in capsys.readouterr().err


@LINUX
def test_the_measuring_process_has_the_settings(monkeypatch, tmp_path):
    """Its cores, torch's and JAX's threads, the precision and the kernels' instruction set."""
    program = """
import json, os, torch
from bench import process
from test_bench_rows import a_row
def measure_rows(settings, device, send):
    seen = [sorted(os.sched_getaffinity(0)), torch.get_num_threads(), os.environ["XLA_FLAGS"]]
    seen += [torch.get_float32_matmul_precision(), os.environ["DANTE_CPU_ISA"]]
    send({"row": a_row(note=json.dumps(seen))})
process.measure_rows = measure_rows
"""
    stand_in(monkeypatch, tmp_path, f"sys.path.append({str(ROOT / 'tests')!r})\n{program}")
    monkeypatch.setenv("DANTE_CPU_ISA", "avx2")
    arguments = ["pass", "--threads", "1", "--isa", "generic", "--precision", "medium", "--output", str(tmp_path / "rows")]
    assert app.main(arguments) == 0
    (path,) = (tmp_path / "rows").glob("*.json")
    (row,) = json.loads(path.read_text())["rows"]
    first = min(os.sched_getaffinity(0))
    assert json.loads(row["note"]) == [[first], 1, "--xla_cpu_multi_thread_eigen=false", "medium", "generic"]


@LINUX
def test_scaling_measures_every_axis_and_fits_exponents(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "superlinear", lambda rows: ["said of the rows"])
    stand_in(monkeypatch, tmp_path, "from bench import limits; limits.of = lambda *_: limits.Limits(1e12, 1e10)")
    arguments = ["--scaling", "--quick", "--methods", "torch SGD, foreach", "--output", str(tmp_path / "rows")]
    assert app.main(arguments) == 1  # for what is said
    (path,) = (tmp_path / "rows").glob("bench-scaling-*-quick.json")
    rows = [report.complete(row) for row in json.loads(path.read_text())["rows"]]
    works = [f"{axis} {value}" for axis, values in scaling.QUICK.items() for value in values]
    assert [(row["work"], row["method"]) for row in rows] == list(itertools.product(works, [OURS, "torch SGD, foreach"]))
    assert {(row["kind"], row["status"]) for row in rows} == {("scaling", "timed")}
    assert [row["exponent"] is not None for row in rows] == [False, False, True, True] * 4


@pytest.mark.parametrize("status", ["wrong result", "failed", "not here"])
def test_a_row_that_is_wrong_or_failed_is_status_1(monkeypatch, tmp_path, capsys, status):
    other = a_row(method="torch SGD", status=status, note="far off", median=None, noisy=None)
    monkeypatch.setattr(app, "child", lambda settings: [{"row": a_row()}, {"row": other}])
    assert app.main(["pass", "--output", str(tmp_path)]) == int(status != "not here")
    assert (f"dante bench: torch SGD: {status}: far off" in capsys.readouterr().err) == (status != "not here")


@pytest.mark.parametrize(
    ("program", "status", "says"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            1,
            "something ended the measuring process by SIGKILL in its",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
        ("sys.exit(3)", 3, ""),
    ],
)
def test_a_process_that_ends_for_no_method_is_not_started_again(monkeypatch, tmp_path, capsys, program, status, says):
    stand_in(monkeypatch, tmp_path, program)
    with pytest.raises(SystemExit) as caught:
        list(process.child({}))
    assert caught.value.code == status
    assert says in capsys.readouterr().err


def test_a_closed_pipe_and_a_missing_rich_lose_no_files(monkeypatch, tmp_path, capsys):
    row = json.dumps(a_row())
    child = f"app.child = lambda _: [{{'row': json.loads({row!r})}}]"
    for at, show in (("table", "pass"), ("paths", "report.show = lambda rows: None")):
        program = f"import json, sys; from bench import app, report; {child}; {show}; sys.exit(app.main(sys.argv[1:]))"
        ours, theirs = os.pipe()
        os.close(ours)
        command = [sys.executable, "-c", program, "pass", "--output", tmp_path / at]
        done = subprocess.run(command, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False, timeout=600)
        os.close(theirs)
        assert (done.returncode, "rror" in done.stderr) == (1, False), done.stderr
        assert len(list((tmp_path / at).glob("bench-*"))) == 2
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else real(name))
    monkeypatch.setattr(app, "child", lambda settings: [{"row": a_row()}])
    assert app.main(["pass", "--output", str(tmp_path / "rich")]) == 0
    assert "no table without rich" in capsys.readouterr().err
    assert len(list((tmp_path / "rich").glob("bench-*"))) == 2


def test_a_row_that_comes_again_is_one_row(monkeypatch, tmp_path, capsys):
    again = [{"row": a_row(kind="quality", repeats=seeds)} for seeds in (2, 3)]
    monkeypatch.setattr(app, "child", lambda settings: again)
    assert app.main(["quality", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert [row["repeats"] for row in json.loads(path.read_text())["rows"]] == [3]


@pytest.mark.parametrize("option", ["--output", "--pictures"])
def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_measured(monkeypatch, tmp_path, capsys, option):
    monkeypatch.setattr(app, "child", lambda settings: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        app.main(["pass", "--output", str(tmp_path), option, str(tmp_path / "file")])
    assert caught.value.code == 2
    assert f"{option}: expected a folder to write to" in capsys.readouterr().err


def test_it_is_a_failure_where_dante_itself_has_no_row(monkeypatch, tmp_path, capsys):
    for method, status in (("torch SGD", 1), (OURS, 0)):
        monkeypatch.setattr(app, "child", lambda settings, m=method: [{"row": a_row(method=m)}])
        assert app.main(["pass", "--output", str(tmp_path)]) == status
        assert ("dante itself could not be measured" in capsys.readouterr().err) == bool(status)


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
        ("quality --target 97", "--target: expected an accuracy above 0 and at most 1, such as 0.97, got 97"),
        ("quality --target 0", "--target: expected an accuracy above 0"),
        ("--against HEAD --methods JAX --threads 1 1", "--against: does not go with --methods, --threads"),
        ("--scaling --pictures x", "--pictures: expected pass or quality"),
        ("--plot nosuch.json --pictures x", "--plot: expected a JSON file of these benchmarks, got 'nosuch.json'"),
        (f"--plot {__file__} --pictures x", "--plot: expected a JSON file"),
    ],
)
def test_a_mistake_is_named(capsys, arguments, says):
    with pytest.raises(SystemExit) as caught:
        cli_bench.run(arguments.split())
    assert caught.value.code == 2
    assert says in capsys.readouterr().err
