"""What is asked of a trained autoencoder besides its loss: how well its features classify, and what it makes of pictures."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data import require
from .problems import Problem

SHOWN = 10  # pictures, the first test row of each class


@torch.no_grad()
def svm(model: nn.Sequential, problem: Problem) -> dict[str, Any]:
    """``svm_accuracy``: of a linear SVM on the first hidden layer's activations, on the test rows.

    The activations are standardized by the training rows and C is 1: the papers say neither.
    """
    pipeline, linear, scaling = (
        require(f"sklearn.{m}", "sklearn", "a linear SVM") for m in ("pipeline", "svm", "preprocessing")
    )
    encoder = model[:2]
    machine = pipeline.make_pipeline(scaling.StandardScaler(), linear.LinearSVC(C=1.0, dual=False, max_iter=5000))
    assert problem.labels is not None
    assert problem.labels_test is not None
    machine.fit(encoder(problem.x).numpy(), problem.labels.numpy())
    return {"svm_accuracy": float(machine.score(encoder(problem.x_test).numpy(), problem.labels_test.numpy()))}


@torch.no_grad()
def pictures(model: nn.Sequential, problem: Problem) -> dict[str, Any]:
    """``originals`` and ``reconstructions``: pixels from 0 to 255, a picture each; see `text_of`."""
    assert problem.labels_test is not None
    first = [int((problem.labels_test == label).nonzero()[0]) for label in problem.labels_test.unique()[:SHOWN]]
    x = problem.x_test[first]
    return {"originals": _as_text(x), "reconstructions": _as_text(model(x))}


def _as_text(x: Tensor) -> list[str]:
    return [text_of(bytes(row)) for row in (x.clamp(0, 1) * 255).round().to(torch.uint8).tolist()]


def text_of(pixels: bytes) -> str:
    """Pixels, compressed, in base 64."""
    return base64.b64encode(zlib.compress(pixels, 9)).decode()


def pixels_of(text: str) -> list[int]:
    """The pixels of a text of `text_of`."""
    return list(zlib.decompress(base64.b64decode(text)))


PROBES: dict[str, Callable[[nn.Sequential, Problem], dict[str, Any]]] = {"svm": svm, "pictures": pictures}
