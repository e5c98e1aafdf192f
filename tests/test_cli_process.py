"""The command `dante` when something is wrong, and as a process of its own: Ctrl-C, `python -m`, missing packages."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import test_cli
from test_cli import QUICK
from test_data import Server

from dante_kernels import cli, data

dante, fits, loads = test_cli.dante, test_cli.fits, test_cli.loads
in_a_directory_of_its_own = test_cli.in_a_directory_of_its_own


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ("cifar", 2, "expected one of digits, mnist, fashion-mnist, kmnist, got 'cifar'"),
        ("--hidden 0", 2, "--hidden: expected widths above 0, separated by commas, such as 400,200, got '0'"),
        ("--hidden 10,,5", 2, "--hidden"),
        ("--hidden ten", 2, "--hidden"),
        ("--activation gelu", 2, "--activation: expected one of"),
        ("--schedule stacked", 2, "--schedule: expected round-robin or alternating, got 'stacked'"),
        ("--device tpu", 2, "--device: expected auto, cpu, cuda"),
        ("--device cuda:99", 2, "--device: expected a device that is there, got 'cuda:99'"),
        ("--seed 18446744073709551616", 2, "--seed: expected a number from 0"),
        ("--force", 2, "--force: goes with --output"),
        ("--data-dir .", 2, "--data-dir: digits come with scikit-learn"),
        ("--loss hinge", 2, "--loss: expected one of mse, cross_entropy, binary_cross_entropy, got 'hinge'"),
        ("--lr 0", 2, "--lr: expected a finite number above 0, got 0.0"),
        ("--lr inf", 2, "--lr: expected a finite number above 0, got inf"),
        ("--lr nan", 2, "--lr: expected a finite number above 0, got nan"),
        ("--lr-schedule step", 2, "--lr-schedule: expected constant or cosine, got 'step'"),
        ("--rounds 0", 2, "--rounds: expected at least 1, got 0"),
        ("--inner-steps 0", 2, "--inner-steps: expected at least 1, got 0"),
        ("--inner-epochs 0", 2, "--inner-epochs: expected a number above 0, got 0"),
        ("--batch-size 0", 2, "--batch-size: expected at least 1, got 0"),
        ("--momentum 1", 2, "--momentum: expected a number from 0 to below 1, got 1.0"),
        ("--momentum -0.1", 2, "--momentum: expected a number from 0 to below 1, got -0.1"),
        ("--direction up", 2, "--direction: expected one of sngd, nesterov, sgd, adam, adagrad, rmsprop, got 'up'"),
        ("--direction nesterov --lr 0.1", 2, "--direction: 'nesterov' needs a momentum above 0"),
        ("--direction adam --lr 0.01 --momentum 0.9", 2, "--momentum: expected 0 with direction='adam', got 0.9"),
        ("--backend cuda", 2, "--backend: expected one of auto, reference, cpp, triton, got 'cuda'"),
        ("--backend triton --device cpu", 2, "--backend: triton cannot be used here: it runs on CUDA devices, not on cpu"),
        ("--hidden 5,5 --schedule alternating", 2, "--schedule: alternating trains one hidden layer, but --hidden has 2"),
        ("mnist --data-dir nowhere", 1, "'nowhere'"),
        ("mnist --data-dir .", 1, "lacks train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz"),
    ],
)
def test_a_mistake_is_answered_by_one_line_before_loading_where_that_can_be(dante, loads, monkeypatch, arguments, status, says):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    got, out, err = dante("train", *arguments.split())
    assert (got, out) == (status, "")
    assert err.count("\n") == 1, err
    assert err.startswith("dante: ")
    assert says in err
    assert len(loads) == (0 if status == 2 else 1)
    assert list(pathlib.Path().iterdir()) == []


def test_a_backend_that_the_environment_names_wrongly_is_refused_before_loading(dante, loads, monkeypatch):
    monkeypatch.setenv("DANTE_BACKEND", "cuda")
    message = "dante: DANTE_BACKEND: expected one of auto, reference, cpp, triton, got 'cuda'\n"
    assert dante("train") == (2, "", message)
    assert loads == []
    assert dante("train", *QUICK, "--backend", "reference")[0] == 0


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("inner_steps: expected less", "--inner-steps: expected less"),
        ("lr: expected less, got a: b", "--lr: expected less, got a: b"),
        ("y: expected more", "y: expected more"),
        ("dataset: expected another", "dataset: expected another"),
        ("lr", "lr"),
    ],
)
def test_what_the_library_says_of_an_argument_is_said_of_the_option(dante, fits, message, printed):
    def fail():
        raise ValueError(message)

    fits.instead = fail
    status, _, err = dante("train", *QUICK)
    assert (status, err) == (1, f"dante: {printed}\n")


def test_training_that_diverges_suggests_a_lower_lr(dante):
    options = ("--lr", "1e30", "--lr-schedule", "constant", "--activation", "identity", "--backend", "reference")
    status, _, err = dante("train", "--hidden", "8", "--rounds", "3", *options)
    assert status == 1
    assert re.fullmatch(r"dante: round [1-3]: a gradient is not finite; try a lower --lr than 1e\+30\n", err), err
    assert list(pathlib.Path().iterdir()) == []


def test_an_error_of_several_lines_is_printed_as_one(dante, fits):
    def fail():
        raise FloatingPointError("layer 0:\n  the gradient's norm is nan")

    fits.instead = fail
    status, _, err = dante("train", *QUICK)
    assert (status, err) == (1, "dante: layer 0: the gradient's norm is nan\n")


def test_with_no_network_training_says_in_one_line_what_to_do(dante, monkeypatch, tmp_path):
    server = Server()
    server.stop()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(data.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setitem(data.SOURCES, "kmnist", data.SOURCES["kmnist"]._replace(urls=(server.url,)))
    status, out, err = dante("train", "kmnist")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1, err
    assert all(text in err for text in ("kmnist", "cannot be reached", "--data-dir DIR", *data.FILES))


def test_interrupted_training_ends_with_130_and_saves_nothing(dante, fits):
    def interrupt():
        raise KeyboardInterrupt

    fits.instead = interrupt
    assert dante("train", *QUICK)[::2] == (130, "dante: interrupted\n")
    assert list(pathlib.Path().iterdir()) == []


# As a process


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


def test_the_module_can_be_run():
    arguments = [sys.executable, "-m", "dante_kernels.cli", "train", "--hidden", "2", "--rounds", "1", "--quiet"]
    root = str(pathlib.Path(cli.__file__).parents[1])
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    assert (done.returncode, done.stdout) == (0, "dante-digits.safetensors\n"), done.stderr
    assert pathlib.Path("dante-digits.safetensors").is_file()
