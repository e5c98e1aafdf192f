"""What every operator keeps, whatever the backend: DESIGN section 4."""

import pytest
import torch
from support import LOSSES, assert_same, make_problem

from dante_kernels import ops
from dante_kernels.ops import Layer


def epoch(problem, order, batch_size, lr=0.1, backend="auto", **more):
    return ops.sngd_epoch_(*problem.args[:4], order, batch_size, *problem.args[4:], lr, backend=backend, **more)


def velocities(problem):
    return {"velocity_weight": torch.zeros_like(problem.weight), "velocity_bias": torch.zeros_like(problem.bias)}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("widths", [(12, 5), (5,), (9, 8, 6)])
def test_an_epoch_equals_its_steps_bit_for_bit(backend, loss, momentum, widths):
    whole = make_problem(seed=8, rows=23, n_in=18, widths=widths, loss=loss)
    single = whole.clone()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    v1, v2 = velocities(whole), velocities(single)
    losses, norms = epoch(whole, order, 5, backend=backend, momentum=momentum, **v1)
    assert losses.shape == norms.shape == (5,)
    for step, start in enumerate(range(0, 23, 5)):
        rows = order[start : start + 5]
        loss_, norm = ops.sngd_step_(
            single.weight, single.bias, single.x[rows], single.target[rows], *single.args[4:], 0.1,
            momentum=momentum, backend=backend, **v2,
        )  # fmt: skip
        assert loss_ == losses[step]
        assert norm == norms[step]
    assert torch.equal(whole.weight, single.weight)
    assert torch.equal(whole.bias, single.bias)
    assert all(torch.equal(v1[name], v2[name]) for name in v1)


def test_order_none_visits_the_rows_as_they_lie(backend):
    one, two = make_problem(seed=9, rows=17), make_problem(seed=9, rows=17)
    assert_same(backend, epoch(one, None, 4, backend=backend)[0], epoch(two, torch.arange(17), 4, backend=backend)[0])
    assert_same(backend, one.weight, two.weight)


def test_order_may_repeat_and_leave_out_rows(backend):
    one = make_problem(seed=9, rows=17)
    two = one.clone()
    order = torch.tensor([3, 3, 16, 0, 5])
    two.x, two.target = two.x[order], two.target[order]
    epoch(one, order, 2, backend=backend)
    epoch(two, None, 2, backend=backend)
    assert_same(backend, one.weight, two.weight)


def test_order_may_be_strided(backend):
    one = make_problem(seed=9, rows=17)
    two = one.clone()
    order = torch.randperm(17, generator=torch.Generator().manual_seed(3))
    spread = torch.stack([order, torch.full_like(order, 99)], dim=1)[:, 0]
    epoch(one, order, 4, backend=backend)
    epoch(two, spread, 4, backend=backend)
    assert torch.equal(one.weight, two.weight)


def test_a_batch_may_be_larger_than_the_data(backend):
    problem = make_problem(seed=9, rows=6)
    losses, norms = epoch(problem, None, 10**12, backend=backend)
    assert losses.shape == norms.shape == (1,)


def test_the_same_call_gives_the_same_bits(backend):
    outcomes = []
    for _ in range(3):
        problem = make_problem(seed=10, rows=40, n_in=50, widths=(33, 10))
        losses, norms = epoch(problem, torch.arange(39, -1, -1), 7, backend=backend, momentum=0.5, **velocities(problem))
        outcomes.append(torch.cat([losses, norms, problem.weight.flatten(), problem.bias]))
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


@pytest.mark.parametrize("kind", ["cpp", "triton"])
def test_a_rows_activations_do_not_depend_on_the_rows_beside_it(kind, request):
    from dante_kernels.ops import backends

    reason = backends.why_not(kind, torch.device("cpu"), torch.float32)
    if reason:
        pytest.skip(reason)
    problem = make_problem(seed=11, rows=150, n_in=300, widths=(70, 3))
    args = (problem.weight, problem.bias, problem.activation)
    whole = ops.layer_forward(problem.x, *args, backend=kind)
    for rows in (slice(0, 1), slice(149, 150), slice(3, 67), slice(64, 150)):
        assert torch.equal(ops.layer_forward(problem.x[rows], *args, backend=kind), whole[rows])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_zero_gradient_changes_nothing(backend, momentum):
    problem = make_problem(seed=12, widths=(6, 3), activation="relu")
    problem.suffix = [Layer(torch.zeros(3, 6), None, "identity")]
    more = velocities(problem)
    for velocity in more.values():
        velocity.fill_(0.5)
    before = problem.clone()
    loss, norm = ops.sngd_step_(*problem.args, 0.1, momentum=momentum, backend=backend, **more)
    assert norm.item() == 0
    assert loss.isfinite()
    assert torch.equal(problem.weight, before.weight)
    assert torch.equal(problem.bias, before.bias)
    assert all(bool((velocity == 0.5).all()) for velocity in more.values())


@pytest.mark.parametrize("where", ["x", "target", "suffix"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("widths", [(6, 3), (4,)])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_goes_on(backend, where, value, widths):
    problem = make_problem(seed=13, rows=8, widths=widths, class_indices=False)
    if where == "suffix":
        if not problem.suffix:
            pytest.skip("no suffix to spoil")
        problem.suffix[0].bias[0] = value
    else:
        getattr(problem, where)[1, 0] = value
    before = problem.clone()
    more = velocities(problem)
    _, norm = ops.sngd_step_(
        problem.weight, problem.bias, problem.x[:4], problem.target[:4], *problem.args[4:], 0.1,
        momentum=0.9, backend=backend, **more,
    )  # fmt: skip
    assert not norm.isfinite()
    assert torch.equal(problem.weight, before.weight)
    assert torch.equal(problem.bias, before.bias)
    assert all(bool((velocity == 0).all()) for velocity in more.values())
    if where != "suffix":
        _, norms = epoch(problem, None, 4, backend=backend, momentum=0.9, **more)
        assert [bool(norm.isfinite()) for norm in norms] == [False, True]
        assert not torch.equal(problem.weight, before.weight)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_a_class_out_of_range_makes_its_step_nan_and_changes_nothing(backend, loss, label):
    problem = make_problem(seed=14, loss=loss, class_indices=True)
    problem.target[2] = label
    before = problem.clone()
    value, norm = ops.sngd_step_(*problem.args, 0.1, backend=backend)
    assert value.isnan()
    assert norm.isnan()
    assert torch.equal(problem.weight, before.weight)


def test_a_rate_of_zero_changes_no_weight_but_the_velocity(backend):
    problem = make_problem(seed=15)
    before, more = problem.clone(), velocities(problem)
    ops.sngd_step_(*problem.args, 0.0, momentum=0.9, backend=backend, **more)
    assert torch.equal(problem.weight, before.weight)
    assert torch.equal(problem.bias, before.bias)
    length = torch.cat([more["velocity_weight"].flatten(), more["velocity_bias"]]).norm().item()
    assert length == pytest.approx(1, rel=1e-5)


def test_lr_may_be_a_device_scalar(backend):
    one = make_problem(seed=15)
    two = one.clone()
    ops.sngd_step_(*one.args, 0.25, backend=backend)
    ops.sngd_step_(*two.args, torch.tensor(0.25), backend=backend)
    assert torch.equal(one.weight, two.weight)


def test_nothing_but_the_layer_and_its_velocity_changes(backend):
    problem = make_problem(seed=16, rows=9)
    before = problem.clone()
    order, lr = torch.arange(9), torch.tensor(0.1)
    ops.sngd_epoch_(*problem.args[:4], order, 4, *problem.args[4:], lr, backend=backend)
    assert torch.equal(problem.x, before.x)
    assert torch.equal(problem.target, before.target)
    assert torch.equal(problem.suffix[0].weight, before.suffix[0].weight)
    assert torch.equal(problem.suffix[0].bias, before.suffix[0].bias)
    assert torch.equal(order, torch.arange(9))
    assert lr == 0.1
    assert not torch.equal(problem.weight, before.weight)
    assert not torch.equal(problem.bias, before.bias)


def test_parameters_that_require_gradients_are_taken_and_no_graph_is_built(backend):
    problem = make_problem(seed=16)
    weight, bias = torch.nn.Parameter(problem.weight.clone()), torch.nn.Parameter(problem.bias.clone())
    loss, norm = ops.sngd_step_(weight, bias, *problem.args[2:], 0.1, backend=backend)
    assert not loss.requires_grad
    assert not norm.requires_grad
    assert weight.grad is None
    assert not torch.equal(weight, problem.weight)
    h = ops.layer_forward(problem.x, weight, bias, "relu", backend=backend)
    assert not h.requires_grad
