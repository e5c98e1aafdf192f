"""The script that proves the kernels on a GPU is rehearsed without one, so that it runs when there is one."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

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
    monkeypatch.setattr(gpu_check, "timings", lambda device: pytest.fail("a speed was measured on a red check"))
    status, report = run(gpu_check, monkeypatch, tmp_path)
    assert status == 1
    assert report["checks"]["check_right"]["status"] == "failed"
    assert report["timings"] == []


def test_without_a_gpu_it_says_so(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main() == 2
    assert "no CUDA device is visible to torch" in capsys.readouterr().err
