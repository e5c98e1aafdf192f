"""The command `dante`: train a network on a data set and save it, and say what is installed here.

typer, rich, safetensors and pooch come with the extra ``cli``, scikit-learn with ``sklearn``. A command that lacks one
says which extra to install. What a user can get wrong is answered by one line on stderr: exit status 2 for options that
this file checks, 1 for what the data or the training rejects, 130 for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

with contextlib.suppress(ImportError):  # `main` says what to install
    import typer

if TYPE_CHECKING:
    from torch import device as Device
    from torch import nn

    from .activations import Activation
    from .data import Dataset
    from .training import History

SCHEDULES = ("round-robin", "alternating")
MAX_ROWS = 12


class UsageError(ValueError):
    """An option that this file checks is wrong."""


def main() -> None:
    """Run the command line; the entry point of `dante`."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError:
        print('dante: the command line needs typer and rich: pip install "dante_kernels[cli]"', file=sys.stderr)
        raise SystemExit(1) from None
    app = typer.Typer(
        help="Train neural networks by DANTE: layer by layer, by stochastic normalized gradient descent.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(train)
    app.command()(info)
    app()


def train(
    dataset: Annotated[str, typer.Argument(help="digits, mnist, fashion-mnist or kmnist")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="directory with the four IDX files of the data set; fetched where not given")
    ] = None,
    hidden: Annotated[str, typer.Option(help="widths of the hidden layers, such as 400,200")] = "100",
    activation: Annotated[
        str, typer.Option(help="leaky_relu (0.01), relu, sigmoid, tanh or identity; at the output only with mse")
    ] = "leaky_relu",
    loss: Annotated[str, typer.Option(help="mse, cross_entropy or binary_cross_entropy")] = "mse",
    rounds: Annotated[int, typer.Option(help="rounds: in each, every layer makes its passes")] = 12,
    inner_epochs: Annotated[float, typer.Option(help="passes of a layer over the data in a round")] = 1.0,
    inner_steps: Annotated[
        int | None, typer.Option(help="cut the passes into blocks of so many mini-batches, the layers taking turns")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows in a mini-batch", show_default="20 for digits, else 100")] = None,
    lr: Annotated[float, typer.Option(help="learning rate: the length of a step in weight space")] = 0.2,
    lr_schedule: Annotated[str, typer.Option(help="constant or cosine")] = "cosine",
    relative_lr: Annotated[bool, typer.Option("--relative-lr", help="step length is lr times the layer's norm")] = False,
    momentum: Annotated[float, typer.Option(help="momentum, from 0 to below 1")] = 0.0,
    schedule: Annotated[str, typer.Option(help="round-robin, or alternating for one hidden layer")] = "round-robin",
    seed: Annotated[int, typer.Option(help="of the initial weights and of the shuffling")] = 0,
    backend: Annotated[str, typer.Option(help="auto, reference, cpp or triton")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda")] = "auto",
    no_bias: Annotated[bool, typer.Option("--no-bias", help="layers without bias")] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="where to save the model", show_default="dante-DATASET.safetensors, numbered where it exists"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite --output where it exists")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only where the model was saved")] = False,
) -> None:
    """Train a network on a data set, print what came of it, and save the weights.

    The defaults train 64-100-10 on scikit-learn's digits in a few seconds.
    """
    with _errors_in_one_line():
        from . import data

        widths = _widths(hidden)
        if dataset not in data.NAMES:
            raise UsageError(f"dataset: expected one of {', '.join(data.NAMES)}, got {dataset!r}")
        if dataset == "digits" and data_dir is not None:
            raise UsageError("--data-dir: digits come with scikit-learn; it goes with the other data sets")
        if schedule not in SCHEDULES:
            raise UsageError(f"--schedule: expected {' or '.join(SCHEDULES)}, got {schedule!r}")
        if not 0 <= seed < 2**63:
            raise UsageError(f"--seed: expected a number from 0 to 2^63 - 1, got {seed}")
        if force and output is None:
            raise UsageError("--force: goes with --output; without it nothing is overwritten")
        target = Path(f"dante-{dataset}.safetensors") if output is None else output
        _check_output(target, may_exist=force or output is None)
        data.require("safetensors.torch", "cli", "saving the model")
        layer_activation, to = _activation(activation), _device(device)

        with _spinner(f"loading {dataset}", quiet):
            split = data.load(dataset, data_dir)
        widths = [split.x_train.shape[1], *widths, split.classes]
        last = layer_activation if loss == "mse" else None
        model = _build(widths, layer_activation, last, seed, bias=not no_bias)
        fit_settings: dict[str, Any] = {
            "loss": loss,
            "lr": lr,
            "lr_schedule": lr_schedule,
            "relative_lr": relative_lr,
            "batch_size": (20 if dataset == "digits" else 100) if batch_size is None else batch_size,
            "momentum": momentum,
            "seed": seed,
            "backend": backend,
        }
        schedule_settings = {"rounds": rounds, "inner_epochs": inner_epochs, "inner_steps": inner_steps}
        shape = "-".join(map(str, widths))
        if not quiet:
            rows = f"{len(split.x_train):,} training and {len(split.x_test):,} test rows"
            print(f"{dataset}: {rows}; {shape}, {activation}, {loss}, on {to}", flush=True)
        history = _fit(model, split, schedule, schedule_settings, fit_settings, to, quiet)
        metadata = {
            "widths": shape,
            "activation": activation,
            "output_activation": "identity" if last is None else activation,
            "loss": loss,
            "dataset": dataset,
            "dante_kernels": _version("dante_kernels"),
            "settings": json.dumps({"schedule": schedule, **schedule_settings, **fit_settings, "bias": not no_bias}),
            "test_accuracy": str(history.rounds[-1].metrics["accuracy"]),
        }
        saved = _save(model, target, metadata, overwrite=force)
        if quiet:
            print(saved)
        else:
            _print_table(history)
            print(f"test accuracy {100 * history.rounds[-1].metrics['accuracy']:.2f} %; model saved to {saved}")


def info() -> None:
    """Print versions, the device, and which backends can be used here and why not."""
    with _errors_in_one_line():
        import torch

        from .ops import backends

        library = next(iter(sorted(Path(__file__).parent.glob("_C*.so"))), None)
        cpu = f"{_cpu_model()}, {os.cpu_count()} logical CPUs, {torch.get_num_threads()} threads for torch"
        lines = [
            ("dante_kernels", _version("dante_kernels")),
            ("python", platform.python_version()),
            *((package, _version(package)) for package in ("torch", "triton", "numpy")),
            ("CPU", cpu),
            *(_gpu(index) for index in range(torch.cuda.device_count())),
            *([] if torch.cuda.is_available() else [("CUDA device", "none is visible to torch")]),
            ("C++ extension", "not built" if library is None else f"built ({library.name})"),
        ]
        for name, reason in backends.availability().items():
            lines.append((f"backend {name}", "usable" if reason is None else f"not usable: {reason}"))
        lines.append(("matmul precision", torch.get_float32_matmul_precision()))
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            print(f"{name:{width}}  {text}")


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Print what a user can cause as one line, and exit."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        raise
    except UsageError as error:
        _fail(str(error), 2)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        _fail(str(error) or type(error).__name__, 1)


def _fail(message: str, status: int) -> NoReturn:
    print("dante: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(status)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "dante_kernels":
            from . import __version__

            return __version__
        return "not installed"


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(index: int) -> tuple[str, str]:
    import torch

    found = torch.cuda.get_device_properties(index)
    memory = found.total_memory / 2**30
    return f"CUDA device {index}", f"{found.name}, sm_{found.major}{found.minor}, {memory:.0f} GiB"


def _widths(hidden: str) -> list[int]:
    parts = [part.strip() for part in hidden.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--hidden: expected widths above 0, separated by commas, such as 400,200, got {hidden!r}")
    return [int(part) for part in parts]


def _activation(name: str) -> Activation:
    from . import activations

    if name not in activations.NAMES:
        raise UsageError(f"--activation: expected one of {', '.join(activations.NAMES)}, got {name!r}")
    return activations.NAMES[name]


def _device(name: str) -> Device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UsageError(f"--device: expected auto, cpu, cuda or cuda:0, cuda:1 and so on, got {name!r}")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise UsageError(f"--device: expected a device that is there, got {name!r}; CUDA devices visible to torch: {count}")
    return torch.device(name)


def _build(widths: list[int], activation: Activation, last: Activation | None, seed: int, *, bias: bool) -> nn.Sequential:
    """Linear layers of these widths, each with the activation, the last with its own or none."""
    import torch
    from torch import nn

    from .activations import to_module

    modules: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for n_in, n_out in itertools.pairwise(widths):
            modules += [nn.Linear(n_in, n_out, bias=bias), to_module(activation)]
    return nn.Sequential(*modules[:-1], *([] if last is None else [to_module(last)]))


def _fit(
    model: nn.Sequential,
    split: Dataset,
    schedule: str,
    schedule_settings: dict[str, Any],
    settings: dict[str, Any],
    device: Device,
    quiet: bool,
) -> History:
    import dante_kernels as dk

    kind = dk.Alternating if schedule == "alternating" else dk.RoundRobin
    with _progress(schedule_settings["rounds"], quiet) as advance:
        return dk.fit(
            model,
            split.x_train,
            split.y_train,
            schedule=kind(**schedule_settings),
            validation=(split.x_test, split.y_test),
            device=device,
            callbacks=[advance],
            **settings,
        )


@contextlib.contextmanager
def _spinner(text: str, quiet: bool) -> Iterator[None]:
    from rich.console import Console

    console = Console(stderr=True)
    with contextlib.nullcontext() if quiet or not console.is_terminal else console.status(text):
        yield


@contextlib.contextmanager
def _progress(rounds: int, quiet: bool) -> Iterator[Callable[[History], None]]:
    """A callback for `fit` that moves a progress bar on stderr; no bar where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda history: None
        return
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=rounds)

        def advance(history: History) -> None:
            progress.update(task, advance=1, description=f"test accuracy {history.rounds[-1].metrics['accuracy']:.2%}")

        yield advance


def _print_table(history: History) -> None:
    """At most `MAX_ROWS` rounds, evenly chosen, first and last among them; weights and seconds count from the start."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE if console.is_terminal else None, pad_edge=False)
    for title in ("round", "training loss", "test accuracy", "weights updated", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    seconds = list(itertools.accumulate(record.seconds for record in history.rounds))
    for index in _evenly(len(history.rounds)):
        record = history.rounds[index]
        accuracy = f"{100 * record.metrics['accuracy']:.2f} %"
        table.add_row(str(index + 1), f"{record.loss:.5f}", accuracy, f"{record.weights_updated:,}", f"{seconds[index]:.2f}")
    console.print(table)


def _evenly(count: int) -> list[int]:
    if count <= MAX_ROWS:
        return list(range(count))
    return [round(i * (count - 1) / (MAX_ROWS - 1)) for i in range(MAX_ROWS)]


def _check_output(target: Path, *, may_exist: bool) -> None:
    """Refuse an output that could not be written, before any training."""
    if target.is_dir():
        raise UsageError(f"--output: expected a file, got the directory {str(target)!r}")
    if target.exists() and not may_exist:
        raise UsageError(f"--output: {str(target)!r} exists; choose another name, or overwrite it with --force")
    if not target.parent.is_dir():
        raise UsageError(f"--output: expected a file in an existing directory, got {str(target)!r}")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UsageError(f"--output: cannot write into the directory {str(target.parent)!r}: {error.strerror}") from error


def _save(model: nn.Sequential, target: Path, metadata: dict[str, str], *, overwrite: bool) -> Path:
    """Write the weights under `target` or, where that exists and must not be overwritten, under a numbered name."""
    from safetensors.torch import save_file

    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(weights, temporary, metadata=metadata)
        if overwrite:
            os.replace(temporary, target)
            return target
        place = _reserve(target)
        try:
            os.replace(temporary, place)
        except BaseException:
            place.unlink()
            raise
        return place
    finally:
        temporary.unlink(missing_ok=True)


def _reserve(target: Path) -> Path:
    """The first free name of target, target-2, target-3, ..., taken by an empty file so that no other run takes it too."""
    for number in itertools.count(1):
        place = target if number == 1 else target.with_name(f"{target.stem}-{number}{target.suffix}")
        with contextlib.suppress(FileExistsError), open(place, "xb"):
            return place
    raise AssertionError("unreachable")
