"""The specification itself, tied to autograd and to torch's own optimizers."""

import pytest
import torch
from support import ACTIVATIONS, LOSSES, make_problem

from dante_kernels import losses, ops, reference
from dante_kernels.activations import Activation, to_module


def autograd_gradient(problem):
    weight = problem.weight.clone().requires_grad_()
    bias = problem.bias.clone().requires_grad_()
    h = problem.x
    for w, b, activation in ((weight, bias, problem.activation), *problem.suffix):
        h = to_module(activation)(torch.nn.functional.linear(h, w, b))
    value = losses.value(losses.code(problem.loss), h, losses.as_values(problem.target, h.shape[1], h.dtype))
    return value, *torch.autograd.grad(value, (weight, bias))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_gradient_equals_autograd_in_float64(loss, activation, depth):
    problem = make_problem(seed=depth, widths=(6, 4, 5, 7, 3)[4 - depth :], activation=activation, loss=loss).to(torch.float64)
    grad_weight, grad_bias, norm = ops.layer_gradient(*problem.args, backend="reference")
    _, expected_weight, expected_bias = autograd_gradient(problem)
    torch.testing.assert_close(grad_weight, expected_weight, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad_bias, expected_bias, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(norm, torch.cat([expected_weight.flatten(), expected_bias]).norm(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("depth", [0, 1])
def test_at_a_kink_the_gradient_follows_g(depth):
    phi = Activation("generalized_relu", 0.25, 2.0)
    x = torch.ones(1, 1, dtype=torch.float64)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    suffix = [ops.Layer(one, None, phi)] * depth
    grad_weight, _, _ = ops.layer_gradient(zero, None, x, -one, suffix, phi, "mse", backend="reference")
    assert grad_weight.item() == 2 * 2.0 ** (depth + 1)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_steps_equal_torch_sgd_on_normalized_gradients(momentum, nesterov):
    problem = make_problem(seed=3, rows=30).to(torch.float64)
    weight, bias = torch.nn.Parameter(problem.weight.clone()), torch.nn.Parameter(problem.bias.clone())
    optimizer = torch.optim.SGD([weight, bias], lr=0.05, momentum=momentum, nesterov=nesterov)
    velocity_weight, velocity_bias = torch.zeros_like(problem.weight), torch.zeros_like(problem.bias)
    for start in range(0, 30, 10):
        rows = slice(start, start + 10)
        batch = make_problem(seed=3, rows=30).to(torch.float64)
        batch.weight, batch.bias = weight.detach(), bias.detach()
        batch.x, batch.target = problem.x[rows], problem.target[rows]
        value, weight.grad, bias.grad = autograd_gradient(batch)
        norm = torch.cat([weight.grad.flatten(), bias.grad]).norm()
        got_loss, got_norm = ops.sngd_step_(
            problem.weight, problem.bias, batch.x, batch.target, problem.suffix, problem.activation, problem.loss, 0.05,
            velocity_weight=velocity_weight, velocity_bias=velocity_bias, momentum=momentum, nesterov=nesterov,
            backend="reference",
        )  # fmt: skip
        weight.grad /= norm
        bias.grad /= norm
        optimizer.step()
        torch.testing.assert_close(got_loss, value.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(got_norm, norm, rtol=1e-12, atol=0)
    torch.testing.assert_close(problem.weight, weight.detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(problem.bias, bias.detach(), rtol=1e-12, atol=1e-15)


def test_a_step_moves_the_layer_by_exactly_lr():
    problem = make_problem(seed=1).to(torch.float64)
    before = torch.cat([problem.weight.flatten(), problem.bias])
    ops.sngd_step_(*problem.args, 0.125, backend="reference")
    after = torch.cat([problem.weight.flatten(), problem.bias])
    assert (after - before).norm().item() == pytest.approx(0.125, rel=1e-12)


def test_narrower_inputs_are_computed_in_the_weights_dtype():
    problem = make_problem(seed=2)
    narrow = problem.x.bfloat16()
    h = reference.layer_forward(narrow, problem.weight, problem.bias, problem.activation)
    assert torch.equal(h, reference.layer_forward(narrow.float(), problem.weight, problem.bias, problem.activation))
