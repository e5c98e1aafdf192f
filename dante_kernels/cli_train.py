"""The command `dante train`: train a network on a data set, print what came of it, and save the weights."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .cli_common import UsageError, errors_in_one_line, expect, naming_the_option, version_of

with contextlib.suppress(ImportError):  # `cli.main` says what to install
    import typer

if TYPE_CHECKING:
    from torch import device as Device
    from torch import nn

    from .activations import Activation
    from .data import Dataset
    from .training import History
    from .training.directions import Steps
    from .training.schedules import Schedule

SCHEDULES = ("round-robin", "alternating")
LR_SCHEDULES = ("constant", "cosine")
MAX_ROWS = 12


def train(
    dataset: Annotated[str, typer.Argument(help="digits, mnist, fashion-mnist or kmnist")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="directory with its four IDX files; fetched where not given")] = None,
    hidden: Annotated[str, typer.Option(help="widths of the hidden layers, such as 400,200")] = "100",
    activation: Annotated[
        str, typer.Option(help="leaky_relu (0.01), relu, sigmoid, tanh or identity; at the output only with mse")
    ] = "leaky_relu",
    loss: Annotated[str, typer.Option(help="mse, cross_entropy or binary_cross_entropy")] = "mse",
    rounds: Annotated[
        int | None, typer.Option(help="rounds: in each, every layer makes its passes", show_default="12, more with few rows")
    ] = None,
    inner_epochs: Annotated[
        float | None, typer.Option(help="passes of a layer over the data in a round", show_default="1")
    ] = None,
    inner_steps: Annotated[
        int | None,
        typer.Option(
            help="the layers take turns of so many mini-batches",
            show_default="3 in parallel, 20 in turn, or a turn a round with --inner-epochs",
        ),
    ] = None,
    parallel: Annotated[
        bool | None,
        typer.Option(
            "--parallel/--in-turn",
            help="in its turn a layer sees the others as they were before all layers' turns, or as the last turn left them",
            show_default="parallel, but in turn with --lr, --inner-steps, --inner-epochs or --schedule alternating",
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows in a mini-batch", show_default="20 for digits, else 100")] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="learning rate: the length of a step in weight space, or torch's own with its optimizers",
            show_default="some 0.004 of the layer's norm, with momentum 0.9",
        ),
    ] = None,
    lr_schedule: Annotated[str, typer.Option(help="constant or cosine")] = "cosine",
    relative_lr: Annotated[bool, typer.Option("--relative-lr", help="step length is lr times the layer's norm")] = False,
    momentum: Annotated[
        float | None, typer.Option(help="momentum, from 0 to below 1", show_default="0.9, or 0 with --lr")
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(
            help="sngd, nesterov, or one of torch's optimizers: sgd, adam, adagrad, rmsprop",
            show_default="nesterov, or sngd with --lr or --momentum 0",
        ),
    ] = None,
    max_norm: Annotated[
        float | None,
        typer.Option(
            help="bound on a layer's norm a unit after a round",
            show_default="by net and loss; none with --lr, nor in mse with sigmoid or tanh",
        ),
    ] = None,
    schedule: Annotated[str, typer.Option(help="round-robin, or alternating for one hidden layer")] = "round-robin",
    seed: Annotated[int, typer.Option(help="of the initial weights and of the shuffling")] = 0,
    backend: Annotated[str, typer.Option(help="auto, reference, cpp or triton")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda")] = "auto",
    no_bias: Annotated[bool, typer.Option("--no-bias", help="layers without bias")] = False,
    output: Annotated[
        Path | None, typer.Option(help="where to save the model", show_default="dante-DATASET.safetensors, numbered if taken")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite --output where it exists")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print only where the model was saved")] = False,
) -> None:
    """Train a network on a data set, print what came of it, and save the weights.

    The defaults train 64-100-10 on scikit-learn's digits in a few seconds.
    """
    with errors_in_one_line():
        from . import activations, data, losses
        from .training.schedules import INNER_STEPS, STEPS_IN_TURN, default_rounds

        widths = _widths(hidden)
        batch = (20 if dataset == "digits" else 100) if batch_size is None else batch_size
        expect(dataset in data.NAMES, "dataset", f"one of {', '.join(data.NAMES)}", dataset)
        if dataset == "digits" and data_dir is not None:
            raise UsageError("--data-dir: digits come with scikit-learn; it goes with the other data sets")
        expect(activation in activations.NAMES, "--activation", f"one of {', '.join(activations.NAMES)}", activation)
        expect(loss in losses.CODES, "--loss", f"one of {', '.join(losses.CODES)}", loss)
        between = activations.NAMES[activation]
        by = _settled(lr, relative_lr, momentum, direction, max_norm, [(width, between) for width in widths], loss)
        expect(math.isfinite(by.lr) and by.lr > 0, "--lr", "a finite number above 0", by.lr)
        expect(lr_schedule in LR_SCHEDULES, "--lr-schedule", " or ".join(LR_SCHEDULES), lr_schedule)
        expect(batch >= 1, "--batch-size", "at least 1", batch)
        expect(0 <= by.momentum < 1, "--momentum", "a number from 0 to below 1", by.momentum)
        expect(by.max_norm > 0, "--max-norm", "a number above 0", by.max_norm)
        expect(0 <= seed < 2**63, "--seed", "a number from 0 to 2^63 - 1", seed)
        if parallel is None:
            parallel = lr is inner_epochs is inner_steps is None and schedule == "round-robin"
        if inner_epochs is None:
            usual = INNER_STEPS if parallel else STEPS_IN_TURN
            inner_epochs, inner_steps = 1.0, usual if inner_steps is None else inner_steps
        turns = {"inner_epochs": inner_epochs, "inner_steps": inner_steps, "parallel": parallel}
        turns["rounds"] = 1 if rounds is None else rounds
        _schedule(schedule, turns, len(widths))
        if force and output is None:
            raise UsageError("--force: goes with --output; without it nothing is overwritten")
        target = Path(f"dante-{dataset}.safetensors") if output is None else _behind_links(output)
        _check_output(target, may_exist=force or output is None)
        data.require("safetensors.torch", "cli", "saving the model")
        to = _device(device)
        _check_backend(backend, to)

        with _spinner(f"loading {dataset}", quiet):
            split = data.load(dataset, data_dir)
        _warn_of_another_data_set(dataset, data_dir)
        if rounds is None:
            turns["rounds"] = default_rounds(len(split.x_train), batch)
        hidden_layers, widths = len(widths), [split.x_train.shape[1], *widths, split.classes]
        last = between if loss == "mse" else None
        model = _build(widths, between, last, seed, bias=not no_bias)
        bound = None if math.isinf(by.max_norm) else by.max_norm  # JSON has no infinity; `fit` takes None so, beside lr
        steps = {**by._asdict(), "max_norm": bound, "lr_schedule": lr_schedule, "batch_size": batch}
        settings = {"loss": loss, **steps, "seed": seed, "backend": backend}
        shape = "-".join(map(str, widths))
        if not quiet:
            rows = f"{len(split.x_train):,} training and {len(split.x_test):,} test rows"
            print(f"{dataset}: {rows}; {shape}, {activation}, {loss}, on {to}", flush=True)
        history = _fit(model, split, _schedule(schedule, turns, hidden_layers), {**settings, "device": to}, quiet)
        metadata = {
            "widths": shape,
            "activation": activation,
            "output_activation": "identity" if last is None else activation,
            "loss": loss,
            "dataset": dataset,
            "dante_kernels": version_of("dante_kernels"),
            "settings": json.dumps({"schedule": schedule, **turns, **settings, "bias": not no_bias}),
            "test_accuracy": str(history.rounds[-1].metrics["accuracy"]),
        }
        saved = _save(model, target, metadata, overwrite=force)
        if quiet:
            print(saved)
        else:
            _print_table(history)
            print(f"test accuracy {100 * history.rounds[-1].metrics['accuracy']:.2f} %; model saved to {saved}")


def _widths(hidden: str) -> list[int]:
    parts = [part.strip() for part in hidden.split(",")]
    good = all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts)
    expect(good, "--hidden", "widths above 0, separated by commas, such as 400,200", hidden)
    return [int(part) for part in parts]


def _device(name: str) -> Device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    good = kind in ("cpu", "cuda") and (not index or index.isdigit())
    expect(good, "--device", "auto, cpu, cuda or cuda:0, cuda:1 and so on", name)
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise UsageError(f"--device: expected a device that is there, got {name!r}; CUDA devices visible to torch: {count}")
    return torch.device(name)


def _schedule(name: str, settings: dict[str, Any], hidden: int) -> Schedule:
    """The schedule for so many hidden layers."""
    import dante_kernels as dk

    expect(name in SCHEDULES, "--schedule", " or ".join(SCHEDULES), name)
    if name == "alternating" and hidden != 1:
        raise UsageError(f"--schedule: alternating trains one hidden layer, but --hidden has {hidden}; choose round-robin")
    try:
        return (dk.Alternating if name == "alternating" else dk.RoundRobin)(**settings)
    except ValueError as error:
        raise UsageError(naming_the_option(str(error))) from error


def _settled(
    lr: float | None,
    relative_lr: bool,
    momentum: float | None,
    direction: str | None,
    max_norm: float | None,
    hidden: list[tuple[int, Activation]],
    loss: str,
) -> Steps:
    """The step's settings, those not given as `fit` takes them."""
    from .training import directions

    try:
        found = directions.settled(lr, relative_lr or None, momentum, direction, max_norm, hidden, loss, classes=True)
        directions.check(found.direction, found.momentum)
    except ValueError as error:
        raise UsageError(naming_the_option(str(error))) from error
    return found


def _check_backend(backend: str, device: Device) -> None:
    """Refuse a backend that is none or cannot be used; instead of auto, the environment variable may name one."""
    import torch

    from .ops import backends

    variable = os.environ.get(backends.ENVIRONMENT_VARIABLE) if backend == "auto" else None
    option, name = (backends.ENVIRONMENT_VARIABLE, variable) if variable else ("--backend", backend)
    expect(name in ("auto", *backends.NAMES), option, f"one of auto, {', '.join(backends.NAMES)}", name)
    reason = None if name == "auto" else backends.why_not(name, device, torch.float32)
    if reason is not None:
        raise UsageError(f"{option}: {name} cannot be used here: {reason}")


def _warn_of_another_data_set(dataset: str, directory: Path | None) -> None:
    """Say so where the files are those of another data set; the test labels' few bytes tell the data sets apart."""
    from . import data

    labels = Path() if directory is None else directory / data.FILES[-1]
    if labels.is_file():
        sha256 = hashlib.sha256(labels.read_bytes()).hexdigest()
        owner = next((name for name, source in data.SOURCES.items() if source.sha256[labels.name] == sha256), dataset)
        if owner != dataset:
            print(f"dante: warning: the files in {str(directory)!r} are {owner}'s, not {dataset}'s", file=sys.stderr)


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


def _fit(model: nn.Sequential, split: Dataset, schedule: Schedule, settings: dict[str, Any], quiet: bool) -> History:
    import dante_kernels as dk

    with _progress(schedule.rounds, quiet) as advance:
        settings = {**settings, "schedule": schedule, "validation": (split.x_test, split.y_test), "callbacks": [advance]}
        try:
            return dk.fit(model, split.x_train, split.y_train, **settings)
        except dk.NonFiniteError as error:
            where = f"round {len(error.history.rounds) + 1}"
            raise ArithmeticError(f"{where}: a gradient is not finite; try a lower --lr than {settings['lr']}") from error


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
    table = Table(box=box.SIMPLE if console.is_terminal else None, pad_edge=False, show_edge=False)
    for title in ("round", "training loss", "test accuracy", "weights updated so far", "seconds so far"):
        table.add_column(title, justify="right", no_wrap=True)
    seconds = list(itertools.accumulate(record.seconds for record in history.rounds))
    count = len(history.rounds)
    shown = sorted({round(i * (count - 1) / (MAX_ROWS - 1)) for i in range(MAX_ROWS)})
    for index in shown:
        record = history.rounds[index]
        accuracy = f"{100 * record.metrics['accuracy']:.2f} %"
        table.add_row(str(index + 1), f"{record.loss:.5f}", accuracy, f"{record.weights_updated:,}", f"{seconds[index]:.2f}")
    console.print(table)
    if len(shown) < count:
        print(f"{len(shown)} of {count} rounds are shown")


def _behind_links(output: Path) -> Path:
    """Where a link leads, so that a link stays a link when what it leads to is replaced."""
    return Path(os.path.realpath(output)) if output.is_symlink() else output


def _check_output(target: Path, *, may_exist: bool) -> None:
    """Refuse an output that could not be written, before any training."""
    expect(target.is_file() or not target.exists(), "--output", "a regular file", str(target))
    if target.exists() and not may_exist:
        raise UsageError(f"--output: {str(target)!r} exists; choose another name, or overwrite it with --force")
    expect(target.parent.is_dir(), "--output", "a file in an existing directory", str(target))
    temporary = _temporary(target)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UsageError(f"--output: cannot write {str(target)!r}: {error.strerror}") from error


def _temporary(target: Path) -> Path:
    """The file beside the output that is written first, so that a broken write never stands in the output's place."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _save(model: nn.Sequential, target: Path, metadata: dict[str, str], *, overwrite: bool) -> Path:
    """Write the weights under `target` or, where that exists and must not be overwritten, under a numbered name."""
    from safetensors.torch import save

    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = _temporary(target)
    try:
        temporary.write_bytes(save(weights, metadata=metadata))
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
