"""How operators reach torch: schemas with declared mutations, an implementation per device, a fake.

`torch.library.Library.define` and `impl` are used rather than `custom_op`, whose dispatch costs about ten times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import backends, checks

LIBRARY = torch.library.Library("dante", "DEF")

# What the operators share, in the order in which every backend takes it; SCALE is the last argument of each.
PROBLEM = "Tensor[] suffix_weights, Tensor?[] suffix_biases, float[] activations, int loss"
UPDATE = "Tensor lr, Tensor(c!)? velocity_weight=None, Tensor(d!)? velocity_bias=None, float momentum=0.0, bool nesterov=False"
SCALE = "float x_scale=1.0"


def written(overload: Any) -> dict[int, str]:
    """The places and names of the arguments that a call of this overload changes."""
    arguments = enumerate(overload._schema.arguments)
    return {i: a.name for i, a in arguments if a.alias_info is not None and a.alias_info.is_write}


def count_up(changed: Iterable[Tensor | None]) -> None:
    """Kernels write behind autograd's back; with the version counted up, a graph that needs the old values says so."""
    torch.autograd.graph.increment_version([t for t in changed if t is not None and not t.is_inference()])


def register(
    name: str, arguments: str, returns: str, check: Callable[..., None], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define ``dante::name(arguments, *, str backend) -> returns`` for CPU and CUDA tensors; returns the callable overload.

    A call runs ``check`` on the arguments, then the function of the same name of the backend that serves it. ``fake``
    makes the results' shapes. Both take the schema's arguments without ``backend``. The first argument named ``weight``
    decides which backend serves.
    """
    LIBRARY.define(f'{name}({arguments}, *, str backend="auto") -> {returns}', tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.dante, name).default
    positional = [argument for argument in overload._schema.arguments if not argument.kwarg_only]
    weight = next(i for i, argument in enumerate(positional) if argument.name == "weight")
    changed = written(overload)

    def complete(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The dispatcher leaves off trailing arguments that have their default."""
        return args + tuple(argument.default_value for argument in positional[len(args) :])

    def implementation(*args: Any, backend: str = "auto") -> Any:
        args = complete(args)
        check(*args)
        checks.no_aliases({name: args[i] for i, name in changed.items()}, args)
        with torch.no_grad():
            result = getattr(backends.choose(backend, args[weight]), name)(*args)
        count_up(args[i] for i in changed)
        return result

    def checked_fake(*args: Any, backend: str = "auto") -> Any:
        args = complete(args)
        check(*args)
        return fake(*args)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    # No autograd: parameters that require gradients are taken like any tensor, and results never require them.
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"dante::{name}", checked_fake, lib=LIBRARY)
    return overload
