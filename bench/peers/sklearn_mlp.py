"""scikit-learn's MLPClassifier, end to end: plain SGD, but ReLU between layers and cross-entropy, as it has no other."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.nn import functional as F

from . import Layers, Method, NotHere, Problem
from .torch_autograd import Autograd


class PlainMlp(Autograd):
    """The same in torch; in float64 the truth."""

    family = "mlp"

    def loss(self, x: Tensor, one_hot: Tensor) -> Tensor:
        for i, (w, b) in enumerate(self.weights):
            x = F.linear(x if i == 0 else x.relu(), w, b)
        return F.cross_entropy(x, one_hot)


class Mlp(Method):
    """`MLPClassifier.fit` with as many iterations as there are epochs, from the problem's weights (a warm start)."""

    family = "mlp"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if problem.x.device.type != "cpu":
            raise NotHere("it runs on the CPU")
        if problem.layers < len(problem.start):
            raise NotHere("it trains all layers")
        self.x, self.y = problem.x.numpy(), problem.y.numpy()

    def reset(self) -> None:
        p, classes = self.problem, np.arange(self.problem.widths[-1])
        self.model = MLPClassifier(
            p.widths[1:-1], solver="sgd", momentum=0, alpha=0, learning_rate_init=p.rate, batch_size=p.batch, tol=0,
            max_iter=p.epochs, n_iter_no_change=2**31, shuffle=False,
        )  # fmt: skip
        rows = np.zeros((p.batch, self.x.shape[1]), self.x.dtype)
        self.model.partial_fit(rows, self.y[: p.batch], classes=classes)  # makes the arrays whose place the start takes
        self.model.set_params(warm_start=True)  # later: it would refuse a first mini-batch that lacks a class
        self.model.coefs_ = [np.ascontiguousarray(w.numpy().T) for w, _ in p.start]
        self.model.intercepts_ = [b.numpy().copy() for _, b in p.start]

    def round(self, order: Tensor) -> None:
        rows = order.numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # max_iter is what is asked for
            self.model.fit(self.x[rows], self.y[rows])

    def wait(self) -> None:
        """Nothing: `fit` returns when it is done."""

    def layers(self) -> Layers:
        return [
            (torch.from_numpy(w.T), torch.from_numpy(b)) for w, b in zip(self.model.coefs_, self.model.intercepts_, strict=True)
        ]
