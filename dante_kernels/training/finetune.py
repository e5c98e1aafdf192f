"""Fine-tuning: end-to-end SGD with backpropagation after the alternation, as the 2018 paper has it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import losses, reference
from ..network import Network
from .problem import RowStream


def epoch(
    network: Network,
    x: Tensor,
    target: Tensor,
    stream: RowStream,
    *,
    loss: str,
    lr: float,
    x_scale: float,
    steps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One pass of plain mini-batch SGD over all trainable layers at once, in place.

    Args:
        network: the layers; ``network.modules`` compute the chain under autograd.
        x: (rows, n_in) the data.
        target: class indices (rows,) or values (rows, n_out).
        stream: gives the rows of each mini-batch.
        loss: the loss's name.
        lr: learning rate.
        x_scale: what uint8 x is multiplied with.
        steps: mini-batches; None for a whole pass.

    Returns:
        (losses, norms), each (steps,) on the device: the loss before each step, and the norm of its whole gradient.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    values, norms = [x.new_empty(0, dtype=parameters[0].dtype)], [x.new_empty(0, dtype=parameters[0].dtype)]
    for _ in range(-(-stream.rows // stream.batch_size) if steps is None else steps):
        (rows,) = stream.take(1)
        h = reference.widened(x[rows], parameters[0].dtype, x_scale)
        with torch.enable_grad():
            for module in network.modules:
                h = module(h)
            value = losses.value(losses.code(loss), h, losses.as_values(target[rows], h.shape[1], h.dtype))
            gradients = torch.autograd.grad(value, parameters)
        torch._foreach_add_([p.detach() for p in parameters], gradients, alpha=-lr)
        values.append(value.detach()[None])
        norms.append(torch.stack(torch._foreach_norm(gradients)).norm()[None])
    return torch.cat(values), torch.cat(norms)
