"""Work of models that know nothing of each other, on streams side by side, so that it can overlap on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# As many streams as a device has queues for, unless CUDA_DEVICE_MAX_CONNECTIONS says otherwise: with more, some would share one
# and wait for each other.
MOST = 8


@functools.cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """The same every time, since recordings belong to a stream."""
    return [torch.cuda.Stream(device) for _ in range(MOST)]


def run(tensor: Tensor, jobs: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """What each job returns, tensors in tuples and lists among it; none may read what another one writes.

    On a CUDA device, which `tensor` is on, they have `at_once` streams, `MOST` at most, and take them in turn. All begin after
    what the current stream has been given so far, and what it is given next begins after all of them, also where a job raises:
    its error is raised then, and no further job is begun. Elsewhere, and inside a capture, one runs after the other. Recordings
    belong to a stream, so where there are fewer jobs than before, those that come to another stream are recorded anew.
    """
    branches = min(len(jobs), at_once, MOST)
    if branches < 2 or not tensor.is_cuda or torch.cuda.is_current_stream_capturing():
        return [job() for job in jobs]
    current = torch.cuda.current_stream(tensor.device)
    streams = _streams(tensor.device)[:branches]
    results: list[T] = []
    for stream in streams:
        stream.wait_stream(current)
    try:
        for i, job in enumerate(jobs):
            with torch.cuda.stream(streams[i % branches]):
                results.append(job())
    finally:
        for stream in streams:
            current.wait_stream(stream)
    _used_on(current, results)
    return results


def _used_on(stream: torch.cuda.Stream, value: Any) -> None:
    """Tell the allocator that tensors made on another stream are used on this one, or they would be handed on too early."""
    if isinstance(value, Tensor):
        value.record_stream(stream)
    elif isinstance(value, tuple | list):
        for part in value:
            _used_on(stream, part)
