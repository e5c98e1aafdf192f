"""The alternation: rounds of blocks, one layer at a time, by the operators."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..network import Network
from ..ops import Layer
from ..ops.blocks import Block, Launcher, Round, Velocity, block_launcher, check_plans, launches_of_step, norms_or_one
from . import bounds, checkpoint, directions, finetune
from .history import BlockRecord, History, RoundRecord
from .problem import Problem, RowStream, evaluate, scale_of
from .schedules import Phase, Schedule

LearningRate = float | Sequence[float] | Callable[[int], float | Sequence[float]]
Callback = Callable[[History], Any]

LAUNCHES_AT_ONCE = 2**14  # about as many in one call, of blocks that are recorded and replayed; of others as many steps

# Training that leaves its passes to whoever drives it. It yields the arguments of `ops.sngd_epoch_` by name, or a `Round`, and
# is sent the result; None, and is sent None, before each block, or call of several, and each epoch of fine-tuning, where it may
# be left off.
T = TypeVar("T")
Passes = Generator[dict[str, Any] | Round | None, Any, T]


class NonFiniteError(FloatingPointError):
    """A step's gradient was not finite. The weights are those before that step; ``history`` holds the rounds before."""

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message)
        self.history = history


@dataclass(frozen=True)
class Settings:
    """How to train; see `fit` for each field."""

    loss: str
    schedule: Schedule
    rates: list[list[float]]  # by round within a phase, then by layer
    relative_lr: bool
    batch_size: int
    momentum: float
    reset_momentum: bool
    direction: str
    max_norm: float
    shuffle: bool
    seed: int | None
    backend: str
    stop_epsilon: float | None
    prefix_budget: int
    x_scale: float

    @property
    def nesterov(self) -> bool:
        """Whether SNGD's momentum is Nesterov's."""
        return self.direction == "nesterov"


class _Turns(NamedTuple):
    """What a block, or several in one call, left on the device."""

    layers: Sequence[int]
    steps: Sequence[int]
    lr: Tensor  # of each block
    losses: Tensor  # of each step of all of them
    norms: Tensor
    seconds: Callable[[], float]  # of the call


def _copy(layer: Layer) -> Layer:
    return layer._replace(weight=layer.weight.clone(), bias=None if layer.bias is None else layer.bias.clone())


def steps_at_once(layers: int) -> int:
    """About how many steps of short blocks are one call, in a net of so many layers."""
    return max(1, LAUNCHES_AT_ONCE // launches_of_step(layers))


def _blocks(turns: Sequence[_Turns]) -> tuple[list[int], Any]:
    """The layers of all blocks, and an array of their steps."""
    return [layer for some in turns for layer in some.layers], np.array([count for some in turns for count in some.steps])


def _stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start the clock; calling the result stops it, and calling that gives the seconds, by events on a GPU."""
    if device.type != "cuda":
        begin = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - begin
            return lambda: seconds

        return stop
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    first.record(stream)

    def stop_on_device() -> Callable[[], float]:
        last.record(stream)

        def seconds() -> float:
            last.synchronize()  # an event that the device has not come to has no time
            return first.elapsed_time(last) / 1000

        return seconds

    return stop_on_device


class Trainer:
    """Trains a network's own parameters in place, by `Settings`, and keeps the `History`.

    Args:
        network: views on the parameters.
        x: (rows, n_in) on the parameters' device; uint8 stands for x times the settings' x_scale.
        target: class indices (rows,) or values (rows, n_out).
        settings: how to train.
        validation: (x, target, whether the target holds classes), or None.
    """

    def __init__(
        self,
        network: Network,
        x: Tensor,
        target: Tensor,
        settings: Settings,
        validation: tuple[Tensor, Tensor, bool] | None,
    ) -> None:
        self.network = network
        self.x = x
        self.target = target
        self.settings = settings
        self.validation = validation
        self.history = History()
        self.device = network.layers[0].weight.device
        self.generator = torch.Generator(self.device)
        if settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(settings.seed)
        self.streams = [
            RowStream(x.shape[0], settings.batch_size, settings.shuffle, self.generator) for _ in (*network.layers, None)
        ]
        by_kernels = settings.direction in directions.BY_KERNELS
        self.rules = [
            None if by_kernels else directions.Rule(settings.direction, settings.momentum, bounds.parts(layer))
            for layer in network.layers
        ]
        with_velocity = by_kernels and settings.momentum > 0
        self.velocities: list[tuple[Tensor | None, Tensor | None]] = [
            (torch.zeros_like(w), None if b is None else torch.zeros_like(b)) if with_velocity else (None, None)
            for w, b, _ in network.layers
        ]
        self.bounds = [bounds.bound(layer, settings.max_norm) for layer in network.layers]
        self.weights_updated = 0

    def run(self, callbacks: Sequence[Callback], checkpoint_file: checkpoint.File | None) -> Passes[History]:
        """Train until the rounds are done, the objective stands still, or a callback returns True."""
        schedule = self.settings.schedule
        phases = schedule.phases(self.network.widths)
        self._check_plans(phases)
        at = checkpoint.Position()
        if checkpoint_file is not None:
            at = checkpoint_file.load(self) or at
        while at.phase <= len(phases):
            if at.phase == len(phases):
                if at.round == schedule.finetune_epochs:
                    break
                yield None
                self._finetune_epoch(at.round)
                at.round += 1
            else:
                at = yield from self._next_round(phases, at)
                if not at.trained:
                    continue
            stop = False
            for callback in callbacks:
                stop |= callback(self.history) is True
            if checkpoint_file is not None:
                checkpoint_file.save(self, at)
            if stop:
                self.history.stopped_by = "callback"
                break
        return self.history

    def _check_plans(self, phases: list[Phase]) -> None:
        """No layer is trained where a later one could not be."""
        settings = self.settings
        if settings.direction not in directions.BY_KERNELS:
            return
        for phase in phases:
            chain = [self.network.layers[i] for i in phase.chain]
            trained = [phase.chain.index(i) for i in phase.order if self.network.trainable[i]]
            check_plans(chain, trained, self.x, settings.batch_size, settings.loss, settings.momentum > 0, settings.backend)

    def _next_round(self, phases: list[Phase], at: checkpoint.Position) -> Passes[checkpoint.Position]:
        """Train one round, record it, and say where training goes on."""
        phase = phases[at.phase]
        if not any(self.network.trainable[layer] for layer in phase.order):
            return checkpoint.Position(phase=at.phase + 1, trained=False)
        rates = self.settings.rates[at.round]
        stop = _stopwatch(self.device)
        encoder = [self.network.layers[i] for i in phase.encoder]
        if at.problem is None:
            target = None if phase.encoder else self.target
            settings = self.settings
            at.problem = Problem(self.x, target, encoder, settings.prefix_budget, settings.backend, settings.x_scale)
        if self.settings.stop_epsilon is not None and at.objective is None:
            at.objective = self._objective(phase, at.problem)
        before = self.state()
        turns = yield from self._run_round(phase, at.problem, rates)
        norms = torch.cat([some.norms for some in turns]).cpu()
        bad = (~torch.isfinite(norms)).nonzero()
        if len(bad):
            yield from self._raise_non_finite(before, phase, at, rates, turns, int(bad[0]), float(norms[bad[0]]))
        if not math.isinf(self.settings.max_norm):
            trained = [i for i in phase.order if self.network.trainable[i]]
            bounds.scale_back([self.network.layers[i] for i in trained], [self.bounds[i] for i in trained])
        seconds = stop()
        self._record(at, turns, norms, seconds())
        at.round += 1
        self.history.stopped_by = "rounds"
        done = at.round == self.settings.schedule.rounds
        if self.settings.stop_epsilon is not None:
            previous, at.objective = at.objective, self._objective(phase, at.problem)
            self.history.rounds[-1].objective = at.objective
            still = abs(at.objective - (previous or 0.0)) < self.settings.stop_epsilon
            if still and at.round >= self.settings.schedule.min_rounds:
                self.history.stopped_by = "epsilon"
                done = True
        return checkpoint.Position(phase=at.phase + 1) if done else at

    def _run_round(
        self, phase: Phase, problem: Problem, rates: list[float], until: tuple[int, int] | None = None
    ) -> Passes[list[_Turns]]:
        """All turns of a round; with `until` (turn, steps) only those before that turn and that many steps of it."""
        steps_per_pass = -(-self.x.shape[0] // self.settings.batch_size)
        lengths = self.settings.schedule.blocks(steps_per_pass)
        turns = [(layer, steps, steps) for steps in lengths for layer in phase.order if self.network.trainable[layer]]
        launcher = self._block_launcher(phase, problem, lengths, steps_per_pass)
        at_once, cycle = len(turns), len(turns) // len(lengths)
        if launcher is not None:
            # Each call has whole cycles, a block of each layer, and as many of them as the others. The device makes one while
            # Python prepares the next.
            calls = -(-sum(steps for _, steps, _ in turns) // steps_at_once(len(phase.chain)))
            at_once = cycle * -(-len(lengths) // min(calls, len(lengths)))
        if until is not None:
            turns = [*turns[: until[0]], *([(turns[until[0]][0], until[1], turns[until[0]][1])] if until[1] else [])]
        done = []
        if launcher is not None:
            for first in range(0, len(turns), at_once):
                yield None
                some = [turn[:2] for turn in turns[first : first + at_once]]
                done.append((yield from self._run_blocks_at_once(launcher, phase, problem, rates, some)))
            return done
        layers = {i: self.network.layers[i] for i in phase.chain}
        for turn, (layer, steps, whole) in enumerate(turns):
            if turn % cycle == 0:
                seen = dict(layers)
            if self.settings.schedule.parallel:
                seen[layer] = _copy(layers[layer])
            done.append((yield from self._run_block(phase, problem, layer, seen, steps, rates[layer], whole >= steps_per_pass)))
        return done

    def _block_launcher(self, phase: Phase, problem: Problem, lengths: list[int], steps_per_pass: int) -> Launcher | None:
        """What runs several blocks, of so many steps each, in one call; None where that cannot be, or is slower.

        Blocks of a pass or more take a whole pass's activations, and are better apart. Behind an encoder no round is one
        launch, whose bits are others, since the budget must not decide them.
        """
        settings, layers = self.settings, [self.network.layers[i] for i in phase.chain]
        if problem.encoder or problem.target is None or settings.direction not in directions.BY_KERNELS:
            return None
        launcher = block_launcher(
            layers, problem.x, settings.batch_size, settings.loss, settings.momentum > 0,
            sum(lengths) / len(lengths), settings.backend,
            not phase.encoder and all(self.network.trainable[i] for i in phase.chain),
        )  # fmt: skip
        apart = max(lengths) >= steps_per_pass or not problem.fits(layers[:-1], max(lengths) * settings.batch_size)
        return None if launcher is None or (apart and not launcher.whole) else launcher

    def _run_blocks_at_once(
        self, launcher: Launcher, phase: Phase, problem: Problem, rates: list[float], turns: list[tuple[int, int]]
    ) -> Passes[_Turns]:
        """Blocks of (layer, steps) in one call."""
        settings, stop = self.settings, _stopwatch(self.device)
        assert problem.target is not None
        blocks = [
            Block(phase.chain.index(layer), list(self.streams[layer].spans(steps)), rates[layer]) for layer, steps in turns
        ]
        values, norms, lengths = yield Round(
            launcher, [self.network.layers[i] for i in phase.chain], [Velocity(*self.velocities[i]) for i in phase.chain],
            problem.x, problem.target, blocks, settings.batch_size, settings.loss,
            momentum=settings.momentum, nesterov=settings.nesterov, relative_lr=settings.relative_lr,
            reset_momentum=settings.reset_momentum, x_scale=scale_of(problem.x, settings.x_scale),
            cycle=sum(self.network.trainable[i] for i in phase.order) if settings.schedule.parallel else 0,
        )  # fmt: skip
        layers, sizes = zip(*turns, strict=True)
        return _Turns(layers, sizes, lengths, values, norms, stop())

    def _run_block(
        self, phase: Phase, problem: Problem, layer: int, seen: dict[int, Layer], steps: int, rate: float, keep: bool
    ) -> Passes[_Turns]:
        """`steps` mini-batches on one layer, the others as in `seen`; `keep` says that the block sees every row."""
        yield None
        settings, stop = self.settings, _stopwatch(self.device)
        place = phase.chain.index(layer)
        prefix = [seen[i] for i in phase.chain[:place]]
        suffix = [seen[i] for i in phase.chain[place + 1 :]]
        weight, bias, activation = self.network.layers[layer]
        if settings.reset_momentum:
            for part in self._kept(layer):
                part.zero_()
        lr = torch.full((), rate, dtype=weight.dtype, device=weight.device)
        if settings.relative_lr:
            lr = lr * norms_or_one([weight], [bias])[0]
        kept = problem.behind(prefix) if keep and prefix else None
        if kept is not None:
            problem, prefix = kept, []
        arguments: dict[str, Any] = {
            "weight": weight, "bias": bias, "batch_size": settings.batch_size, "suffix": suffix, "activation": activation,
            "loss": settings.loss, "lr": lr, "backend": settings.backend,
        }  # fmt: skip
        velocity = dict(zip(("velocity_weight", "velocity_bias"), self.velocities[layer], strict=True))
        sngd = {**velocity, "momentum": settings.momentum, "nesterov": settings.nesterov}
        rule, results = self.rules[layer], []
        for rows in self.streams[layer].take(steps):
            for piece in problem.pieces(rows, prefix, settings.batch_size):
                call = arguments | piece._asdict() | {"x_scale": scale_of(piece.x, settings.x_scale)}
                results.append((yield call | sngd) if rule is None else rule.epoch_(**call))
        losses, norms = (torch.cat(part) for part in zip(*results, strict=True))
        return _Turns([layer], [len(norms)], lr[None], losses, norms, stop())

    def _record(self, at: checkpoint.Position, turns: list[_Turns], norms: Tensor, seconds: float) -> None:
        losses = torch.cat([some.losses for some in turns]).cpu()
        rates = torch.cat([some.lr for some in turns]).tolist()
        layers, steps = _blocks(turns)
        # Of blocks in one call each has its part, by its steps, of the call's seconds.
        a_step = np.repeat([some.seconds() / len(some.norms) for some in turns], [len(some.steps) for some in turns]).tolist()
        starts, every_norm = np.cumsum(steps) - steps, norms.double().numpy()
        means = (np.add.reduceat(values, starts) / steps for values in (losses.double().numpy(), every_norm))
        of_turns = (
            steps, np.add.reduceat(every_norm == 0, starts, dtype=int), *means,
            np.minimum.reduceat(every_norm, starts), np.maximum.reduceat(every_norm, starts),
        )  # fmt: skip
        widths = [weight.numel() + (0 if bias is None else bias.numel()) for weight, bias, _ in self.network.layers]
        coasts = [rule is not None and rule.coasts for rule in self.rules]
        columns = layers, rates, a_step, *(column.tolist() for column in of_turns)
        for layer, lr, each, count, zeros, loss, norm_mean, norm_min, norm_max in zip(*columns, strict=True):
            skipped = 0 if coasts[layer] else zeros
            self.weights_updated += widths[layer] * (count - skipped)
            self.history.blocks.append(
                BlockRecord(
                    phase=at.phase,
                    round=len(self.history.rounds),
                    layer=layer,
                    name=self.network.names[layer],
                    lr=lr,
                    steps=count,
                    skipped=skipped,
                    loss=loss,
                    norm_mean=norm_mean,
                    norm_min=norm_min,
                    norm_max=norm_max,
                    weights_updated=self.weights_updated,
                    seconds=each * count,
                )
            )
        self._record_round(at.phase, float(losses.mean()), len(losses), seconds)

    def _record_round(self, phase: int, loss: float, steps: int, seconds: float) -> None:
        metrics: dict[str, float] = {}
        if self.validation is not None:
            x, target, classes = self.validation
            value, correct = self._evaluate(self.network.layers, x, target)
            metrics["loss"] = float(value)
            if classes:
                metrics["accuracy"] = int(correct) / x.shape[0]
        record = RoundRecord(phase, len(self.history.rounds), loss, None, metrics, steps, self.weights_updated, seconds)
        self.history.rounds.append(record)

    def _evaluate(self, chain: Sequence[Layer], x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate(chain, x, target, self.settings.loss, self.settings.backend, self.settings.x_scale)

    def _objective(self, phase: Phase, problem: Problem) -> float:
        """The phase's loss over all training rows."""
        chain = [self.network.layers[i] for i in phase.chain]
        total = 0.0
        for x, target in problem.all_pieces():
            value, _ = self._evaluate(chain, x, target)
            total += float(value) * x.shape[0]
        return total / self.x.shape[0]

    def _finetune_epoch(self, number: int) -> None:
        settings, before = self.settings, self.state()
        stop = _stopwatch(self.device)

        def train(steps: int | None) -> tuple[Tensor, Tensor]:
            return finetune.epoch(
                self.network, self.x, self.target, self.streams[-1], loss=settings.loss, lr=settings.schedule.finetune_lr,
                x_scale=settings.x_scale, steps=steps,
            )  # fmt: skip

        values, norms = train(None)
        seconds = stop()
        bad = (~torch.isfinite(norms)).nonzero()
        if len(bad):
            step = int(bad[0])
            self.restore(before)
            train(step)
            raise NonFiniteError(
                f"all layers, fine-tuning epoch {number}, step {step}: the gradient's norm is {float(norms[step])}; "
                "look for NaN or infinity in x and y, or lower finetune_lr. The weights are those before that step.",
                self.history,
            )
        parameters = (p for p in self.network.parameters() if p.requires_grad)
        self.weights_updated += len(values) * sum(p.numel() for p in parameters)
        self._record_round(-1, float(values.mean()), len(values), seconds())

    def _raise_non_finite(
        self,
        before: dict[str, Any],
        phase: Phase,
        at: checkpoint.Position,
        rates: list[float],
        turns: list[_Turns],
        step: int,
        norm: float,
    ) -> Passes[NoReturn]:
        """Go back to the weights before the first step that was not finite, and say where that was."""
        layers, steps = _blocks(turns)
        ends = np.cumsum(steps)
        index = int(np.searchsorted(ends, step, side="right"))
        step -= int(ends[index] - steps[index])
        self.restore(before)
        assert at.problem is not None
        yield from self._run_round(phase, at.problem, rates, until=(index, step))
        layer = layers[index]
        raise NonFiniteError(
            f"layer {layer} ({self.network.names[layer]!r}), round {len(self.history.rounds)}, step {step} of its block "
            f"{index}: the gradient's norm is {norm}; look for NaN or infinity in x and y, or lower lr. "
            "The weights are those before that step.",
            self.history,
        )

    def state(self) -> dict[str, Any]:
        """All that training depends on, apart from data and settings, copied."""
        return {
            "tensors": [[part.clone() for part in parts] for parts in self._changing()],
            "bounds": self.bounds,
            "streams": [stream.state() for stream in self.streams],
            "generator": self.generator.get_state(),
            "weights_updated": self.weights_updated,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a `state`, weights included."""
        for parts, saved_parts in zip(self._changing(), state["tensors"], strict=True):
            for own, saved in zip(parts, saved_parts, strict=True):
                own.copy_(saved)
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.restore(saved)
        self.bounds = state["bounds"]
        self.generator.set_state(state["generator"])
        self.weights_updated = state["weights_updated"]

    def _kept(self, layer: int) -> list[Tensor]:
        """What the layer's direction keeps from step to step."""
        rule = self.rules[layer]
        return [part for part in self.velocities[layer] if part is not None] if rule is None else rule.kept

    def _changing(self) -> list[list[Tensor]]:
        """Layer by layer all tensors that training changes."""
        return [[*bounds.parts(layer), *self._kept(i)] for i, layer in enumerate(self.network.layers)]
