"""Blocks in parallel: each layer of a cycle sees the others as they were at its start, whatever makes the steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import blobs, net, weights
from torch import nn

import dante_kernels as dk
from dante_kernels.training import schedules

ROWS = 20
X, Y = blobs(rows=ROWS)


def one_by_one(model: nn.Sequential, schedule: dk.Schedule, layers: list[int], rows: slice, **settings: Any) -> nn.Sequential:
    """The model with each layer from a training in which it alone is trained, the others as they come in."""
    result = copy.deepcopy(model)
    for layer in layers:
        alone = copy.deepcopy(model)
        for i in range(0, len(alone), 2):
            alone[i].requires_grad_(i == 2 * layer)
        dk.fit(alone, X[rows], Y[rows], schedule=schedule, **settings)
        result[2 * layer].load_state_dict(alone[2 * layer].state_dict())
    return result


@pytest.mark.parametrize(
    ("backend", "plan"), [("reference", "auto"), ("cpp", "auto"), ("triton", "fused"), ("triton", "persistent")]
)
@pytest.mark.parametrize(
    ("kind", "widths"), [(dk.RoundRobin, (6, 5, 3)), (dk.RoundRobin, (6, 5, 4, 3)), (dk.Alternating, (6, 5, 3))]
)
@pytest.mark.parametrize(
    "how", [{}, {"momentum": 0.9, "reset_momentum": True, "relative_lr": True}, {"direction": "sgd"}], ids=str
)
def test_a_cycle_is_every_layer_trained_alone_from_the_same_start(kind, widths, backend, plan, how, monkeypatch):
    """Blocks of a pass over rows that are not shuffled, so that each cycle can be made from the model before it."""
    if plan == "persistent" and len(widths) > 3:
        plan = "auto"  # it cannot serve two layers after the active one
    monkeypatch.setenv("DANTE_GPU_PLAN", plan)
    settings = {"lr": 0.05, "lr_schedule": "constant", "batch_size": 5, "shuffle": False, "backend": backend} | how
    model = net(*widths)
    expected = copy.deepcopy(model)
    dk.fit(model, X, Y, schedule=kind(rounds=2, inner_steps=4, parallel=True), **settings)
    for _ in range(2):
        expected = one_by_one(expected, kind(rounds=1, inner_steps=4), [*range(len(widths) - 1)], slice(None), **settings)
    if backend == "reference":
        torch.testing.assert_close(weights(model), weights(expected))
    else:
        assert torch.equal(weights(model), weights(expected))
    in_turn = net(*widths)
    dk.fit(in_turn, X, Y, schedule=kind(rounds=2, inner_steps=4), **settings)
    assert not torch.allclose(weights(model), weights(in_turn), atol=1e-3)


def test_a_frozen_layer_is_no_part_of_a_cycle():
    model = net(6, 5, 4, 3)
    model[2].requires_grad_(False)
    settings: dict[str, Any] = {"lr": 0.05, "lr_schedule": "constant", "batch_size": 5, "shuffle": False}
    expected = copy.deepcopy(model)
    dk.fit(model, X, Y, schedule=dk.RoundRobin(rounds=1, inner_epochs=1, inner_steps=2, parallel=True), **settings)
    for rows in (slice(0, 10), slice(10, 20)):
        expected = one_by_one(expected, dk.RoundRobin(rounds=1, inner_steps=2), [0, 2], rows, **settings)
    assert torch.equal(weights(model), weights(expected))


def test_without_a_schedule_blocks_are_short_and_in_parallel():
    x, y = blobs(rows=47)
    given, free = net(6, 5, 3), net(6, 5, 3)
    dk.fit(free, x, y, batch_size=5)
    rounds = schedules.default_rounds(47, 5)
    dk.fit(given, x, y, batch_size=5, schedule=dk.RoundRobin(rounds=rounds, inner_epochs=1, inner_steps=3, parallel=True))
    assert torch.equal(weights(given), weights(free))


def test_a_gradient_that_is_not_finite_leaves_the_weights_before_it():
    x, y = X.clone(), Y
    x[17] = float("nan")
    schedule = dk.RoundRobin(rounds=1, inner_epochs=1, inner_steps=2, parallel=True)
    model, expected = net(6, 5, 3), net(6, 5, 3)
    settings: dict[str, Any] = {"lr": 0.05, "batch_size": 5, "shuffle": False}
    with pytest.raises(dk.NonFiniteError, match=r"layer 0 \('0'\), round 0, step 1 of its block 2"):
        dk.fit(model, x, y, schedule=schedule, **settings)
    dk.fit(expected, x[:10], y[:10], schedule=schedule, **settings)  # the first cycle, as the round's rate is the same
    after_it = copy.deepcopy(expected)
    after_it[2].requires_grad_(False)
    dk.fit(after_it, x[10:15], y[10:15], schedule=dk.RoundRobin(rounds=1), **settings)
    assert torch.equal(weights(model), weights(after_it))


def test_it_must_be_true_or_false():
    with pytest.raises(TypeError, match="parallel: expected True or False, got 'yes'"):
        dk.RoundRobin(parallel="yes")
