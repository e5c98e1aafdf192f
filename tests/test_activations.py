import pytest
import torch
from support import ACTIVATIONS
from torch import nn

from dante_kernels import GeneralizedReLU, activations, ops
from dante_kernels.activations import Activation

GRID = torch.tensor([-3.0, -1.5, -0.25, -0.0, 0.0, 0.25, 1.0, 2.5])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_g_is_the_derivative_of_phi_away_from_zero(name):
    activation = ACTIVATIONS[name]
    z = GRID[GRID != 0].double().requires_grad_()
    (expected,) = torch.autograd.grad(activation.phi(z).sum(), z)
    torch.testing.assert_close(activation.g(z.detach()), expected)


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (0.01, 1.0), (0.25, 1.5), (1.0, 1.0)])
def test_generalized_relu_has_slope_b_at_zero_in_spec_and_module(a, b):
    zero = torch.zeros(2, requires_grad=True)
    assert Activation("generalized_relu", a, b).g(zero.detach()).tolist() == [pytest.approx(b)] * 2
    (gradient,) = torch.autograd.grad(GeneralizedReLU(a, b)(zero).sum(), zero)
    assert gradient.tolist() == [pytest.approx(b)] * 2


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_backend_computes_the_same_phi_and_g(name, backend):
    activation = ACTIVATIONS[name]
    x = GRID[:, None]
    one = torch.ones(1, 1)
    h = ops.layer_forward(x, one, None, activation, backend=backend)
    torch.testing.assert_close(h, activation.phi(x), rtol=2e-6, atol=2e-7)
    for z in GRID:
        # With target phi(z) - 1/2 the residual is 1/2 and dJ/dZ = g(z); x = 1 makes the bias gradient equal to it.
        target = activation.phi(z).reshape(1, 1) - 0.5
        _, grad_bias, _ = ops.layer_gradient(
            torch.zeros(1, 1), z.reshape(1), torch.ones(1, 1), target, [], activation, "mse", backend=backend
        )
        torch.testing.assert_close(grad_bias[0], activation.g(z), rtol=4e-6, atol=4e-7)


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Tanh(), nn.Identity(), GeneralizedReLU(0.5, 2.0)],
    ids=lambda module: type(module).__name__,
)
def test_a_module_and_its_spec_compute_the_same(module):
    activation = activations.from_module(module)
    assert activation is not None
    torch.testing.assert_close(activation.phi(GRID), module(GRID))
    torch.testing.assert_close(activations.to_module(activation)(GRID), module(GRID))
    assert Activation.decode(activation.encode()) == activation


@pytest.mark.parametrize("module", [nn.GELU(), nn.LeakyReLU(-0.1), nn.LeakyReLU(1.5), nn.Linear(1, 1)])
def test_an_unknown_module_is_no_activation(module):
    assert activations.from_module(module) is None
    with pytest.raises(ValueError, match="activation"):
        activations.resolve(module)


def test_a_subclass_with_its_own_forward_is_no_known_activation():
    class Odd(nn.ReLU):
        def forward(self, z):
            return z * 3

    assert activations.from_module(Odd()) is None


@pytest.mark.parametrize(("a", "b"), [(-0.1, 1.0), (2.0, 1.0), (0.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_slopes_that_are_not_ordered_are_refused(a, b):
    for make in (GeneralizedReLU, lambda a, b: Activation("generalized_relu", a, b)):
        with pytest.raises(ValueError, match="a, b: expected"):
            make(a, b)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="leaky_relu"):
        activations.resolve("swish")
    with pytest.raises(TypeError, match="activation"):
        activations.resolve(3)
