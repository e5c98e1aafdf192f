"""Fixtures that several tests share. Triton kernels run interpreted here, which must be said before triton is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("DANTE_BACKEND", None)

import pathlib

import pytest
import torch

from dante_kernels.ops import backends


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that cannot run here is skipped with its reason."""
    reason = backends.why_not(request.param, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of the real data sets; tests that need it are skipped where it is absent."""
    default = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"
    folder = pathlib.Path(os.environ.get("DANTE_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; name its folder in DANTE_TEST_DATA")
    return folder
