"""One training of one network by one method at one rate, by `dk.fit` or by torch's autograd and optimizers, as a row.

Both sides get the same initial weights, mini-batches of the same size, the same number of weights updated (an epoch of SGD on
L layers against a pass of each of L layers) and the same schedule of the rate, and are judged by the same function.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dante_kernels as dk

from .. import activations, network
from ..training import directions
from .problems import Problem

Row = dict[str, Any]
METRICS = ("test_loss", "test_accuracy", "svm_accuracy", "train_loss", "baseline", "seconds", "weights_updated")  # of a row
EVALUATED = 5000  # rows that go through the network at once
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


@dataclass(frozen=True)
class Method:
    """A way to train; everything but the rate.

    Attributes:
        name, title: for rows and for pages.
        start: where the search for its rate begins, an index into the rates of `search.rate_of`.
        rule: ``direction`` of `dk.fit` where layerwise, else a name of `OPTIMIZERS`.
        layerwise: whether the layers are trained one by one, by `dk.fit`.
        momentum, reset_momentum, relative_lr, lr_schedule: as for `dk.fit`; torch's methods know the first and the last.
        bounded: whether the layers' norms have the bound that `dk.fit` takes where no rate is given.
        inner_epochs: T, passes of a layer in one block; an integer part or a multiple of the run's epochs.
        inner_steps: where given, blocks of so many mini-batches, a pass of each layer a round.
        parallel: as of `Schedule`.
        stacked: whether layers are trained in pairs, from the outermost inwards, in the whole network (2018).
        finetune_lr: where given, the last `inner_epochs` epochs are end-to-end SGD at this rate.
    """

    name: str
    title: str
    start: int
    rule: str = "sngd"
    layerwise: bool = True
    momentum: float = 0.0
    reset_momentum: bool = False
    relative_lr: bool = False
    bounded: bool = False
    lr_schedule: str = "constant"
    inner_epochs: float = 5
    inner_steps: int | None = None
    parallel: bool = False
    stacked: bool = False
    finetune_lr: float | None = None


PUBLISHED_T = "T = 5, constant rate"
METHODS = {
    method.name: method
    for method in (
        Method("dante", f"DANTE as published ({PUBLISHED_T})", -2),
        Method("dante-heavy", f"DANTE + momentum 0.9 ({PUBLISHED_T})", -3, momentum=0.9),
        Method(
            "dante-short", "DANTE in short blocks (3 steps in parallel, relative rate, Nesterov 0.9, cosine, fit's bound)", -4,
            rule="nesterov", momentum=0.9, relative_lr=True, bounded=True, lr_schedule="cosine", inner_steps=3, parallel=True,
        ),
        Method("dante-stacked", f"DANTE, pair after pair ({PUBLISHED_T})", -2, stacked=True),
        Method(
            "dante-tuned", f"DANTE, pair after pair, then end to end ({PUBLISHED_T})", -2, stacked=True, finetune_lr=3.0
        ),
        Method("alternating-sgd", f"plain SGD inside the alternation ({PUBLISHED_T})", 0, rule="sgd"),
        Method("dante-adam", f"Adam inside the alternation ({PUBLISHED_T})", -6, rule="adam"),
        Method("dante-adagrad", f"Adagrad inside the alternation ({PUBLISHED_T})", -4, rule="adagrad"),
        Method("dante-rmsprop", f"RMSProp inside the alternation ({PUBLISHED_T})", -6, rule="rmsprop"),
        Method("sgd", "SGD (constant rate)", 0, rule="sgd", layerwise=False),
        Method("sgd-heavy", "SGD + momentum 0.9 (constant rate)", -1, rule="sgd", layerwise=False, momentum=0.9),
        Method(
            "sgd-cosine", "SGD + momentum 0.9, cosine", -1,
            rule="sgd", layerwise=False, momentum=0.9, lr_schedule="cosine",
        ),
        Method("adam", "SGD + Adam (constant rate)", -6, rule="adam", layerwise=False),
        Method("adagrad", "SGD + Adagrad (constant rate)", -4, rule="adagrad", layerwise=False),
        Method("rmsprop", "SGD + RMSProp (constant rate)", -6, rule="rmsprop", layerwise=False),
    )
}  # fmt: skip


def train(
    problem: Problem,
    widths: tuple[int, ...],
    activation: str,
    loss: str,
    method: Method | str,
    rate: float,
    seed: int,
    epochs: int,
    *,
    batch_size: int = 100,
    output: str | None = None,
    followed: bool = True,
    probe: Callable[[nn.Sequential, Problem], Row] | None = None,
    **settings: Any,
) -> Row:
    """Train a network and judge it on the problem's test rows.

    Args:
        problem: see `problems.load`.
        widths: of input, hidden layers and output.
        activation: a name of `activations.NAMES`, for the hidden layers.
        loss: ``"mse"``, ``"cross_entropy"`` or ``"binary_cross_entropy"``.
        method: a `Method` or its name in `METHODS`.
        rate: its learning rate.
        seed: of the initial weights (torch's own initialisation) and of the rows' order.
        epochs: passes over the data in which every layer is updated.
        batch_size: rows in a mini-batch.
        output: activation of the last layer; with mse that of the hidden ones where None, else none.
        followed: whether it is judged after each round or epoch, and not only at the end.
        probe: called with the trained model and the problem; what it returns is added to the row.
        settings: fields of `Method` to change, such as ``inner_steps=60``.

    Returns:
        A dictionary fit for JSON: ``status`` (``"done"``, or ``"diverged"``, then losses are None), ``test_loss`` (times
        the problem's unit), ``test_accuracy`` (None where the target holds no classes), ``train_loss`` (mean over the last
        round's mini-batches, each before its step), ``baseline`` (the test loss of answering with the training rows' mean;
        None for classes), ``seconds`` of the processor in training, ``weights_updated``, and ``curve``, a list of [weights
        updated, seconds, training loss, test loss, test accuracy] after each round or epoch, or after the last alone.

    Raises:
        ValueError, TypeError: for what `dk.fit` refuses; for epochs that are no whole number of rounds.

    >>> from dante_kernels.reproduce import problems
    >>> digits = problems.load(problems.Spec("digits"), None)
    >>> row = train(digits, (64, 30, 10), "leaky_relu", "mse", "dante-short", rate=0.003, seed=0, epochs=2)
    >>> row["status"], len(row["curve"])
    ('done', 2)
    """
    way = replace(METHODS[method] if isinstance(method, str) else method, **settings)
    last = output or (activation if loss == "mse" else "identity")
    model = build(widths, activation, last, seed)
    curve: list[list[float | None]] = []

    def judged() -> list[float | None]:
        value, accuracy = evaluate(model, problem.x_test, problem.y_test, loss)
        return [value * problem.unit, accuracy]

    def note(weights: int, seconds: float, train_loss: float) -> None:
        """Add a point to the curve, or have it take the place of the one before."""
        curve[:] = [*(curve if followed else ()), [weights, seconds, train_loss, *(judged() if followed else ())]]

    train_with = _fit if way.layerwise else _descend
    diverged = train_with(model, problem, loss, way, rate, seed, epochs, batch_size, note)
    if curve and not followed:
        curve[-1] += judged()
    diverged = diverged or not curve or not math.isfinite(curve[-1][3] or 0.0)
    weights, seconds, train_loss, test_loss, accuracy = (None, None, None, None, None) if diverged else curve[-1]
    finite = [[point[0], *map(_short, point[1:])] for point in curve if all(v is None or math.isfinite(v) for v in point)]
    row: Row = {
        "status": "diverged" if diverged else "done",
        "test_loss": test_loss,
        "test_accuracy": accuracy,
        "train_loss": train_loss,
        "baseline": _baseline(problem) if problem.y.is_floating_point() else None,
        "seconds": _short(seconds),
        "weights_updated": weights,
        "curve": finite,
    }
    return row if probe is None or diverged else row | probe(model, problem)


def _short(value: float | None) -> float | None:
    """What is drawn and not compared, to four digits, so that rows stay small."""
    return None if value is None else float(f"{value:.4g}")


def build(widths: tuple[int, ...], activation: str, last: str, seed: int) -> nn.Sequential:
    """nn.Linear of these widths with torch's own initial weights, each with its activation; no module for the identity."""
    modules: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for n_in, n_out in pairwise(widths):
            modules += [nn.Linear(n_in, n_out), activations.to_module(activations.NAMES[activation])]
    modules[-1:] = [] if last == "identity" else [activations.to_module(activations.NAMES[last])]
    return nn.Sequential(*modules)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> tuple[float, float | None]:
    """(loss, accuracy) over all rows, as torch computes them; no accuracy where y holds values."""
    total, hits = 0.0, 0
    for rows, wanted in zip(x.split(EVALUATED), y.split(EVALUATED), strict=True):
        h = model(rows)
        total += float(LOSSES[loss](h, _as_target(wanted, h.shape[1], loss))) * len(rows)
        hits += 0 if y.is_floating_point() else int((h.argmax(1) == wanted).sum())
    return total / len(x), None if y.is_floating_point() else hits / len(x)


def _as_target(y: Tensor, classes: int, loss: str) -> Tensor:
    """What torch's loss wants: class indices for cross_entropy, one-hot rows else; values stay as they are."""
    if y.is_floating_point() or loss == "cross_entropy":
        return y
    return F.one_hot(y, classes).float()


def _baseline(problem: Problem) -> float:
    """The mean squared test error of answering with the mean of the training targets."""
    return float(F.mse_loss(problem.y.mean(0).expand_as(problem.y_test), problem.y_test)) * problem.unit


Note = Callable[[int, float, float], None]


def _fit(
    model: nn.Sequential,
    problem: Problem,
    loss: str,
    way: Method,
    rate: float,
    seed: int,
    epochs: int,
    batch: int,
    note: Note,
) -> bool:
    """Train layer by layer; whether it diverged. One hidden layer is Algorithm 2 (outer layer first), more go round-robin."""
    turns: dict[str, Any] = {
        "inner_epochs": 1 if way.inner_steps else way.inner_epochs, "inner_steps": way.inner_steps, "parallel": way.parallel
    }  # fmt: skip
    if way.finetune_lr is not None:
        turns |= {"finetune_epochs": round(way.inner_epochs), "finetune_lr": way.finetune_lr}
    layerwise = epochs - turns.get("finetune_epochs", 0)
    rounds = round(layerwise / turns["inner_epochs"])
    if rounds < 1 or not math.isclose(rounds * turns["inner_epochs"], layerwise):
        least = f" and at least {2 * way.inner_epochs:g}" if way.finetune_lr is not None else ""
        raise ValueError(f"epochs: expected a multiple of inner_epochs ({way.inner_epochs}){least}, got {epochs}")
    kind: Callable[..., Any] = dk.RoundRobin
    if way.stacked:
        kind = partial(dk.StackedAutoencoder, whole_network=True)
    elif sum(isinstance(m, nn.Linear) for m in model) == 2:
        kind = dk.Alternating
    schedule = kind(rounds=rounds, **turns)
    max_norm = math.inf
    if way.bounded:
        max_norm = directions.usual_max_norm(network.from_module(model, loss).hidden, loss, not problem.y.is_floating_point())

    seconds, begin = 0.0, time.process_time()

    def after_round(history: dk.History) -> None:
        nonlocal seconds, begin
        seconds += time.process_time() - begin
        note(history.weights_updated, seconds, history.rounds[-1].loss)
        begin = time.process_time()

    try:
        dk.fit(
            model, problem.x, problem.y, loss=loss, schedule=schedule, lr=rate, relative_lr=way.relative_lr,
            lr_schedule=way.lr_schedule, batch_size=batch, momentum=way.momentum, reset_momentum=way.reset_momentum,
            direction=way.rule, max_norm=max_norm, seed=seed, callbacks=[after_round],
        )  # fmt: skip
    except dk.NonFiniteError:
        return True
    return False


def _descend(
    model: nn.Sequential,
    problem: Problem,
    loss: str,
    way: Method,
    rate: float,
    seed: int,
    epochs: int,
    batch: int,
    note: Note,
) -> bool:
    """Train all layers at once with torch's optimizer; whether it diverged."""
    momentum: dict[str, Any] = {"momentum": way.momentum} if way.momentum else {}
    optimizer = OPTIMIZERS[way.rule](model.parameters(), lr=rate, **momentum)
    generator = torch.Generator().manual_seed(seed)
    target = _as_target(problem.y, model(problem.x[:1]).shape[1], loss)
    size, done, seconds = sum(p.numel() for p in model.parameters()), 0, 0.0
    for epoch in range(epochs):
        factor = (1 + math.cos(math.pi * epoch / epochs)) / 2 if way.lr_schedule == "cosine" else 1.0
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        begin, values = time.process_time(), []
        for rows in torch.randperm(len(problem.x), generator=generator).split(batch):
            value = LOSSES[loss](model(problem.x[rows]), target[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.detach())
        mean = float(torch.stack(values).mean())
        seconds += time.process_time() - begin
        done += len(values) * size
        note(done, seconds, mean)
        if not math.isfinite(mean):
            return True
    return False
