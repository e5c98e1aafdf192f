"""Fine-tuning: end-to-end SGD with backpropagation after the alternation, as the 2018 paper has it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import losses
from ..network import Network
from .problem import RowStream


def epoch(network: Network, x: Tensor, target: Tensor, stream: RowStream, *, loss: str, lr: float) -> tuple[Tensor, int]:
    """One pass of plain mini-batch SGD over all trainable layers at once, in place.

    Args:
        network: the layers; ``network.modules`` compute the chain under autograd.
        x: (rows, n_in) the data.
        target: class indices (rows,) or values (rows, n_out).
        stream: gives the rows of each mini-batch.
        loss: the loss's name.
        lr: learning rate.

    Returns:
        (mean over the steps of the loss before the step, on the device; number of steps).
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    steps = -(-stream.rows // stream.batch_size)
    values = []
    for _ in range(steps):
        (rows,) = stream.take(1)
        h = x[rows].to(parameters[0].dtype)
        with torch.enable_grad():
            for module in network.modules:
                h = module(h)
            value = losses.value(losses.code(loss), h, losses.as_values(target[rows], h.shape[1], h.dtype))
            gradients = torch.autograd.grad(value, parameters)
        torch._foreach_add_([p.detach() for p in parameters], gradients, alpha=-lr)
        values.append(value.detach())
    return torch.stack(values).mean(), steps
