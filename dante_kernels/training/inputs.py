"""x and y as they are given to `fit`, as the tensors that training takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..network import Network
from ..ops.checks import scale


def _tensor(name: str, value: Any) -> Tensor:
    try:
        tensor: Tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a tensor or an array of numbers, got {type(value).__name__} ({error})") from error
    return tensor.detach()


def _place(name: str, tensor: Tensor, net: Network, device: torch.device | None) -> Tensor:
    if device is not None:
        return tensor.to(device)
    home = net.layers[0].weight.device
    if tensor.device != home:
        raise ValueError(f"{name}: expected on {home}, where the model is, got {tensor.device}; give device= to move both")
    return tensor


def rows_of(x: Any) -> int:
    """How many rows x has, before it is checked; at least 1."""
    tensor = _tensor("x", x)
    return max(1, len(tensor)) if tensor.dim() else 1


def holds_classes(y: Any) -> bool:
    """Whether y, before it is checked, has the dtype of class indices."""
    return y is not None and _is_whole(_tensor("y", y))


def _is_whole(y: Tensor) -> bool:
    return not y.is_floating_point() and not y.is_complex()


def inputs(name: str, value: Any, x_scale: float | None, net: Network, device: torch.device | None) -> Tensor:
    """x as (rows, n_in) on the device."""
    x = _tensor(name, value)
    dtype = net.layers[0].weight.dtype
    if net.flattens and x.dim() > 2:
        x = x.flatten(1)
    if x.dim() != 2 or x.shape[1] != net.n_in:
        raise ValueError(f"{name}: expected shape (rows, {net.n_in}), got {tuple(x.shape)}")
    if x.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one row, got none")
    if x.dtype not in (dtype, torch.uint8) and not (dtype == torch.float32 and x.dtype == torch.bfloat16):
        narrow = " or torch.bfloat16" if dtype == torch.float32 else ""
        raise TypeError(
            f"{name}: expected {dtype}{narrow} or torch.uint8, as the model's weights are {dtype}, got {x.dtype}; convert it, "
            f"such as by torch.as_tensor(x, dtype={dtype})"
        )
    if x.dtype == torch.uint8 and x_scale is None:
        raise ValueError(f"x_scale: expected a number, such as 1 / 255, since {name} is uint8, got None")
    scale(1.0 if x_scale is None else x_scale, name, x)
    return _place(name, x, net, device)


def target(name: str, value: Any, x: Tensor, net: Network, device: torch.device | None) -> tuple[Tensor | None, bool]:
    """y as class indices (rows,) int64 or values (rows, n_out), and whether it holds classes; None for an autoencoder."""
    if value is None:
        if net.n_out != net.n_in:
            raise ValueError(
                f"{name}: expected targets, since the output ({net.n_out}) is not as wide as the input ({net.n_in})"
            )
        return None, False
    y = _tensor(name, value)
    dtype = net.layers[0].weight.dtype
    rows, n_out = x.shape[0], net.n_out
    if _is_whole(y):
        if y.dim() == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.shape != (rows,):
            raise ValueError(f"{name}: expected {rows} class indices, one for each row of x, got shape {tuple(y.shape)}")
        y = y.to(torch.int64)
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= max(n_out, 2):
            raise ValueError(f"{name}: expected class indices from 0 to {max(n_out, 2) - 1}, got {low} to {high}")
        y = _place(name, y, net, device)
        return (y, True) if n_out > 1 else (y[:, None].to(dtype), True)
    if y.dim() == 1 and n_out == 1:
        y = y[:, None]
    if y.shape != (rows, n_out):
        raise ValueError(f"{name}: expected values of shape ({rows}, {n_out}) or {rows} class indices, got {tuple(y.shape)}")
    if y.dtype == torch.bfloat16 and dtype == torch.float32:
        y = y.to(dtype)
    if y.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, the model's dtype, or integer class indices, got {y.dtype}")
    return _place(name, y, net, device), False
