"""JAX: a whole pass as one compiled `lax.scan`, a step as one compiled call; SNGD on one layer or SGD on the whole net."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import torch
from jax import lax

from . import SLOPE, Method, NotHere


def forward(layers, h):
    """The chain's output."""
    for w, b in layers:
        z = h @ w.T + b
        h = jnp.where(z > 0, z, SLOPE * z)
    return h


def objective(layers, xb, yb):
    """MSE against one-hot classes."""
    h = forward(layers, xb)
    return jnp.mean((h - jax.nn.one_hot(yb, h.shape[1])) ** 2)


def batches(x, y, order, batch):
    """The shuffled data as (steps, batch, ...)."""
    return x[order].reshape(-1, batch, x.shape[1]), y[order].reshape(-1, batch)


def sngd(layer, suffix, xb, yb, lr):
    """`layer` = (weight, bias) after one SNGD step, all of `suffix` frozen."""
    gradient = jax.grad(lambda first: objective([first, *suffix], xb, yb))(layer)
    scale = lr / jnp.sqrt(sum(jnp.sum(g * g) for g in gradient))
    return tuple(p - scale * g for p, g in zip(layer, gradient, strict=True))


def sgd(layers, xb, yb, lr):
    """All layers after one step of SGD."""
    return jax.tree.map(lambda p, g: p - lr * g, layers, jax.grad(objective)(layers, xb, yb))


sngd_step = jax.jit(sngd, donate_argnums=(0,))
sgd_step = jax.jit(sgd, donate_argnums=(0,))
prefix = jax.jit(forward)


@partial(jax.jit, static_argnames=("batch",), donate_argnums=(0,))
def sngd_epoch(active, suffix, x, y, order, batch, lr):
    """A pass of SNGD."""
    return lax.scan(lambda layer, data: (sngd(layer, suffix, *data, lr), None), active, batches(x, y, order, batch))[0]


@partial(jax.jit, static_argnames=("batch",), donate_argnums=(0,))
def sgd_epoch(layers, x, y, order, batch, lr):
    """A pass of SGD over all layers."""
    return lax.scan(lambda layers, data: (sgd(layers, *data, lr), None), layers, batches(x, y, order, batch))[0]


class JaxMethod(Method):
    """The problem as JAX's arrays; the weights in `weights`."""

    def __init__(self, problem):
        super().__init__(problem)
        if problem.x.device.type == "cuda" and jax.default_backend() != "gpu":
            raise NotHere("this JAX sees no GPU")
        precision = {"highest": "highest", "high": "tensorfloat32", "medium": "bfloat16"}
        jax.config.update("jax_default_matmul_precision", precision[torch.get_float32_matmul_precision()])
        self.x, self.y = self.convert(problem.x), self.convert(problem.y)

    @staticmethod
    def convert(tensor):
        return jax.block_until_ready(jnp.array(tensor.cpu().numpy()))

    def reset(self):
        self.weights = [(self.convert(w), self.convert(b)) for w, b in self.problem.start]
        self.wait()

    def wait(self):
        jax.block_until_ready(self.weights)

    def layers(self):
        return [tuple(torch.tensor(p.__array__()) for p in layer) for layer in self.weights]


class ScanSgd(JaxMethod):
    """SGD."""

    family = "sgd"

    def round(self, order):
        p = self.problem
        for _ in range(p.epochs):
            self.weights = sgd_epoch(self.weights, self.x, self.y, order, p.batch, p.rate)

    def step(self, x, y, one_hot):
        self.weights = sgd_step(self.weights, x, y, self.problem.rate)


class ScanSngd(JaxMethod):
    """SNGD."""

    family = "sngd"

    def round(self, order):
        p = self.problem
        block = p.block or len(order)
        for begin in range(0, len(order), block):
            rows = order[begin : begin + block]
            for active in range(p.layers):
                h, y, in_turn = self.x, self.y, rows
                if active and p.block is not None:
                    h, y, in_turn = h[rows], y[rows], jnp.arange(len(rows))
                h = prefix(self.weights[:active], h) if active else h
                for _ in range(p.epochs):
                    self.weights[active] = sngd_epoch(
                        self.weights[active], self.weights[active + 1 :], h, y, in_turn, p.batch, p.rate
                    )

    def step(self, x, y, one_hot):
        self.weights[0] = sngd_step(self.weights[0], self.weights[1:], x, y, self.problem.rate)
