# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""A grid barrier: a counter in device memory that serves barrier after barrier, launch after launch, without a reset."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Counters lie this many int32 apart, each in a cache line of its own.
SPACING = 32


@triton.jit
def arrive(p_counter, program, PROGRAMS: tl.constexpr):
    """Count this program in at a barrier; what it stored before is then visible to whoever has waited.

    Program 0 adds 2^31 - (PROGRAMS - 1) and each other program 1: when the last one has arrived, the counter's sign has
    changed and all its other bits are 0 again, as the next barrier needs them.
    """
    tl.debug_barrier()
    tl.atomic_add(p_counter, tl.where(program == 0, 2147483649 - PROGRAMS, 1), sem="release", scope="gpu")


@triton.jit
def wait(p_counter, sense):
    """Wait until the counter's sign is not that of `sense`, and return a number with the new sign.

    At first `sense` is the counter as it was before this program arrived anywhere: until it does, the sign stays.
    """
    while (tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") ^ sense) >= 0:
        pass
    tl.debug_barrier()
    return ~sense


@triton.jit
def meet(p_counter, program, sense, PROGRAMS: tl.constexpr):
    """Arrive and wait."""
    arrive(p_counter, program, PROGRAMS)
    return wait(p_counter, sense)


# By (device, stream): launches on one stream run one after the other, so they can share counters.
_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, groups: int) -> Tensor:
    """Counters for `groups` groups of programs, SPACING int32 apart, at rest: between launches all their low bits are 0."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(groups * SPACING, dtype=torch.int32, device=device)  # lives as long as the graph
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    found = _counters.get(key)
    if found is None or len(found) < groups * SPACING:
        found = _counters[key] = torch.zeros(groups * SPACING, dtype=torch.int32, device=device)
    return found
