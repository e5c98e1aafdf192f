"""An nn.Sequential seen as a chain of layers: views on the model's own parameters, never copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from . import activations
from .activations import Activation
from .ops import Layer


@dataclass(frozen=True)
class Network:
    """The layers of a model in order, each with its place in the model.

    Attributes:
        layers: (weight, bias, activation) of each layer; weight and bias share memory with the model's parameters.
        names: the name of each layer's nn.Linear in the model, such as ``"2"`` or ``"decoder.0"``.
        trainable: for each layer whether its parameters require gradients; the others are never changed.
        modules: the modules that compute the chain under autograd, in order, without an output module (softmax,
            sigmoid) that the loss already contains.
        flattens: whether the model starts with nn.Flatten, so that inputs of more than two dimensions are taken.
    """

    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    trainable: tuple[bool, ...]
    modules: tuple[nn.Module, ...]
    flattens: bool

    @property
    def n_in(self) -> int:
        """The width of the input."""
        return self.layers[0].weight.shape[1]

    @property
    def n_out(self) -> int:
        """The width of the output."""
        return self.layers[-1].weight.shape[0]

    @property
    def widths(self) -> list[int]:
        """The widths of the input and of each layer's output."""
        return [self.n_in, *(layer.weight.shape[0] for layer in self.layers)]

    @property
    def hidden(self) -> list[tuple[int, Activation]]:
        """The widths and activations of the layers before the last one."""
        return [
            (width, activations.resolve(layer.activation)) for width, layer in zip(self.widths[1:-1], self.layers, strict=False)
        ]

    def parameters(self) -> list[nn.Parameter]:
        """The model's own parameters, layer by layer."""
        return [parameter for module in self.modules for parameter in module.parameters()]


def _reject(name: str, module: nn.Module, why: str) -> NoReturn:
    raise ValueError(
        f"model: module {name!r} ({type(module).__name__}) {why}; expected a chain of nn.Linear, "
        "each followed by at most one of GeneralizedReLU, ReLU, LeakyReLU (slope 0 to 1), Sigmoid, Tanh, Identity"
    )


def _leaves(model: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """The modules of nested nn.Sequentials, in the order in which they run, with their names."""
    _check_plain(path.removesuffix(".") or "model", model)
    found = []
    for name, module in model._modules.items():  # not named_children(), which leaves out a module that comes again
        if module is None:
            continue
        full = f"{path}{name}"
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            found += _leaves(module, f"{full}.")
        else:
            _check_plain(full, module)
            found.append((full, module))
    return found


def _is_part_of_loss(module: nn.Module, loss: str) -> bool:
    """Whether a last module computes what the loss computes itself: softmax of cross-entropy, sigmoid of binary."""
    if loss == "cross_entropy" and isinstance(module, nn.Softmax | nn.LogSoftmax):
        return module.dim in (None, 1, -1)
    return loss == "binary_cross_entropy" and isinstance(module, nn.Sigmoid)


def from_module(model: nn.Module, loss: str) -> Network:
    """See a model as a chain of layers, for training with `loss`.

    Args:
        model: an nn.Sequential, nested or not, of nn.Linear, each followed by at most one known activation. It may
            start with nn.Flatten. A last nn.Softmax or nn.LogSoftmax is understood with ``"cross_entropy"``, a last
            nn.Sigmoid with ``"binary_cross_entropy"``: these losses contain them.
        loss: ``"mse"``, ``"cross_entropy"`` or ``"binary_cross_entropy"``.

    Raises:
        TypeError: where the model is no nn.Sequential, or its weights are neither float32 nor float64.
        ValueError: naming the first module that does not fit and where it sits.
    """
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        raise TypeError(f"model: expected an nn.Sequential, with nn.Sequential's forward, got {type(model).__name__}")
    leaves = _leaves(model)
    first = leaves[0][1] if leaves else None
    flattens = isinstance(first, nn.Flatten)
    if isinstance(first, nn.Flatten) and (first.start_dim, first.end_dim) != (1, -1):
        _reject(*leaves[0], "flattens other dimensions than all after the first")
    if flattens:
        leaves = leaves[1:]
    if len(leaves) > 1 and _is_part_of_loss(leaves[-1][1], loss):
        leaves = leaves[:-1]
    linears: list[tuple[str, nn.Linear]] = []
    chosen: list[Activation | None] = []
    for name, module in leaves:
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            if linears and linears[-1][1].out_features != module.in_features:
                _reject(name, module, f"takes {module.in_features} features, but {linears[-1][1].out_features} come")
            linears.append((name, module))
            chosen.append(None)
            continue
        activation = activations.from_module(module)
        if activation is None:
            _reject(name, module, "is neither nn.Linear nor an activation that the kernels know")
        if not linears:
            _reject(name, module, "stands before the first nn.Linear")
        if chosen[-1] is not None:
            _reject(name, module, "is a second activation after one nn.Linear")
        chosen[-1] = activation
    if not linears:
        raise ValueError("model: expected at least one nn.Linear, got none")
    _check_unshared(linears)
    _check_dtype_and_device(linears)
    return Network(
        layers=tuple(_view(linear, phi) for (_, linear), phi in zip(linears, chosen, strict=True)),
        names=tuple(name for name, _ in linears),
        trainable=tuple(_trainable(name, linear) for name, linear in linears),
        modules=tuple(module for _, module in leaves),
        flattens=flattens,
    )


def _check_plain(name: str, module: nn.Module) -> None:
    """Refuse a module whose call does more than its forward: hooks and parametrizations would be passed by."""
    if nn.utils.parametrize.is_parametrized(module) or "weight_g" in dict(module.named_parameters(recurse=False)):
        _reject(name, module, "is parametrized")
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        _reject(name, module, "has forward hooks or a forward of its own, which layer-wise training would not run")


def _check_unshared(linears: list[tuple[str, nn.Linear]]) -> None:
    seen: dict[int, str] = {}
    for name, linear in linears:
        for parameter in linear.parameters():
            place = parameter.data_ptr() or id(parameter)  # meta tensors have no address
            if place in seen:
                _reject(name, linear, f"shares a parameter with {seen[place]!r}; layers are trained one by one")
            seen[place] = name


def _check_dtype_and_device(linears: list[tuple[str, nn.Linear]]) -> None:
    first = linears[0][1].weight
    if first.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"model: expected float32 or float64 weights, got {first.dtype}")
    for name, linear in linears:
        for parameter in linear.parameters():
            if (parameter.dtype, parameter.device) != (first.dtype, first.device):
                _reject(name, linear, f"is {parameter.dtype} on {parameter.device}, the first {first.dtype} on {first.device}")


def _view(linear: nn.Linear, activation: Activation | None) -> Layer:
    bias: Tensor | None = linear.bias
    return Layer(linear.weight.detach(), None if bias is None else bias.detach(), activation or Activation.IDENTITY)


def _trainable(name: str, linear: nn.Linear) -> bool:
    wanted = {parameter.requires_grad for parameter in linear.parameters()}
    if len(wanted) > 1:
        _reject(name, linear, "has a frozen weight or bias beside a trainable one; a layer is trained whole or not at all")
    return wanted.pop()
