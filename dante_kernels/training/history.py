"""What a training run leaves behind: a record per block and per round."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class BlockRecord:
    """One layer's turn.

    Attributes:
        phase: index of the phase (the pair, for stacked autoencoders).
        round: the round, counted over all phases from 0.
        layer: index of the active layer; ``name`` is its nn.Linear's name in the model.
        lr: the step length that was used (the learning rate times the layer's norm with ``relative_lr``), or what torch's
            optimizer was given as lr.
        steps: mini-batches seen; ``skipped`` of them changed nothing, since their gradient was zero (none where the direction
            goes on by the steps before, see `fit`).
        loss: mean over the steps of the mini-batch's loss before the step.
        norm_mean, norm_min, norm_max: of the gradient's Frobenius norm over the steps.
        weights_updated: weights changed since the start of training, each change counted.
        seconds: of this block, the prefix's activations included; of blocks that are one call on a GPU, the call's, shared
            out by their steps.
    """

    phase: int
    round: int
    layer: int
    name: str
    lr: float
    steps: int
    skipped: int
    loss: float
    norm_mean: float
    norm_min: float
    norm_max: float
    weights_updated: int
    seconds: float


@dataclass
class RoundRecord:
    """All layers' turns of one round, or one epoch of fine-tuning.

    Attributes:
        phase: index of the phase, or -1 for fine-tuning.
        round: counted over all phases from 0.
        loss: mean over the round's steps of the mini-batch's loss before the step.
        objective: the loss over all training rows after the round; only where ``stop_epsilon`` asks for it, else None.
        metrics: on the validation data after the round: ``loss``, and ``accuracy`` where its targets are classes.
        steps: mini-batches seen in the round, over all layers.
        weights_updated: weights changed since the start of training, each change counted.
        seconds: of training in this round, validation and objective not included.
    """

    phase: int
    round: int
    loss: float
    objective: float | None
    metrics: dict[str, float]
    steps: int
    weights_updated: int
    seconds: float


@dataclass
class History:
    """The records of a run, and why it ended: ``"rounds"``, ``"epsilon"`` or ``"callback"``.

    ``blocks`` holds the turns, ``rounds`` the rounds and fine-tuning epochs, in order.
    """

    blocks: list[BlockRecord] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)
    stopped_by: str = "rounds"

    @property
    def weights_updated(self) -> int:
        """Weights changed so far, each change counted: the papers' x-axis."""
        return self.rounds[-1].weights_updated if self.rounds else 0

    @property
    def seconds(self) -> float:
        """Seconds of training so far, validation not included."""
        return sum(record.seconds for record in self.rounds)

    def __repr__(self) -> str:
        """Not the records themselves, of which there are thousands."""
        last = f", last {self.rounds[-1]}" if self.rounds else ""
        return f"History({len(self.blocks)} blocks, {len(self.rounds)} rounds, stopped by {self.stopped_by!r}{last})"

    def to_dict(self) -> dict[str, Any]:
        """The records as plain lists and dictionaries, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, records: dict[str, Any]) -> History:
        """The inverse of `to_dict`."""
        return cls(
            [BlockRecord(**record) for record in records["blocks"]],
            [RoundRecord(**record) for record in records["rounds"]],
            records["stopped_by"],
        )
