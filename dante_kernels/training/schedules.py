"""Schedules: which layers are trained in which order, on which problem, and for how long a layer keeps its turn."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field

# What `fit` takes where no schedule is given, in parallel or in turn; docs/defaults.md has the reasons.
INNER_STEPS, STEPS_IN_TURN = 3, 20
ROUNDS, MOST_ROUNDS, STEPS = 12, 100, 1200  # rounds at least and at most, and the steps of a layer that they should come to


def default_rounds(rows: int, batch_size: int) -> int:
    """How many passes of each layer `fit` makes where no schedule is given: more over small data."""
    return max(ROUNDS, min(MOST_ROUNDS, -(-STEPS // -(-rows // batch_size))))


def usual(rounds: int, parallel: bool) -> Schedule:
    """What `fit` takes where no schedule is given, with so many rounds."""
    return RoundRobin(rounds=rounds, inner_epochs=1, inner_steps=INNER_STEPS if parallel else STEPS_IN_TURN, parallel=parallel)


@dataclass(frozen=True)
class Phase:
    """One alternation: a chain of layers, trained on one problem until its rounds are done.

    Attributes:
        chain: indices of the layers that form the network of this phase, from input to output.
        order: indices of the layers to train, in the order of their turns.
        encoder: indices of the layers whose activations are this phase's input and target (none: the data itself).
        autoencodes: whether the target is the phase's own input (with an encoder always).
    """

    chain: tuple[int, ...]
    order: tuple[int, ...]
    encoder: tuple[int, ...] = ()
    autoencodes: bool = False


@dataclass(frozen=True)
class Schedule:
    """What all schedules share: how many rounds, and how long each layer's turn is.

    In a round every layer takes its turns. With ``inner_epochs`` alone a layer has one turn a round, of that many passes
    over the data (a fraction is that part of a pass); with ``inner_steps`` alone one turn of that many mini-batches. With
    both, a layer makes ``inner_epochs`` passes a round, cut into turns (blocks) of ``inner_steps`` mini-batches that the
    layers take alternately. A layer goes on through its shuffled data where its last block stopped.

    A turn of each layer is a cycle. The other layers are frozen in a turn as the turns before have left them; with ``parallel``
    as they were at the start of the cycle, so that the layers of a cycle know nothing of each other's turns: block coordinate
    descent in the way of Jacobi instead of Gauss and Seidel.

    Args:
        rounds: rounds at most, in each phase.
        inner_epochs: passes of a layer over the data in a round (the papers' T, 5 there); 1 where neither is given.
        inner_steps: mini-batches in one block.
        parallel: freeze the other layers as they were at the cycle's start. For blocks of a few mini-batches and small steps,
            such as `fit` takes where no rate is given; with momentum and a rate of 0.1 a deeper net learns next to nothing so.
        min_rounds: with `fit`'s ``stop_epsilon``, rounds at least (T_AM of Algorithm 2).
        finetune_epochs: epochs of end-to-end SGD with backpropagation after the alternation.
        finetune_lr: their learning rate, constant.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    rounds: int = 12
    inner_epochs: float | None = None
    inner_steps: int | None = None
    min_rounds: int = 1
    finetune_epochs: int = 0
    finetune_lr: float = 0.1
    parallel: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name, low in (("rounds", 1), ("min_rounds", 1), ("finetune_epochs", 0), ("inner_steps", 1)):
            value = getattr(self, name)
            if value is None and name == "inner_steps":
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"{name}: expected a whole number, got {value!r}")
            if value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")
        for name in ("inner_epochs", "finetune_lr"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            if value is not None and not (math.isfinite(value) and float(value) > 0):
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if not isinstance(self.parallel, bool):
            raise TypeError(f"parallel: expected True or False, got {self.parallel!r}")

    def blocks(self, steps_per_pass: int) -> list[int]:
        """The length in mini-batches of each turn that a layer takes in one round."""
        if self.inner_epochs is None and self.inner_steps is not None:
            return [self.inner_steps]
        total = max(1, round((self.inner_epochs or 1) * steps_per_pass))
        block = min(self.inner_steps or total, total)
        return [min(block, total - done) for done in range(0, total, block)]

    def phases(self, widths: list[int]) -> list[Phase]:
        """The phases for a network of these widths, from input to output."""
        raise TypeError(f"schedule: expected Alternating, RoundRobin or StackedAutoencoder, got {type(self).__name__}")


class Alternating(Schedule):
    """Algorithm 2 of the 2020 paper: one hidden layer; in each round the outer layer W2 first, then W1.

    Give `fit` a ``stop_epsilon`` for the algorithm's stopping rule: it ends when a round changes the objective by less
    than epsilon and at least ``min_rounds`` (T_AM) rounds are done. Arguments and errors are
    those of `dante_kernels.training.schedules.Schedule`; `fit` raises ValueError for a model without exactly one hidden layer.
    """

    def phases(self, widths: list[int]) -> list[Phase]:
        """One phase over both layers."""
        if len(widths) != 3:
            raise ValueError(
                f"schedule: Alternating trains one hidden layer, but the model has {len(widths) - 2}; use RoundRobin"
            )
        return [Phase(chain=(0, 1), order=(1, 0))]


class RoundRobin(Schedule):
    """Every layer in network order, over and over.

    Arguments and errors are those of `dante_kernels.training.schedules.Schedule`.

    Source: section 3.5 of the 2020 paper, which trains multi-layer networks so.
    """

    def phases(self, widths: list[int]) -> list[Phase]:
        """One phase over all layers."""
        everything = tuple(range(len(widths) - 1))
        return [Phase(chain=everything, order=everything)]


@dataclass(frozen=True)
class StackedAutoencoder(Schedule):
    """Pairs of layers of an autoencoder, from the outermost pair (W_1, W_2n) inwards.

    Algorithm 3 of the 2020 paper: pair l is trained by Algorithm 2 as a one-hidden-layer network whose input and target
    are the activations of the trained outer encoder. With ``whole_network=True``, the form of 2018 and 2019: each pair
    is trained inside the whole network, with the data as input and target.

    Args:
        whole_network: train each pair inside the whole network.

    The other arguments and the errors are those of `Schedule`; ``rounds`` counts for each pair. `fit` raises ValueError
    for a model that is no such autoencoder.
    """

    whole_network: bool = False

    def phases(self, widths: list[int]) -> list[Phase]:
        """One phase for each pair."""
        layers = len(widths) - 1
        if layers % 2 or widths[0] != widths[-1]:
            raise ValueError(
                "schedule: StackedAutoencoder needs an even number of layers and an output as wide as the input, "
                f"got widths {'-'.join(map(str, widths))}"
            )
        phases = []
        for outer in range(layers // 2):
            inner = layers - 1 - outer
            if self.whole_network:
                phases.append(Phase(chain=tuple(range(layers)), order=(inner, outer), autoencodes=True))
                continue
            if widths[outer] != widths[inner + 1]:
                raise ValueError(
                    f"schedule: StackedAutoencoder pairs layer {outer} with layer {inner}, whose output {widths[inner + 1]} "
                    f"must be as wide as the pair's input {widths[outer]}"
                )
            phases.append(Phase(chain=(outer, inner), order=(inner, outer), encoder=tuple(range(outer)), autoencodes=True))
        return phases
