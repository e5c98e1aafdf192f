"""Many launches, those of a pass or of several blocks, recorded as a CUDA graph when they come a second time, then replayed.

What a graph bakes in is its key: the address, shape and strides of every tensor, every number, the precision switch, the
plan that the environment names and the stream. What may differ from call to call, the order of the rows and the learning
rate, is copied into tensors of the graph's own first. A graph holds no tensor of the caller's: an address in the key belongs
to a tensor that the caller passes now, whatever lay there when the graph was recorded. Its own memory (scratch, copies,
results) lives as long as the graph, and the least recently used graphs go where there are more than `MOST_GRAPHS` or they
take more than `MOST_BYTES`.

Any doubt means launch by launch: off a CUDA device, inside a capture of the caller's, in another thread meanwhile, with
`DANTE_CUDA_GRAPHS=0`, beyond `MOST_LAUNCHES`, and for good after a recording that failed.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plan

ENVIRONMENT_VARIABLE = "DANTE_CUDA_GRAPHS"
MOST_GRAPHS = 256
MOST_BYTES = 2**30
NODE_BYTES = 2**10  # about what a launch takes of the host's memory, and of the device's
MOST_LAUNCHES = 2**16

logger = logging.getLogger("dante_kernels")

Results = tuple[Tensor, ...]
Function = Callable[..., Results]
Changing = tuple[Tensor | None, ...]


class Recording(NamedTuple):
    """A recorded run: what runs it again, what it leaves its results in, and the bytes that it keeps on the device."""

    replay: Callable[[], None]
    results: Results
    bytes: int


def switched_on() -> bool:
    """What DANTE_CUDA_GRAPHS says; on where it is unset or empty."""
    switch = os.environ.get(ENVIRONMENT_VARIABLE) or "1"
    if switch not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected 0 or 1, got {switch!r}")
    return switch == "1"


class CudaRecorder:
    """Records by capturing a stream's work as a CUDA graph. Nothing runs while it is recorded."""

    def place(self, tensor: Tensor) -> Hashable | None:
        """The stream on which work on a tensor is to be replayed, or None where it cannot be recorded now."""
        if not tensor.is_cuda or torch.cuda.is_current_stream_capturing():
            return None
        return torch.cuda.current_stream().cuda_stream

    def record(self, run: Callable[[], Results]) -> Recording:
        """What `run` launches, with its memory in a pool of the graph's own.

        Not by torch.cuda.graph, which waits for the device and gives back all cached memory: then the next activations
        would lie at other addresses, and no graph of them be found again.
        """
        # Of another priority than `branches`' streams, which another thread may give work to meanwhile: so it is none of them.
        graph, current, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream(priority=-1)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # cuBLAS's workspace must be the graph's own: neither one that lies elsewhere and may go, nor one that is handed on
            # to other graphs. The handle cannot be made during a capture.
            torch.cuda.current_blas_handle()
            torch._C._cuda_clearCublasWorkspaces()
            # What other threads do at the same time is no part of it, and no error.
            with torch.inference_mode(False):  # in it, tensors of torch's generator would be of no use to captures outside it
                graph.capture_begin(capture_error_mode="thread_local")
            try:
                before = torch.cuda.memory_reserved()
                results = run()
                kept = torch.cuda.memory_reserved() - before
            finally:
                graph.capture_end()
                torch._C._cuda_clearCublasWorkspaces()
        current.wait_stream(side)
        return Recording(graph.replay, results, kept)


@dataclasses.dataclass
class _Entry:
    own: Changing  # copies of what changes
    recording: Recording | None = None

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.own if t is not None) + (self.recording.bytes if self.recording else 0)


def _fingerprint(value: Any, changing: Changing) -> Iterator[Hashable]:
    """All that a recording of these arguments depends on; of a tensor that changes only its kind."""
    if isinstance(value, Tensor):
        fixed = all(value is not tensor for tensor in changing)
        yield (value.data_ptr(), value.stride()) if fixed else "changing"
        yield (value.shape, value.dtype, value.device)
    elif isinstance(value, tuple | list):
        yield len(value)
        for part in value:
            yield from _fingerprint(part, changing)
    else:
        yield value


def _with_own(value: Any, changing: Changing, own: Changing) -> Any:
    """The arguments with every tensor that changes replaced by the graph's own."""
    if isinstance(value, Tensor):
        return next((mine for tensor, mine in zip(changing, own, strict=True) if tensor is value), value)
    if isinstance(value, tuple | list):
        parts = [_with_own(part, changing, own) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


@torch.inference_mode(False)  # whose tensors could not be written to outside it
def _like(changing: Changing) -> Changing:
    """Fresh tensors of the same kinds, contiguous."""
    return tuple(t if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in changing)


class Graphs:
    """Recordings by key, the least recently used first."""

    def __init__(self, recorder: Any) -> None:
        self.recorder = recorder
        self.entries: collections.OrderedDict[Hashable, _Entry] = collections.OrderedDict()
        self.usable = True
        self._lock = threading.Lock()

    def run(self, function: Function, arguments: tuple[Any, ...], changing: Changing, launches: int) -> Results:
        """function(*arguments), from the key's second call on as a replay.

        Args:
            function: launches kernels and returns fresh tensors; what it does must depend on its arguments alone.
            arguments: nested tuples and lists of tensors, numbers and None. The key is made of them.
            changing: those of the tensors (the same objects, at least one, or None) whose address and values are no part
                of the key. `function` must only read them.
            launches: about how many it makes.
        """
        place = None
        if switched_on() and self.usable and launches <= MOST_LAUNCHES:
            place = self.recorder.place(next(tensor for tensor in changing if tensor is not None))
        if place is None or not self._lock.acquire(blocking=False):
            return function(*arguments)
        try:
            key = (
                function,
                place,
                torch.get_float32_matmul_precision(),
                plan.wanted_plan(),
                *_fingerprint(arguments, changing),
            )
            return self._run(key, function, arguments, changing, launches)
        finally:
            self._lock.release()

    def _run(self, key: Hashable, function: Function, arguments: tuple[Any, ...], changing: Changing, launches: int) -> Results:
        entry, first = self.entries.get(key), key not in self.entries
        if entry is None:
            entry = _Entry(_like(changing))
        for mine, tensor in zip(entry.own, changing, strict=True):
            if mine is not None and tensor is not None:
                mine.copy_(tensor)
        if first:
            # On the graph's own copies, so that every kernel that will be recorded has been compiled for them.
            results = function(*_with_own(arguments, changing, entry.own))
            self._keep(key, entry)
            return results
        if entry.recording is None:
            arguments = _with_own(arguments, changing, entry.own)
            try:
                recording = self.recorder.record(lambda: function(*arguments))
                entry.recording = recording._replace(bytes=recording.bytes + NODE_BYTES * launches)
            except RuntimeError as error:
                logger.warning("no CUDA graphs from now on, since recording one failed: %s", error)
                self.usable = False
                self.entries.clear()
                return function(*arguments)
            self._keep(key, entry)
        self.entries.move_to_end(key)
        entry.recording.replay()
        return tuple(result.clone() for result in entry.recording.results)

    def _keep(self, key: Hashable, entry: _Entry) -> None:
        """As the last used; the least recently used go while there are too many, but never this one."""
        self.entries[key] = entry
        self.entries.move_to_end(key)
        total = sum(entry.bytes for entry in self.entries.values())
        while len(self.entries) > MOST_GRAPHS or (total > MOST_BYTES and len(self.entries) > 1):
            total -= self.entries.popitem(last=False)[1].bytes


_shared = Graphs(CudaRecorder())


def run(function: Function, arguments: tuple[Any, ...], changing: Changing, launches: int) -> Results:
    """`Graphs.run` with the recordings that all share."""
    return _shared.run(function, arguments, changing, launches)
