"""JAX: a whole pass as one compiled `lax.scan`, SNGD on one layer or SGD on the whole net."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def forward(layers, h):
    """The chain's output, leaky ReLU 0.01 after every layer."""
    for w, b in layers:
        z = h @ w.T + b
        h = jnp.where(z > 0, z, 0.01 * z)
    return h


def objective(layers, xb, yb):
    """MSE against one-hot classes."""
    h = forward(layers, xb)
    return jnp.mean((h - jax.nn.one_hot(yb, h.shape[1])) ** 2)


def batches(x, y, order, batch):
    """The shuffled data as (steps, batch, ...)."""
    return x[order].reshape(-1, batch, x.shape[1]), y[order].reshape(-1, batch)


@partial(jax.jit, static_argnames=("batch",), donate_argnums=(0,))
def sngd_epoch(active, suffix, x, y, order, batch, lr):
    """A pass of SNGD over `active` = (weight, bias), all of `suffix` frozen."""

    def step(layer, data):
        gradient = jax.grad(lambda first: objective([first, *suffix], *data))(layer)
        scale = lr / jnp.sqrt(sum(jnp.sum(g * g) for g in gradient))
        return tuple(p - scale * g for p, g in zip(layer, gradient, strict=True)), None

    return lax.scan(step, active, batches(x, y, order, batch))[0]


@partial(jax.jit, static_argnames=("batch",), donate_argnums=(0,))
def sgd_epoch(layers, x, y, order, batch, lr):
    """A pass of SGD over all layers."""

    def step(layers, data):
        gradient = jax.grad(objective)(layers, *data)
        return jax.tree.map(lambda p, g: p - lr * g, layers, gradient), None

    return lax.scan(step, layers, batches(x, y, order, batch))[0]


@jax.jit
def prefix(layers, x):
    """The activations behind the frozen prefix."""
    return forward(layers, x)
