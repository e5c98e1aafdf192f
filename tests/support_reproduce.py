"""What the tests of the papers' experiments share: tiny problems and cases, and rows as trainings would leave them."""

from __future__ import annotations

import numpy as np
import torch

from dante_kernels.reproduce import experiments
from dante_kernels.reproduce.problems import Problem, Spec
from dante_kernels.reproduce.search import Case

SPEC = Spec("synthetic-6-3", 40, 20)
TINY = Case("tiny", "tiny", SPEC, (6, 5, 3), experiments.FOUR, epochs=5, batch=10, most=4)


def blobs(n=60, features=4, classes=3, seed=0):
    """Classes that are easily told apart, as a problem."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.eye(classes, features)[y] * 2 + 0.2 * torch.randn(n, features, generator=generator)
    return Problem("blobs", x[: n // 2], y[: n // 2], x[n // 2 :], y[n // 2 :])


def fake(job, loss):
    """A row as a training of this job would leave it."""
    return {
        "job": job.settings, "method": job.method.name, "made_by": "a test", "test_loss": loss,
        "status": "diverged" if loss is None else "done",
        "test_accuracy": None if loss is None else 1 - loss, "train_loss": loss, "baseline": None, "seconds": 1.0,
        "weights_updated": 100, "curve": [[100, 1.0, 0.5, loss, 0.5]],
    }  # fmt: skip


def write_ccpp(folder, rows=50):
    generator = np.random.default_rng(0)
    lines = [",".join(f"{v:.2f}" for v in row) for row in generator.normal(100, 20, (rows, 5))]
    (folder / "ccpp.csv").write_text("AT,V,AP,RH,PE\n" + "\n".join(lines) + "\n")
