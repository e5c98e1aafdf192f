"""The command `dante`: what it prints and saves, and where it refuses to write."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_data import small_arrays, write_files
from torch import nn

import dante_kernels as dk
from dante_kernels import cli, data
from dante_kernels.ops import backends

QUICK = ("--hidden", "8", "--rounds", "1", "--batch-size", "100")
ROW = re.compile(r"^ *(\d+) +(\d+\.\d+) +(\d+\.\d\d) % +([\d,]+) +(\d+\.\d\d) *$", re.MULTILINE)


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    for name in ("DANTE_BACKEND", "DANTE_CPU_ISA", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
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


@pytest.fixture
def loads(monkeypatch):
    """The names of the data sets that were loaded."""
    names, real = [], data.load
    monkeypatch.setattr(data, "load", lambda name, directory=None: (names.append(name), real(name, directory))[1])
    return names


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# Training


def test_with_no_argument_digits_are_learned_and_the_saved_model_is_that_good(dante, tmp_path):
    status, out, err = dante("train")
    assert status == 0, err
    assert [int(row[0]) for row in ROW.findall(out)] == [1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16, 17]
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
    asked = {"rounds": 1, "batch_size": 100, "seed": 5, "inner_steps": 3, "lr": 0.004, "schedule": "round-robin", "bias": True}
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
    options = "--schedule alternating --inner-epochs 0.5 --lr 0.07 --lr-schedule constant --relative-lr"
    options += " --momentum 0.3 --direction sgd"
    assert dante("train", *QUICK, *options.split(), "--backend", "reference", "--no-bias", "--device", "cpu")[0] == 0
    model, settings, _ = fits[0]
    assert settings["schedule"] == dk.Alternating(rounds=1, inner_epochs=0.5)
    given = {"lr": 0.07, "lr_schedule": "constant", "relative_lr": True, "momentum": 0.3, "direction": "sgd"}
    given["backend"] = "reference"
    assert given.items() <= settings.items()
    assert settings["device"] == torch.device("cpu")
    assert model[0].bias is None
    assert model[2].bias is None


@pytest.mark.parametrize(
    ("options", "inner_epochs", "inner_steps", "parallel"),
    [
        ("", 1, 3, True),
        ("--in-turn", 1, 20, False),
        ("--lr 0.1", 1, 20, False),
        ("--lr 0.1 --parallel", 1, 3, True),
        ("--inner-steps 4", 1, 4, False),
        ("--inner-steps 4 --parallel", 1, 4, True),
        ("--inner-epochs 2", 2, None, False),
        ("--schedule alternating", 1, 20, False),
        ("--schedule alternating --parallel", 1, 3, True),
    ],
)
def test_turns_are_short_and_parallel_unless_they_are_given(dante, fits, options, inner_epochs, inner_steps, parallel):
    assert dante("train", *QUICK, *options.split())[0] == 0
    kind = dk.Alternating if "alternating" in options else dk.RoundRobin
    turns = {"inner_epochs": inner_epochs, "inner_steps": inner_steps, "parallel": parallel}
    assert fits[0][1]["schedule"] == kind(rounds=1, **turns)
    assert turns.items() <= json.loads(metadata_of("dante-digits.safetensors")["settings"]).items()


def test_inner_steps_cut_the_passes_but_do_not_change_their_number(dante, fits):
    for options in (["--inner-epochs", "1"], ["--inner-steps", "4"]):
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


@pytest.mark.parametrize("owner", ["kmnist", "mnist", None])
def test_files_of_another_data_set_are_trained_on_with_a_warning(dante, monkeypatch, tmp_path, owner):
    folder = write_files(tmp_path / "files", small_arrays(40, 20))
    labels = "t10k-labels-idx1-ubyte.gz"
    if owner is not None:
        sums = {**data.SOURCES[owner].sha256, labels: hashlib.sha256((folder / labels).read_bytes()).hexdigest()}
        monkeypatch.setitem(data.SOURCES, owner, data.SOURCES[owner]._replace(sha256=sums))
    status, out, err = dante("train", "mnist", "--data-dir", folder, *QUICK)
    assert status == 0
    assert "model saved" in out
    warning = f"dante: warning: the files in {str(folder)!r} are kmnist's, not mnist's\n"
    assert err == (warning if owner == "kmnist" else "")


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
    assert out.splitlines()[1].split("  ")[-2:] == ["weights updated so far", "seconds so far"]
    assert re.findall(r"^(\d+) of (\d+) rounds are shown$", out, re.MULTILINE) == ([("12", str(rounds))] if rounds > 12 else [])
    seconds = 0.0
    for number, loss, accuracy, updated, elapsed in rows:
        record = records[int(number) - 1]
        seconds = sum(r.seconds for r in records[: int(number)])
        assert float(loss) == pytest.approx(record.loss, abs=1e-5)
        assert float(accuracy) == pytest.approx(100 * record.metrics["accuracy"], abs=0.006)
        assert int(updated.replace(",", "")) == record.weights_updated
        assert float(elapsed) == pytest.approx(seconds, abs=0.006)


def test_the_table_fits_a_terminal_of_80_columns(dante, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = dante("train", *QUICK)
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert "weights updated so far" in plain
    assert "seconds so far" in plain
    assert "…" not in plain


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
    assert "--output: expected a" in err
    assert fits == []


def test_a_directory_that_takes_no_files_is_refused_before_training(dante, fits, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "touch", refuse)
    status, _, err = dante("train", *QUICK)
    assert status == 2
    assert "--output: cannot write 'dante-digits.safetensors': Permission denied" in err
    assert fits == []


def test_a_name_that_leaves_no_room_for_the_temporary_one_is_refused_before_training(dante, fits):
    status, _, err = dante("train", *QUICK, "--output", "m" * 252)
    assert status == 2
    assert "--output: cannot write" in err
    assert fits == []


def test_what_is_no_regular_file_is_refused_even_with_force(dante, fits):
    os.mkfifo("pipe")
    status, _, err = dante("train", *QUICK, "--output", "pipe", "--force")
    assert status == 2
    assert "--output: expected a regular file" in err
    assert fits == []


def test_a_link_is_followed_and_the_model_is_readable_as_any_file(dante):
    pathlib.Path("disk").mkdir()
    pathlib.Path("link.safetensors").symlink_to("disk/model.safetensors")
    assert dante("train", *QUICK, "--output", "link.safetensors")[0] == 0
    pathlib.Path("plain").touch()
    assert pathlib.Path("link.safetensors").is_symlink()
    assert pathlib.Path("disk/model.safetensors").stat().st_mode == pathlib.Path("plain").stat().st_mode


def test_a_network_too_large_for_the_machine_is_one_line(dante):
    status, _, err = dante("train", "--hidden", "99999999999999")
    assert status == 1
    assert len(err.splitlines()) == 1


def test_a_save_that_fails_leaves_nothing_behind(dante, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    status, out, err = dante("train", *QUICK)
    assert status == 1
    assert "No space left on device" in err
    assert "saved" not in out
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
    assert lines["CPU kernels"] == (backends.cpu_kernels() or "none")
    assert {"dante_kernels", "python", "triton", "numpy", "CPU", "C++ extension"} <= set(lines)


def test_info_says_that_an_instruction_set_cannot_be_had():
    environment = os.environ | {"DANTE_CPU_ISA": "mmx"}
    command = [sys.executable, "-m", "dante_kernels.cli", "info"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(
        r"^backend cpp +not usable: (DANTE_CPU_ISA: expected avx512, avx2 or generic, got 'mmx'|the C\+\+)", out, re.M
    )
    assert re.search(r"^CPU kernels +none$", out, re.M)


def test_info_shows_the_variables_that_are_set(dante, monkeypatch):
    assert not re.search("^DANTE_", dante("info")[1], re.MULTILINE)
    monkeypatch.setenv("DANTE_BACKEND", "reference")
    monkeypatch.setenv("DANTE_CPU_ISA", "generic")
    out = dante("info")[1]
    assert re.search(r"^DANTE_BACKEND +reference$", out, re.MULTILINE)
    assert re.search(r"^DANTE_CPU_ISA +generic$", out, re.MULTILINE)


def test_version_is_that_of_the_package(dante, monkeypatch):
    monkeypatch.setattr(cli, "version_of", lambda package: f"that of {package}")
    assert dante("--version") == (0, "dante_kernels that of dante_kernels\n", "")


def test_the_readmes_snippet_loads_a_saved_model(dante):
    assert dante("train", "--rounds", "1")[0] == 0
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (snippet,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "load_file" in block)
    names = {}
    exec(snippet, names)
    split = data.load_digits()
    accuracy = float((names["model"](split.x_test).argmax(1) == split.y_test).double().mean())
    assert accuracy == pytest.approx(float(metadata_of("dante-digits.safetensors")["test_accuracy"]), abs=0.003)


def test_help_lists_the_commands_and_the_options(dante):
    status, out, _ = dante("--help")
    assert status == 0
    assert "train" in out
    assert "info" in out
    status, out, _ = dante("train", "--help")
    assert status == 0
    for option in ("--data-dir", "--hidden", "--inner-steps", "--lr-schedule", "--output", "--force"):
        assert option in out
