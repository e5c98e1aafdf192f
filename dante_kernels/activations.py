"""Activations: the numeric codes that every backend shares, phi and its subgradient g, and the nn.Module they come from.

Three kinds cover all that DANTE trains: the generalized ReLU of the papers (with ReLU, leaky ReLU and the identity as
special cases), sigmoid and tanh. A backend sees an activation as three numbers ``(code, a, b)``; see `Activation.encode`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

GENERALIZED_RELU, SIGMOID, TANH = 0, 1, 2
CODES = {"generalized_relu": GENERALIZED_RELU, "sigmoid": SIGMOID, "tanh": TANH}


@dataclass(frozen=True)
class Activation:
    """An element-wise activation phi with the subgradient g that the kernels use.

    ``kind`` is one of ``"generalized_relu"``, ``"sigmoid"`` and ``"tanh"``. The slopes belong to the generalized ReLU
    (Definition 3 of the 2020 paper): phi(z) = a z for z <= 0 and b z for z > 0, with 0 <= a <= b, and the subgradient
    g(z) = a for z < 0 and b for z >= 0, so that g(0) = b. ``a = b = 1`` is the identity.
    """

    kind: str
    a: float = 1.0
    b: float = 1.0

    RELU: ClassVar[Activation]
    IDENTITY: ClassVar[Activation]
    SIGMOID: ClassVar[Activation]
    TANH: ClassVar[Activation]

    def __post_init__(self) -> None:
        if self.kind not in CODES:
            raise ValueError(f"kind: expected one of {', '.join(CODES)}, got {self.kind!r}")
        _check_slopes(self.a, self.b)

    def encode(self) -> list[float]:
        """The three numbers ``[code, a, b]`` by which operators and kernels know this activation."""
        return [float(CODES[self.kind]), float(self.a), float(self.b)]

    @classmethod
    def decode(cls, numbers: list[float]) -> Activation:
        """The activation of three numbers ``[code, a, b]``; the inverse of `encode`."""
        if len(numbers) != 3:
            raise ValueError(f"activation: expected the three numbers [code, a, b], got {list(numbers)}")
        for kind, code in CODES.items():
            if numbers[0] == code:
                return cls(kind, numbers[1], numbers[2])
        raise ValueError(f"activation: expected a code of {CODES}, got {numbers[0]}")

    def phi(self, z: Tensor) -> Tensor:
        """phi(z), element by element; any shape and floating dtype."""
        if self.kind == "sigmoid":
            return torch.sigmoid(z)
        if self.kind == "tanh":
            return torch.tanh(z)
        return torch.where(z > 0, self.b * z, self.a * z)

    def g(self, z: Tensor) -> Tensor:
        """The (sub)gradient of phi at z, element by element, with g(0) = b for the generalized ReLU."""
        # Products of two sigmoids, since h (1 - h) and 1 - h^2 cancel where the activation saturates.
        if self.kind == "sigmoid":
            return torch.sigmoid(z) * torch.sigmoid(-z)
        if self.kind == "tanh":
            return 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)
        return torch.where(z < 0, torch.full_like(z, self.a), torch.full_like(z, self.b))

    def __str__(self) -> str:
        if self.kind != "generalized_relu":
            return self.kind
        return "identity" if self.a == self.b == 1 else f"generalized_relu(a={self.a:g}, b={self.b:g})"


def _check_slopes(a: float, b: float) -> None:
    if not (math.isfinite(a) and math.isfinite(b) and 0 <= a <= b and b > 0):
        raise ValueError(f"a, b: expected finite slopes with 0 <= a <= b and b > 0, got a={a}, b={b}")


Activation.RELU = Activation("generalized_relu", 0.0, 1.0)
Activation.IDENTITY = Activation("generalized_relu", 1.0, 1.0)
Activation.SIGMOID = Activation("sigmoid")
Activation.TANH = Activation("tanh")

NAMES = {
    "identity": Activation.IDENTITY,
    "relu": Activation.RELU,
    "leaky_relu": Activation("generalized_relu", 0.01, 1.0),
    "sigmoid": Activation.SIGMOID,
    "tanh": Activation.TANH,
}


class GeneralizedReLU(nn.Module):
    """The papers' generalized ReLU as a torch module: a z for z <= 0, b z for z > 0, with 0 <= a <= b.

    The gradient that autograd gives it at z = 0 is b, as in the kernels (torch's own ReLU has 0 there).

    Args:
        a: slope of the negative side; 0 gives the ordinary ReLU, 0.01 with b = 1 the papers' leaky ReLU.
        b: slope of the positive side.

    Raises:
        ValueError: unless 0 <= a <= b, b > 0 and both are finite.

    Source: Definition 3 of the 2020 DANTE paper.

    >>> GeneralizedReLU(0.5, 2.0)(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.5000,  0.0000,  2.0000])
    """

    def __init__(self, a: float = 0.01, b: float = 1.0) -> None:
        super().__init__()
        _check_slopes(a, b)
        self.a = a
        self.b = b

    def forward(self, z: Tensor) -> Tensor:
        """phi(z), of z's shape and dtype."""
        return torch.where(z < 0, self.a * z, self.b * z)

    def extra_repr(self) -> str:
        """The slopes, for repr."""
        return f"a={self.a}, b={self.b}"


def from_module(module: nn.Module) -> Activation | None:
    """The activation that a torch module computes, or None where it is none of those known here.

    Known are `GeneralizedReLU`, nn.ReLU, nn.LeakyReLU with a slope from 0 to 1, nn.Sigmoid, nn.Tanh and nn.Identity. A
    subclass counts only while it keeps its parent's forward.
    """
    for known in (GeneralizedReLU, nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Identity):
        if isinstance(module, known) and type(module).forward is known.forward:
            break
    else:
        return None
    if isinstance(module, GeneralizedReLU):
        return Activation("generalized_relu", float(module.a), float(module.b))
    if isinstance(module, nn.LeakyReLU):
        slope = float(module.negative_slope)
        return Activation("generalized_relu", slope, 1.0) if 0 <= slope <= 1 else None
    return {
        nn.ReLU: Activation.RELU,
        nn.Sigmoid: Activation.SIGMOID,
        nn.Tanh: Activation.TANH,
        nn.Identity: Activation.IDENTITY,
    }[known]


def to_module(activation: Activation) -> nn.Module:
    """A torch module that computes `activation`: nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.Identity or GeneralizedReLU."""
    if activation.kind == "sigmoid":
        return nn.Sigmoid()
    if activation.kind == "tanh":
        return nn.Tanh()
    if activation == Activation.IDENTITY:
        return nn.Identity()
    if activation.b == 1:
        return nn.LeakyReLU(activation.a) if activation.a else nn.ReLU()
    return GeneralizedReLU(activation.a, activation.b)


def resolve(activation: Activation | str | nn.Module) -> Activation:
    """The `Activation` that a spec, a name of `NAMES` or a torch module stands for.

    Raises:
        ValueError: for an unknown name or a module that is no known activation.
        TypeError: for anything else.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in NAMES:
            raise ValueError(f"activation: expected one of {', '.join(NAMES)}, got {activation!r}")
        return NAMES[activation]
    if isinstance(activation, nn.Module):
        found = from_module(activation)
        if found is None:
            raise ValueError(
                f"activation: {activation!r} is not one that the kernels know ({', '.join(NAMES)}, GeneralizedReLU)"
            )
        return found
    raise TypeError(f"activation: expected an Activation, a name or an nn.Module, got {type(activation).__name__}")
