"""Importing the package is cheap and silent, and needs neither a GPU nor triton."""

import subprocess
import sys

import pytest

SILENT = """
import sys
{before}
import dante_kernels as dk
import torch
assert not torch.cuda.is_initialized()
for name in ("triton", "sklearn", "typer", "rich", "pooch", "safetensors", "torch._inductor", "dante_kernels.kernels"):
    assert name not in sys.modules or sys.modules[name] is None, name
{after}
"""
BLOCK_TRITON = "sys.modules['triton'] = None"
TRAIN = """
import logging; logging.disable(logging.WARNING)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
dk.fit(model, torch.randn(20, 4), torch.randint(0, 2, (20,)), schedule=dk.RoundRobin(rounds=1), batch_size=5)
from dante_kernels.ops import backends
assert "triton" in backends.availability()
"""


@pytest.mark.parametrize("before", ["", BLOCK_TRITON], ids=["with triton", "without triton"])
@pytest.mark.parametrize("after", ["", TRAIN], ids=["import", "train"])
def test_importing_is_silent_and_starts_nothing(before, after):
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SILENT.format(before=before, after=after)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr == ""


def test_without_triton_the_backend_says_so():
    code = f"import sys; {BLOCK_TRITON}\nfrom dante_kernels.ops import backends\nprint(backends.availability()['triton'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "triton is not installed" in run.stdout


def test_the_public_names_are_there():
    import dante_kernels as dk

    for name in ("fit", "Alternating", "RoundRobin", "StackedAutoencoder", "GeneralizedReLU", "ops"):
        assert name in dk.__all__
    assert all(hasattr(dk, name) for name in dk.__all__)
