"""What `fit` takes where nothing is given: what goes together, and what the documentation says of it."""

import math
import pathlib
import re

import numpy as np
import pytest
import torch
from support import net, weights
from torch import nn

import dante_kernels as dk
from dante_kernels.activations import Activation
from dante_kernels.data import load_digits
from dante_kernels.training import directions, inputs, schedules

ROOT = pathlib.Path(__file__).parents[2]


def digits_after(rows=300, **settings):
    split = load_digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.LeakyReLU(0.01), nn.Linear(12, 10))
    history = dk.fit(model, split.x_train[:rows], split.y_train[:rows], **settings)
    return history, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_nothing_given_is_short_blocks_of_relative_nesterov_steps_within_a_bound():
    history, weights = digits_after(loss="cross_entropy")
    rounds = schedules.default_rounds(300, 100)
    blocks = schedules.usual(rounds, parallel=True)
    steps = {"loss": "cross_entropy", "lr": 0.005, "relative_lr": True, "momentum": 0.9, "direction": "nesterov"}
    given, same = digits_after(schedule=blocks, **steps, max_norm=4 / math.sqrt(3))
    assert torch.equal(weights, same)
    assert [block.steps for block in history.blocks] == [block.steps for block in given.blocks]
    _, without = digits_after(schedule=blocks, **steps)
    assert not torch.equal(weights, without)


def test_a_given_rate_goes_with_blocks_in_turn():
    history, weights = digits_after(lr=0.1)
    given, same = digits_after(lr=0.1, schedule=dk.RoundRobin(rounds=len(history.rounds), inner_epochs=1, inner_steps=20))
    assert torch.equal(weights, same)
    assert [block.steps for block in history.blocks] == [block.steps for block in given.blocks]


@pytest.mark.parametrize(("loss", "parallel"), [("mse", False), ("binary_cross_entropy", True)])
def test_values_to_be_met_go_with_blocks_in_turn_and_probabilities_do_not(loss, parallel):
    split = load_digits()
    found = []
    for schedule in (None, schedules.usual(100, parallel=parallel), schedules.usual(100, parallel=not parallel)):
        model = net(64, 12, 64)
        dk.fit(model, split.x_train[:300], split.x_train[:300], loss=loss, schedule=schedule)
        found.append(weights(model))
    assert torch.equal(*found[:2])
    assert not torch.equal(found[0], found[2])


def test_a_given_rate_is_a_length_without_momentum():
    short = dk.RoundRobin(rounds=2)
    _, weights = digits_after(schedule=short, lr=0.1)
    _, same = digits_after(schedule=short, lr=0.1, relative_lr=False, momentum=0.0)
    _, other = digits_after(schedule=short, lr=0.1, relative_lr=True)
    assert torch.equal(weights, same)
    assert not torch.equal(weights, other)


LEAKY, SIGMOID, TANH, INFINITE = Activation("generalized_relu", 0.01), Activation.SIGMOID, Activation.TANH, math.inf


@pytest.mark.parametrize(
    ("given", "hidden", "loss", "classes", "expected"),
    [
        ({}, [(100, LEAKY)], "cross_entropy", True, (0.005, True, 0.9, "nesterov", 4 / 3**0.5)),
        ({}, [(100, LEAKY)] * 2, "cross_entropy", True, (0.005, True, 0.9, "nesterov", 2 / 3**0.5)),
        ({}, [(100, LEAKY)] * 5, "binary_cross_entropy", False, (0.005, True, 0.9, "nesterov", 0.8 / 3**0.5)),
        ({}, [(25, LEAKY)], "cross_entropy", True, (0.005, True, 0.9, "nesterov", 4 / 3**0.5)),
        ({}, [(25, LEAKY)] * 4, "cross_entropy", True, (0.005, True, 0.9, "nesterov", 2 / 3**0.5)),
        ({}, [(100, LEAKY), (25, LEAKY)] * 2, "cross_entropy", True, (0.005, True, 0.9, "nesterov", 2**0.5 / 3**0.5)),
        ({}, [(25, LEAKY)] * 2, "mse", True, (0.004, True, 0.9, "nesterov", 2 / 3**0.5)),
        ({}, [(100, LEAKY)] * 2, "mse", True, (0.004, True, 0.9, "nesterov", 2 / 3**0.5)),
        ({}, [(100, LEAKY)] * 3, "mse", True, (0.003, True, 0.9, "nesterov", 4 ** (1 / 3) / 3**0.5)),
        ({}, [(100, LEAKY)] * 5, "mse", True, (0.002, True, 0.9, "nesterov", 4**0.2 / 3**0.5)),
        ({}, [(100, LEAKY)], "mse", False, (0.004, True, 0.9, "nesterov", INFINITE)),
        ({}, [(100, LEAKY)] * 3, "mse", False, (0.003, True, 0.9, "nesterov", INFINITE)),
        ({}, [(100, LEAKY), (100, SIGMOID)], "cross_entropy", True, (0.004, True, 0.9, "nesterov", 6 / 3**0.5)),
        ({}, [(100, LEAKY), (100, TANH)], "cross_entropy", True, (0.004, True, 0.9, "nesterov", 3 / 3**0.5)),
        ({}, [(100, LEAKY), (100, SIGMOID)], "mse", True, (0.004, True, 0.9, "nesterov", INFINITE)),
        ({}, [(100, SIGMOID)], "binary_cross_entropy", False, (0.004, True, 0.9, "nesterov", 12 / 3**0.5)),
        ({}, [(100, TANH)], "cross_entropy", True, (0.004, True, 0.9, "nesterov", 6 / 3**0.5)),
        ({}, [(100, SIGMOID)] * 5, "cross_entropy", True, (0.004, True, 0.9, "nesterov", 4 / 3**0.5)),
        ({}, [(25, TANH)] * 4, "cross_entropy", True, (0.004, True, 0.9, "nesterov", 4 / 3**0.5)),
        ({}, [], "cross_entropy", True, (0.004, True, 0.9, "nesterov", INFINITE)),
        ({}, [], "mse", True, (0.004, True, 0.9, "nesterov", INFINITE)),
        ({"max_norm": 0.7}, [(100, SIGMOID)], "mse", True, (0.004, True, 0.9, "nesterov", 0.7)),
        ({"max_norm": INFINITE}, [(100, LEAKY)], "mse", True, (0.004, True, 0.9, "nesterov", INFINITE)),
        ({"momentum": 0.5, "direction": "sngd"}, [(100, SIGMOID)], "mse", True, (0.02, True, 0.5, "sngd", INFINITE)),
        ({"momentum": 0.0}, [(100, SIGMOID)], "mse", True, (0.04, True, 0.0, "sngd", INFINITE)),
        ({"lr": 0.1}, [(100, LEAKY)], "mse", True, (0.1, False, 0.0, "sngd", INFINITE)),
        ({"lr": 0.1, "relative_lr": True, "momentum": 0.9}, [(100, LEAKY)], "mse", True, (0.1, True, 0.9, "sngd", INFINITE)),
        ({"lr": 0.1, "direction": "adam", "max_norm": 2.0}, [(100, LEAKY)], "mse", True, (0.1, False, 0.0, "adam", 2.0)),
    ],
)
def test_what_is_not_given_goes_with_what_is(given, hidden, loss, classes, expected):
    nothing = dict.fromkeys(("lr", "relative_lr", "momentum", "direction", "max_norm"))
    found = directions.settled(**nothing | given, hidden=hidden, loss=loss, classes=classes)
    assert found[1:-1] == expected[1:-1]
    assert (found.lr, found.max_norm) == pytest.approx((expected[0], expected[-1]))


def test_the_dtype_says_whether_a_target_holds_classes():
    whole = (torch.uint8, torch.int32, torch.int64, torch.bool)
    assert all(inputs.holds_classes(torch.zeros(3, dtype=dtype)) for dtype in whole)
    assert inputs.holds_classes(np.zeros(3, dtype=np.int32))
    assert not any(inputs.holds_classes(y) for y in (None, torch.zeros(3), np.zeros(3)))


def test_a_momentum_that_is_no_number_is_named():
    with pytest.raises(TypeError, match="momentum: expected a number, got Tensor"):
        digits_after(momentum=torch.tensor([0.9, 0.9]))


@pytest.mark.parametrize("outputs", ["classes", "values"])
def test_only_classes_have_a_bound_with_mse(outputs):
    """Values may be of any size, which a bound would keep the net from."""
    split = load_digits()
    y = split.y_train[:300] if outputs == "classes" else nn.functional.one_hot(split.y_train[:300], 10).float()
    found = []
    for bound in (None, math.inf):
        model = net(64, *[30] * 4, 10, activation=nn.ReLU)
        dk.fit(model, split.x_train[:300], y, max_norm=bound, batch_size=10)
        found.append(weights(model))
    assert torch.equal(*found) == (outputs == "values")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"relative_lr": False}, "lr: expected a number with relative_lr=False, got None"),
        ({"direction": "adam"}, "lr: expected a number with direction='adam', got None"),
    ],
)
def test_a_rate_that_cannot_be_settled_is_named(settings, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        digits_after(**settings)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("hidden", [(), (30,)])
def test_a_layer_that_starts_at_zero_is_trained(hidden, loss):
    split = load_digits()
    model = net(64, *hidden, 10, activation=nn.ReLU)
    for parameter in model[-2].parameters():
        nn.init.zeros_(parameter)
    history = dk.fit(model, split.x_train, split.y_train, loss=loss, validation=(split.x_test, split.y_test))
    assert history.rounds[-1].metrics["accuracy"] > 0.93
    assert history.blocks[len(hidden)].lr == pytest.approx(directions.usual_lr([(30, LEAKY)] * len(hidden), loss))


def test_layers_that_are_not_trained_are_not_counted():
    """A head on frozen layers is a net of one layer."""
    split = load_digits()
    model = net(64, *[30] * 4, 10)
    for parameter in model[:-2].parameters():
        parameter.requires_grad_(False)
    start = model[-2].weight.norm().hypot(model[-2].bias.norm()).item()
    history = dk.fit(model, split.x_train[:300], split.y_train[:300], loss="cross_entropy")
    assert history.blocks[0].lr == pytest.approx(directions.RELATIVE_LR * start)


def test_rounds_are_more_over_small_data_within_bounds():
    assert [schedules.default_rounds(rows, 100) for rows in (1, 200, 1437, 10_000, 60_000)] == [100, 100, 80, 12, 12]


def test_digits_are_learned_with_nothing_given():
    split = load_digits()
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 100), nn.LeakyReLU(0.01), nn.Linear(100, 10), nn.LeakyReLU(0.01))
        history = dk.fit(model, split.x_train, split.y_train, validation=(split.x_test, split.y_test), seed=seed)
        assert history.rounds[-1].metrics["accuracy"] > 0.975


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh])
def test_the_bound_keeps_nets_that_saturate_from_growing_too_sure(activation):
    split = load_digits()
    losses = []
    for bound in (None, math.inf):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 100), activation(), nn.Linear(100, 10))
        dk.fit(model, split.x_train, split.y_train, loss="cross_entropy", max_norm=bound)
        losses.append(nn.functional.cross_entropy(model(split.x_test), split.y_test).item())
    assert losses[0] < 0.8 * losses[1]


def test_the_page_on_defaults_names_them():
    page = " ".join((ROOT / "docs" / "defaults.md").read_text().split())
    rates = directions.RELATIVE_LR, directions.RELATIVE_LR_CROSS_ENTROPY, directions.RELATIVE_LR_TOGETHER
    assert "A step is {} of the layer's norm; where all hidden layers are generalized ReLUs, {} with".format(*rates) in page
    assert f"{rates[2]} over the number of layers from four on with MSE" in page
    assert f"parallel blocks of {schedules.INNER_STEPS} steps with Nesterov's momentum of {directions.MOMENTUM}" in page
    assert f"below {directions.WIDE}" in page
    (relu, _), (sigmoid, least), tanh = (directions.GROWTH[kind] for kind in ("generalized_relu", "sigmoid", "tanh"))
    assert f"times {relu:g} / H for generalized ReLUs, the larger of {sigmoid:g} / H and {least:g} for sigmoids" in page
    assert tanh == (sigmoid / 2, least / 2)
    assert "half of that for tanh" in page
    assert f"MSE's bound is 1 / sqrt(3) times {relu:g}^(1 / H)" in page
    assert f"{schedules.ROUNDS} rounds, or as many as make {schedules.STEPS} steps, {schedules.MOST_ROUNDS} at most" in page
