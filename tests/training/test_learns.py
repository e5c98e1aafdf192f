"""Training on real data reaches what is promised."""

import pytest
import torch
from torch import nn

import dante_kernels as dk
from dante_kernels import data


def leaky_net(*widths):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(m for i in range(len(widths) - 1) for m in (nn.Linear(widths[i], widths[i + 1]), nn.LeakyReLU(0.01)))
        )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_reach_96_percent(seed):
    digits = data.load_digits()
    history = dk.fit(
        leaky_net(64, 100, 10), digits.x_train, digits.y_train, schedule=dk.RoundRobin(rounds=15), lr=0.2, batch_size=20,
        validation=(digits.x_test, digits.y_test), seed=seed,
    )  # fmt: skip
    assert history.rounds[-1].metrics["accuracy"] >= 0.96


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_digits_are_learnt_with_the_other_losses(loss):
    digits = data.load_digits()
    model = nn.Sequential(*list(leaky_net(64, 100, 10))[:-1])
    history = dk.fit(
        model, digits.x_train, digits.y_train, loss=loss, schedule=dk.RoundRobin(rounds=15), lr=0.2, batch_size=20,
        validation=(digits.x_test, digits.y_test),
    )  # fmt: skip
    assert history.rounds[-1].metrics["accuracy"] >= 0.96


@pytest.mark.parametrize(("inner_steps", "accuracy"), [(None, 0.978), (60, 0.980)], ids=["whole passes", "blocks of 60 steps"])
def test_mnist_reaches_the_papers_level(real_data, inner_steps, accuracy):
    mnist = data.load_idx(real_data / "mnist")
    schedule = dk.RoundRobin(rounds=12, inner_epochs=1, inner_steps=inner_steps)
    history = dk.fit(
        leaky_net(784, 100, 10), mnist.x_train, mnist.y_train, schedule=schedule, lr=0.2, batch_size=100,
        validation=(mnist.x_test, mnist.y_test),
    )  # fmt: skip
    assert history.rounds[-1].metrics["accuracy"] >= accuracy
