"""The constants of `dante_kernels.theory`, what `suggest` makes of them, and its errors."""

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support_theory import MANY, direction, idealized, layers, leaky, slopes

import dante_kernels as dk
from dante_kernels import theory
from dante_kernels.activations import Activation

# The constants.


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (theory.layer_kappa(leaky(0.5, 2.0), 3.0), 2 * 8 * 3 / 0.5),
        (theory.layer_kappa(leaky(0.0, 2.0), 3.0), 2 * 4 * 3),
        (theory.layer_kappa("sigmoid", 3.0), math.exp(3)),
        (theory.layer_kappa("identity", loss="binary_cross_entropy", epsilon=0.5), 0.5 / (1 - math.exp(-0.5)) ** 2),
        (theory.layer_kappa("identity", loss="cross_entropy", epsilon=0.5, outputs=3), 1.5 / (1 - math.exp(-0.5)) ** 2),
        (theory.inner_kappa(leaky(0.5, 2.0), 3.0, 0.1, epsilon=50.0), 1 / (0.5 / (4 * 32 * 0.01 * 3) - 3 / 50)),
        (theory.noisy_kappa(leaky(0.5, 2.0), 3.0), 2 * 4 * (2 * 2 * 3 + 1) / 0.5),
        (theory.noisy_kappa("sigmoid", 3.0), math.exp(3)),
        (theory.noisy_samples(leaky(0.5, 2.0), 3.0, epsilon=0.1, delta=0.5), 288 * 16 * 9 / 0.05**2 * math.log(2)),
        (theory.noisy_samples("sigmoid", 3.0, epsilon=0.1, delta=0.5), 4 * 9 * math.exp(6) * math.log(2) / 0.01),
        (theory.sharp_kappa(leaky(0.25, 4.0), epsilon=0.01), 8 * 0.2),
        (theory.sharp_kappa("identity", loss="cross_entropy", epsilon=0.01), math.sqrt(2)),
        (theory.sharp_kappa("tanh", 2.0, epsilon=0.01), 0.1 * math.cosh(2)),
    ],
)
def test_constants_are_their_formulas(got, expected):
    assert got == pytest.approx(math.ceil(expected) if isinstance(got, int) else expected, rel=1e-12)


def test_suggest_is_theorem_8():
    """leaky 0.5 / 1, norm 1: kappa = 4, T = (4 * 2 / 0.1)^2 = 6400, M = (2 b norm)^2 = 4."""
    got = dk.theory.suggest(leaky(0.5), epsilon=0.1, norm=1.0, delta=0.05)
    rows = math.ceil(16 * math.log(4 * 6400 / 0.05) / 0.02)
    assert got == theory.Suggestion(lr=0.025, steps=6400, batch_size=rows, kappa=4.0)
    nearer = theory.suggest(leaky(0.5), epsilon=0.1, norm=1.0, distance=0.2, kappa=2.0)
    assert (nearer.lr, nearer.steps, nearer.kappa) == (0.05, 16, 2.0)
    noisy = theory.suggest(leaky(0.5), epsilon=0.1, norm=1.0, distance=0.2, noisy=True)
    assert noisy.kappa == theory.noisy_kappa(leaky(0.5), 1.0)
    assert noisy.batch_size == theory.noisy_samples(leaky(0.5), 1.0, epsilon=0.1, delta=0.05 / noisy.steps)
    inner = theory.suggest(leaky(0.5), epsilon=9.0, norm=1.0, outer_norm=1.0)
    assert inner.kappa == theory.inner_kappa(leaky(0.5), 1.0, 1.0, epsilon=9.0)
    softmax = theory.suggest("identity", loss="cross_entropy", epsilon=0.1, norm=1.0, outputs=10)
    assert softmax.kappa == theory.layer_kappa("identity", loss="cross_entropy", epsilon=0.1, outputs=10)


def bound_of(phi, norm, **setting):
    """M of Theorem 8, from the rows of a mini-batch that `suggest` asks for; delta near 1 leaves `noisy_samples` small."""
    epsilon, delta = 1e-4 * norm, 1 - 1e-12
    got = theory.suggest(phi, epsilon=epsilon, norm=norm, kappa=1.0, distance=0, delta=delta, **setting)
    assert got.steps == 1
    return epsilon * math.sqrt(2 * got.batch_size / math.log(4 / delta))


@pytest.mark.parametrize(
    ("phi", "setting", "expected"),
    [
        (leaky(0.5, 2.0), {}, (2 * 2 * 3) ** 2),
        (leaky(0.5, 2.0), {"outputs": 5}, (2 * 2 * 3) ** 2),
        (leaky(0.0, 2.0), {}, (2 * 2 * 3) ** 2),
        (leaky(0.5, 2.0), {"noisy": True}, (2 * 2 * 3 + 1) ** 2),
        (leaky(0.5, 2.0), {"outer_norm": 0.7}, (2 * 4 * 3 * 0.7) ** 2),
        ("sigmoid", {"outputs": 2}, 2),
        ("sigmoid", {"outputs": 4}, 9 / 4),
        ("tanh", {"outputs": 8}, 32),
        ("tanh", {"outputs": 20}, 36),
        ("identity", {"loss": "binary_cross_entropy"}, 3 + math.log(2)),
        ("identity", {"loss": "cross_entropy", "outputs": 10}, 3 * math.sqrt(2) + math.log(10)),
    ],
)  # fmt: skip
def test_mini_batches_come_from_the_documented_bound(phi, setting, expected):
    assert bound_of(phi, 3.0, **setting) == pytest.approx(expected, rel=1e-6)


def test_the_bound_of_the_noisy_sigmoid_is_1():
    assert bound_of("sigmoid", 0.1, noisy=True) == pytest.approx(1, rel=1e-6)


@MANY
@given(layers(), slopes | st.sampled_from([leaky(0.0), Activation.SIGMOID, Activation.TANH]))
def test_no_idealized_objective_exceeds_the_bound(case, phi):
    w, w_star, x, norm = case
    value, _ = theory.objective(w, x, idealized(w_star, x, phi), activation=phi)
    assert value <= bound_of(phi, norm, outputs=len(w)) * (1 + 1e-6)


@MANY
@given(layers(widest=1, largest_norm=5.0), slopes | st.just(Activation.SIGMOID), st.sampled_from([0.0, 1.0]))
def test_no_noisy_objective_exceeds_the_bound(case, phi, label):
    w, w_star, x, norm = case
    x = x * torch.where(x @ w_star.t() < 0, -1, 1)
    mean = idealized(w_star, x, phi)
    assume(mean.max() <= 1)
    value, _ = theory.objective(w, x, torch.full_like(mean, label), activation=phi)
    assert value <= bound_of(phi, norm, noisy=True) * (1 + 1e-6)


@MANY
@given(layers(widest=3, largest_norm=3.0), slopes, st.integers(1, 3), st.floats(0.01, 3.0), st.integers(0, 2**31))
def test_no_objective_of_an_inner_layer_exceeds_the_bound(case, phi, n_last, outer_norm, seed):
    w, w_star, x, norm = case
    outer = outer_norm * direction(torch.Generator().manual_seed(seed), n_last, len(w))
    target = idealized(outer, idealized(w_star, x, phi), phi)
    value, _ = theory.objective(w, x, target, activation=phi, suffix=[(outer, None, phi)])
    assert value <= bound_of(phi, norm, outer_norm=outer_norm) * (1 + 1e-6)


@MANY
@given(layers(), st.integers(0, 3), st.sampled_from(["binary_cross_entropy", "cross_entropy"]))
def test_no_cross_entropy_exceeds_the_bound(case, label, loss):
    w, _, x, norm = case
    w = w[:1] if loss == "binary_cross_entropy" else w
    target = torch.full((len(x), 1), float(label % 2)) if len(w) == 1 else torch.full((len(x),), label % len(w))
    if loss == "cross_entropy" and len(w) == 1:
        target = torch.zeros(len(x), dtype=torch.int64)
    value, _ = theory.objective(w, x, target, activation="identity", loss=loss)
    assert value <= bound_of("identity", norm, loss=loss, outputs=len(w)) * (1 + 1e-6)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64], ids=str)
def test_numbers_of_numpy_are_numbers(number):
    assert theory.steps(number(3), number(2), number(1)) == 36
    got = theory.suggest("identity", loss="cross_entropy", epsilon=number(1), norm=number(2), outputs=np.int64(3))
    assert got == theory.suggest("identity", loss="cross_entropy", epsilon=1.0, norm=2.0, outputs=3)


# Errors.

ONE, WIDE = torch.ones(1, 1), [(torch.ones(1, 2), None, "relu")]
NAN, TINY, HUGE = torch.tensor([[math.nan]]), 5e-324, 1e200


def value_of(w=ONE, x=ONE, target=ONE, suffix=(), **setting):
    return theory.objective(w, x, target, suffix=suffix, **{"activation": "identity", **setting})


@pytest.mark.parametrize(
    ("name", "error", "call"),
    [
        ("norm", TypeError, lambda: theory.layer_kappa("sigmoid")),
        ("norm", ValueError, lambda: theory.layer_kappa("sigmoid", 1000.0)),
        ("norm", ValueError, lambda: theory.layer_kappa("leaky_relu", math.nan)),
        ("epsilon", TypeError, lambda: theory.layer_kappa("identity", 1.0, loss="cross_entropy")),
        ("activation", ValueError, lambda: theory.layer_kappa("tanh", 1.0)),
        ("activation", ValueError, lambda: theory.layer_kappa("sigmoid", loss="binary_cross_entropy", epsilon=0.1)),
        ("activation", ValueError, lambda: theory.sharp_kappa("relu", epsilon=0.1)),
        ("activation", ValueError, lambda: theory.noisy_kappa("relu", 1.0)),
        ("activation", ValueError, lambda: theory.inner_kappa("sigmoid", 1.0, 1.0, epsilon=0.1)),
        ("loss", ValueError, lambda: theory.layer_kappa("identity", loss="hinge", epsilon=0.1)),
        ("outputs", ValueError, lambda: theory.layer_kappa("identity", loss="binary_cross_entropy", epsilon=0.1, outputs=2)),
        ("outputs", TypeError, lambda: theory.suggest("sigmoid", epsilon=0.1, norm=1.0, outputs=1.5)),
        ("delta", ValueError, lambda: theory.suggest("sigmoid", epsilon=0.1, norm=1.0, delta=1.0)),
        ("epsilon", ValueError, lambda: theory.suggest("sigmoid", epsilon=0.0, norm=1.0)),
        ("epsilon", ValueError, lambda: theory.suggest("leaky_relu", epsilon=0.1, norm=1.0, outer_norm=1.0)),
        ("distance", ValueError, lambda: theory.suggest("sigmoid", epsilon=0.1, norm=1.0, distance=-1.0)),
        ("kappa", ValueError, lambda: theory.suggest("sigmoid", epsilon=1e-200, norm=1.0)),
        ("noisy", ValueError, lambda: theory.suggest("sigmoid", epsilon=0.1, norm=1.0, noisy=True, outputs=2)),
        ("loss", ValueError, lambda: theory.suggest("identity", epsilon=0.1, norm=1.0, noisy=True, loss="cross_entropy")),
        ("kappa", ValueError, lambda: theory.is_slqc(ONE, ONE, ONE, ONE, epsilon=1.0, kappa=-1.0, activation="sigmoid")),
        ("w_star", ValueError, lambda: theory.is_slqc(ONE, torch.ones(2, 1), ONE, ONE, epsilon=1, kappa=1, activation="relu")),
        ("w", TypeError, lambda: theory.objective([1.0], ONE, ONE, activation="relu")),
        ("x", ValueError, lambda: theory.objective(ONE, torch.ones(1), ONE, activation="relu")),
        ("suffix", ValueError, lambda: theory.objective(ONE, ONE, ONE, activation="relu", suffix=WIDE)),
        ("target", ValueError, lambda: theory.objective(ONE, ONE, torch.ones(2), activation="relu")),
        ("target", TypeError, lambda: theory.objective(ONE, ONE, 1.0, activation="relu")),
        ("target", ValueError, lambda: value_of(target=torch.tensor([1]), loss="cross_entropy")),
        ("target", ValueError, lambda: value_of(target=torch.tensor([-1]), loss="cross_entropy")),
        ("target", TypeError, lambda: value_of(target=torch.tensor([True]), loss="cross_entropy")),
        ("target", TypeError, lambda: value_of(target=torch.tensor([0], dtype=torch.int32), loss="cross_entropy")),
        ("target", ValueError, lambda: value_of(target=NAN)),
        ("w", ValueError, lambda: value_of(w=NAN)),
        ("x", ValueError, lambda: value_of(x=NAN)),
        ("x", ValueError, lambda: value_of(x=torch.ones(0, 1), target=torch.ones(0, 1))),
        ("w", ValueError, lambda: value_of(w=torch.ones(0, 1), target=torch.ones(1, 0))),
        ("suffix", ValueError, lambda: value_of(suffix=[(ONE, torch.ones(2), "relu")])),
        ("suffix", ValueError, lambda: value_of(suffix=[(ONE, NAN[0], "relu")])),
        ("suffix", TypeError, lambda: value_of(suffix=[(ONE, [1.0], "relu")])),
        ("suffix", TypeError, lambda: value_of(suffix=[(ONE, "relu")])),
        ("suffix", TypeError, lambda: value_of(suffix=[ONE])),
        ("suffix", TypeError, lambda: value_of(suffix=None)),
        ("distance", TypeError, lambda: theory.steps(1.0, None, 0.1)),
        ("distance", TypeError, lambda: theory.steps(1.0, False, 0.1)),
        ("distance", ValueError, lambda: theory.steps(1.0, math.nan, 0.1)),
        ("epsilon", ValueError, lambda: theory.steps(1.0, 1.0, TINY)),
        ("epsilon", ValueError, lambda: theory.layer_kappa("identity", loss="binary_cross_entropy", epsilon=TINY)),
        ("epsilon", ValueError, lambda: theory.sharp_kappa(leaky(4.0, 4.0), epsilon=TINY)),
        ("epsilon", ValueError, lambda: theory.noisy_samples("leaky_relu", 1.0, epsilon=TINY, delta=0.1)),
        ("epsilon", ValueError, lambda: theory.suggest("leaky_relu", epsilon=TINY, norm=1.0)),
        ("epsilon", ValueError, lambda: theory.suggest("leaky_relu", epsilon=TINY, norm=1.0, distance=0, kappa=1.0)),
        ("kappa", ValueError, lambda: theory.suggest("leaky_relu", epsilon=1.0, norm=1.0, kappa=TINY)),
        ("norm", ValueError, lambda: theory.layer_kappa(leaky(TINY), 1.0)),
        ("norm", ValueError, lambda: theory.layer_kappa("relu", 10**400)),
        ("norm", ValueError, lambda: theory.inner_kappa(leaky(0.5), HUGE, HUGE, epsilon=0.1)),
        ("norm", ValueError, lambda: theory.inner_kappa(leaky(0.5), TINY, TINY, epsilon=0.1)),
        ("norm", ValueError, lambda: theory.noisy_kappa(leaky(TINY), 1.0)),
        ("norm", ValueError, lambda: theory.suggest("leaky_relu", epsilon=1.0, norm=HUGE, distance=1.0, kappa=1.0)),
        ("norm", ValueError, lambda: theory.suggest("tanh", epsilon=1e-200, norm=HUGE, distance=0, kappa=1.0)),
    ],
)  # fmt: skip
def test_errors_name_the_argument(name, error, call):
    with pytest.raises(error, match=rf"\b{name}\b.*:"):
        call()


def test_the_examples_run():
    found = doctest.testmod(theory)
    assert found.attempted > 5
    assert found.failed == 0
