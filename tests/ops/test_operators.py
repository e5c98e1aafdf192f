"""Every operator on every backend is right: DESIGN's error rule against the float64 reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ACTIVATIONS, LOSSES, as_float32, assert_error_rule, assert_same, make_problem, reference_gradient

from dante_kernels import losses, ops, reference
from dante_kernels.ops import Layer

SHAPES = {  # rows, n_in, widths of the active layer and the suffix
    "batch of one": (1, 5, (4, 3)),
    "one output": (9, 7, (1,)),
    "one input, one unit": (5, 1, (1, 2)),
    "last layer": (20, 33, (10,)),
    "odd sizes": (13, 17, (19, 7)),
    "deep suffix": (6, 9, (8, 7, 5, 6, 3)),
    "wider than a tile": (21, 100, (70, 10)),
    "784-100-10": (20, 784, (100, 10)),
    "wide output": (5, 12, (6, 150)),
    "many rows": (130, 6, (5, 4)),
}


def check_forward(problem, backend):
    args = (problem.x, problem.weight, problem.bias, problem.activation)
    exact = problem.to(torch.float64)
    got = ops.layer_forward(*args, x_scale=problem.x_scale, backend=backend)
    truth = reference.layer_forward(exact.x, exact.weight, exact.bias, exact.activation, problem.x_scale)
    assert_error_rule("h", got, reference.layer_forward(*args, problem.x_scale), truth)


def check_gradient(problem, backend):
    got = ops.layer_gradient(*problem.args, x_scale=problem.x_scale, backend=backend)
    torch32, exact = (reference_gradient(problem, dtype) for dtype in (torch.float32, torch.float64))
    for name, ours, theirs, truth in zip(("grad_weight", "grad_bias", "norm"), got, torch32, exact, strict=True):
        if ours is not None:
            assert_error_rule(name, ours, theirs, truth)


def check_step(problem, backend, momentum=0.0, nesterov=False, lr=0.3):
    """Two steps, so that the velocity of the first enters the second, each judged by itself: torch starts where ours did."""
    ours = problem.clone()
    velocity = [torch.zeros_like(t) if momentum and t is not None else None for t in (ours.weight, ours.bias)]
    for step in range(2):
        results = []
        for kind, dtype in (("reference", torch.float32), ("reference", torch.float64), (backend, torch.float32)):
            p, (v, vb) = ours, velocity
            if len(results) < 2:
                p = ours.to(dtype)
                v, vb = (None if t is None else t.to(dtype, copy=True) for t in velocity)
            outcome = ops.sngd_step_(
                *p.args, lr, velocity_weight=v, velocity_bias=vb, momentum=momentum, nesterov=nesterov,
                x_scale=p.x_scale, backend=kind,
            )  # fmt: skip
            changed = {"weight": p.weight, "bias": p.bias, "velocity_weight": v, "velocity_bias": vb}
            results.append(dict(zip(("loss", "norm"), outcome, strict=True)) | changed)
        torch32, exact, got = results
        for name, value in got.items():
            if value is not None:
                assert_error_rule(f"step {step}: {name}", value, torch32[name], exact[name])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_right_at_every_shape(backend, shape, loss):
    rows, n_in, widths = SHAPES[shape]
    if loss == "cross_entropy" and widths[-1] == 1:
        pytest.skip("softmax over one class has no gradient")
    problem = make_problem(seed=len(shape), rows=rows, n_in=n_in, widths=widths, loss=loss)
    check_forward(problem, backend)
    check_gradient(problem, backend)
    check_step(problem, backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("class_indices", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_right_for_every_loss_and_activation(backend, loss, activation, class_indices, depth):
    problem = make_problem(
        seed=17 + depth, rows=11, n_in=9, widths=(12, 6, 5)[2 - depth :], loss=loss, activation=activation,
        class_indices=class_indices, bias=depth != 1,
    )  # fmt: skip
    check_forward(problem, backend)
    check_gradient(problem, backend)
    check_step(problem, backend)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("uint8", [False, True])
def test_right_with_momentum(backend, nesterov, bias, uint8):
    problem = make_problem(seed=5, rows=12, n_in=20, widths=(18, 5), bias=bias, uint8=uint8)
    check_step(problem, backend, momentum=0.9, nesterov=nesterov)


@st.composite
def laid_out(draw, tensor):
    """A tensor's values in some other memory layout: transposed, every other element, an offset, or all of them."""
    if draw(st.booleans()):
        tensor = tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
    steps = [draw(st.integers(1, 3)) for _ in tensor.shape]
    offset = draw(st.integers(0, 3))
    order = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
    storage_shape = [tensor.shape[d] * steps[d] for d in order]
    storage = torch.full([offset + int(torch.tensor(storage_shape).prod())], 77, dtype=tensor.dtype)[offset:]
    view = storage.view(storage_shape).permute([order.index(d) for d in range(tensor.dim())])
    view = view[tuple(slice(None, None, step) for step in steps)]
    view.copy_(tensor)
    return view


@settings(max_examples=25, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_right_for_any_shape_and_strides(backend, data):
    draw = data.draw
    widths = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    loss = draw(st.sampled_from(LOSSES if widths[-1] > 1 else ("mse", "binary_cross_entropy")))
    problem = make_problem(
        seed=draw(st.integers(0, 1000)), rows=draw(st.integers(1, 40)), n_in=draw(st.integers(1, 70)), widths=widths,
        loss=loss, activation=draw(st.sampled_from(["leaky_relu", "sigmoid", "tanh"])), bias=draw(st.booleans()),
        uint8=draw(st.booleans()),
    )  # fmt: skip
    for name in ("weight", "bias", "x", "target"):
        if getattr(problem, name) is not None:
            setattr(problem, name, draw(laid_out(getattr(problem, name))))
    problem.suffix = [Layer(draw(laid_out(w)), b if b is None else draw(laid_out(b)), phi) for w, b, phi in problem.suffix]
    check_forward(problem, backend)
    check_gradient(problem, backend)
    check_step(problem, backend, momentum=draw(st.sampled_from([0.0, 0.5])))


def test_a_weight_that_is_a_view_is_changed_where_it_lies(backend):
    problem = make_problem(seed=4, rows=8, n_in=11, widths=(7, 3))
    expected = problem.clone()
    ops.sngd_step_(*expected.args, 0.1, backend=backend)
    storage = torch.full((22, 9), 77.0)
    storage[::2, 1:8] = problem.weight.t()
    problem.weight = storage[::2, 1:8].t()
    ops.sngd_step_(*problem.args, 0.1, backend=backend)
    assert_same(backend, storage[::2, 1:8].t(), expected.weight)
    storage[::2, 1:8] = 77.0
    assert bool((storage == 77.0).all())


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "generalized_relu"])
def test_relu_masks_are_exact_where_the_arithmetic_is(backend, activation):
    """On small dyadic numbers every product and sum is exact, also at z = 0, so masks must agree bit for bit."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randint(-4, 5, shape, generator=generator) / 4

    phi = ACTIVATIONS["relu"] if activation == "relu" else ACTIVATIONS["generalized_relu"]
    weight, bias, x = draw(24, 18), draw(24), draw(33, 18)
    z = x @ weight.t() + bias
    assert bool((z == 0).any())
    assert torch.equal(ops.layer_forward(x, weight, bias, phi, backend=backend), phi.phi(z))
    w2, target = draw(1, 24), draw(33, 1)
    problem = (weight, bias, x[:32], target[:32], [Layer(w2, None, "identity")], phi, "mse")
    grad_weight, grad_bias, _ = ops.layer_gradient(*problem, backend=backend)
    exact = ops.layer_gradient(*(p.double() if isinstance(p, torch.Tensor) else p for p in problem[:4]),
                               [Layer(w2.double(), None, "identity")], phi, "mse", backend="reference")  # fmt: skip
    assert torch.equal(grad_weight.double(), exact[0])
    assert torch.equal(grad_bias.double(), exact[1])


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("loss", LOSSES)
def test_saturated_activations_and_confident_outputs_are_right(backend, activation, loss):
    """Pre-activations of several tens: slopes far below the rounding of 1 - h, and softmax of logits far apart."""
    problem = make_problem(seed=31, rows=9, n_in=7, widths=(6, 5), loss=loss, activation=activation)
    problem.x *= 25
    problem.suffix[0].weight.mul_(30)
    check_gradient(problem, backend)


def test_classes_ruled_out_by_minus_infinity_cost_nothing(backend):
    for widths in ((5,), (4, 5), (3, 1200)):
        problem = make_problem(seed=32, rows=6, widths=widths, loss="cross_entropy", class_indices=True)
        bias = problem.suffix[-1].bias if problem.suffix else problem.bias
        bias[: widths[-1] - 2] = -torch.inf
        problem.target.fill_(widths[-1] - 1)
        exact = problem.to(torch.float64)
        loss, norm = ops.sngd_step_(*problem.args, 0.1, backend=backend)
        truth, true_norm = ops.sngd_step_(*exact.args, 0.1, backend="reference")
        assert truth.isfinite()
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.double(), true_norm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])  # without, cpp takes the norm from Gram matrices
def test_narrow_inputs_give_the_bits_of_their_float32_values(backend, dtype, transposed, momentum):
    problem = make_problem(seed=6, rows=30, n_in=40, widths=(20, 5), uint8=dtype == torch.uint8)
    problem.x = problem.x.to(dtype)
    outcomes = []
    for p in (problem, as_float32(problem)):
        x = p.x = p.x.t().contiguous().t() if transposed else p.x
        scale = {"x_scale": p.x_scale, "backend": backend}
        outcome = [ops.layer_forward(x, p.weight, p.bias, p.activation, **scale), *ops.layer_gradient(*p.args, **scale)]
        outcome += ops.sngd_step_(*p.args, 0.1, **scale)
        more = {"velocity_weight": torch.zeros_like(p.weight), "velocity_bias": torch.zeros_like(p.bias)} if momentum else {}
        order = torch.arange(29, -1, -1)
        outcome += ops.sngd_epoch_(*p.args[:4], order, 8, *p.args[4:], 0.1, momentum=momentum, **more, **scale)
        outcomes.append([*outcome, p.weight, p.bias, *more.values()])
    for narrow, wide in zip(*outcomes, strict=True):
        assert_same(backend, narrow, wide)


def test_uint8_inputs_beside_float64_weights_are_scaled_in_float64():
    problem = make_problem(seed=6, rows=9, uint8=True)
    p = problem.to(torch.float64)
    h = ops.layer_forward(p.x, p.weight, p.bias, p.activation, x_scale=1 / 255)
    assert torch.equal(h, ops.layer_forward(p.x.double() * (1 / 255), p.weight, p.bias, p.activation))


def test_no_rows_give_no_activations(backend):
    problem = make_problem(seed=0)
    h = ops.layer_forward(problem.x[:0], problem.weight, problem.bias, problem.activation, backend=backend)
    assert h.shape == (0, problem.weight.shape[0])


def test_float64_is_served_by_the_reference(caplog):
    problem = make_problem(seed=0).to(torch.float64)
    before = problem.weight.clone()
    loss, norm = ops.sngd_step_(*problem.args, 0.1)
    assert loss.dtype == norm.dtype == torch.float64
    assert not torch.equal(before, problem.weight)
    assert losses.CODES.keys() == set(LOSSES)
