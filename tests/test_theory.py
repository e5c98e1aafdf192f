"""The theorems of the DANTE papers hold where docs/theory.md says so, and fail where it says that."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support_theory import MANY, assert_slqc, direction, fractions, gap_of, idealized, layers, leaky, rows_of, slopes

from dante_kernels import losses, reference, theory
from dante_kernels.activations import Activation

# The definition.


def test_definition_4_by_hand():
    """f(w) = (w - 1)^2: at w = 3 the gap is 4, the gradient 4, and every ball around 1 of radius up to 2 lies behind it."""
    one, three = torch.tensor([1.0]), torch.tensor([3.0])
    x = torch.ones(1, 1)

    def check(epsilon, kappa):
        return theory.is_slqc(three, one, x, one, epsilon=epsilon, kappa=kappa, activation="identity")

    assert check(4.0, 1.0) == theory.Slqc(holds=True, branch=1, margin=0.0, gap=4.0, radius=2.0)
    assert check(2.0, 1.0) == theory.Slqc(holds=True, branch=2, margin=0.0, gap=4.0, radius=2.0)
    assert check(3.0, 1.0) == theory.Slqc(holds=False, branch=0, margin=-1.0, gap=4.0, radius=2.0)
    assert check(2.0, 1.0)  # as a truth value it is `holds`
    assert not check(3.0, 1.0)


@pytest.mark.parametrize("loss", losses.CODES)
def test_the_objective_sums_over_outputs_and_its_gradient_is_autograds(loss):
    torch.manual_seed(0)
    w, outer, bias = torch.randn(4, 5), torch.randn(3, 4), torch.randn(3)
    x, target = torch.randn(6, 5), torch.softmax(torch.randn(6, 3), dim=1)
    suffix = [(outer, bias, "identity")]
    value, gradient = theory.objective(w, x, target, activation="tanh", loss=loss, suffix=suffix)
    wide = w.double().requires_grad_()
    h = torch.tanh(x.double() @ wide.t()) @ outer.double().t() + bias.double()
    expected = {
        "mse": (h - target).square(),
        "cross_entropy": -target * torch.log_softmax(h, dim=1),
        "binary_cross_entropy": torch.nn.functional.softplus(h) - target * h,
    }[loss]
    expected = expected.sum(dim=1).mean()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, wide)[0], rtol=1e-12, atol=1e-12)


def test_class_indices_are_one_hot_rows():
    w, x = torch.eye(3), torch.randn(5, 3)
    labels = torch.tensor([0, 2, 1, 1, 0])
    by_index = theory.objective(w, x, labels, activation="identity", loss="cross_entropy")
    by_value = theory.objective(w, x, torch.eye(3)[labels], activation="identity", loss="cross_entropy")
    assert by_index[0] == by_value[0]
    assert torch.equal(by_index[1], by_value[1])


# What holds.


@MANY
@given(layers(), slopes, fractions)
def test_theorems_1_and_3_hold(case, phi, fraction):
    w, w_star, x, norm = case
    target = idealized(w_star, x, phi)
    assert_slqc(w, w_star, x, target, fraction, lambda _: theory.layer_kappa(phi, norm), activation=phi)


@MANY
@given(layers(largest_norm=5.0), fractions)
def test_the_sigmoid_theorem_holds_for_layers(case, fraction):
    w, w_star, x, norm = case
    target = idealized(w_star, x, Activation.SIGMOID)
    assert_slqc(w, w_star, x, target, fraction, lambda _: theory.layer_kappa("sigmoid", norm), activation="sigmoid")


@MANY
@given(layers(largest_norm=5.0), slopes | st.sampled_from([Activation.SIGMOID, Activation.TANH]), fractions)
def test_the_sharper_constant_holds(case, phi, fraction):
    w, w_star, x, norm = case
    target = idealized(w_star, x, phi)
    assert_slqc(w, w_star, x, target, fraction, lambda eps: theory.sharp_kappa(phi, norm, epsilon=eps), activation=phi)


def test_theorem_1_is_tight_where_a_is_b():
    """One row of norm 1, W = -W*, epsilon near the gap: a ball one part in a hundred larger already fails."""
    phi, x, w_star = leaky(1.0), torch.ones(1, 1), torch.tensor([0.5])
    for kappa, holds in ((theory.layer_kappa(phi, 0.5), True), (0.99 * theory.layer_kappa(phi, 0.5), False)):
        assert theory.is_slqc(-w_star, w_star, x, w_star, epsilon=0.999, kappa=kappa, activation=phi).holds == holds


@MANY
@given(layers(), st.floats(0.05, 4.0), fractions)
def test_corollaries_1_and_2_hold_for_the_error_of_active_units(case, b, fraction):
    w, w_star, x, norm = case
    phi = leaky(0.0, b)
    error = idealized(w, x, phi) - idealized(w_star, x, phi)
    active = torch.where(x @ w.t() >= 0, error, 0).square().sum(dim=1).mean().item()
    assume(active > 0)
    found = theory.is_slqc(
        w, w_star, x, idealized(w_star, x, phi), epsilon=fraction * active, kappa=theory.layer_kappa(phi, norm), activation=phi
    )
    assert found.branch == 2, found


@MANY
@given(layers(widest=1), fractions, st.booleans(), st.booleans())
def test_theorem_6_holds_with_soft_and_hard_targets(case, fraction, hard, sharp):
    w, w_star, x, _ = case
    target = torch.sigmoid(x @ w_star.t())
    target = target.round() if hard else target
    setting = {"activation": "identity", "loss": "binary_cross_entropy"}
    constant = theory.sharp_kappa if sharp else theory.layer_kappa
    assert_slqc(w, w_star, x, target, fraction, lambda eps: constant(epsilon=eps, **setting), **setting)


@MANY
@given(layers(widest=5), fractions, st.booleans(), st.booleans())
def test_theorem_7_holds_with_soft_and_hard_targets(case, fraction, hard, sharp):
    w, w_star, x, _ = case
    logits = x @ w_star.t()
    target = logits.argmax(dim=1) if hard else torch.softmax(logits, dim=1)
    setting = {"activation": "identity", "loss": "cross_entropy"}

    def kappa(eps):
        if sharp:
            return theory.sharp_kappa(epsilon=eps, **setting)
        return theory.layer_kappa(epsilon=eps, outputs=w.shape[0], **setting)

    assert_slqc(w, w_star, x, target, fraction, kappa, **setting)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("phi", "epsilon"), [(leaky(0.5), 0.3), (leaky(1.0), 0.3), (Activation.SIGMOID, 0.05)], ids=str)
def test_the_noisy_glm_is_slqc_after_its_samples(phi, epsilon, seed):
    """Coin flips with mean phi(<w*, x>), at W = -W* and at a random W; each may fail once in twenty, and none does."""
    generator = torch.Generator().manual_seed(seed)
    w_star = direction(generator, 1, 2)
    m = theory.noisy_samples(phi, 1.0, epsilon=epsilon, delta=0.05)
    x = torch.randn(m, 2, generator=generator, dtype=torch.float64)
    x /= x.norm(dim=1, keepdim=True)
    x = x * torch.where(x @ w_star.t() < 0, -1, 1)  # so that phi(<w*, x>) is a probability
    y = torch.bernoulli(idealized(w_star, x, phi), generator=generator)
    for w in (-w_star, direction(generator, 1, 2)):
        found = theory.is_slqc(w, w_star, x, y, epsilon=epsilon, kappa=theory.noisy_kappa(phi, 1.0), activation=phi)
        assert found.holds, found
    assert gap_of(-w_star, w_star, x, y, activation=phi) > epsilon


# Theorem 8.


def steps_to(epsilon, w, w_star, x, target, suggestion, **setting):
    """The number of SNGD steps on all rows after which f(W) <= f(W*) + epsilon, or None where T do not do."""
    phi, loss = setting["activation"], losses.code(setting.get("loss", "mse"))
    lr, w = torch.tensor(suggestion.lr, dtype=torch.float64), w.clone()
    for step in range(suggestion.steps + 1):
        if gap_of(w, w_star, x, target, **setting) <= epsilon:
            return step
        reference.sngd_step_(w, None, x, target, [], phi, loss, lr, None, None, 0.0, False)
    return None


def problem(seed, outputs, norm=1.0):
    """(W, W*, x): six rows of norm 1, W* and W of the given norm, W opposite to W* or anywhere."""
    generator = torch.Generator().manual_seed(seed)
    w_star = norm * direction(generator, outputs, 3)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return -w_star if seed % 2 else norm * direction(generator, outputs, 3), w_star, x / x.norm(dim=1, keepdim=True)


SATURATING = {Activation.SIGMOID: 3.0, Activation.TANH: 3.0}  # ||W*|| + distance: no iterate is farther from W* than the first
CASES = [
    (phi, sharp)
    for phi in (leaky(0.2), leaky(0.5, 1.5), leaky(1.0), *SATURATING)
    for sharp in (False, True)
    if sharp or phi != Activation.TANH
]


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize(("phi", "sharp"), CASES, ids=lambda value: str(value))
def test_sngd_meets_the_bound_of_theorem_8_on_idealized_layers(phi, sharp, seed):
    w, w_star, x = problem(seed, outputs=1 + seed % 3)
    target, norm = idealized(w_star, x, phi), SATURATING.get(phi, 1.0)
    epsilon = 0.3 * gap_of(w, w_star, x, target, activation=phi)
    kappa = theory.sharp_kappa(phi, norm, epsilon=epsilon) if sharp else None
    distance = (w - w_star).norm().item()
    asked = theory.suggest(phi, epsilon=epsilon, norm=norm, outputs=len(w), distance=distance, kappa=kappa)
    assert steps_to(epsilon, w, w_star, x, target, asked, activation=phi) is not None, asked


@pytest.mark.parametrize("sharp", [False, True], ids=["published", "sharp"])
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "cross_entropy"])
@pytest.mark.parametrize("seed", [1, 3, 5])
def test_sngd_meets_the_bound_of_theorem_8_with_cross_entropies(loss, sharp, seed):
    w, w_star, x = problem(seed, outputs=1 if loss == "binary_cross_entropy" else 3, norm=3.0)
    logits = x @ w_star.t()
    target = torch.sigmoid(logits) if len(w) == 1 else torch.softmax(logits, dim=1)
    setting = {"activation": Activation.IDENTITY, "loss": loss}
    epsilon = 0.3 * gap_of(w, w_star, x, target, **setting)
    kappa = theory.sharp_kappa("identity", epsilon=epsilon, loss=loss) if sharp else None
    distance = (w - w_star).norm().item()
    asked = theory.suggest("identity", loss=loss, epsilon=epsilon, norm=9.0, outputs=len(w), distance=distance, kappa=kappa)
    assert steps_to(epsilon, w, w_star, x, target, asked, **setting) is not None, asked


@pytest.mark.parametrize("seed", range(4))
def test_the_best_iterate_of_mini_batch_sngd_is_within_three_epsilon(seed):
    generator = torch.Generator().manual_seed(seed)
    phi, epsilon = leaky(0.8), 0.05
    w_star = 0.5 * direction(generator, 1, 2)
    x = torch.randn(5000, 2, generator=generator, dtype=torch.float64)
    x /= x.norm(dim=1, keepdim=True)
    y, w = idealized(w_star, x, phi), -w_star
    asked = theory.suggest(phi, epsilon=epsilon, norm=0.5, distance=1.0)
    assert theory.objective(w, x, y, activation=phi)[0] > 3 * epsilon
    lr, best = torch.tensor(asked.lr, dtype=torch.float64), (math.inf, math.inf)
    for _ in range(asked.steps):
        batch = torch.randint(0, len(x), (asked.batch_size,), generator=generator)
        at_w = theory.objective(w, x, y, activation=phi)[0]
        value, _ = reference.sngd_step_(w, None, x[batch], y[batch], [], phi, losses.MSE, lr, None, None, 0.0, False)
        best = min(best, (value.item(), at_w))
    assert best[1] <= 3 * epsilon


# What does not hold: the counterexamples of docs/theory.md.


@pytest.mark.parametrize("outputs", [1, 2])
def test_corollaries_1_and_2_fail_where_no_unit_is_active(outputs):
    """ReLU, x = 1, w* = 1, w = -1: the error is 1 and the gradient zero."""
    w_star = rows_of(*[[1.0]] * outputs)
    kappa = theory.layer_kappa("relu", math.sqrt(outputs))
    found = theory.is_slqc(
        -w_star, w_star, rows_of([1.0]), rows_of([1.0] * outputs), epsilon=0.5, kappa=kappa, activation="relu"
    )
    assert found == theory.Slqc(holds=False, branch=0, margin=-math.inf, gap=float(outputs), radius=-math.inf)


def chance_of_failure(m, kappa):
    """m rows x = 1 whose labels are fair coins, a = b = 1, w* = 1/2, w = -1/2, epsilon = 1.001, exactly, by the binomial."""
    chance = 0
    for ones in range(m + 1):
        y = (torch.arange(m) < ones).double()
        found = theory.is_slqc(
            torch.tensor([-0.5]), torch.tensor([0.5]), torch.ones(m, 1), y, epsilon=1.001, kappa=kappa, activation="identity"
        )
        chance += 0 if found.holds else math.comb(m, ones)
    return chance / 2**m


def test_theorem_2_fails_with_its_constant_and_holds_with_ours():
    """delta = 0.1: both published sample bounds leave a chance of failure above 0.4, whatever delta."""
    ours = theory.noisy_samples("identity", 0.5, epsilon=1.001, delta=0.1)
    published = math.ceil(288 * 0.5**4 * math.log(10) / 1.001**2)
    assert (published, ours) == (42, 166)
    kappa = theory.layer_kappa("identity", 0.5)
    assert kappa == 1.0
    assert chance_of_failure(published, kappa) == pytest.approx(0.4388, abs=1e-4)
    assert chance_of_failure(ours, kappa) > 0.4
    assert theory.noisy_kappa("identity", 0.5) == 4.0
    assert chance_of_failure(ours, 4.0) == 0


def swapped_pair():
    """Two hidden units in each other's place, at half their length: the error shrinks on the way to the swapped optimum."""
    phi, star, x = leaky(0.5), rows_of([1.0, -1.0], [-1.0, 1.0]), torch.eye(2, dtype=torch.float64)
    suffix = [(torch.ones(1, 2, dtype=torch.float64), None, phi)]
    target = reference.layer_forward(reference.layer_forward(x, star, None, phi), suffix[0][0], None, phi)
    return -0.5 * star, star, x, target, {"activation": phi, "suffix": suffix}


def test_no_kappa_serves_the_inner_layer_for_a_small_epsilon():
    w, star, x, target, setting = swapped_pair()
    assert target.tolist() == [[0.5], [0.5]]
    kappa_2018 = 2 * math.sqrt(2) ** 2 * 2 / 0.5
    found = theory.is_slqc(w, star, x, target, epsilon=0.05, kappa=kappa_2018, **setting)
    assert (found.holds, found.gap) == (False, 0.0625)
    assert found.radius == pytest.approx(-3 / math.sqrt(10))
    assert not theory.is_slqc(w, star, x, target, epsilon=0.05, kappa=1e30, **setting).holds
    with pytest.raises(ValueError, match="epsilon"):
        theory.inner_kappa(setting["activation"], 2.0, math.sqrt(2), epsilon=0.05)


@MANY
@given(layers(widest=3, largest_norm=3.0), slopes, st.integers(1, 3), st.integers(0, 2**31), st.floats(1.0001, 100.0))
def test_theorems_4_and_5_hold_only_where_they_say_nothing(case, phi, n_last, seed, above):
    """Where their kappa is positive, the first branch holds at every W1 within the norm, with room b / a."""
    w, w_star, x, norm = case
    outer = 1.5 * direction(torch.Generator().manual_seed(seed), n_last, len(w))
    suffix = [(outer, None, phi)]
    target = reference.layer_forward(idealized(w_star, x, phi), outer, None, phi)
    epsilon = above * 4 * phi.b**5 * 1.5**2 * norm**2 / phi.a
    kappa = theory.inner_kappa(phi, norm, 1.5, epsilon=epsilon)
    found = theory.is_slqc(w, w_star, x, target, epsilon=epsilon, kappa=kappa, activation=phi, suffix=suffix)
    assert found.branch == 1
    assert found.gap <= 4 * phi.b**4 * 1.5**2 * norm**2 * (1 + 1e-12)  # met where a = b, but for rounding
