"""The command `dante` as a process of its own: Ctrl-C, and what it says where packages are missing."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from dante_kernels import cli


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(*arguments, without=(), **options):
    """The command in a process of its own, where the modules named cannot be imported."""
    code = f"import sys\nfor name in {list(without)!r}: sys.modules[name] = None\nfrom dante_kernels.cli import main\nmain()"
    root = str(pathlib.Path(cli.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, **options},
    )


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_a_running_training_with_one_line():
    process = start("train", "--rounds", "100000", TTY_COMPATIBLE="0", FORCE_COLOR="")
    try:
        assert process.stdout.readline().startswith("digits: 1,437 training")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "dante: interrupted"
    assert "Traceback" not in err
    assert list(pathlib.Path().iterdir()) == []


@pytest.mark.parametrize(
    ("without", "arguments", "extra"),
    [
        (["typer"], ["--help"], "cli"),
        (["rich", "typer"], ["train"], "cli"),
        (["sklearn"], ["train"], "sklearn"),
        (["safetensors", "safetensors.torch"], ["train"], "cli"),
        (["pooch"], ["train", "mnist"], "cli"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_missing_extra_is_named(without, arguments, extra):
    process = start(*arguments, without=without)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert err.count("\n") == 1, err
    assert f'pip install "dante_kernels[{extra}]"' in err


def test_info_works_without_triton():
    process = start("info", without=["triton"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "triton is not installed" in out
