"""Blocks in parallel: each layer of a cycle sees the others as they were at its start, whatever makes the steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import blobs, net, weights
from torch import nn

import dante_kernels as dk
from dante_kernels import kernels
from dante_kernels.ops.blocks import launches_of_step
from dante_kernels.training import schedules, trainer

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
    if backend == "reference" or (plan == "persistent" and "direction" not in how):  # all of a round in one launch
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


@pytest.mark.parametrize("kind", [dk.RoundRobin, dk.Alternating])
@pytest.mark.parametrize("how", [{"loss": "cross_entropy"}, {"momentum": 0.9, "relative_lr": True}], ids=str)
def test_a_round_in_one_launch_is_recorded_as_that_of_the_reference(kind, how, monkeypatch):
    """Though of a cycle the kernel makes the last layer's block first."""
    monkeypatch.setenv("DANTE_GPU_PLAN", "persistent")
    run, launches = kernels.one_launch.run, []
    monkeypatch.setattr(kernels.one_launch, "run", lambda *args, **more: launches.append(1) or run(*args, **more))
    settings = {"lr": [0.05, 0.1], "batch_size": 3, "seed": 2, "schedule": kind(2, 1, 3, parallel=True)} | how
    models = [net(6, 5, 3) for _ in range(2)]
    histories = [
        dk.fit(model, X, Y, backend=name, **settings) for model, name in zip(models, ("reference", "triton"), strict=True)
    ]
    assert len(launches) == 2  # one a round
    torch.testing.assert_close(*map(weights, models), rtol=1e-4, atol=1e-5)
    for theirs, ours in zip(histories[0].blocks, histories[1].blocks, strict=True):
        assert (ours.layer, ours.steps) == (theirs.layer, theirs.steps)
        for name in ("lr", "loss", "norm_mean", "norm_min", "norm_max"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-4), name


@pytest.mark.parametrize("parallel", [False, True])
def test_a_long_round_is_several_launches_with_the_same_bits(parallel, monkeypatch):
    monkeypatch.setenv("DANTE_GPU_PLAN", "persistent")
    launches, run = [], kernels.one_launch.run
    monkeypatch.setattr(kernels.one_launch, "run", lambda *args, **more: launches.append(1) or run(*args, **more))
    settings = {"lr": 0.05, "momentum": 0.9, "relative_lr": True, "batch_size": 3, "seed": 2, "backend": "triton"}
    models, records = [net(6, 5, 3) for _ in range(2)], []
    for model in models:  # of 14 steps, in blocks of 3, 3 and 1 of each layer
        history = dk.fit(model, X, Y, schedule=dk.RoundRobin(1, 1, 3, parallel=parallel), **settings)
        records.append([(block.layer, block.loss, block.norm_mean) for block in history.blocks])
        monkeypatch.setattr(trainer, "LAUNCHES_AT_ONCE", 6 * launches_of_step(2))
    assert len(launches) == 1 + 3
    assert torch.equal(*map(weights, models))
    assert records[0] == records[1]


@pytest.mark.parametrize(("backend", "plan"), [("auto", "auto"), ("triton", "persistent")])
def test_a_gradient_that_is_not_finite_leaves_the_weights_before_it(backend, plan, monkeypatch):
    monkeypatch.setenv("DANTE_GPU_PLAN", plan)
    x, y = X.clone(), Y
    x[17] = float("nan")
    schedule = dk.RoundRobin(rounds=1, inner_epochs=1, inner_steps=2, parallel=True)
    model, expected = net(6, 5, 3), net(6, 5, 3)
    settings: dict[str, Any] = {"lr": 0.05, "batch_size": 5, "shuffle": False, "backend": backend}
    with pytest.raises(dk.NonFiniteError, match=r"layer 0 \('0'\), round 0, step 1 of its block 2"):
        dk.fit(model, x, y, schedule=schedule, **settings)
    dk.fit(expected, x[:10], y[:10], schedule=schedule, **settings)  # the first cycle, as the round's rate is the same
    after_it = copy.deepcopy(expected)
    after_it[2].requires_grad_(False)
    dk.fit(after_it, x[10:15], y[10:15], schedule=dk.RoundRobin(rounds=1), **settings)
    torch.testing.assert_close(
        weights(model), weights(after_it), rtol=1e-5 if plan == "persistent" else 0, atol=1e-6 * (plan == "persistent")
    )


@pytest.mark.parametrize("kind", [dk.RoundRobin, dk.Alternating])
@pytest.mark.parametrize("parallel", [False, True])
def test_what_is_infinite_but_saturates_stops_the_hidden_layer_alone(kind, parallel, monkeypatch):
    """The last layer sees a finite activation; also where one launch makes both layers' gradients."""
    monkeypatch.setenv("DANTE_GPU_PLAN", "persistent")
    x = X.clone()
    x[0, 2] = float("inf")
    found = []
    for backend in ("reference", "triton"):
        model = net(6, 5, 3)
        with pytest.raises(dk.NonFiniteError) as caught:
            dk.fit(
                model, x, Y, schedule=kind(1, 1, 2, parallel=parallel), lr=0.05, batch_size=3, shuffle=False, backend=backend
            )
        found.append((str(caught.value), weights(model)))
    assert "layer 0 ('0')" in found[0][0]
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


def test_it_must_be_true_or_false():
    with pytest.raises(TypeError, match="parallel: expected True or False, got 'yes'"):
        dk.RoundRobin(parallel="yes")
