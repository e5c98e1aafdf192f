"""Algorithm 2's stopping rule, Algorithm 3's phases, and fine-tuning."""

from itertools import pairwise

import pytest
import torch
from support import as_bytes, assert_same, blobs, net, weights
from torch import nn

import dante_kernels as dk
from dante_kernels.training.schedules import Schedule


def test_one_hidden_layer_alternation_stops_by_epsilon():
    x, y = blobs()
    model = net(6, 5, 3)
    history = dk.fit(
        model, x, y, schedule=dk.Alternating(rounds=200, inner_epochs=1), lr=0.05, lr_schedule=lambda r, _: 0.7**r,
        batch_size=10, stop_epsilon=1e-4,
    )  # fmt: skip
    assert history.stopped_by == "epsilon"
    objectives = [r.objective for r in history.rounds]
    assert 2 <= len(objectives) < 200
    assert abs(objectives[-1] - objectives[-2]) < 1e-4
    assert all(abs(a - b) >= 1e-4 for a, b in pairwise(objectives[:-1]))
    target = nn.functional.one_hot(y, 3).float()
    assert objectives[-1] == pytest.approx(nn.functional.mse_loss(model(x), target).item(), rel=1e-4)


def test_t_am_rounds_are_done_at_least():
    x, y = blobs()
    common = {"lr": 1e-6, "lr_schedule": "constant", "stop_epsilon": 1.0}
    assert len(dk.fit(net(6, 5, 3), x, y, schedule=dk.Alternating(rounds=9), **common).rounds) == 1
    assert len(dk.fit(net(6, 5, 3), x, y, schedule=dk.Alternating(rounds=9, min_rounds=4), **common).rounds) == 4


def test_without_epsilon_no_objective_is_computed():
    x, y = blobs()
    history = dk.fit(net(6, 5, 3), x, y, schedule=dk.Alternating(rounds=2))
    assert [r.objective for r in history.rounds] == [None, None]
    assert history.stopped_by == "rounds"


def autoencoder_data():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(120, 2, generator=generator)
    return torch.sigmoid(codes @ torch.randn(2, 12, generator=generator))


@pytest.mark.parametrize("whole_network", [False, True])
@pytest.mark.parametrize("blocks", [{}, {"inner_epochs": 1, "inner_steps": 4}])
def test_a_stacked_autoencoders_loss_falls_in_every_phase(whole_network, blocks):
    x = autoencoder_data()
    model = net(12, 8, 3, 8, 12, activation=nn.Sigmoid, output=nn.Sigmoid)
    schedule = dk.StackedAutoencoder(rounds=8, whole_network=whole_network, **blocks)
    history = dk.fit(model, x, schedule=schedule, lr=0.5, batch_size=10, validation=(x, None))
    assert {b.phase: {c.layer for c in history.blocks if c.phase == b.phase} for b in history.blocks} == {0: {0, 3}, 1: {1, 2}}
    assert [b.layer for b in history.blocks[:2]] == [3, 0]
    for phase in (0, 1):
        falling = [r.loss for r in history.rounds if r.phase == phase]
        assert len(falling) == 8
        assert falling[-1] < 0.97 * falling[0]
    assert history.rounds[-1].metrics["loss"] == pytest.approx(nn.functional.mse_loss(model(x), x).item(), rel=1e-3)
    assert "accuracy" not in history.rounds[-1].metrics


def test_a_stacked_autoencoder_trains_on_every_backend(backend):
    x = autoencoder_data()[:30]
    outcomes = []
    for kind in ("reference", backend):
        model = net(12, 8, 3, 8, 12, activation=nn.Sigmoid, output=nn.Sigmoid)
        history = dk.fit(model, x, schedule=dk.StackedAutoencoder(rounds=2), lr=0.5, batch_size=15, backend=kind)
        outcomes.append(torch.tensor([r.loss for r in history.rounds]))
        assert all(a > b for a, b in outcomes[-1].reshape(2, 2).tolist())
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=0)


def test_the_inner_pair_learns_the_trained_encoders_activations():
    """Algorithm 3: phase 2 equals training the inner pair alone on the outer encoder's output."""
    x = autoencoder_data()
    model = net(12, 8, 3, 8, 12, activation=nn.Sigmoid, output=nn.Sigmoid)
    inner = nn.Sequential(nn.Linear(8, 3), nn.Sigmoid(), nn.Linear(3, 8), nn.Sigmoid())
    inner[0].load_state_dict(model[2].state_dict())
    inner[2].load_state_dict(model[4].state_dict())
    common = {"lr": 0.3, "batch_size": 10, "shuffle": False, "backend": "reference"}
    dk.fit(model, x, schedule=dk.StackedAutoencoder(rounds=3), **common)
    with torch.no_grad():
        encoded = model[1](model[0](x))
    dk.fit(inner, encoded, schedule=dk.Alternating(rounds=3), **common)
    torch.testing.assert_close(model[2].weight, inner[0].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[4].weight, inner[2].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [500, 0])
def test_a_stacked_autoencoder_gives_the_same_result_within_any_budget(backend, budget):
    x = autoencoder_data()[:50]
    outcomes = []
    for b in (2**30, budget):
        model = net(12, 8, 3, 8, 12, activation=nn.Sigmoid, output=nn.Sigmoid)
        history = dk.fit(
            model, x, schedule=dk.StackedAutoencoder(rounds=1), lr=0.3, batch_size=16, prefix_budget=b, backend=backend,
            stop_epsilon=1e-12,
        )  # fmt: skip
        outcomes.append((weights(model), history.rounds[-1].objective))
    if backend == "reference":
        torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == pytest.approx(outcomes[1][1], rel=1e-4)


def test_fine_tuning_is_plain_sgd_on_all_layers():
    x, y = blobs(rows=30)
    model, twin = net(6, 5, 3), net(6, 5, 3)
    history = dk.fit(
        model, x, y, schedule=dk.RoundRobin(rounds=1, finetune_epochs=2, finetune_lr=0.3), batch_size=10, shuffle=False
    )
    dk.fit(twin, x, y, schedule=dk.RoundRobin(rounds=1), batch_size=10, shuffle=False)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3)
    target = nn.functional.one_hot(y, 3).float()
    for _ in range(2):
        for start in range(0, 30, 10):
            optimizer.zero_grad()
            nn.functional.mse_loss(twin(x[start : start + 10]), target[start : start + 10]).backward()
            optimizer.step()
    torch.testing.assert_close(weights(model), weights(twin))
    assert [r.phase for r in history.rounds] == [0, -1, -1]
    before = 3 * weights(model).numel()
    assert [r.weights_updated for r in history.rounds] == [before, 2 * before, 3 * before]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dk.RoundRobin(rounds=0), "rounds: expected at least 1, got 0"),
        (lambda: dk.RoundRobin(inner_epochs=0), "inner_epochs: expected a number above 0, got 0"),
        (lambda: dk.RoundRobin(inner_steps=0), "inner_steps: expected at least 1, got 0"),
        (lambda: dk.Alternating(min_rounds=-1), "min_rounds: expected at least 1"),
        (lambda: dk.RoundRobin(finetune_epochs=-1), "finetune_epochs: expected at least 0"),
        (lambda: dk.RoundRobin(finetune_lr=float("nan")), "finetune_lr: expected a number above 0"),
    ],
)
def test_a_schedule_names_the_argument_that_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_fraction_of_a_round_is_refused():
    with pytest.raises(TypeError, match=r"rounds: expected a whole number, got 1\.5"):
        dk.RoundRobin(rounds=1.5)


@pytest.mark.parametrize(
    ("schedule", "widths", "error", "message"),
    [
        (dk.Alternating(), (6, 5, 4, 3), ValueError, "schedule: Alternating trains one hidden layer, but the model has 2"),
        (dk.StackedAutoencoder(), (6, 5, 3), ValueError, "schedule: StackedAutoencoder needs an even number of layers"),
        (dk.StackedAutoencoder(), (6, 5, 4, 3, 6), ValueError, "StackedAutoencoder pairs layer 1 with layer 2"),
        (Schedule(), (6, 5, 3), TypeError, "schedule: expected Alternating, RoundRobin or StackedAutoencoder"),
        ("round-robin", (6, 5, 3), TypeError, "schedule: expected a Schedule"),
    ],
)
def test_a_schedule_that_does_not_fit_the_model_is_refused(schedule, widths, error, message):
    x, y = blobs()
    model = net(*widths)
    before = weights(model)
    with pytest.raises(error, match=message):
        dk.fit(model, x, None if widths[-1] == 6 else y, schedule=schedule)
    assert torch.equal(before, weights(model))


def test_a_stacked_autoencoders_target_is_its_input():
    x = autoencoder_data()
    dk.fit(net(12, 4, 12), x, x.clone(), schedule=dk.StackedAutoencoder(rounds=1))
    with pytest.raises(ValueError, match="y: StackedAutoencoder's target is x itself"):
        dk.fit(net(12, 4, 12), x, x + 1, schedule=dk.StackedAutoencoder(rounds=1))


def test_a_pair_that_is_frozen_is_passed_over():
    x = autoencoder_data()
    model = net(12, 8, 3, 8, 12, activation=nn.Sigmoid, output=nn.Sigmoid)
    for outer in (model[0], model[6]):
        outer.requires_grad_(False)
    history = dk.fit(model, x, schedule=dk.StackedAutoencoder(rounds=2))
    assert {b.layer for b in history.blocks} == {1, 2}
    assert len(history.rounds) == 2


def test_a_bfloat16_autoencoder_takes_its_input_as_target():
    x = autoencoder_data().bfloat16()
    given, implied = net(12, 4, 12), net(12, 4, 12)
    dk.fit(given, x, x, schedule=dk.StackedAutoencoder(rounds=1))
    dk.fit(implied, x, schedule=dk.StackedAutoencoder(rounds=1))
    assert torch.equal(weights(given), weights(implied))


@pytest.mark.parametrize("budget", [2**30, 500])
def test_a_uint8_autoencoders_target_is_what_its_input_stands_for(backend, budget):
    narrow, wide = as_bytes(autoencoder_data()[:50])
    outcomes = []
    for data, more in ((narrow, {"x_scale": 1 / 255}), (narrow, {"x_scale": 1 / 255, "y": wide}), (wide, {})):
        model = net(12, 8, 3, 8, 12, activation=nn.Sigmoid, output=nn.Sigmoid)
        settings = {"validation": (data, None), "prefix_budget": budget, "stop_epsilon": 1e-12, "backend": backend, **more}
        schedule = dk.StackedAutoencoder(rounds=2, finetune_epochs=1)
        history = dk.fit(model, data, schedule=schedule, lr=0.3, batch_size=16, **settings)
        outcomes.append((weights(model), torch.tensor([[r.metrics["loss"], r.objective or 0] for r in history.rounds])))
    for ours in outcomes[:2]:
        for got, expected in zip(ours, outcomes[2], strict=True):
            assert_same(backend, got, expected)
