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
WITHOUT_A_GPU = ["graph_replays", "graph_capture", "memcheck", "racecheck"]
CPU = torch.device("cpu")


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
    assert {row["status"] for name, row in checks.items() if name not in WITHOUT_A_GPU} == {"passed"}
    assert all(checks[name]["status"] == "skipped" for name in WITHOUT_A_GPU)


def test_a_wrong_kernel_is_reported(gpu_check, monkeypatch, tmp_path):
    from dante_kernels import kernels

    real = kernels.layer_forward
    monkeypatch.setattr(kernels, "layer_forward", lambda *args: real(*args) * 1.00001)
    monkeypatch.setattr(gpu_check.gpu_checks, "names_and_plans", lambda: [("right", "auto"), ("skips", "auto")])
    status, report = run(gpu_check, monkeypatch, tmp_path)
    assert status == 1
    assert report["checks"]["right, auto"]["status"] == "failed"
    assert "results are further from float64 than allowed: highest" in report["checks"]["right, auto"]["what"]
    assert report["checks"]["skips, auto"]["status"] == "passed"
    assert report["timings"] == []


def test_no_plan_is_timed_with_a_check_of_its_own_that_fails(gpu_check):
    every = [f"{name}, {which}" if name in gpu_check.gpu_checks.OF_A_PLAN else name
             for name, which in gpu_check.gpu_checks.names_and_plans()]  # fmt: skip
    good = {name: {"status": "passed"} for name in [*every, "memcheck", "racecheck"]}
    assert gpu_check.sound_plans(good) == [*gpu_check.PLANS, "persistent", gpu_check.ONE_BARRIER]
    bad = {"status": "failed"}
    assert gpu_check.sound_plans(good | {"repeats, fused": bad}) == ["streamed", "library", gpu_check.ONE_BARRIER]
    assert gpu_check.sound_plans(good | {"right, auto": bad}) == ["fused", "streamed", "library", gpu_check.ONE_BARRIER]
    for name in ("short_blocks_and_models", "memcheck"):
        assert gpu_check.sound_plans(good | {name: bad}) == []
    assert gpu_check.sound_plans(good | {"racecheck": {"status": "skipped"}}) == gpu_check.sound_plans(good)


def test_a_check_in_a_process_of_its_own_takes_nothing_with_it(gpu_check):
    (row,), wrong = gpu_check.in_a_process("skips", "fused", CPU, 300)
    assert (row["status"], wrong) == ("passed", "")
    assert gpu_check.in_a_process("skips", "fused", CPU, 0) == ([], "no end after 0 s")
    rows, wrong = gpu_check.in_a_process("no such check", "fused", CPU, 300)
    assert rows[0]["status"] == "failed"
    assert "KeyError" in rows[0]["what"]
    rows, wrong = gpu_check.in_a_process("timings", "fused", CPU, 300)  # which needs a GPU
    assert rows == []
    assert wrong.startswith("exit status 1")


def test_operands_cut_to_tf32_are_as_far_off_as_ten_bits(gpu_check):
    generator = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(shape, generator=generator) for shape in ((30, 40), (20, 40), (20,)))
    exact = torch.nn.functional.linear(a.double(), b.double(), bias.double())
    with gpu_check.gpu_checks.Tf32Products():
        got = torch.nn.functional.linear(a, b, bias)
        few_bits = torch.nn.functional.linear(a.bfloat16().float(), b.bfloat16().float())
    assert torch.equal(few_bits, a.bfloat16().float() @ b.bfloat16().float().t())
    assert 2**-12 < (got - exact).norm() / exact.norm() < 2**-9


AHEAD = """
import json, sys
sys.path[:0] = [sys.argv[1]]
from pathlib import Path
import triton
from bench import gpu_compile  # which says where the rest is
from bench import gpu_checks, gpu_timings
from dante_kernels.kernels import fused, launcher, layers, library, persistent, plan, step, streamed

gpu_checks.names_and_plans = lambda: [("skips", "auto"), ("skips", "fused")]
gpu_timings.launch_all = lambda: None
launch, compiled, launched = launcher.launch, [], []
triton.knobs.compilation.listener = lambda **what: compiled.append(not what["cache_hit"])

def forget():
    for module in (fused, layers, library, persistent, step, streamed):
        for function in vars(module).values():
            if isinstance(function, triton.JITFunction):
                function.device_caches.clear()

class Launcher:
    def __init__(self, source, metadata):
        self.metadata = metadata
    def __call__(self, *arguments):
        launched.append([self.metadata.name, self.metadata.launch_cooperative_grid])

class Utils:
    def load_binary(self, *arguments):
        return 1, 1, 0, 0, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

reports = []
for _ in range(2):
    reports.append(gpu_compile.work(Path(sys.argv[2]), 90, plan.H200))
    forget()
anew = [*compiled]
gpu_compile.Driver.launcher_cls, gpu_compile.Driver.utils = Launcher, Utils()
triton.knobs.runtime.jit_cache_hook = None
launcher.launch = launch
gpu_compile.launch_all()
print(json.dumps([reports, anew, compiled[len(anew):], launched]))
"""


def test_kernels_are_compiled_once_and_found_again_by_what_launches_them(gpu_check, tmp_path):
    """By Triton's own launch, all but what asks the driver for a GPU: the persistent kernel's is cooperative."""
    claims = tmp_path / "claims"
    claims.mkdir()
    command = [sys.executable, "-c", AHEAD, str(SCRIPT.parent.parent), str(claims)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (first, second), compiled, compiled_by_launches, launched = json.loads(done.stdout.splitlines()[-1])
    assert (first["failed"], second["failed"]) == ({}, {})
    assert first["kernels"] > second["kernels"] == 0
    assert compiled == [True] * first["kernels"]
    assert compiled_by_launches == [False] * first["kernels"]
    assert {name for name, cooperative in launched if cooperative} == {"persistent"}
    assert len({name for name, cooperative in launched if not cooperative}) > 2


REHEARSAL = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import torch
from bench import gpu_check
from dante_kernels.kernels import barrier
cpu = torch.device("cpu")
barrier.counters(cpu, 1).fill_(5)  # as a launch that was broken off leaves it: a barrier there would never end
found = gpu_check.gpu_limits.measure(cpu, few=True)["device"]
rows = [*gpu_check.gpu_timings.many_models(cpu, counts=(1, 2), steps=1, nets=((20, 8, 10), (20, 8, 6, 10)))]
rounds = [*gpu_check.gpu_timings.rounds(cpu, rows=40, count=2, peer=False, nets=((20, 8, 10),))]
print(json.dumps([found, rows, rounds]))
"""


def test_what_is_measured_on_a_gpu_is_rehearsed(gpu_check):
    """The numbers mean nothing here; but every one of them is in the cost model's table, and each model's pass is made."""
    from dante_kernels.kernels import cost

    command = [sys.executable, "-c", REHEARSAL, str(SCRIPT.parent.parent)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found, rows, rounds = json.loads(done.stdout.splitlines()[-1])
    assert set(found) | {"barrier", "barrier_program"} < set(cost.Device._fields)
    assert all(number["assumed"] == getattr(cost.H200, name) for name, number in found.items())
    assert gpu_check.gpu_limits.line({1: 1.0, 3: 2.0, 5: 3.0}) == pytest.approx((0.5, 0.5))
    kinds = itertools.product(("20-8-10", "20-8-6-10"), ("highest", "high"), (1, 2))
    assert [(row["net"], row["precision"], row["models"]) for row in rows] == [*kinds]
    assert rows[2]["times_of_the_first"] == 1
    kinds = itertools.product(("highest", "high"), ("20 in turn", "3 in parallel"))
    assert [(row["precision"], row["method"]) for row in rounds] == [*kinds]
    assert all(row["us_per_mini_batch"] > 0 for row in rounds)


def test_the_form_with_one_barrier_is_checked_and_timed_whatever_is_faster(gpu_check, monkeypatch):
    from support import make_problem

    from dante_kernels.kernels import launcher, plan

    at = gpu_check.gpu_checks.Setting(CPU, gpu_check.ONE_BARRIER)
    assert at.precisions() == ("high", "medium")
    assert at._replace(few=True).precisions() == ("high",)
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
    with gpu_check.gpu_timings.matmul_precision("high"):
        timed(batch=20)()
        assert timed(batch=33) is None
    assert launched == [((13,), True)]


def test_compiled_peers_are_timed_as_far_as_they_are_here(gpu_check, capsys):
    names = ("torch SGD", gpu_check.gpu_timings.COMPILED[-1])
    rows = [*gpu_check.gpu_timings.compiled_peers(CPU, names, nets=((8, 6, 3),))]
    kinds = itertools.product(("highest", "high"), (20, 100, 500))
    assert [(row["precision"], row["batch"], row["method"]) for row in rows] == [(*kind, "torch SGD") for kind in kinds]
    assert "CUDA graphs need a GPU" in capsys.readouterr().out
    assert set(gpu_check.gpu_timings.COMPILED) <= set(gpu_check.gpu_timings.workloads.METHODS)


def test_without_a_gpu_it_says_so(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main() == 2
    assert "no CUDA device is visible to torch" in capsys.readouterr().err
