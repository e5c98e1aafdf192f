"""A pass in one launch of the persistent kernel, its programs interleaved, and the kernel with something taken away."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import passes
import torch
import triton
from interleave import Deadlock, interleaved
from passes import NO_MOMENTUM, Rule
from support import Problem
from torch import Tensor

from dante_kernels.kernels import one_launch, persistent, plan
from dante_kernels.kernels.fused import Call

# What waits in the kernel, and what does not.
MEET = "sense = meet(p_counter, program, sense, PROGRAMS)\n"
ONLY_ARRIVE = "arrive(p_counter, program, PROGRAMS); sense = ~sense\n"
WAIT = "sense = wait(p_counter, sense)\n"


def tiles(p: Problem, batch: int) -> plan.Persistent:
    """Tiles of 16 units and 4 x 16 inputs, so that small problems have several programs."""
    widths = (p.weight.shape[1], p.weight.shape[0], *(layer.weight.shape[0] for layer in p.suffix))
    rows = 16 if len(p.suffix) == 2 else 32
    return plan._persistent(widths, batch, plan.Sizes(rows, 16, 16, 4, 4), plan.H200)


def wide_tiles(p: Problem, batch: int) -> plan.Persistent:
    """Tiles of 2 x 16 units and 4 x 16 inputs, updated part by part."""
    widths = (p.weight.shape[1], p.weight.shape[0], *(layer.weight.shape[0] for layer in p.suffix))
    return plan._persistent(widths, batch, plan.Sizes(16, 32, 16, 4, 8, 2), plan.H200)


def one_barrier_tiles(p: Problem, batch: int, inputs: int = 32) -> plan.Persistent:
    """The form with one barrier a step, with few inputs a program."""
    n_next = p.suffix[0].weight.shape[0] if p.suffix else 0
    return plan._one_barrier(*p.weight.shape, n_next, batch, inputs, "tf32", plan.H200)


def run(
    p: Problem, batch: int, how: plan.Persistent, seed: int = 0, rule: Rule = NO_MOMENTUM, order=None,
    module: ModuleType = persistent,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(losses, norms)."""
    call = Call(*passes.arguments_of(p, batch, order, rule))
    with interleaved(seed) as grids:
        result = one_launch.run(
            [one_launch.model(call)], call.layers, batch, call.loss, call.momentum, call.nesterov, call.x_scale, how,
            kernel=module.persistent,
        )  # fmt: skip
    assert grids == [how.programs] * (how.programs > 1)
    return result[0]


def assert_pass_is_right(p: Problem, batch: int, how: plan.Persistent, seed: int = 0, **rest) -> Tensor:
    """`passes.assert_pass_is_right` for `run`; all that it returns, as one vector."""

    def make(p: Problem, batch: int, order: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
        return run(p, batch, how, seed, rule, order)

    return torch.cat([t.flatten() for t in passes.assert_pass_is_right(p, batch, make, **rest)])


def mutant(tmp_path: Path, old: str, nth: int, new: str) -> ModuleType:
    """The kernel's module with one occurrence of `old` replaced."""
    parts = Path(persistent.__file__).read_text().split(old)
    assert len(parts) > nth + 1
    path = tmp_path / "mutant.py"
    path.write_text(old.join(parts[: nth + 1]) + new + old.join(parts[nth + 1 :]))
    spec = importlib.util.spec_from_file_location("dante_kernels.kernels.mutant", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def ends(launch: Callable[[], object]) -> bool:
    """Whether a changed kernel comes to its end."""
    try:
        launch()
    except (Deadlock, triton.runtime.errors.InterpreterError) as error:
        if "Deadlock" not in repr(error):
            raise
        return False
    return True
