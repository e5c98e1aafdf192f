"""The bound on the layers' norms after a round."""

import copy
import functools
import math
import re

import pytest
import torch
from support import blobs, net, weights
from torch import nn

import dante_kernels as dk

TWO = {"loss": "cross_entropy", "schedule": dk.RoundRobin(rounds=2), "lr": 0.5, "batch_size": 10}


def norms_a_unit(model):
    """Of each nn.Linear: the Frobenius norm of weight and bias over the square root of its units, in float64."""
    found = []
    for linear in (module for module in model if isinstance(module, nn.Linear)):
        parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
        squares = sum(part.detach().double().square().sum() for part in parts)
        found.append(math.sqrt(squares / len(linear.weight)))
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_after_every_round_longer_layers_are_scaled_back_and_shorter_ones_are_not(backend, bias):
    x, y = blobs()
    start = net(6, 8, 5, 3)
    for linear in start[::2] if not bias else ():
        linear.bias = None
    bounded, free = copy.deepcopy(start), copy.deepcopy(start)
    one_round = TWO | {"schedule": dk.RoundRobin(rounds=1), "backend": backend}
    dk.fit(free, x, y, **one_round)
    longest = norms_a_unit(free)
    bound = sorted(longest)[1]  # between the three of them
    assert max(norms_a_unit(start)) < bound
    dk.fit(bounded, x, y, **one_round, max_norm=bound * (1 + 1e-9))
    for layer, norm in enumerate(longest):
        factor = min(1.0, bound / norm)
        for own, other in zip(bounded[2 * layer].parameters(), free[2 * layer].parameters(), strict=True):
            torch.testing.assert_close(own, factor * other, rtol=1e-6, atol=0)
            assert factor < 1 or torch.equal(own, other)
    assert sum(norm > bound * (1 + 1e-6) for norm in longest) == 1


def test_it_goes_on_from_the_scaled_weights_and_measures_them():
    x, y = blobs()
    held_to_it, model = [], net(6, 8, 3)
    history = dk.fit(
        model, x, y, **TWO | {"schedule": dk.RoundRobin(rounds=5)}, max_norm=0.7, validation=(x, y),
        callbacks=[lambda _: held_to_it.append(norms_a_unit(model))],
    )  # fmt: skip
    assert len(held_to_it) == 5
    for found in held_to_it:
        assert max(found) == pytest.approx(0.7, rel=1e-6)
    loss = nn.functional.cross_entropy(model(x), y).item()
    assert history.rounds[-1].metrics["loss"] == pytest.approx(loss, rel=1e-5)


def test_no_layer_is_made_shorter_than_it_was():
    x, y = blobs()
    model = net(6, 8, 3)
    with torch.no_grad():
        model[0].weight.mul_(10)
    start = norms_a_unit(model)
    dk.fit(model, x, y, **TWO, max_norm=1e-3)
    assert norms_a_unit(model) == pytest.approx(start, rel=1e-6)


def test_infinity_is_no_bound_and_changes_no_bit():
    x, y = blobs()
    models = [net(6, 8, 3) for _ in range(3)]
    for model, bound in zip(models, (None, math.inf, 1e30), strict=True):
        dk.fit(model, x, y, **TWO, max_norm=bound)
        assert torch.equal(weights(model), weights(models[0]))


def test_weights_whose_squares_overflow_float32_are_held_to_it_too():
    x, y = blobs()
    model = net(6, 8, 3)
    with torch.no_grad():
        model[0].weight.mul_(1e25)
        model[2].weight.mul_(1e-3)
    start = norms_a_unit(model)
    moving = TWO | {"lr": lambda _: (1e25, 0.5), "schedule": dk.Alternating(rounds=2)}
    dk.fit(model, x * 1e-25, y, **moving, max_norm=0.35)
    assert norms_a_unit(model) == pytest.approx([start[0], 0.35], rel=1e-6)


@pytest.mark.parametrize(
    "schedule", [dk.Alternating, functools.partial(dk.StackedAutoencoder, whole_network=True), dk.StackedAutoencoder]
)
def test_layers_are_held_to_it_in_whatever_order_they_are_trained(schedule):
    x, _ = blobs()
    model = net(6, 8, 6)
    dk.fit(model, x, **TWO | {"loss": "mse", "schedule": schedule(rounds=2)}, max_norm=0.65)
    assert norms_a_unit(model) == pytest.approx([0.65, 0.65], rel=1e-6)


@pytest.mark.parametrize("bound", [0.6, 1e308])
def test_weights_without_a_finite_norm_are_left_alone(bound):
    x, y = blobs()
    models = [net(6, 8, 3).double() for _ in range(2)]
    for model, max_norm in zip(models, (bound, None), strict=True):
        with torch.no_grad():
            model[0].weight.mul_(1e200)
            model[2].weight.zero_()
        dk.fit(model, x.double() * 1e-200, y, **TWO, backend="reference", max_norm=max_norm)
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    assert models[0][0].weight.isfinite().all()


def test_the_bounds_are_of_the_start_whatever_a_callback_makes_of_the_weights():
    x, y = blobs()
    model, found = net(6, 8, 3), []
    with torch.no_grad():
        model[0].weight.mul_(4)
    start = norms_a_unit(model)[0]

    def shrink(history):
        found.append(norms_a_unit(model)[0])
        if len(history.rounds) == 1:
            with torch.no_grad():
                model[0].weight.mul_(0.2)

    dk.fit(model, x, y, **TWO | {"schedule": dk.RoundRobin(rounds=9)}, lr_schedule="constant", max_norm=0.3, callbacks=[shrink])
    assert found[1] < 0.8 * start < found[-1] <= start * (1 + 1e-6)


def test_a_gradient_that_is_not_finite_leaves_the_weights_before_its_step_unscaled():
    x, y = blobs()
    x[-1, 0] = math.inf
    models = [net(6, 8, 3) for _ in range(2)]
    for model, max_norm in zip(models, (0.1, None), strict=True):
        with pytest.raises(dk.NonFiniteError, match="step 8 of its block"):
            dk.fit(model, x, y, **TWO, shuffle=False, max_norm=max_norm)
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_fine_tuning_has_no_bound():
    x, y = blobs()
    model = net(6, 8, 3)
    settings = TWO | {"schedule": dk.RoundRobin(rounds=1, finetune_epochs=2, finetune_lr=0.5)}
    dk.fit(model, x, y, **settings, max_norm=0.6)
    assert max(norms_a_unit(model)) > 0.65


def test_a_checkpoint_keeps_the_bounds_of_the_start(tmp_path):
    x, y = blobs()
    settings = TWO | {"schedule": dk.RoundRobin(rounds=4), "max_norm": 0.1}
    whole, broken, anew = net(6, 8, 3), net(6, 8, 3), net(6, 8, 3)
    with torch.no_grad():
        anew[0].weight.mul_(3)  # whose norm is no one's bound
    dk.fit(whole, x, y, **settings)
    file = tmp_path / "run"
    dk.fit(broken, x, y, **settings, checkpoint=file, callbacks=[lambda history: len(history.rounds) == 2])
    dk.fit(anew, x, y, **settings, checkpoint=file)
    assert torch.equal(weights(anew), weights(whole))
    with pytest.raises(ValueError, match="belongs to another run, which differs in max_norm;"):
        dk.fit(net(6, 8, 3), x, y, **settings | {"max_norm": 0.2}, checkpoint=file)


def test_side_by_side_each_model_has_its_own():
    x, y = blobs()
    bounds = [0.6, math.inf, 0.8]
    alone = [net(6, 8, 3) for _ in bounds]
    together = copy.deepcopy(alone)
    for model, bound in zip(alone, bounds, strict=True):
        dk.fit(model, x, y, **TWO, max_norm=bound, backend="cpp")
    dk.fit_many(together, x, y, **TWO, max_norm=bounds, backend="cpp")
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(weights(one), weights(other))
    assert len({norms_a_unit(model)[0] for model in alone}) == 3


@pytest.mark.parametrize("layer", [0, 2])
def test_layers_that_are_not_trained_are_not_written_to(layer):
    x, y = blobs()
    model = net(6, 8, 3)
    for parameter in model[layer].parameters():
        parameter.requires_grad_(False)
    versions = [parameter._version for parameter in model[layer].parameters()]
    dk.fit(model, x, y, **TWO, max_norm=0.6)
    assert [parameter._version for parameter in model[layer].parameters()] == versions


@pytest.mark.parametrize(
    ("bound", "error", "says"),
    [
        (0, ValueError, "max_norm: expected a number above 0, got 0.0"),
        (-1.0, ValueError, "max_norm: expected a number above 0, got -1.0"),
        (math.nan, ValueError, "max_norm: expected a number above 0, got nan"),
        ("1", TypeError, "max_norm: expected a number, got str"),
    ],
)
def test_a_bound_that_is_none_is_named(bound, error, says):
    x, y = blobs()
    with pytest.raises(error, match=re.escape(says)):
        dk.fit(net(6, 8, 3), x, y, **TWO, max_norm=bound)
