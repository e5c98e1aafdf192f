"""The command `dante`: what it prints and saves, what it refuses before training, and how it fails."""

import importlib.metadata
import json
import os
import pathlib
import re
import sys
import tempfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_data import Server, small_arrays, write_files
from torch import nn

import dante_kernels as dk
from dante_kernels import cli, data
from dante_kernels.ops import backends

QUICK = ("--hidden", "8", "--rounds", "1", "--batch-size", "100")
ROW = re.compile(r"^ *(\d+) +(\d+\.\d+) +(\d+\.\d\d) % +([\d,]+) +(\d+\.\d\d) *$", re.MULTILINE)


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def dante(monkeypatch, capsys):
    """Runs the command in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dante", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (caught.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def fits(monkeypatch):
    """Every call of fit with what it was given and gave, and a place to put something to do instead of it."""

    class Fits(list):
        instead = None

    calls, real = Fits(), dk.fit

    def spy(model, x, y, **settings):
        calls.append((model, settings))
        if calls.instead is not None:
            calls.instead()
        history = real(model, x, y, **settings)
        calls[-1] = (model, settings, history)
        return history

    monkeypatch.setattr(dk, "fit", spy)
    return calls


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# Training


def test_with_no_argument_digits_are_learned_and_the_saved_model_is_that_good(dante, tmp_path):
    status, out, err = dante("train")
    assert status == 0, err
    assert [int(row[0]) for row in ROW.findall(out)] == list(range(1, 13))
    assert "model saved to dante-digits.safetensors" in out
    model = nn.Sequential(nn.Linear(64, 100), nn.LeakyReLU(0.01), nn.Linear(100, 10), nn.LeakyReLU(0.01))
    model.load_state_dict(load_file("dante-digits.safetensors"))
    split = data.load_digits()
    accuracy = float((model(split.x_test).argmax(1) == split.y_test).double().mean())
    assert accuracy >= 0.96
    assert accuracy == pytest.approx(float(metadata_of("dante-digits.safetensors")["test_accuracy"]), abs=0.003)
    assert f"test accuracy {100 * float(metadata_of('dante-digits.safetensors')['test_accuracy']):.2f} %" in out


def test_the_file_says_what_it_is(dante):
    assert dante("train", *QUICK, "--hidden", "20,15", "--activation", "tanh", "--seed", "5", "--inner-steps", "3")[0] == 0
    metadata = metadata_of("dante-digits.safetensors")
    told = {name: metadata[name] for name in ("widths", "activation", "output_activation", "loss", "dataset", "dante_kernels")}
    try:
        version = importlib.metadata.version("dante_kernels")
    except importlib.metadata.PackageNotFoundError:
        version = dk.__version__
    assert told == {
        "widths": "64-20-15-10",
        "activation": "tanh",
        "output_activation": "tanh",
        "loss": "mse",
        "dataset": "digits",
        "dante_kernels": version,
    }
    settings = json.loads(metadata["settings"])
    asked = {"rounds": 1, "batch_size": 100, "seed": 5, "inner_steps": 3, "lr": 0.2, "schedule": "round-robin", "bias": True}
    assert asked.items() <= settings.items()
    shapes = [list(tensor.shape) for tensor in load_file("dante-digits.safetensors").values()]
    assert sorted(shapes) == sorted([[20, 64], [20], [15, 20], [15], [10, 15], [10]])


@pytest.mark.parametrize(
    ("loss", "kinds"),
    [
        ("mse", [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU]),
        ("cross_entropy", [nn.Linear, nn.ReLU, nn.Linear]),
        ("binary_cross_entropy", [nn.Linear, nn.ReLU, nn.Linear]),
    ],
)
def test_only_mse_has_an_activation_at_the_output(dante, fits, loss, kinds):
    status, _, err = dante("train", *QUICK, "--loss", loss, "--activation", "relu")
    assert status == 0, err
    assert [type(module) for module in fits[0][0]] == kinds
    assert metadata_of("dante-digits.safetensors")["output_activation"] == ("relu" if loss == "mse" else "identity")


def test_options_reach_the_training(dante, fits):
    options = "--schedule alternating --inner-epochs 0.5 --lr 0.07 --lr-schedule constant --relative-lr --momentum 0.3"
    assert dante("train", *QUICK, *options.split(), "--backend", "reference", "--no-bias", "--device", "cpu")[0] == 0
    model, settings, _ = fits[0]
    assert settings["schedule"] == dk.Alternating(rounds=1, inner_epochs=0.5)
    given = {"lr": 0.07, "lr_schedule": "constant", "relative_lr": True, "momentum": 0.3, "backend": "reference"}
    assert given.items() <= settings.items()
    assert settings["device"] == torch.device("cpu")
    assert model[0].bias is None
    assert model[2].bias is None


def test_inner_steps_cut_the_passes_but_do_not_change_their_number(dante, fits):
    for options in ([], ["--inner-steps", "4"]):
        assert dante("train", *QUICK, *options)[0] == 0
    whole, cut = (history for *_, history in fits)
    steps = -(-1437 // 100)
    assert [block.steps for block in whole.blocks] == [steps, steps]
    assert max(block.steps for block in cut.blocks) == 4
    assert cut.rounds[0].steps == whole.rounds[0].steps == 2 * steps


def test_the_seed_decides_the_weights_and_torchs_own_generator_has_no_part(dante):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(name))
        before = torch.get_rng_state()
        assert dante("train", *QUICK, "--seed", seed, "--output", f"{name}.safetensors")[0] == 0
        assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (load_file(f"{name}.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_a_directory_of_idx_files_is_trained_on(dante, tmp_path):
    write_files(tmp_path / "files", small_arrays(40, 20))
    status, out, err = dante("train", "fashion-mnist", "--data-dir", tmp_path / "files", *QUICK)
    assert status == 0, err
    assert "40 training and 20 test rows; 9-8-4" in out
    assert metadata_of("dante-fashion-mnist.safetensors")["dataset"] == "fashion-mnist"


def test_real_mnist_is_learned_from_its_original_files(dante, real_data):
    status, out, err = dante("train", "mnist", "--data-dir", real_data / "mnist", "--rounds", "1")
    assert status == 0, err
    assert "784-100-10" in out
    assert float(metadata_of("dante-mnist.safetensors")["test_accuracy"]) > 0.93


# What is printed


@pytest.mark.parametrize("rounds", [1, 12, 13, 30])
def test_the_table_has_at_most_twelve_rows_the_last_round_among_them(dante, fits, rounds):
    status, out, _ = dante("train", "--hidden", "2", "--batch-size", "1437", "--rounds", rounds)
    assert status == 0
    rows = ROW.findall(out)
    records = fits[0][2].rounds
    shown = [int(row[0]) for row in rows]
    assert len(shown) == min(rounds, 12)
    assert shown == sorted(set(shown))
    assert (shown[0], shown[-1]) == (1, rounds)
    seconds = 0.0
    for number, loss, accuracy, updated, elapsed in rows:
        record = records[int(number) - 1]
        seconds = sum(r.seconds for r in records[: int(number)])
        assert float(loss) == pytest.approx(record.loss, abs=1e-5)
        assert float(accuracy) == pytest.approx(100 * record.metrics["accuracy"], abs=0.006)
        assert int(updated.replace(",", "")) == record.weights_updated
        assert float(elapsed) == pytest.approx(seconds, abs=0.006)


def test_output_that_no_terminal_shows_has_no_control_codes_and_no_progress_bar(dante):
    _, out, err = dante("train", *QUICK)
    assert "\x1b" not in out + err
    assert "\r" not in out + err
    assert "training" not in err


def test_a_terminal_sees_progress_on_stderr(dante, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, err = dante("train", *QUICK)
    assert "training" in err
    assert "1/1" in err
    assert "1/1" not in out


def test_quiet_prints_only_where_the_model_is(dante, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    status, out, err = dante("train", *QUICK, "--quiet")
    assert (status, out) == (0, "dante-digits.safetensors\n")
    assert "\x1b" not in err


# Where the model goes


def test_without_output_nothing_is_overwritten(dante):
    for _ in range(3):
        assert dante("train", *QUICK)[0] == 0
    names = sorted(path.name for path in pathlib.Path().iterdir())
    assert names == ["dante-digits-2.safetensors", "dante-digits-3.safetensors", "dante-digits.safetensors"]


def test_explicit_output_that_exists_is_refused_before_training(dante, fits):
    path = pathlib.Path("model.safetensors")
    path.write_text("mine")
    status, _, err = dante("train", *QUICK, "--output", path)
    assert status == 2
    assert "model.safetensors" in err
    assert "--force" in err
    assert fits == []
    assert path.read_text() == "mine"


def test_force_overwrites_the_output(dante):
    path = pathlib.Path("model.safetensors")
    path.write_text("mine")
    assert dante("train", *QUICK, "--output", path, "--force")[0] == 0
    assert metadata_of(path)["dataset"] == "digits"
    assert [entry.name for entry in pathlib.Path().iterdir()] == ["model.safetensors"]


def test_a_file_that_appears_during_training_is_not_overwritten(dante, fits):
    path = pathlib.Path("model.safetensors")
    fits.instead = lambda: path.write_text("mine")
    status, out, _ = dante("train", *QUICK, "--output", path)
    assert status == 0
    assert path.read_text() == "mine"
    assert "model saved to model-2.safetensors" in out
    assert metadata_of("model-2.safetensors")["dataset"] == "digits"


@pytest.mark.parametrize("output", ["nowhere/model.safetensors", ".", "file/model.safetensors"])
def test_an_output_that_cannot_be_is_refused_before_training(dante, fits, output):
    pathlib.Path("file").touch()
    status, _, err = dante("train", *QUICK, "--output", output)
    assert status == 2
    assert "--output: expected a file" in err
    assert fits == []


def test_a_directory_that_takes_no_files_is_refused_before_training(dante, fits, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    status, _, err = dante("train", *QUICK)
    assert status == 2
    assert "cannot write into the directory '.': Permission denied" in err
    assert fits == []


def test_a_save_that_fails_leaves_nothing_behind(dante, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    status, out, err = dante("train", *QUICK)
    assert status == 1
    assert "No space left on device" in err
    assert "saved" not in out
    assert list(pathlib.Path().iterdir()) == []


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
        ("mnist --data-dir nowhere", 1, "'nowhere'"),
        ("mnist --data-dir .", 1, "lacks train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz"),
        ("--loss hinge", 1, "loss: expected one of mse, cross_entropy, binary_cross_entropy, got 'hinge'"),
        ("--lr 0", 1, "lr: expected"),
        ("--lr-schedule step", 1, "lr_schedule: expected"),
        ("--rounds 0", 1, "rounds: expected at least 1, got 0"),
        ("--inner-steps 0", 1, "inner_steps: expected at least 1, got 0"),
        ("--batch-size 0", 1, "batch_size: expected at least 1, got 0"),
        ("--momentum 1", 1, "momentum: expected"),
        ("--backend cuda", 1, "backend: expected auto or one of"),
        ("--hidden 5,5 --schedule alternating", 1, "Alternating trains one hidden layer"),
    ],
)
def test_a_mistake_is_answered_by_one_line(dante, arguments, status, says):
    got, _, err = dante("train", *arguments.split())
    assert got == status
    assert err.count("\n") == 1, err
    assert err.startswith("dante: ")
    assert says in err
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


# The rest


def test_info_says_which_backends_can_be_used_and_why_not(dante):
    status, out, _ = dante("info")
    assert status == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert lines["torch"] == importlib.metadata.version("torch")
    assert lines["matmul precision"] == torch.get_float32_matmul_precision()
    for name, reason in backends.availability().items():
        assert lines[f"backend {name}"] == ("usable" if reason is None else f"not usable: {reason}")
    assert {"dante_kernels", "python", "triton", "numpy", "CPU", "C++ extension"} <= set(lines)


def test_help_lists_the_commands_and_the_options(dante):
    status, out, _ = dante("--help")
    assert status == 0
    assert "train" in out
    assert "info" in out
    status, out, _ = dante("train", "--help")
    assert status == 0
    for option in ("--data-dir", "--hidden", "--inner-steps", "--lr-schedule", "--output", "--force"):
        assert option in out
