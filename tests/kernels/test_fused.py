"""What is special to the Triton kernels of the fused-step plan, run interpreted; tests/ops holds what all backends keep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from passes import SPOILED, spoil, strided
from support import ACTIVATIONS, FLOOR, LOSSES, Problem, as_float32, assert_error_rule, make_problem, reference_gradient
from torch import Tensor

from dante_kernels import kernels, losses, reference
from dante_kernels.kernels import launcher, tiling
from dante_kernels.ops import Layer
from dante_kernels.ops.layer import flatten

LR = torch.tensor(0.3)


@pytest.fixture(autouse=True)
def fused_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """This plan for every shape, also where the persistent one would be chosen."""
    monkeypatch.setenv("DANTE_GPU_PLAN", "fused")


@pytest.fixture
def precision() -> Iterator[None]:
    """Puts torch's precision switch back."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def flat(p: Problem) -> tuple:
    return (*flatten(p.suffix, p.activation), losses.code(p.loss))


def gradient(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.layer_gradient(p.weight, p.bias, p.x, p.target, *flat(p))


def step(p: Problem, *rule, rows: Tensor | slice = slice(None), lr: Tensor = LR) -> tuple[Tensor, Tensor]:
    return kernels.sngd_step_(p.weight, p.bias, p.x[rows], p.target[rows], *flat(p), lr, *rule)


def epoch(p: Problem, order: Tensor | None, batch_size: int, *rule, lr: Tensor = LR) -> tuple[Tensor, Tensor]:
    return kernels.sngd_epoch_(p.weight, p.bias, p.x, p.target, order, batch_size, *flat(p), lr, *rule)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def assert_gradient_is_right(p: Problem) -> None:
    got = gradient(p)
    for name, g, t32, exact in zip(
        ("G", "bias", "norm"), got, reference_gradient(p, torch.float32), reference_gradient(p, torch.float64), strict=True
    ):
        assert_error_rule(name, g, t32, exact)


@pytest.mark.parametrize("widths", [(3,), (33, 12), (17, 9, 21, 10)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_is_right_for_every_activation_loss_and_depth(activation: str, loss: str, widths: tuple[int, ...]) -> None:
    seed = len(widths)
    assert_gradient_is_right(make_problem(seed=seed, rows=19, n_in=21, widths=widths, activation=activation, loss=loss))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000), rows=st.integers(1, 40), n_in=st.integers(1, 40),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=3), loss=st.sampled_from(LOSSES), bias=st.booleans(),
)  # fmt: skip
def test_the_gradient_is_right_for_any_sizes(seed, rows, n_in, widths, loss, bias) -> None:
    assert_gradient_is_right(make_problem(seed=seed, rows=rows, n_in=n_in, widths=tuple(widths), loss=loss, bias=bias))


@pytest.mark.parametrize(("loss", "class_indices"), [("mse", False), ("cross_entropy", False), ("cross_entropy", True)])
def test_a_last_layer_wider_than_a_tile_is_right(loss: str, class_indices: bool) -> None:
    p = make_problem(seed=5, rows=18, n_in=20, widths=(12, 784), loss=loss, class_indices=class_indices)
    assert_gradient_is_right(p)


def test_softmax_over_several_column_tiles_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "SOFTMAX_COLUMNS", 32)
    p = make_problem(seed=7, rows=5, n_in=9, widths=(8, 101), loss="cross_entropy", class_indices=False)
    p.x *= 40
    p.x[0] = 0  # logits of very different sizes: the running maximum rises in one row and stays in another
    assert_gradient_is_right(p)


def test_the_loss_of_a_confident_network_keeps_its_digits() -> None:
    for loss, width in (("cross_entropy", 3), ("cross_entropy", 40), ("binary_cross_entropy", 3)):
        p = make_problem(seed=2, rows=6, n_in=4, widths=(width,), loss=loss, class_indices=True)
        p.weight.zero_()
        p.bias.fill_(-6.0)
        p.bias[1] = 6.0
        p.target.fill_(1)
        q = p.to(torch.float64)
        exact = reference.sngd_step_(
            q.weight, q.bias, q.x, q.target, q.suffix, q.activation, losses.code(loss), LR.double(), None, None, 0.0, False
        )[0]
        got, _ = step(p)
        # The cross-entropy adds exponentials to 1, as torch does, and each addition costs up to half an ulp of 1.
        floor = 0 if loss == "binary_cross_entropy" else width * 2.0**-24
        assert abs(got.double() - exact) <= 4 * FLOOR * exact + floor, loss


@pytest.mark.parametrize("class_indices", [True, False])
def test_rows_gathered_through_order_equal_rows_gathered_before(class_indices: bool) -> None:
    p = make_problem(seed=3, rows=23, n_in=11, widths=(9, 4), loss="mse", class_indices=class_indices)
    order = torch.randint(0, 23, (40,), generator=torch.Generator().manual_seed(0))
    q = p.clone()
    q.x, q.target = p.x[order], p.target[order]
    results = epoch(p, order, 40), epoch(q, None, 40)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert same_bits(p.weight, q.weight)


@pytest.mark.parametrize(
    ("rule", "widths", "loss"),
    [((0.0, False), (9, 4), "mse"), ((0.9, True), (34,), "cross_entropy"), ((0.5, False), (7, 40), "cross_entropy")],
)
def test_an_epoch_equals_its_steps_bit_for_bit(rule: tuple[float, bool], widths: tuple[int, ...], loss: str) -> None:
    p = make_problem(seed=4, rows=23, n_in=37, widths=widths, loss=loss)
    q = p.clone()
    rules = [(torch.zeros_like(r.weight), torch.zeros_like(r.bias), *rule) if rule[0] else (None, None, *rule) for r in (p, q)]
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    values, norms = epoch(p, order, 9, *rules[0])
    steps = [step(q, *rules[1], rows=order[i : i + 9]) for i in range(0, 23, 9)]
    assert same_bits(values, torch.stack([v for v, _ in steps]))
    assert same_bits(norms, torch.stack([s for _, s in steps]))
    assert same_bits(p.weight, q.weight)
    assert same_bits(p.bias, q.bias)


@pytest.mark.parametrize("nesterov", [False, True])
def test_several_steps_with_momentum_follow_the_reference(nesterov: bool) -> None:
    # Several tiles of W and strips of the bias; the last mini-batch has fewer tiles of rows than the others.
    p = make_problem(seed=6, rows=60, n_in=150, widths=(40, 5), loss="mse")
    results = []
    for dtype in (None, torch.float32, torch.float64):
        q = p.clone() if dtype is None else p.to(dtype)
        velocities = torch.zeros_like(q.weight), torch.zeros_like(q.bias)
        if dtype is None:
            values, norms = epoch(q, None, 26, *velocities, 0.9, nesterov)
        else:
            values, norms = reference.sngd_epoch_(
                q.weight, q.bias, q.x, q.target, None, 26, q.suffix, q.activation, losses.code(q.loss), LR.to(dtype),
                *velocities, 0.9, nesterov,
            )  # fmt: skip
        results.append((q.weight, q.bias, *velocities, values, norms))
    names = ("W", "bias", "V", "V of the bias", "losses", "norms")
    for name, got, torch32, exact in zip(names, *results, strict=True):
        assert_error_rule(name, got, torch32, exact)


@pytest.mark.parametrize("transposed", [False, True])
def test_strides_of_every_tensor_are_kept_and_gaps_stay_untouched(transposed: bool) -> None:
    p = make_problem(seed=9, rows=18, n_in=21, widths=(19, 11), loss="binary_cross_entropy", class_indices=False)
    q = p.clone()
    q.weight, q.x, q.target = (strided(t, transposed=transposed) for t in (p.weight, p.x, p.target))
    q.bias = torch.full((19, 2), 7.0)[:, 0].copy_(p.bias)
    q.suffix = [layer._replace(weight=strided(layer.weight, transposed=transposed)) for layer in p.suffix]
    order = torch.arange(36)[::2] // 2
    velocity = strided(torch.zeros(19, 21), transposed=not transposed)
    epoch(p, None, 7, torch.zeros(19, 21), torch.zeros(19), 0.9, False)
    epoch(q, order, 7, velocity, torch.zeros(19), 0.9, False)
    assert same_bits(p.weight, q.weight)
    assert same_bits(p.bias, q.bias)
    storage = torch.as_strided(q.weight, (q.weight.untyped_storage().nbytes() // 4,), (1,), 0)
    assert (storage == 7.0).sum() >= 2 * q.weight.numel()


def test_a_row_of_layer_forward_has_the_same_bits_whatever_rows_stand_beside_it() -> None:
    p = make_problem(seed=1, rows=70, n_in=65, widths=(40,))
    together = kernels.layer_forward(p.x, p.weight, p.bias, p.activation.encode())
    for rows in (slice(0, 1), slice(13, 14), slice(30, 67), slice(69, 70)):
        assert same_bits(kernels.layer_forward(p.x[rows], p.weight, p.bias, p.activation.encode()), together[rows])
    assert kernels.layer_forward(p.x[:0], p.weight, p.bias, p.activation.encode()).shape == (0, 40)


@pytest.mark.parametrize("activation", ["identity", "relu", "generalized_relu"])
def test_subgradients_match_the_reference_bitwise_on_exact_inputs_with_zeros(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, suffix_weight, target = (
        torch.randint(-2, 3, shape, generator=generator).float() for shape in ((16, 5), (9, 5), (8, 9), (16, 8))
    )
    assert (x @ weight.t() == 0).any()
    phi = ACTIVATIONS[activation]
    p = Problem(weight, torch.zeros(9), x, target, [Layer(suffix_weight, None, phi)], phi, "mse")
    # All values are small multiples of powers of two, so nothing rounds: neither here nor in float64.
    for got, expected in zip(gradient(p)[:2], reference_gradient(p, torch.float64)[:2], strict=True):
        assert torch.equal(got.double(), expected)


def test_two_runs_give_the_same_bits() -> None:
    p = make_problem(seed=8, rows=33, n_in=70, widths=(40, 40), loss="cross_entropy")
    q = p.clone()
    for a, b in zip(epoch(p, None, 10), epoch(q, None, 10), strict=True):
        assert same_bits(a, b)
    assert same_bits(p.weight, q.weight)


def test_a_zero_gradient_skips_the_update() -> None:
    p = make_problem(seed=0, rows=6, n_in=4, widths=(3,), activation="identity", loss="mse", class_indices=False)
    p.target = torch.zeros(6, 3)
    p.weight.zero_()
    p.bias.zero_()
    velocity, velocity_bias = torch.ones(3, 4), torch.ones(3)
    value, norm = step(p, velocity, velocity_bias, 0.9, False)
    assert (value, norm) == (0.0, 0.0)
    assert not p.weight.any()
    assert not p.bias.any()
    assert (velocity == 1).all()
    assert (velocity_bias == 1).all()


@pytest.mark.parametrize("what", ["infinite x", *SPOILED])
@pytest.mark.parametrize(("widths", "loss"), [((6, 3), "mse"), ((5,), "binary_cross_entropy"), ((4, 40), "cross_entropy")])
def test_what_is_not_finite_skips_its_step_and_no_other(what: str, widths: tuple[int, ...], loss: str) -> None:
    p = make_problem(seed=0, rows=9, n_in=5, widths=widths, loss=loss, class_indices=True, activation="relu")
    order = torch.arange(9)
    spoil(p, order, what.removeprefix("infinite "), torch.inf if "infinite" in what else torch.nan)
    before = p.weight.clone()
    values, norms = epoch(p, order, 3)
    finite = [False] * 3 if what == "weight" else [True, False, True]
    assert norms.isfinite().tolist() == finite
    if what != "infinite x":  # whose infinity the ReLU may cut off, or not, in the loss
        assert values.isfinite().tolist() == finite
    if what == "weight":
        assert same_bits(p.weight, before)
    else:
        assert p.weight.isfinite().all()
        assert not torch.equal(p.weight, before)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("name", "bits"), [("high", 24), ("medium", 8)])
def test_lower_precision_is_accepted_and_rounds_operands_only(name: str, bits: int) -> None:
    torch.set_float32_matmul_precision(name)
    p = make_problem(seed=12, rows=30, n_in=40, widths=(20, 10), activation="tanh", loss="mse")
    exact = reference_gradient(p, torch.float64)
    error = (gradient(p)[0].double() - exact[0]).norm() / exact[0].norm()
    # The interpreter computes tf32 products in float32; bfloat16 operands have 8 bits.
    assert error <= 8 * 2.0**-bits
    assert name == "high" or error >= 2.0**-12


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("name", ["highest", "medium"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_narrow_data_are_computed_as_their_float32_values(name: str, dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision(name)
    q = make_problem(seed=14, rows=12, n_in=40, widths=(8, 3), uint8=dtype == torch.uint8)
    q.x = q.x.to(dtype)
    p = as_float32(q)
    rest = (None, None, 0.0, False)
    assert all(same_bits(a, b) for a, b in zip(epoch(p, None, 5), epoch(q, None, 5, *rest, q.x_scale), strict=True))
    assert same_bits(p.weight, q.weight)
    activation = p.activation.encode()
    together = (kernels.layer_forward(r.x, r.weight, r.bias, activation, r.x_scale) for r in (p, q))
    assert same_bits(*together)


def test_a_step_is_two_launches_a_layer_and_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(launcher, "launch", lambda kernel, grid, *args, **options: launched.append(grid))
    p = make_problem(seed=0, rows=40, n_in=784, widths=(100, 10))
    epoch(p, None, 20)
    assert len(launched) == 2 * 5
    launched.clear()
    epoch(make_problem(seed=0, rows=40, n_in=784, widths=(100, 784), loss="cross_entropy"), None, 40)
    assert len(launched) == 6


def test_the_update_covers_more_tiles_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "UPDATE_PROGRAMS", 3)
    p = make_problem(seed=2, rows=4, n_in=300, widths=(40,))
    q = p.clone()
    step(p)
    monkeypatch.undo()
    step(q)
    assert same_bits(p.weight, q.weight)
    assert same_bits(p.bias, q.bias)


def test_the_norm_of_more_partial_sums_than_a_block_holds_is_whole() -> None:
    """17,600 outputs of one input: more programs leave partial sums than `sum_of` adds up at a time."""
    p = make_problem(seed=9, rows=3, n_in=1, widths=(17_600,), activation="identity", class_indices=False)
    grad, grad_bias, norm = gradient(p)
    expected = torch.cat([grad.flatten(), grad_bias]).double().norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
