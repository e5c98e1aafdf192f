"""A wrong argument is named, with what was expected and what came, before anything is changed."""

import pytest
import torch
from support import make_problem

from dante_kernels import ops
from dante_kernels.ops import Layer

WRONG = {
    "weight": [
        (lambda p: p.weight.half(), TypeError, "weight: expected float32 or float64, got float16"),
        (lambda p: p.weight[0], ValueError, r"weight: expected shape \(n_out, n_in\), got \(5,\)"),
        (lambda p: p.weight[:0], ValueError, r"weight: expected shape \(n_out, n_in\), got \(0, 5\)"),
        (lambda p: p.weight[:1].expand(6, 5), ValueError, "weight: is changed in place, but elements share memory"),
        (lambda p: p.weight.tolist(), TypeError, "weight: expected a torch.Tensor, got list"),
    ],
    "bias": [
        (lambda p: p.bias[:2], ValueError, r"bias: expected shape \(6,\), got \(2,\)"),
        (lambda p: p.bias.double(), TypeError, "bias: expected float32, got float64"),
        (lambda p: p.bias[:1].expand(6), ValueError, "bias: is changed in place"),
    ],
    "x": [
        (lambda p: p.x[:, :4], ValueError, r"x: expected shape \(rows, 5\), got \(7, 4\)"),
        (lambda p: p.x.double(), TypeError, "x: expected float32 or bfloat16 or uint8, got float64"),
        (lambda p: p.x.to(torch.int8), TypeError, "x: expected float32 or bfloat16 or uint8, got int8"),
        (lambda p: p.x[:0], ValueError, "x: expected at least one row"),
        (lambda p: p.x.to("meta"), ValueError, "x: expected on cpu, where the weight is, got meta"),
    ],
    "target": [
        (lambda p: p.target[:3], ValueError, r"target: expected shape \(7,\), got \(3,\)"),
        (lambda p: p.target.int(), TypeError, "target: expected int64 or float32, got int32"),
        (lambda p: torch.zeros(7, 4), ValueError, r"target: expected shape \(7, 3\), got \(7, 4\)"),
        (lambda p: torch.zeros(7, 3).double(), TypeError, "target: expected float32, got float64"),
    ],
    "suffix": [
        (lambda p: [Layer(torch.zeros(3, 5), None, "relu")], ValueError, r"suffix\[0\] weight: expected shape \(n_out, 6\)"),
        (lambda p: [Layer(torch.zeros(3, 6), torch.zeros(2), "relu")], ValueError, r"suffix\[0\] bias: expected shape \(3,\)"),
        (lambda p: [Layer(torch.zeros(3, 6), None, "swish")], ValueError, "activation: expected one of"),
        (lambda p: [torch.zeros(3, 6)], TypeError, r"suffix\[0\]: expected a Layer"),
        (lambda p: [Layer(torch.zeros(1, 6), None, "relu")], ValueError, "target: class indices need at least 2 outputs"),
    ],
    "activation": [(lambda p: "swish", ValueError, "activation: expected one of")],
    "loss": [(lambda p: "hinge", ValueError, "loss: expected one of mse")],
}


@pytest.mark.parametrize(
    ("name", "make", "error", "message"), [(name, *case) for name, cases in WRONG.items() for case in cases]
)
def test_a_wrong_part_of_the_problem_is_named(name, make, error, message, backend):
    problem = make_problem(seed=0, class_indices=True)
    before = problem.clone()
    wrong = make(problem)
    parts = dict(zip(("weight", "bias", "x", "target", "suffix", "activation", "loss"), problem.args, strict=True))
    parts[name] = wrong
    with pytest.raises(error, match=message):
        ops.sngd_step_(*parts.values(), 0.1, backend=backend)
    assert torch.equal(problem.weight, before.weight)
    assert torch.equal(problem.bias, before.bias)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"x_scale": 0.5}, ValueError, "x_scale: expected 1 unless x is uint8, got 0.5 beside float32"),
        ({"lr": float("nan")}, ValueError, "lr: expected a finite number, got nan"),
        ({"lr": float("inf")}, ValueError, "lr: expected a finite number, got inf"),
        ({"lr": torch.zeros(2)}, ValueError, "lr: expected a number or a 0-dimensional tensor"),
        ({"lr": torch.tensor(0.1).double()}, TypeError, "lr: expected float32, got float64"),
        ({"momentum": 1.0}, ValueError, "momentum: expected a number from 0 to below 1, got 1.0"),
        ({"momentum": -0.5}, ValueError, "momentum: expected"),
        ({"momentum": 0.5}, ValueError, "velocity_weight: expected a tensor like the weight"),
        ({"nesterov": True}, ValueError, "nesterov: expected a momentum above 0"),
        ({"velocity_weight": torch.zeros(6, 5)}, ValueError, "velocity_bias: expected a tensor exactly where"),
        ({"velocity_bias": torch.zeros(6)}, ValueError, "velocity_weight: expected a tensor beside velocity_bias"),
        (
            {"velocity_weight": torch.zeros(5, 6), "velocity_bias": torch.zeros(6)},
            ValueError,
            r"velocity_weight: expected shape \(6, 5\)",
        ),
        (
            {"velocity_weight": torch.zeros(6, 5), "velocity_bias": torch.zeros(1).expand(6)},
            ValueError,
            "velocity_bias: is changed in place",
        ),
        ({"backend": "cuda"}, ValueError, "backend: expected auto or one of reference, cpp, triton, got 'cuda'"),
    ],
)
def test_a_wrong_argument_of_the_update_is_named(more, error, message):
    problem = make_problem(seed=0)
    before = problem.weight.clone()
    with pytest.raises(error, match=message):
        ops.sngd_step_(*problem.args, more.pop("lr", 0.1), **more)
    assert torch.equal(problem.weight, before)


@pytest.mark.parametrize(
    ("order", "batch_size", "error", "message"),
    [
        (None, 0, ValueError, "batch_size: expected at least 1, got 0"),
        (torch.arange(7).int(), 2, TypeError, "order: expected int64, got int32"),
        (torch.zeros(2, 2, dtype=torch.int64), 2, ValueError, r"order: expected shape \(n,\)"),
        (torch.zeros(0, dtype=torch.int64), 2, ValueError, "order: expected at least one row number, got none"),
        (torch.tensor([0, 7]), 2, ValueError, "order: expected row numbers from 0 to 6, got 0 to 7"),
        (torch.tensor([-1, 3]), 2, ValueError, "order: expected row numbers from 0 to 6, got -1 to 3"),
    ],
)
def test_a_wrong_order_or_batch_size_is_named(order, batch_size, error, message, backend):
    problem = make_problem(seed=0)
    before = problem.weight.clone()
    with pytest.raises(error, match=message):
        ops.sngd_epoch_(*problem.args[:4], order, batch_size, *problem.args[4:], 0.1, backend=backend)
    assert torch.equal(problem.weight, before)


def test_an_explicit_backend_that_cannot_serve_raises(monkeypatch):
    problem = make_problem(seed=0).to(torch.float64)
    for backend in ("cpp", "triton"):
        with pytest.raises(ValueError, match=f"backend: '{backend}' cannot serve this call: it takes float32 weights"):
            ops.sngd_step_(*problem.args, 0.1, backend=backend)
    monkeypatch.setenv("DANTE_BACKEND", "cpp")
    with pytest.raises(ValueError, match="DANTE_BACKEND: 'cpp' cannot serve"):
        ops.sngd_step_(*problem.args, 0.1)


def test_the_environment_variable_chooses_the_backend(monkeypatch):
    problem = make_problem(seed=0)
    monkeypatch.setenv("DANTE_BACKEND", "reference")
    by_variable = ops.layer_gradient(*problem.args)
    assert torch.equal(by_variable[0], ops.layer_gradient(*problem.args, backend="reference")[0])
    monkeypatch.setenv("DANTE_BACKEND", "abacus")
    with pytest.raises(ValueError, match="DANTE_BACKEND: expected auto or one of"):
        ops.layer_gradient(*problem.args)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"x": [[1.0]]}, "x: expected a torch.Tensor, got list"),
        ({"target": [0, 1]}, "target: expected a torch.Tensor, got list"),
        ({"bias": 3}, "bias: expected a torch.Tensor, got int"),
        ({"suffix": None}, "suffix: expected a list of layers, empty for the last layer, got NoneType"),
        ({"suffix": [Layer([1], None, "relu")]}, r"suffix\[0\] weight: expected a torch.Tensor, got list"),
        ({"order": [1, 2]}, "order: expected a torch.Tensor, got list"),
        ({"batch_size": 2.5}, "batch_size: expected a whole number, got float"),
        ({"lr": None}, "lr: expected a number, got NoneType"),
        ({"momentum": "0.9"}, "momentum: expected a number, got str"),
        ({"x_scale": "1/255"}, "x_scale: expected a number, got str"),
        ({"velocity_weight": 1}, "velocity_weight: expected a torch.Tensor, got int"),
        ({"backend": 3}, "backend: expected a name, got int"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(more, message):
    problem = make_problem(seed=0)
    arguments = {
        "weight": problem.weight, "bias": problem.bias, "x": problem.x, "target": problem.target, "order": None,
        "batch_size": 3, "suffix": problem.suffix, "activation": problem.activation, "loss": problem.loss, "lr": 0.1, **more,
    }  # fmt: skip
    with pytest.raises(TypeError, match=message):
        ops.sngd_epoch_(**arguments)


@pytest.mark.parametrize("x_scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_wrong_scale_of_uint8_x_is_named_by_every_operator(x_scale, backend):
    problem = make_problem(seed=0, uint8=True)
    before = problem.weight.clone()
    more = {"x_scale": x_scale, "backend": backend}
    for call in (
        lambda: ops.layer_forward(problem.x, problem.weight, problem.bias, problem.activation, **more),
        lambda: ops.layer_gradient(*problem.args, **more),
        lambda: ops.sngd_step_(*problem.args, 0.1, **more),
        lambda: ops.sngd_epoch_(*problem.args[:4], None, 2, *problem.args[4:], 0.1, **more),
    ):
        with pytest.raises(ValueError, match=f"x_scale: expected a finite number above 0, got {x_scale}"):
            call()
    assert torch.equal(problem.weight, before)


@pytest.mark.parametrize("other", ["x", "velocity_weight", "bias"])
def test_memory_that_is_shared_with_what_changes_is_refused(other, backend):
    problem = make_problem(seed=0, rows=6, n_in=5, widths=(6, 3))
    before = problem.weight.clone()
    more = {"velocity_weight": torch.zeros(6, 5), "velocity_bias": torch.zeros(6), "momentum": 0.9}
    if other == "velocity_weight":
        more["velocity_weight"] = problem.weight
    elif other == "x":
        problem.x = problem.weight
    else:
        problem.suffix[0] = Layer(problem.suffix[0].weight, problem.bias[:3], "relu")
    with pytest.raises(ValueError, match="is changed in place, but shares its memory"):
        ops.sngd_step_(*problem.args, 0.1, backend=backend, **more)
    assert torch.equal(problem.weight, before)


def test_memory_that_is_shared_in_part_is_refused_and_rows_in_between_are_not(backend):
    target = torch.zeros(4, 5)
    for weight_at, bias_at in ((slice(0, 50), slice(49, 54)), (slice(10, 60), slice(2, 12, 2))):
        buffer = torch.linspace(-1, 1, 200)
        before = buffer.clone()
        with pytest.raises(ValueError, match="is changed in place, but shares its memory"):
            ops.sngd_step_(
                buffer[weight_at].view(5, 10), buffer[bias_at], torch.ones(4, 10), target, (), "relu", "mse", 0.1,
                backend=backend,
            )  # fmt: skip
        assert torch.equal(buffer, before)
    both = torch.linspace(-1, 1, 110).view(5, 22)
    weight, velocity, bias, velocity_bias = both[:, :10], both[:, 10:20], both[:, 20], both[:, 21]
    alone = [t.clone() for t in (weight, bias, velocity, velocity_bias)]
    for w, b, v, v_b in ((weight, bias, velocity, velocity_bias), alone):
        more = {"velocity_weight": v, "velocity_bias": v_b, "momentum": 0.9, "backend": backend}
        ops.sngd_step_(w, b, torch.ones(4, 10), target, (), "relu", "mse", 0.1, **more)
    torch.testing.assert_close([weight, bias, velocity, velocity_bias], alone)


def test_an_empty_order_and_too_large_a_number_are_named(backend):
    problem = make_problem(seed=0)
    for order, batch_size, message in (
        (torch.empty(0, dtype=torch.int64), 2, "order: expected at least one row number, got none"),
        (None, 2**64, "batch_size: expected a number below 2\\^63, got 18446744073709551616"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.sngd_epoch_(*problem.args[:4], order, batch_size, *problem.args[4:], 0.1, backend=backend)
