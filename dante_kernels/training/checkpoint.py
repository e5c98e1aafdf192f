"""Checkpoints: the whole state of a run after each round, written so that a broken write never replaces a good file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .history import History
from .problem import Problem

MAGIC = b"dante_kernels checkpoint 1\n"  # then the SHA-256 of the rest, which is torch.save's


class Resumable(Protocol):
    """A run that can be put back to where it was: the trainer."""

    device: torch.device
    history: History

    def state(self) -> dict[str, Any]:
        """All that the run depends on, apart from data and settings."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a `state`."""


@dataclass
class Position:
    """Where training goes on: the phase, the round within it, and what is kept between the phase's rounds."""

    phase: int = 0
    round: int = 0
    objective: float | None = None
    problem: Problem | None = None
    trained: bool = True  # False where a phase was passed over, all of whose layers are frozen


class File:
    """A checkpoint file of one run. A file that is there is gone on from; it must come from the same run.

    Args:
        path: the file.
        fingerprint: what tells this run from another, as text by name: settings, layers, size of the data.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: dict[str, str]) -> None:
        self.path = Path(os.path.realpath(path))  # a link stays a link
        self.fingerprint = fingerprint
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"checkpoint: expected a file in an existing folder, got {str(self.path)!r}")
        if self.path.is_dir():
            raise IsADirectoryError(f"checkpoint: expected a file, got the folder {str(self.path)!r}")

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """What the file holds, its tensors on the device; None where there is no file yet.

        Raises:
            ValueError: where the file is not a checkpoint of this run.
        """
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        digest, rest = content[len(MAGIC) : len(MAGIC) + 32], content[len(MAGIC) + 32 :]
        if not content.startswith(MAGIC) or hashlib.sha256(rest).digest() != digest:
            raise ValueError(f"checkpoint: {str(self.path)!r} is not a readable checkpoint: it is damaged, or something else")
        saved: dict[str, Any] = torch.load(io.BytesIO(rest), map_location=device, weights_only=True)
        theirs = saved["fingerprint"]
        if theirs != self.fingerprint:
            names = [name for name in self.fingerprint if theirs.get(name) != self.fingerprint[name]]
            raise ValueError(
                f"checkpoint: {str(self.path)!r} belongs to another run, which differs in {', '.join(names)}; "
                "give another file, or remove it to start anew"
            )
        return saved

    def load(self, trainer: Resumable) -> Position | None:
        """Put the trainer where the file left off, if there is one; see `read`."""
        saved = self.read(trainer.device)
        if saved is None:
            return None
        saved["state"]["generator"] = saved["state"]["generator"].cpu()
        trainer.restore(saved["state"])
        trainer.history = History.from_dict(saved["history"])
        return Position(*saved["position"])

    def save(self, trainer: Resumable, at: Position) -> None:
        """Write the trainer's state to a temporary file beside the checkpoint, then put it in its place."""
        content: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "state": trainer.state(),
            "history": trainer.history.to_dict(),
            "position": [at.phase, at.round, at.objective],
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                file.write(MAGIC + hashlib.sha256(buffer.getbuffer()).digest() + buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
