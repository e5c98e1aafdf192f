"""Fixtures for all tests of kernels."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN, so that a kernel which reads what nobody wrote is seen."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> torch.Tensor:
        fresh = empty(*args, **kwargs)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty", poisoned)
