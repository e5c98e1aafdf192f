"""A checked run of training that has not begun, and how it is carried out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import network, ops
from ..network import Network
from ..ops.blocks import Round, sngd_blocks_
from . import checkpoint
from .history import History
from .trainer import Callback, Passes, Settings, Trainer


@dataclass
class Run:
    """All that `fit` was given, checked; nothing has been changed yet.

    Attributes:
        device: where the model is to be moved; None leaves it where it is.
        served_by: the backend's name.
        x, target, validation: on the device, as `Trainer` takes them.
        trainer: None until training has begun.
    """

    model: nn.Module
    network: Network
    device: torch.device | None
    served_by: str
    x: Tensor
    target: Tensor
    settings: Settings
    validation: tuple[Tensor, Tensor, bool] | None
    callbacks: list[Callback]
    file: checkpoint.File | None
    precision: str | None
    trainer: Trainer | None = field(default=None, init=False)

    @property
    def history(self) -> History:
        """The records so far."""
        return History() if self.trainer is None else self.trainer.history

    def passes(self) -> Passes[History]:
        """Train, under torch.no_grad() and the wanted precision, which are for the caller to set."""
        if self.device is not None:
            with torch.inference_mode(False):  # in it, parameters that are moved could not be written to outside it
                self.model.to(self.device)
            self.network = network.from_module(self.model, self.settings.loss)
        self.trainer = Trainer(self.network, self.x, self.target, self.settings, self.validation)
        return (yield from self.trainer.run(self.callbacks, self.file))

    def alone(self) -> History:
        """Train this model and nothing beside it."""
        passes, result = self.passes(), None
        with matmul_precision(self.precision), torch.no_grad():
            while True:
                try:
                    call = passes.send(result)
                except StopIteration as end:
                    history: History = end.value
                    return history
                result = None if call is None else _perform(call)


def _perform(call: dict[str, Any] | Round) -> tuple[Tensor, ...]:
    if not isinstance(call, Round):
        return ops.sngd_epoch_(**call)
    (result,) = sngd_blocks_([call])
    if isinstance(result, Exception):
        raise result
    return result


@contextlib.contextmanager
def matmul_precision(wanted: str | None) -> Iterator[None]:
    """Set torch's float32 matmul precision, which is the whole process's, and put it back; None leaves it."""
    before = torch.get_float32_matmul_precision()
    if wanted is None:
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
