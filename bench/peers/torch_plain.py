"""torch as a user would write it: SNGD on one layer by plain products, and SGD on the whole net by autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Layers = list[tuple[Tensor, Tensor]]


def sngd_epoch(layers: Layers, active: int, x: Tensor, y: Tensor, order: Tensor, batch: int, lr: float) -> None:
    """A pass of SNGD over layer `active`, whose input x is; leaky ReLU 0.01 everywhere, MSE against one-hot classes."""
    weight, bias = layers[active]
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        h = xb = x[rows]
        slopes = []
        for w, b in layers[active:]:
            z = torch.addmm(b, h, w.t())
            slopes.append(torch.where(z < 0, 0.01, 1.0))
            h = z * slopes[-1]
        d = (h - F.one_hot(y[rows], h.shape[1])) * (2 / h.numel()) * slopes.pop()
        for w, _ in reversed(layers[active + 1 :]):
            d = (d @ w) * slopes.pop()
        grad, grad_bias = d.t() @ xb, d.sum(0)
        step = lr / torch.sqrt(grad.square().sum() + grad_bias.square().sum())
        weight -= step * grad
        bias -= step * grad_bias


def sgd_epoch(layers: Layers, x: Tensor, y: Tensor, order: Tensor, batch: int, lr: float) -> None:
    """A pass of SGD by autograd over all layers."""
    parameters = [t.requires_grad_() for layer in layers for t in layer]
    optimizer = torch.optim.SGD(parameters, lr=lr, foreach=True)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        h = x[rows]
        for w, b in layers:
            h = F.leaky_relu(F.linear(h, w, b), 0.01)
        optimizer.zero_grad()
        F.mse_loss(h, F.one_hot(y[rows], h.shape[1]).to(h.dtype)).backward()
        optimizer.step()
    for t in parameters:
        t.requires_grad_(False)
