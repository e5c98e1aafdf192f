"""The script that proves the kernels on a GPU is rehearsed without one, so that it runs when there is one."""

import functools
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

SCRIPT = pathlib.Path(__file__).parent.parent / "bench" / "gpu_check.py"
pytest.importorskip("triton", reason="the rehearsal interprets Triton kernels")


@pytest.fixture
def gpu_check(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


def run(gpu_check, monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--output", str(folder)])
    status = gpu_check.main()
    (report,) = folder.glob("*.json")
    return status, json.loads(report.read_text())


def test_the_rehearsal_passes_and_leaves_a_report(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, SCRIPT, "--device", "cpu", "--output", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = tmp_path.glob("*.json")
    checks = json.loads(report.read_text())["checks"]
    assert checks["check_right"]["status"] == "passed"
    assert checks["check_graph_capture"]["status"] == "skipped"


def test_a_wrong_kernel_is_reported_and_not_timed(gpu_check, monkeypatch, tmp_path):
    from dante_kernels import kernels

    real = kernels.layer_forward
    monkeypatch.setattr(kernels, "layer_forward", lambda *args: real(*args) * 1.00001)
    monkeypatch.setattr(gpu_check, "CHECKS", [gpu_check.check_right])
    monkeypatch.setattr(gpu_check.gpu_timings, "steps", lambda device: pytest.fail("a speed was measured on a red check"))
    status, report = run(gpu_check, monkeypatch, tmp_path)
    assert status == 1
    assert report["checks"]["check_right"]["status"] == "failed"
    assert report["timings"] == []


REHEARSAL = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import torch
from bench import gpu_check
from dante_kernels.kernels import barrier
cpu = torch.device("cpu")
barrier.counters(cpu, 1).fill_(5)  # as a launch that was broken off leaves it: a barrier there would never end
found = gpu_check.gpu_limits.measure(cpu, few=True)["device"]
rows = gpu_check.gpu_timings.many_models(cpu, counts=(1, 2), steps=1, nets=((20, 8, 10), (20, 8, 6, 10)))
print(json.dumps([found, rows]))
"""


def test_what_is_measured_on_a_gpu_is_rehearsed(gpu_check):
    """The numbers mean nothing here; but every one of them is in the cost model's table, and each model's pass is made."""
    from dante_kernels.kernels import cost

    command = [sys.executable, "-c", REHEARSAL, str(SCRIPT.parent.parent)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found, rows = json.loads(done.stdout.splitlines()[-1])
    assert set(found) | {"barrier", "barrier_program"} < set(cost.Device._fields)
    assert all(number["assumed"] == getattr(cost.H200, name) for name, number in found.items())
    assert gpu_check.gpu_limits.line({1: 1.0, 3: 2.0, 5: 3.0}) == pytest.approx((0.5, 0.5))
    kinds = itertools.product(("20-8-10", "20-8-6-10"), ("highest", "high"), (1, 2))
    assert [(row["net"], row["precision"], row["models"]) for row in rows] == [*kinds]
    assert rows[2]["times_of_the_first"] == 1


def test_the_form_with_one_barrier_is_checked_and_timed_whatever_is_faster(gpu_check, monkeypatch):
    from support import make_problem

    from dante_kernels.kernels import launcher, plan

    assert all(gpu_check.ONE_BARRIER in gpu_check.PASSES[precision] for precision in ("high", "medium"))
    shape = plan.Shape((784, 100, 10), 20, precision="high")
    with gpu_check.chosen_plan(gpu_check.ONE_BARRIER):
        assert plan.choose(shape, plan.H200, 132).tiles.one_barrier
        assert plan.choose(shape._replace(batch=33), plan.H200, 132).plan != "persistent"
    assert not plan.choose(shape, plan.H200, 132).tiles.one_barrier
    launched = []
    monkeypatch.setattr(launcher, "launch", lambda *args, **options: launched.append((args[1], options["ONE_BARRIER"])))
    monkeypatch.setattr("dante_kernels.kernels._most_programs", lambda tensor: 132)
    p = make_problem(seed=0, rows=40, n_in=784, widths=(100, 10))
    timed = functools.partial(gpu_check.gpu_timings.one_barrier, p, torch.arange(40), lr=torch.tensor(0.1))
    assert timed(batch=20) is None  # full float32 has no such form
    with gpu_check.matmul_precision("high"):
        timed(batch=20)()
        assert timed(batch=33) is None
    assert launched == [((13,), True)]


def test_without_a_gpu_it_says_so(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main() == 2
    assert "no CUDA device is visible to torch" in capsys.readouterr().err
