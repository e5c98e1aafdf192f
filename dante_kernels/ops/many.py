"""`sngd_epochs_`: passes over layers that do not depend on each other, side by side."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, registration
from .sngd import check_epoch, epoch, epoch_arguments

_WRITTEN = registration.written(epoch)
_PARAMETERS = inspect.signature(epoch_arguments).parameters
_NAMES = _PARAMETERS.keys()
_REQUIRED = {name for name, parameter in _PARAMETERS.items() if parameter.default is parameter.empty}


def outcomes(calls: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor] | Exception]:
    """`sngd_epochs_`, with the error itself as the result of those calls that a backend could not serve together.

    Errors of arguments, which are found before any call is made, are raised.
    """
    if isinstance(calls, Mapping) or not isinstance(calls, Sequence):
        raise TypeError(f"calls: expected a list of mappings, got {type(calls).__name__}")
    with torch.no_grad():
        flat: list[tuple[Any, ...]] = []
        changed: dict[str, Tensor | None] = {}
        groups: dict[Any, list[int]] = {}
        for i, call in enumerate(calls):
            with checks.among("calls", i):
                if not isinstance(call, Mapping):
                    raise TypeError(f"expected a mapping of sngd_epoch_'s arguments by name, got {type(call).__name__}")
                rest = dict(call)
                backend = checks.backend_name(rest.pop("backend", "auto"))
                if rest.keys() - _NAMES or _REQUIRED - rest.keys():
                    wrong = sorted(rest.keys() - _NAMES) or [f"no {name}" for name in sorted(_REQUIRED - rest.keys())]
                    raise TypeError(f"expected sngd_epoch_'s arguments by name, got {', '.join(wrong)}")
                arguments = epoch_arguments(**rest)
                check_epoch(*arguments)
                served_by = backends.serving(backend, arguments[0].device, arguments[0].dtype)
            flat.append(arguments)
            changed.update({f"calls[{i}] {name}": arguments[place] for place, name in _WRITTEN.items()})
            groups.setdefault((served_by, *map(checks.kind, arguments)), []).append(i)
        checks.no_aliases(changed, tuple(value for arguments in flat for value in arguments))
        results: dict[int, tuple[Tensor, Tensor] | Exception] = {}
        for (served_by, *_), members in groups.items():
            serving = backends.module(served_by)
            together = getattr(serving, "sngd_epochs_", None) if len(members) > 1 else None
            for part in [members] if together else [[i] for i in members]:
                try:
                    done = together([flat[i] for i in part]) if together else [serving.sngd_epoch_(*flat[part[0]])]
                except Exception as error:
                    done = [error] * len(part)
                results.update(zip(part, done, strict=True))
        registration.count_up(changed.values())
    return [results[i] for i in range(len(flat))]


def sngd_epochs_(calls: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """A pass of `sngd_epoch_` over each of several layers that do not depend on each other, without waiting for the device.

    Equal, bit for bit, to calling `sngd_epoch_` with each in turn. Calls of one kind, which have the same shapes, strides,
    dtypes, device, mini-batch, activations, loss and momentum, go to the backend together where it has a kernel for that;
    else each by itself, on a GPU on streams side by side. Only tensors' values, lr's among them, may differ then.

    Args:
        calls: for each layer the arguments of `sngd_epoch_` by name. Weights, biases and velocities are **mutated**; they
            must not share memory with any argument of another call. Other tensors may be shared.

    Returns:
        (losses, norms) of each call, in order.

    Raises:
        ValueError, TypeError: naming the call, such as ``calls[2]``, and what `sngd_epoch_` would say of it. Nothing is
        changed then.

    >>> x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([[6.5]])
    >>> weights = [torch.tensor([[1.0, 1.0]]) for _ in range(2)]
    >>> common = dict(bias=None, x=x, target=y, order=None, batch_size=1, suffix=[], activation="identity", loss="mse")
    >>> results = sngd_epochs_([dict(common, weight=w, lr=lr) for w, lr in zip(weights, (0.5, 1.0))])
    >>> weights
    [tensor([[0.7000, 0.6000]]), tensor([[0.4000, 0.2000]])]
    """
    results: list[tuple[Tensor, Tensor]] = []
    for outcome in outcomes(calls):
        if isinstance(outcome, Exception):
            raise outcome
        results.append(outcome)
    return results
