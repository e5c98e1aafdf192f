"""`fit`: train an ordinary nn.Sequential by DANTE."""

from __future__ import annotations

import functools
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses, network, reference
from ..network import Network
from ..ops import backends
from ..ops.checks import backend_name, number
from . import checkpoint as checkpoints
from . import directions, inputs, schedules
from .history import History
from .run import Run
from .schedules import Schedule
from .trainer import Callback, LearningRate, Settings

LR_SCHEDULES = ("constant", "cosine")
PRECISIONS = ("highest", "high", "medium")


def fit(
    model: nn.Module,
    x: Any,
    y: Any = None,
    *,
    loss: str = "mse",
    schedule: Schedule | None = None,
    lr: LearningRate | None = None,
    relative_lr: bool | None = None,
    lr_schedule: str | Callable[[int, int], float] = "cosine",
    batch_size: int = 100,
    momentum: float | None = None,
    reset_momentum: bool = False,
    direction: str | None = None,
    max_norm: float | None = None,
    shuffle: bool = True,
    x_scale: float | None = None,
    validation: tuple[Any, Any] | None = None,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    precision: str | None = None,
    backend: str = "auto",
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    stop_epsilon: float | None = None,
    prefix_budget: int = 2**30,
) -> History:
    """Train a model's own parameters in place by DANTE: one layer at a time, by normalized gradient steps.

    Args:
        model: an nn.Sequential of nn.Linear, each followed by at most one of GeneralizedReLU, ReLU, LeakyReLU, Sigmoid,
            Tanh, Identity; see `dante_kernels.network.from_module`. Its weights are the start. float32, or float64 (on
            the reference backend). Layers whose parameters do not require gradients stay as they are. **Mutated.**
        x: inputs, a tensor or array (rows, n_in) of the model's dtype, bfloat16 beside a float32 model, or uint8, which
            stays uint8 and stands for x * x_scale; (rows, ...) where the model starts with nn.Flatten. On the model's
            device, or anywhere where `device` is given.
        y: class indices (rows,) of an integer dtype, or values (rows, n_out) of the model's dtype, (rows,) too for one
            output. With one output, integers must be 0 or 1. None makes an autoencoder: the target is x (of uint8
            x a copy in the model's dtype, times x_scale).
        loss: ``"mse"``, ``"cross_entropy"`` (the output as logits, or a last nn.Softmax or nn.LogSoftmax) or
            ``"binary_cross_entropy"`` (logits, or a last nn.Sigmoid); means as in torch.
        schedule: `Alternating`, `RoundRobin` or `StackedAutoencoder`. None is RoundRobin in blocks of 20 steps in turn; where
            lr is None and y holds classes (or the loss is no ``"mse"``) in parallel blocks of 3. A round is a pass of each
            layer; there are 12 rounds, or more with less data (1200 steps, 100 rounds at most).
        lr: the length of a step in weight space: a number, one per layer, or a callable that gives either for a round
            (from 0, within its phase). Callables are called for all rounds before training starts. With a direction of
            torch's optimizers it is theirs, for which other numbers are good: 0.001 is usual for Adam. None, with the kernels'
            directions, is relative to the layer: 0.004, which docs/defaults.md found to do well on many nets; where there are
            hidden layers and all are generalized ReLUs, 0.005 with cross-entropies, and with ``"mse"`` 0.012 over the number
            of layers, from four on; times (1 - momentum) / 0.1. Layers that are not trained are not counted, here and below.
        relative_lr: lr is multiplied with the Frobenius norm of the layer (weight and bias) at its block's start, where that is
            not 0. None is True where lr is None, else False.
        lr_schedule: ``"constant"``; ``"cosine"``, which multiplies lr in round r of R by (1 + cos(pi r / R)) / 2; or a
            callable of (r, R) that gives the factor.
        batch_size: rows in a mini-batch; the last of a pass may be shorter.
        momentum: mu, from 0 to below 1. A layer's velocity is kept from block to block. None is 0.9 where lr is None, else 0.
        reset_momentum: start every block with zero velocity, or without what else the direction keeps.
        direction: how a layer's weights follow its gradient. ``"sngd"``, with momentum heavy ball, and ``"nesterov"``, with
            Nesterov's momentum, are kernels, and take the normalized gradient. The others take the gradient itself, from
            `ops.layer_gradient`, to torch's optimizers with their default settings: ``"sgd"`` (torch.optim.SGD, with
            momentum too), and without momentum ``"adam"``, ``"adagrad"`` and ``"rmsprop"``. What they keep (averages, a
            count of steps) belongs to its layer, as the velocity does. A step whose gradient is zero changes nothing, but
            goes on by the steps before with ``"adam"``, and with ``"sgd"`` with momentum; the `History` counts it so.
            None is ``"nesterov"`` where lr is None and there is momentum, else ``"sngd"``.
        max_norm: bound on a layer's norm a unit, the Frobenius norm of weight and bias over sqrt(n_out); torch's initial
            weights have 1 / sqrt(3). After every round a trained layer whose norm is above the bound, and above what it was at
            the start, is scaled back to the larger of these (not after fine-tuning); the theorems have the weights in such a
            ball. None is a bound where lr is None and there are H hidden layers, 1 / sqrt(3) times a growth, which keeps the
            outputs from growing too sure. With cross-entropies that is 4 / H for generalized ReLUs, the larger of 12 / H and 4
            for sigmoids, half as much as theirs for tanh, the largest of these where there are several, and more where the
            hidden widths' geometric mean w is below 100: times (100 / w)^((H - 1) / 6). With ``"mse"`` it is 4^(1 / H) where y
            holds classes and all H are generalized ReLUs; elsewhere None is no bound, as math.inf is. That is for inputs of
            order 1: scale smaller ones, or give math.inf.
        shuffle: a new order for every pass, drawn on the device; else the rows as they lie.
        x_scale: what uint8 x is multiplied with, such as 1 / 255; needed there, and None or 1 elsewhere. The trained model
            itself takes x.float() * x_scale.
        validation: (x, y) on which loss and accuracy are computed after every round; its x uint8 as x is, or not.
        seed: of the shuffling; None for a different one each time.
        device: move model and data there first; None leaves the model where it is and expects the data there too.
        precision: ``"highest"``, ``"high"`` or ``"medium"``, as torch.set_float32_matmul_precision, during this call;
            None keeps what is set.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        callbacks: called with the `History` after every round; one that returns True ends training.
        progress: print a line to stderr after every round.
        checkpoint: a file, written after every round. Where it exists already, training goes on from it, bit for bit as
            if it had not been interrupted; it must come from the same settings, kind of model and data.
        stop_epsilon: end a phase when a round changes the objective, the loss over all training rows, by less than this
            and the schedule's ``min_rounds`` are done (Algorithm 2).
        prefix_budget: bytes that the kept activations of the frozen layers before the active one may take. Beyond it they
            are computed anew for the rows of each block; the result is the same.

    Returns:
        The `History`: records per block and per round. Interrupted from outside, such as by Ctrl-C, the model keeps the
        weights of the last finished block, or call of several; a checkpoint those of the last finished round.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; the model is unchanged then.
        OSError: where the checkpoint's folder is not there or cannot be written to.
        NonFiniteError: where a gradient is not finite: names layer, round and step, all counted from 0; the weights are
            those before it.

    Source: Algorithms 1 to 3 of the 2020 DANTE paper.

    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.zeros_(model[0].weight)
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> history = fit(model, x, 3 * x, schedule=RoundRobin(rounds=30), lr=0.1, lr_schedule="constant", batch_size=2)
    >>> round(model[0].weight.item(), 3)
    3.0
    """
    return prepare(**locals(), made={}, label="").alone()


def prepare(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    loss: str,
    schedule: Schedule | None,
    lr: LearningRate | None,
    relative_lr: bool | None,
    lr_schedule: str | Callable[[int, int], float],
    batch_size: int,
    momentum: float | None,
    reset_momentum: bool,
    direction: str | None,
    max_norm: float | None,
    shuffle: bool,
    validation: tuple[Any, Any] | None,
    seed: int | None,
    device: torch.device | str | None,
    precision: str | None,
    backend: str,
    callbacks: Sequence[Callback],
    progress: bool,
    checkpoint: str | os.PathLike[str] | None,
    stop_epsilon: float | None,
    prefix_budget: int,
    x_scale: float | None,
    made: dict[Any, Any],
    label: str,
) -> Run:
    """Check all of `fit`'s arguments without changing anything.

    `made` keeps what was made of x, y and validation, for the next model that is given the same; `label` stands before
    each line of progress.
    """
    losses.code(loss)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule: expected a Schedule such as RoundRobin(rounds=12), got {schedule!r}")
    net = network.from_module(model, loss)
    batch_size = _whole("batch_size", batch_size, low=1)
    classes = inputs.holds_classes(y)
    growing = [layer for layer, trains in zip(net.hidden, net.trainable, strict=False) if trains]
    steps = directions.settled(lr, relative_lr, momentum, direction, max_norm, growing, loss, classes)
    if schedule is None:
        rounds = schedules.default_rounds(inputs.rows_of(x), batch_size)
        schedule = schedules.usual(rounds, parallel=lr is None and (classes or loss != "mse"))
    rates = _rates(steps.lr, lr_schedule, schedule.rounds, len(net.layers))
    settings = Settings(
        loss=loss,
        schedule=schedule,
        rates=rates,
        relative_lr=steps.relative_lr,
        batch_size=batch_size,
        momentum=number("momentum", steps.momentum),
        reset_momentum=bool(reset_momentum),
        direction=steps.direction,
        max_norm=number("max_norm", steps.max_norm),
        shuffle=shuffle,
        seed=None if seed is None else _whole("seed", seed, low=0, high=2**63 - 1),
        backend=backend_name(backend),
        stop_epsilon=None if stop_epsilon is None else number("stop_epsilon", stop_epsilon),
        prefix_budget=_whole("prefix_budget", prefix_budget, low=0),
        x_scale=1.0 if x_scale is None else number("x_scale", x_scale),
    )
    _check_settings(settings, precision)
    to = None if device is None else _device(device)
    callbacks = _callbacks(callbacks)
    if loss == "cross_entropy" and net.n_out == 1:
        raise ValueError("loss: cross_entropy needs at least 2 outputs, the model has 1; use binary_cross_entropy")
    if schedule.finetune_epochs and torch.is_inference_mode_enabled():
        raise ValueError("schedule: finetune_epochs needs gradients, which torch.inference_mode() does not allow")
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"checkpoint: expected a path, got {type(checkpoint).__name__}")
    if not isinstance(shuffle, bool):
        raise TypeError(f"shuffle: expected True or False, got {shuffle!r}")
    home, dtype = net.layers[0].weight.device, net.layers[0].weight.dtype
    where = backends.serving(settings.backend, to or home, dtype)

    def once(what: str, make: Callable[[], Any], *of: Any) -> Any:
        """What `make` makes of these, the same for every model that would have the same."""
        key = (what, *map(id, of), net.n_in, net.n_out, dtype, home, net.flattens, settings.x_scale, to)
        if key not in made:
            made[key] = make()
        return made[key]

    as_target = functools.partial(reference.widened, dtype=dtype, x_scale=settings.x_scale)
    rows = once("inputs", lambda: inputs.inputs("x", x, x_scale, net, to), x)
    target, _ = once("target", lambda: inputs.target("y", y, rows, net, to), y, rows)
    phases = schedule.phases(net.widths)
    if not any(net.trainable[layer] for phase in phases for layer in phase.order):
        raise ValueError("model: no layer has parameters that require gradients, so nothing can be trained")
    if any(phase.autoencodes for phase in phases):
        if target is not None and not (target.shape == rows.shape and bool((target == as_target(rows)).all())):
            raise ValueError("y: StackedAutoencoder's target is x itself; expected None or x, got other values")
        target = None
    held_out = None
    if validation is not None:
        if not isinstance(validation, tuple | list) or len(validation) != 2:
            raise TypeError("validation: expected a pair (x, y)")
        x_given, y_given = validation
        x_held_out = once("inputs", lambda: inputs.inputs("validation[0]", x_given, x_scale, net, to), x_given)
        y_held_out, classes = once(
            "target", lambda: inputs.target("validation[1]", y_given, x_held_out, net, to), y_given, x_held_out
        )
        if y_held_out is None:
            y_held_out = once("x as target", lambda: as_target(x_held_out), x_held_out)
        held_out = (x_held_out, y_held_out, classes)
    file = None
    if checkpoint is not None:
        effective = precision or torch.get_float32_matmul_precision()
        file = checkpoints.File(checkpoint, _fingerprint(settings, effective, net, rows, target))
        file.read(torch.device("cpu"))
    printing = [functools.partial(_print_round, label=label)] if progress else []
    if target is None:
        target = once("x as target", lambda: as_target(rows), rows)
    return Run(model, net, to, where, rows, target, settings, held_out, [*callbacks, *printing], file, precision)


def _rates(lr: LearningRate, lr_schedule: str | Callable[[int, int], float], rounds: int, layers: int) -> list[list[float]]:
    """The learning rate of every round of a phase and every layer, all checked before anything is trained."""
    if not callable(lr_schedule) and lr_schedule not in LR_SCHEDULES:
        raise ValueError(
            f"lr_schedule: expected {' or '.join(LR_SCHEDULES)} or a callable of (round, rounds), got {lr_schedule!r}"
        )
    table = []
    for round_ in range(rounds):
        given: Any = lr(round_) if callable(lr) else lr
        in_round = f" in round {round_}" if callable(lr) else ""
        if isinstance(given, Tensor):
            given = given.tolist()
        rates = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * layers
        if len(rates) != layers:
            raise ValueError(f"lr: expected a number or one for each of {layers} layers{in_round}, got {len(rates)}")
        rates = [number("lr", rate) for rate in rates]
        for rate in rates:
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"lr: expected a finite number above 0{in_round}, got {rate}")
        if callable(lr_schedule):
            factor = number("lr_schedule", lr_schedule(round_, rounds))
            if not (math.isfinite(factor) and factor >= 0):
                raise ValueError(f"lr_schedule: expected a finite factor of 0 or more in round {round_}, got {factor}")
        else:
            factor = (1 + math.cos(math.pi * round_ / rounds)) / 2 if lr_schedule == "cosine" else 1.0
        table.append([rate * factor for rate in rates])
    return table


def _whole(name: str, value: Any, *, low: int, high: int | None = None) -> int:
    """A whole number, of Python's or numpy's types, within its bounds."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    whole = int(value)
    if whole < low or (high is not None and whole > high):
        raise ValueError(f"{name}: expected {f'at least {low}' if high is None else f'{low} to {high}'}, got {whole}")
    return whole


def _device(value: torch.device | str) -> torch.device:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected one such as 'cpu' or 'cuda', got {value!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected a CPU or CUDA device, got {str(device)!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {str(device)!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _callbacks(value: Any) -> list[Callback]:
    if not isinstance(value, Iterable):
        raise TypeError(f"callbacks: expected a list of callables, got {type(value).__name__}")
    callbacks = list(value)
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"callbacks: expected callables, got {type(callback).__name__}")
    return callbacks


def _check_settings(settings: Settings, precision: str | None) -> None:
    directions.check(settings.direction, settings.momentum)
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not 0 <= settings.momentum < 1:
        raise ValueError(f"momentum: expected a number from 0 to below 1, got {settings.momentum}")
    if not settings.max_norm > 0:
        raise ValueError(f"max_norm: expected a number above 0, got {settings.max_norm}")
    if settings.stop_epsilon is not None and not settings.stop_epsilon > 0:
        raise ValueError(f"stop_epsilon: expected a number above 0, got {settings.stop_epsilon}")


def _fingerprint(settings: Settings, precision: str, net: Network, x: Tensor, target: Tensor | None) -> dict[str, str]:
    """What must be the same for a checkpoint to be gone on from: settings, model, and sums over the data in its order."""

    def digest(tensor: Tensor) -> str:
        rows = torch.empty(len(tensor), dtype=torch.float64, device=tensor.device)
        # In parts of at most 8 MiB or a row, since torch's sum in float64 copies what it sums.
        size = max(1, 2**20 // tensor[0].numel())
        for part, sums in zip(tensor.split(size), rows.split(size), strict=True):
            sums.copy_(part) if part.dim() == 1 else torch.sum(part, 1, dtype=torch.float64, out=sums)
        place = torch.arange(1, len(rows) + 1, dtype=torch.float64, device=rows.device)
        return repr((tuple(tensor.shape), str(tensor.dtype), rows.sum().item(), (rows * place).sum().item()))

    chain = [(tuple(w.shape), b is not None, str(phi), str(w.dtype)) for w, b, phi in net.layers]
    names = {"rates": "lr or lr_schedule"}
    return {
        **{names.get(key, key): repr(value) for key, value in vars(settings).items() if key != "prefix_budget"},
        "precision": precision,
        "model": repr(chain),
        "which layers are frozen": repr(net.trainable),
        "x": digest(x),
        "y": "x" if target is None else digest(target),
    }


def _print_round(history: History, label: str) -> None:
    last = history.rounds[-1]
    metrics = "".join(f"  validation {name} {value:.4f}" for name, value in last.metrics.items())
    line = f"{label}round {last.round + 1}  loss {last.loss:.6f}{metrics}  {last.seconds:.2f} s\n"
    print(line, end="", file=sys.stderr, flush=True)  # as one text, which no other thread's line comes into
