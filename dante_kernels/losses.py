"""The three losses: value and gradient with respect to the network's output.

All take the output of the last layer, h = phi(Z), of shape (rows, n_out), and a target that is either class indices
(rows,) int64, meaning their one-hot rows, or values (rows, n_out). They agree with their torch namesakes: `mse` is the
mean over all elements; `cross_entropy` takes h as logits, softmax over the columns, mean over rows; and
`binary_cross_entropy` takes h as logits, mean over all elements. dJ/dZ is the gradient given here times phi's
subgradient g(Z).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MSE, CROSS_ENTROPY, BINARY_CROSS_ENTROPY = 0, 1, 2
CODES = {"mse": MSE, "cross_entropy": CROSS_ENTROPY, "binary_cross_entropy": BINARY_CROSS_ENTROPY}


def code(loss: str) -> int:
    """The number by which operators and kernels know a loss.

    Raises:
        ValueError: for a name that is not one of `CODES`.
    """
    if not isinstance(loss, str) or loss not in CODES:
        raise ValueError(f"loss: expected one of {', '.join(CODES)}, got {loss!r}")
    return CODES[loss]


def as_values(target: Tensor, n_out: int, dtype: torch.dtype) -> Tensor:
    """Targets as values (rows, n_out): class indices become one-hot rows.

    A class index outside 0..n_out-1 becomes a row of NaN, so that whatever is computed from it is visibly wrong instead
    of silently wrong: its step is skipped and its loss is NaN.
    """
    if target.is_floating_point():
        return target.to(dtype)
    columns = torch.arange(n_out, device=target.device)
    one_hot = (target[:, None] == columns).to(dtype)
    valid = (target >= 0) & (target < n_out)
    return torch.where(valid[:, None], one_hot, torch.full_like(one_hot, torch.nan))


def value(loss: int, h: Tensor, target: Tensor) -> Tensor:
    """The loss J, 0-dimensional, of output h (rows, n_out) against values (rows, n_out)."""
    if loss == MSE:
        return (h - target).square().mean()
    if loss == CROSS_ENTROPY:
        # A class without weight adds nothing, also where its logit is -inf.
        return -torch.where(target == 0, 0, target * F.log_softmax(h, dim=1)).sum() / h.shape[0]
    return (F.softplus(-h.abs()) + h.clamp(min=0) - h * target).mean()


def gradient(loss: int, h: Tensor, target: Tensor) -> Tensor:
    """dJ/dh, of h's shape, for output h (rows, n_out) against values (rows, n_out)."""
    if loss == MSE:
        return (h - target) * (2.0 / h.numel())
    if loss == CROSS_ENTROPY:
        return (torch.softmax(h, dim=1) * target.sum(dim=1, keepdim=True) - target) / h.shape[0]
    return (torch.sigmoid(h) - target) / h.numel()
