"""A pass by a kernel and by the reference, held against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import Problem, assert_error_rule
from torch import Tensor

from dante_kernels import kernels, losses, reference
from dante_kernels.ops.layer import flatten

LR = 0.3
Rule = tuple[Tensor | None, Tensor | None, float, bool]  # velocities, momentum, nesterov


def rule_of(p: Problem, momentum: float = 0.0, nesterov: bool = False) -> Rule:
    """Velocities at rest where there is momentum."""
    zeros = (torch.zeros_like(p.weight), None if p.bias is None else torch.zeros_like(p.bias)) if momentum else (None, None)
    return *zeros, momentum, nesterov


NO_MOMENTUM: Rule = (None, None, 0.0, False)


def arguments_of(p: Problem, batch: int, order: Tensor | None = None, rule: Rule = NO_MOMENTUM) -> tuple[Any, ...]:
    """What the backend's `sngd_epoch_` takes."""
    problem = (p.weight, p.bias, p.x, p.target, order, batch, *flatten(p.suffix, p.activation), losses.code(p.loss))
    return *problem, torch.tensor(LR), *rule, p.x_scale


def epoch(p: Problem, batch: int, order: Tensor | None = None, rule: Rule = NO_MOMENTUM) -> tuple[Tensor, Tensor]:
    """A pass by the plan that DANTE_GPU_PLAN names."""
    return kernels.sngd_epoch_(*arguments_of(p, batch, order, rule))


def changed(p: Problem, rule: Rule, result: tuple[Tensor, Tensor]) -> list[Tensor]:
    """All that a pass changes and returns: weight, bias, velocities, losses, norms."""
    return [t for t in (p.weight, p.bias, *rule[:2], *result) if t is not None]


def truth(p: Problem, batch: int, dtype: torch.dtype, order=None, momentum=0.0, nesterov=False) -> list[Tensor]:
    """The same after the reference's pass."""
    q = p.to(dtype)
    rule = rule_of(q, momentum, nesterov)
    problem = (q.weight, q.bias, q.x, q.target, order, batch, q.suffix, q.activation, losses.code(q.loss))
    return changed(q, rule, reference.sngd_epoch_(*problem, torch.tensor(LR, dtype=dtype), *rule))


def assert_pass_is_right(
    p: Problem, batch: int, make: Callable = epoch, order=None, momentum=0.0, nesterov=False
) -> list[Tensor]:
    """`make` changes p and returns (losses, norms) as the reference does, by the error rule; all of that is returned."""
    expected = [truth(p, batch, dtype, order, momentum, nesterov) for dtype in (torch.float32, torch.float64)]
    rule = rule_of(p, momentum, nesterov)
    got = changed(p, rule, make(p, batch, order, rule))
    for i, (ours, theirs, exact) in enumerate(zip(got, *expected, strict=True)):
        assert_error_rule(f"result {i}", ours, theirs, exact)
    return got


def strided(t: Tensor, *, transposed: bool) -> Tensor:
    """The same values in memory with a gap after every element, rows or columns first."""
    shape = (t.shape[1], t.shape[0], 3) if transposed else (*t.shape, 3)
    view = torch.full(shape, 7.0, dtype=t.dtype).select(2, 1)
    return (view.t() if transposed else view).copy_(t)


# What makes a step's result not finite: data, weights, a class or a row that does not exist.
SPOILED = ["x", "weight", "label", "negative label", "order", "negative order", "far order"]


def spoil(p: Problem, order: Tensor, what: str, value: float = torch.nan) -> None:
    """Spoil the fifth row's part of a pass over class indices, or a weight."""
    if what.endswith("label"):
        p.target[4] = -1 if "negative" in what else (p.suffix[-1].weight if p.suffix else p.weight).shape[0]
    elif what.endswith("order"):
        # A read of the far one would end the process.
        order[4] = {"order": len(p.x), "negative order": -3, "far order": 2**45}[what]
    elif what == "x":
        p.x[4, 2] = value
    else:
        p.weight[1, 1] = value
