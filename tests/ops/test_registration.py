"""The operators are good citizens of torch: schemas with their mutations, fakes, functionalization."""

import pytest
import torch
from support import make_problem
from torch.library import opcheck

from dante_kernels import ops


def flat(problem):
    active, *rest = [problem.activation, *(phi for _, _, phi in problem.suffix)]
    numbers = active.encode() + [number for phi in rest for number in phi.encode()]
    return (
        [problem.weight, problem.bias, problem.x, problem.target],
        [[w for w, _, _ in problem.suffix], [b for _, b, _ in problem.suffix], numbers, 0],
    )


def samples(bias, uint8=False):
    problem = make_problem(seed=0, bias=bias, uint8=uint8)
    data, chain = flat(problem)
    lr = torch.tensor(0.1)
    velocity = (torch.zeros_like(problem.weight), torch.zeros_like(problem.bias) if bias else None)
    scale = [problem.x_scale] if uint8 else []
    plain = [None, None, 0.0, False] if uint8 else []
    return {
        "layer_forward": (problem.x, problem.weight, problem.bias, chain[2][:3], *scale),
        "layer_gradient": (*data, *chain, *scale),
        "sngd_step_": (*data, *chain, lr, *velocity, 0.9, True, *scale),
        "sngd_epoch_": (*data, torch.randperm(7), 3, *chain, lr, *plain, *scale),
    }


@pytest.mark.parametrize("name", ["layer_forward", "layer_gradient", "sngd_step_", "sngd_epoch_"])
@pytest.mark.parametrize(("bias", "uint8"), [(True, False), (False, False), (True, True)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck_passes(name, bias, uint8, backend):
    operator = getattr(torch.ops.dante, name).default
    opcheck(operator, samples(bias, uint8)[name], {"backend": backend})


@pytest.mark.parametrize("name", ["layer_forward", "layer_gradient", "sngd_step_", "sngd_epoch_"])
def test_fakes_have_the_shapes_and_dtypes_of_the_real_thing(name, backend):
    operator = getattr(torch.ops.dante, name)
    args = samples(True)[name]
    real = operator(*args, backend=backend)
    meta = [
        [t.to("meta") if isinstance(t, torch.Tensor) else t for t in a]
        if isinstance(a, list)
        else a.to("meta")
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    ]
    fake = operator(*meta, backend=backend)
    for r, f in zip(real if isinstance(real, tuple) else [real], fake if isinstance(fake, tuple) else [fake], strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_a_compiled_graph_sees_the_mutation():
    eager, compiled = make_problem(seed=1), make_problem(seed=1)

    def step(problem):
        problem.weight.mul_(1.5)
        loss, _ = ops.sngd_step_(*problem.args, 0.1, backend="reference")
        return problem.weight.sum() + loss

    expected = step(eager)
    got = torch.compile(lambda: step(compiled), backend="aot_eager")()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled.weight, eager.weight)


def test_schemas_declare_what_is_changed():
    for name in ("sngd_step_", "sngd_epoch_"):
        schema = getattr(torch.ops.dante, name).default._schema
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        assert written == {"weight", "bias", "velocity_weight", "velocity_bias"}
    for name in ("layer_forward", "layer_gradient"):
        schema = getattr(torch.ops.dante, name).default._schema
        assert all(a.alias_info is None for a in schema.arguments)


def test_autograd_sees_that_a_weight_was_changed(backend):
    """A graph that kept the old weight must refuse to run backward, not give a wrong gradient."""
    problem = make_problem(seed=2, widths=(3,))
    weight = torch.nn.Parameter(problem.weight.clone())
    x = problem.x.clone().requires_grad_()
    out = torch.nn.functional.linear(x, weight).square().sum()
    ops.sngd_step_(weight.detach(), problem.bias, *problem.args[2:], 0.1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_flat_operators_build_no_graph():
    problem = make_problem(seed=3)
    data, chain = flat(problem)
    data[0] = torch.nn.Parameter(data[0])
    loss, _ = torch.ops.dante.sngd_step_(*data, *chain, torch.tensor(0.1))
    assert not loss.requires_grad
    h = torch.ops.dante.layer_forward(problem.x, data[0], problem.bias, chain[2][:3])
    assert not h.requires_grad


@pytest.mark.parametrize("numbers", [[7.0, 1.0, 1.0], [0.0, 2.0, 1.0], [0.0, float("nan"), 1.0]])
def test_a_flat_operator_names_numbers_that_are_no_activation(numbers):
    problem = make_problem(seed=4)
    data, (suffix_weights, suffix_biases, activations, loss) = flat(problem)
    before = problem.weight.clone()
    wrong = [*activations[:3], *numbers]
    with pytest.raises(ValueError, match=r"activation: expected a code|expected finite slopes"):
        torch.ops.dante.sngd_step_(*data, suffix_weights, suffix_biases, wrong, loss, torch.tensor(0.1))
    assert torch.equal(problem.weight, before)
