"""One training: both sides do equal work from the same start, and a row is what the model does."""

import json
import math
from itertools import pairwise

import pytest
import torch
from support_reproduce import blobs

import dante_kernels as dk
from dante_kernels.reproduce import experiments, runs, search

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("ours", "theirs"), experiments.PAIRS[:6])
@pytest.mark.parametrize("widths", [(4, 5, 3), (4, 6, 5, 3)])
def test_both_sides_update_equally_many_weights(ours, theirs, widths):
    rows = [runs.train(blobs(), widths, "leaky_relu", "mse", name, 0.01, 1, 5, batch_size=7) for name in (ours, theirs)]
    steps = 5 * math.ceil(30 / 7)
    assert [row["weights_updated"] for row in rows] == [steps * sum((n + 1) * m for n, m in pairwise(widths))] * 2


@pytest.mark.parametrize("name", ["dante-short", "sgd"])
def test_a_training_that_is_not_followed_has_the_last_point_alone(name):
    row, other = (
        runs.train(blobs(), (4, 5, 3), "relu", "mse", name, 0.01, 1, 5, batch_size=7, followed=followed)
        for followed in (True, False)
    )
    assert len(row["curve"]) == 5
    *_, last = row.pop("curve")
    (only,) = other.pop("curve")
    assert [last[0], *last[2:]] == [only[0], *only[2:]]
    assert {**row, "seconds": 0} == {**other, "seconds": 0}


def test_both_sides_start_from_the_same_weights():
    problem = blobs()
    problem = problem._replace(x_test=problem.x, y_test=problem.y)
    rows = [runs.train(problem, (4, 5, 3), "tanh", "mse", name, 1e-12, 3, 5) for name in ("dante", "sgd")]
    assert rows[0]["test_loss"] == pytest.approx(rows[1]["test_loss"], rel=1e-6)
    assert rows[0]["test_loss"] != pytest.approx(
        runs.train(problem, (4, 5, 3), "tanh", "mse", "sgd", 1e-12, 4, 5)["test_loss"], rel=1e-3
    )


@pytest.mark.parametrize("name", [name for name, method in runs.METHODS.items() if not method.stacked])
@pytest.mark.parametrize(("loss", "activation"), [("mse", "leaky_relu"), ("cross_entropy", "sigmoid")])
def test_every_method_learns(name, loss, activation):
    if runs.METHODS[name].rule != "sngd" and runs.METHODS[name].layerwise:
        pytest.importorskip("dante_kernels.training.directions")
    rate = search.rate_of(runs.METHODS[name].start + (activation == "sigmoid"))
    row = runs.train(blobs(), (4, 12, 3), activation, loss, name, rate, 0, 40, batch_size=5)
    assert row["status"] == "done"
    assert row["test_accuracy"] > 0.8
    assert len(row["curve"]) == (8 if runs.METHODS[name].layerwise and name != "dante-short" else 40)


@pytest.mark.parametrize(
    ("name", "settings", "points"), [("dante-stacked", {}, 2 * 4), ("dante-tuned", {"finetune_lr": 0.1}, 2 * 3 + 5)]
)
def test_a_stacked_autoencoder_learns_with_as_many_weights_updated(name, settings, points):
    problem = blobs()
    problem = problem._replace(y=problem.x, y_test=problem.x_test)
    net = (problem, (4, 6, 3, 6, 4), "leaky_relu", "mse")
    row = runs.train(*net, name, 0.1, 0, 20, batch_size=7, **settings)
    other = runs.train(*net, "sgd", 0.1, 0, 20, batch_size=7)
    assert row["test_loss"] < 0.7 * row["baseline"]
    assert len(row["curve"]) == points
    assert row["weights_updated"] == other["weights_updated"]


def test_the_row_is_what_the_model_does_on_the_test_rows():
    seen = []
    problem = blobs()._replace(unit=3.0)
    row = runs.train(
        problem, (4, 5, 3), "tanh", "cross_entropy", "sgd", 0.1, 0, 2, probe=lambda m, p: seen.append(m) or {"a": 1}
    )
    with torch.no_grad():
        logits = seen[0](problem.x_test)
    assert isinstance(seen[0][-1], torch.nn.Linear)
    assert row["test_loss"] == pytest.approx(3 * float(torch.nn.functional.cross_entropy(logits, problem.y_test)), rel=1e-6)
    assert row["test_accuracy"] == int((logits.argmax(1) == problem.y_test).sum()) / len(problem.y_test)
    assert row["a"] == 1


def test_a_rate_that_is_far_too_high_is_a_row_that_says_so():
    for name in ("dante", "sgd"):
        row = runs.train(blobs(), (4, 5, 3), "leaky_relu", "mse", name, 1e30, 0, 5)
        assert (row["status"], row["test_loss"], row["test_accuracy"]) == ("diverged", None, None)
        json.dumps(row, allow_nan=False)


def test_epochs_that_are_no_whole_rounds_are_refused():
    with pytest.raises(ValueError, match=r"epochs: expected a multiple of inner_epochs \(5\), got 7"):
        runs.train(blobs(), (4, 5, 3), "relu", "mse", "dante", 0.1, 0, 7)


def test_end_to_end_training_needs_epochs_of_its_own():
    problem = blobs()
    with pytest.raises(ValueError, match=r"multiple of inner_epochs \(5\) and at least 10, got 5"):
        runs.train(problem._replace(y=problem.x), (4, 6, 3, 6, 4), "relu", "mse", "dante-tuned", 0.1, 0, 5)


def test_settings_change_a_method():
    way = {"inner_epochs": 1, "lr_schedule": "cosine"}
    assert len(runs.train(blobs(), (4, 5, 3), "relu", "mse", "dante", 0.1, 0, 7, **way)["curve"]) == 7


@pytest.mark.parametrize(("loss", "classes"), [("mse", True), ("cross_entropy", True), ("mse", False)])
def test_short_blocks_are_those_of_fit_with_nothing_set(monkeypatch, loss, classes):
    problem = blobs()
    if not classes:
        problem = problem._replace(y=problem.x, y_test=problem.x_test)
    given = []
    monkeypatch.setattr(runs.dk, "fit", lambda model, x, y, **settings: given.append(settings))
    runs.train(problem, (4, 5, 3 if classes else 4), "leaky_relu", loss, "dante-short", 0.01, 0, 2)
    (settings,) = given
    assert settings["schedule"] == dk.Alternating(rounds=2, inner_epochs=1, inner_steps=3, parallel=True)
    assert (settings["relative_lr"], settings["momentum"], settings["direction"]) == (True, 0.9, "nesterov")
    growth = 4.0 if classes else float("inf")
    assert settings["max_norm"] == pytest.approx(growth / 3**0.5)
