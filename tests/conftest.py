"""Fixtures that several tests share. Triton kernels run interpreted here, which must be said before triton is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("DANTE_BACKEND", None)

import importlib.util
import pathlib
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from dante_kernels.ops import backends

# The same examples each time; --hypothesis-profile=explore tries new ones. There a result of a few numbers may now and then
# miss the error rule, since torch's own error in it can be nothing by luck.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tests that are too long for every change."""
    what = (
        "compile for all compute capabilities, not one; 20 schedules of a kernel, not 3, 10 of a broken one, not 2; every size"
    )
    parser.addoption("--nightly", action="store_true", help=what)


@pytest.fixture
def schedules(request: pytest.FixtureRequest) -> range:
    """Seeds of unfair schedules of a kernel's programs; in each of them what is broken must be seen."""
    return range(10 if request.config.getoption("--nightly") else 2)


@pytest.fixture
def pairs(request: pytest.FixtureRequest) -> int:
    """Of how many pairs of a layer's inputs and outputs one is tried; all values of both come up."""
    return 1 if request.config.getoption("--nightly") else 7


@pytest.fixture
def unfair(request: pytest.FixtureRequest) -> range:
    """Seeds of unfair schedules of a kernel's programs; all of them must give the same bits."""
    return range(20 if request.config.getoption("--nightly") else 3)


@pytest.fixture(scope="session", autouse=True)
def _interruptions_come_through() -> None:
    """As in a terminal: a shell's background jobs ignore Ctrl-C, and what they start does too, so tests would wait for ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _products_do_not_depend_on_the_row() -> Iterator[None]:
    """Sum every element of an interpreted tile's product in one order, as a GPU does.

    The interpreter calls numpy's BLAS, which sums a row of a tile in another order than the next one; then no test of
    equal bits would speak of the kernels.
    """
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.einsum("...ik,...kj->...ij", a.data, b.data, dtype=d.data.dtype, optimize=False)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    yield
    patch.undo()


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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One of torch's threads, for tiny networks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
