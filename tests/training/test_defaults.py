"""What `fit` takes where nothing is given: what goes together, and what the documentation says of it."""

import pathlib
import re

import pytest
import torch
from torch import nn

import dante_kernels as dk
from dante_kernels.data import load_digits
from dante_kernels.training import directions, schedules

ROOT = pathlib.Path(__file__).parents[2]


def digits_after(rows=300, **settings):
    split = load_digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.LeakyReLU(0.01), nn.Linear(12, 10))
    history = dk.fit(model, split.x_train[:rows], split.y_train[:rows], **settings)
    return history, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_nothing_given_is_short_blocks_of_relative_steps_with_momentum():
    history, weights = digits_after()
    rounds = schedules.default_rounds(300, 100)
    blocks = dk.RoundRobin(rounds=rounds, inner_epochs=1, inner_steps=20)
    given, same = digits_after(schedule=blocks, lr=0.003, relative_lr=True, momentum=0.9)
    assert torch.equal(weights, same)
    assert [block.steps for block in history.blocks] == [block.steps for block in given.blocks]


def test_a_given_rate_is_a_length_without_momentum():
    short = dk.RoundRobin(rounds=2)
    _, weights = digits_after(schedule=short, lr=0.1)
    _, same = digits_after(schedule=short, lr=0.1, relative_lr=False, momentum=0.0)
    _, other = digits_after(schedule=short, lr=0.1, relative_lr=True)
    assert torch.equal(weights, same)
    assert not torch.equal(weights, other)


def test_what_goes_with_no_rate_can_be_changed():
    assert directions.settled(None, None, 0.5, "nesterov") == (0.003, True, 0.5)
    assert directions.settled(None, True, None, "sngd") == (0.003, True, 0.9)


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


def test_rounds_are_more_over_small_data_within_bounds():
    assert [schedules.default_rounds(rows, 100) for rows in (1, 200, 1437, 10_000, 60_000)] == [100, 100, 80, 12, 12]


def test_digits_are_learned_with_nothing_given():
    split = load_digits()
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 100), nn.LeakyReLU(0.01), nn.Linear(100, 10), nn.LeakyReLU(0.01))
        history = dk.fit(model, split.x_train, split.y_train, validation=(split.x_test, split.y_test), seed=seed)
        assert history.rounds[-1].metrics["accuracy"] > 0.975


def test_the_page_on_defaults_names_them():
    page = " ".join((ROOT / "docs" / "defaults.md").read_text().split())
    numbers = (schedules.INNER_STEPS, directions.RELATIVE_LR, directions.MOMENTUM)
    assert "blocks of {} steps, {} of the layer's norm, momentum {}".format(*numbers) in page
    assert f"{schedules.ROUNDS} rounds, or as many as make {schedules.STEPS} steps, {schedules.MOST_ROUNDS} at most" in page
