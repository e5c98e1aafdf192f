"""What every operator checks of its arguments before it touches any of them.

All raise ValueError or TypeError that name the argument, what was expected and what came. Nothing here reads a tensor's
values on a GPU, so no check waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation

WEIGHT_DTYPES = (torch.float32, torch.float64)


@contextlib.contextmanager
def among(name: str, index: int) -> Iterator[None]:
    """Let the errors of a check begin with ``name[index]``."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        error.args = (f"{name}[{index}]: {error}",)
        raise


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(name: str, value: object) -> Tensor:
    """`value` itself, where it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def argument_types(
    tensors: Mapping[str, object], optional: Mapping[str, object], numbers_: Mapping[str, object], whole: Mapping[str, object]
) -> None:
    """What torch's dispatcher would otherwise refuse with a schema instead of a sentence."""
    for name, value in tensors.items():
        tensor(name, value)
    for name, value in optional.items():
        if value is not None:
            tensor(name, value)
    for name, value in numbers_.items():
        number(name, value)
    for name, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
        if isinstance(value, int) and value >= 2**63:
            raise ValueError(f"{name}: expected a number below 2^63, got {value}")


def backend_name(value: object) -> str:
    """`value` itself, where it is a string."""
    if not isinstance(value, str):
        raise TypeError(f"backend: expected a name, got {type(value).__name__}")
    return value


def _shape(name: str, value: Tensor, expected: tuple[int | str, ...]) -> None:
    """Hold a tensor's shape against numbers; a word stands for any size from 1 up."""
    shape = value.shape
    if len(shape) == len(expected):
        for size, want in zip(shape, expected):  # noqa: B905 - as long as each other, and every step passes here
            if size != want and not (isinstance(want, str) and size > 0):
                break
        else:
            return
    wanted = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
    raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(shape)}")


def _same_place(name: str, value: Tensor, weight: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if value.device != weight.device:
        raise ValueError(f"{name}: expected on {weight.device}, where the weight is, got {value.device}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(_name, dtypes))}, got {_name(value.dtype)}")


def _writable(name: str, value: Tensor) -> None:
    """A tensor changed in place must have one memory location per element."""
    if value.is_contiguous():
        return
    (size, stride), *more = sorted(zip(value.shape, value.stride(), strict=True), key=lambda pair: pair[1])
    extent = 1 + (size - 1) * stride
    overlaps = size > 1 and stride == 0
    for size, stride in more:
        overlaps |= size > 1 and stride < extent
        extent += (size - 1) * stride
    if overlaps:
        raise ValueError(f"{name}: is changed in place, but elements share memory (strides {value.stride()}); pass a clone()")


def layer(
    weight: Tensor, bias: Tensor | None, *, prefix: str = "", n_in: int | None = None, like: Tensor | None = None
) -> None:
    """A layer's weight (n_out, n_in) and bias (n_out,), of one dtype, float32 or float64, on one device."""
    tensor(f"{prefix}weight", weight)
    _shape(f"{prefix}weight", weight, ("n_out", "n_in" if n_in is None else n_in))
    if like is None:
        if weight.dtype not in WEIGHT_DTYPES:
            raise TypeError(f"{prefix}weight: expected {' or '.join(map(_name, WEIGHT_DTYPES))}, got {_name(weight.dtype)}")
        like = weight
    _same_place(f"{prefix}weight", weight, like, (like.dtype,))
    if bias is not None:
        tensor(f"{prefix}bias", bias)
        _shape(f"{prefix}bias", bias, (weight.shape[0],))
        _same_place(f"{prefix}bias", bias, like, (like.dtype,))


def inputs(x: Tensor, weight: Tensor, x_scale: float) -> None:
    """x (rows, n_in), of the weight's dtype, bfloat16 beside float32 weights, or uint8, which alone has an x_scale."""
    tensor("x", x)
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x: expected shape (rows, {weight.shape[1]}), got {tuple(x.shape)}")
    narrow = (torch.bfloat16,) if weight.dtype == torch.float32 else ()
    _same_place("x", x, weight, (weight.dtype, *narrow, torch.uint8))
    scale(x_scale, "x", x)


def scale(x_scale: float, name: str, x: Tensor) -> None:
    """x_scale: what a uint8 x of this name is multiplied with, finite and above 0; 1 beside any other."""
    if not (math.isfinite(x_scale) and x_scale > 0):
        raise ValueError(f"x_scale: expected a finite number above 0, got {x_scale}")
    if x_scale != 1 and x.dtype != torch.uint8:
        raise ValueError(f"x_scale: expected 1 unless {name} is uint8, got {x_scale} beside {_name(x.dtype)}")


@functools.lru_cache(maxsize=256)
def _known_activation(code: float, a: float, b: float) -> None:
    Activation.decode([code, a, b])


def problem(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    suffix_weights: list[Tensor],
    suffix_biases: list[Tensor | None],
    activations: list[float],
    loss: int,
    x_scale: float,
) -> None:
    """A layer's training problem: its parameters, its input, the frozen suffix and the target."""
    layer(weight, bias)
    inputs(x, weight, x_scale)
    if x.shape[0] == 0:
        raise ValueError("x: expected at least one row, got none")
    if len(suffix_biases) != len(suffix_weights):
        raise ValueError(
            f"suffix_biases: expected {len(suffix_weights)} entries, one per suffix weight, got {len(suffix_biases)}"
        )
    n_out = weight.shape[0]
    for i, (w, b) in enumerate(zip(suffix_weights, suffix_biases, strict=True)):
        layer(w, b, prefix=f"suffix[{i}] ", n_in=n_out, like=weight)
        n_out = w.shape[0]
    if len(activations) != 3 * (len(suffix_weights) + 1):
        raise ValueError(
            f"activations: expected 3 numbers for each of {len(suffix_weights) + 1} layers, got {len(activations)}"
        )
    for i in range(0, len(activations), 3):
        _known_activation(*activations[i : i + 3])
    if loss not in (0, 1, 2):
        raise ValueError(f"loss: expected the code 0 (mse), 1 (cross_entropy) or 2 (binary_cross_entropy), got {loss}")
    _target(target, x.shape[0], n_out, weight)


def _target(target: Tensor, rows: int, n_out: int, weight: Tensor) -> None:
    tensor("target", target)
    if target.is_floating_point():
        _shape("target", target, (rows, n_out))
        _same_place("target", target, weight, (weight.dtype,))
        return
    _same_place("target", target, weight, (torch.int64, weight.dtype))
    _shape("target", target, (rows,))
    if n_out == 1:
        raise ValueError(f"target: class indices need at least 2 outputs; for 1 output pass values of shape ({rows}, 1)")


def update(
    weight: Tensor,
    bias: Tensor | None,
    lr: Tensor,
    velocity_weight: Tensor | None,
    velocity_bias: Tensor | None,
    momentum: float,
    nesterov: bool,
) -> None:
    """The update rule's arguments, and that all which it changes can be changed in place."""
    tensor("lr", lr)
    if lr.dim() != 0:
        raise ValueError(f"lr: expected a number or a 0-dimensional tensor, got shape {tuple(lr.shape)}")
    _same_place("lr", lr, weight, (weight.dtype,))
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number from 0 to below 1, got {momentum}")
    if nesterov and momentum == 0:
        raise ValueError("nesterov: expected a momentum above 0 beside it, got momentum=0")
    if momentum > 0 and velocity_weight is None:
        raise ValueError("velocity_weight: expected a tensor like the weight where momentum is above 0, got None")
    if velocity_weight is not None and (velocity_bias is None) != (bias is None):
        raise ValueError("velocity_bias: expected a tensor exactly where the layer has a bias and velocity_weight is given")
    if velocity_weight is None and velocity_bias is not None:
        raise ValueError("velocity_weight: expected a tensor beside velocity_bias, got None")
    for name, velocity, parameter in (("velocity_weight", velocity_weight, weight), ("velocity_bias", velocity_bias, bias)):
        if velocity is not None and parameter is not None:
            tensor(name, velocity)
            _shape(name, velocity, tuple(parameter.shape))
            _same_place(name, velocity, weight, (weight.dtype,))
            _writable(name, velocity)
    _writable("weight", weight)
    if bias is not None:
        _writable("bias", bias)


def no_aliases(written: dict[str, Tensor | None], args: tuple[Any, ...]) -> None:
    """What is changed in place must share no memory with another argument."""
    names = {id(changed): name for name, changed in written.items() if changed is not None}
    parts: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            parts.append(value)
        elif isinstance(value, list | tuple):
            parts += [one for one in value if isinstance(one, Tensor)]
    spans = sorted([(*_span(one), i) for i, one in enumerate(parts)])
    before: list[tuple[int, Tensor]] = []  # those whose span reaches into the next one's
    for first, end, i in spans:
        one = parts[i]
        if before:
            before = [span for span in before if span[0] > first]
        for _, other in before:
            name = names.get(id(one)) or names.get(id(other))
            if name and (one is other or _overlap(one, other)):
                raise ValueError(f"{name}: is changed in place, but shares its memory with another argument; pass a clone()")
        before.append((end, one))


def _span(value: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of that after its last."""
    first = value.data_ptr()
    if value.is_contiguous():
        return first, first + value.nbytes
    if not value.numel():
        return first, first
    last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    return first, first + (last + 1) * value.element_size()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose spans meet have a byte in common: the rows of one may lie between the other's."""
    begin = min(_span(one)[0], _span(other)[0])
    taken = torch.zeros(max(_span(one)[1], _span(other)[1]) - begin, dtype=torch.bool)

    def bytes_of(value: Tensor) -> Tensor:
        size = value.element_size()
        strides = [stride * size for stride in value.stride()]
        return taken.as_strided((*value.shape, size), (*strides, 1), value.data_ptr() - begin)

    bytes_of(one).fill_(True)
    return bool(bytes_of(other).any())


def number(name: str, value: object) -> float:
    """A real number, of Python's or numpy's types."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def finite(name: str, value: object) -> float:
    """A real number that is neither infinite nor NaN."""
    real = number(name, value)
    if not math.isfinite(real):
        raise ValueError(f"{name}: expected a finite number, got {real}")
    return real


def batches(order: Tensor | None, batch_size: int, x: Tensor) -> None:
    """The rows of a pass: `order` (n,) int64 of row numbers of x, or None for all rows as they lie."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if order is None:
        return
    tensor("order", order)
    if order.shape == (0,):
        raise ValueError("order: expected at least one row number, got none")
    _shape("order", order, ("n",))
    _same_place("order", order, x, (torch.int64,))
    if order.device.type == "cpu" and type(order) is Tensor:
        low, high = order.aminmax()
        if low < 0 or high >= x.shape[0]:
            raise ValueError(f"order: expected row numbers from 0 to {x.shape[0] - 1}, got {int(low)} to {int(high)}")


def kind(value: Any) -> Any:
    """What must be equal for two calls to share a launch: of tensors the layout, of all else the value."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(kind, value)) if isinstance(value, list) else value
