"""What several tests share: random problems, and the error rule by which every backend is judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from dante_kernels import losses, reference
from dante_kernels.activations import Activation
from dante_kernels.ops import Layer

ACTIVATIONS = {
    "identity": Activation.IDENTITY,
    "relu": Activation.RELU,
    "leaky_relu": Activation("generalized_relu", 0.01, 1.0),
    "generalized_relu": Activation("generalized_relu", 0.25, 1.5),
    "sigmoid": Activation.SIGMOID,
    "tanh": Activation.TANH,
}
LOSSES = tuple(losses.CODES)
FLOOR = 2.0**-21  # relative to the expected value's norm: a few roundings of float32
TINY = 2.0**-28  # absolute, for values of order 1 that cancel to few digits, where torch may be right by luck


@dataclass
class Problem:
    """One layer's training problem in the arguments of the operators."""

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    target: Tensor
    suffix: list[Layer]
    activation: Activation
    loss: str
    x_scale: float = 1.0

    @property
    def args(self) -> tuple:
        return (self.weight, self.bias, self.x, self.target, self.suffix, self.activation, self.loss)

    def to(self, dtype: torch.dtype) -> Problem:
        """A copy in another dtype, whose mutation leaves this one alone."""

        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().clone().to(dtype if t.is_floating_point() else t.dtype)

        suffix = [Layer(cast(w), cast(b), phi) for w, b, phi in self.suffix]
        return replace(
            self, weight=cast(self.weight), bias=cast(self.bias), x=cast(self.x), target=cast(self.target), suffix=suffix
        )

    def clone(self) -> Problem:
        """A copy that keeps every tensor's strides."""

        def copy(t: Tensor | None) -> Tensor | None:
            return None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)

        suffix = [Layer(copy(w), copy(b), phi) for w, b, phi in self.suffix]
        return replace(
            self, weight=copy(self.weight), bias=copy(self.bias), x=copy(self.x), target=copy(self.target), suffix=suffix
        )


def make_problem(
    *,
    seed: int,
    rows: int = 7,
    n_in: int = 5,
    widths: tuple[int, ...] = (6, 3),
    activation: str = "leaky_relu",
    loss: str = "mse",
    bias: bool = True,
    class_indices: bool | None = None,
    uint8: bool = False,
) -> Problem:
    """A random float32 problem: the active layer n_in-widths[0], then a suffix layer for each further width.

    With `uint8` x is of that dtype, and its x_scale is one whose products are rounded.
    Hidden layers have `activation`; so has the last one, but for losses that take logits.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = []
    width = n_in
    for i, n_out in enumerate(widths):
        weight = torch.randn(n_out, width, generator=generator) / width**0.5
        phi = ACTIVATIONS[activation]
        if i == len(widths) - 1 and loss != "mse":
            phi = Activation.IDENTITY
        layers.append(Layer(weight, torch.randn(n_out, generator=generator) * 0.3 if bias else None, phi))
        width = n_out
    if class_indices is None:
        class_indices = width > 1 and seed % 2 == 0
    if class_indices:
        target = torch.randint(0, width, (rows,), generator=generator)
    else:
        target = torch.rand(rows, width, generator=generator)
        if loss == "cross_entropy":
            target = target / target.sum(dim=1, keepdim=True)
    (weight, b, phi), *suffix = layers
    x = torch.randn(rows, n_in, generator=generator)
    if uint8:
        x = torch.randint(0, 256, (rows, n_in), generator=generator, dtype=torch.uint8)
        return Problem(weight, b, x, target, suffix, phi, loss, 1 / 255)
    return Problem(weight, b, x, target, suffix, phi, loss)


def reference_gradient(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, ...]:
    p = problem.to(dtype)
    return reference.layer_gradient(p.weight, p.bias, p.x, p.target, p.suffix, p.activation, losses.code(p.loss), p.x_scale)


def as_float32(problem: Problem) -> Problem:
    """A copy of a problem with narrow x whose x is what that stands for, in float32."""
    copy = problem.clone()
    copy.x, copy.x_scale = problem.x.float() * problem.x_scale, 1.0
    return copy


def assert_error_rule(name: str, got: Tensor, torch32: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice that of torch's own float32 composition, plus a few roundings."""
    error = (got.double() - exact).norm().item()
    allowed = 2 * (torch32.double() - exact).norm().item() + FLOOR * exact.norm().item() + TINY
    assert error <= allowed, f"{name}: error {error:.3e} against float64, allowed {allowed:.3e}"


def assert_same(backend: str, got: Tensor, expected: Tensor) -> None:
    """The same bits; on the reference backend nearly so, since torch's products may depend on where operands lie."""
    if backend == "reference":
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(got, expected), f"{(got - expected).abs().max()}"


def blobs(rows=90, n_in=6, classes=3, seed=0):
    """Clouds of points around a centre per class: (x, y)."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(classes, n_in, generator=generator)
    y = torch.arange(rows) % classes
    return centres[y] + torch.randn(rows, n_in, generator=generator), y


def as_bytes(x):
    """uint8 pictures of values, and the float32 values that they stand for with an x_scale of 1 / 255."""
    narrow = ((x - x.min()) / (x.max() - x.min()) * 255).to(torch.uint8)
    return narrow, narrow.float() * (1 / 255)


def net(*widths, activation=nn.Tanh, seed=0, output=None):
    """A chain of nn.Linear of these widths, with an activation module after each but the last, which has `output`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = []
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            modules += [nn.Linear(n_in, n_out), activation() if i < len(widths) - 2 else (output or nn.Identity)()]
        return nn.Sequential(*modules)


def weights(model):
    """All parameters of a model as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
