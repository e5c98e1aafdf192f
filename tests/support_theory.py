"""Random cases for the theorems, and what the tests of `dante_kernels.theory` share.

They draw W far from and near to W*, small and large norms, slopes far apart and alike, rows that differ and rows that are
one, and epsilon from a millionth of the gap f(W) - f(W*) to nearly all of it.
"""

import math

import torch
from hypothesis import assume, settings
from hypothesis import strategies as st

from dante_kernels import reference, theory
from dante_kernels.activations import Activation

MANY = settings(max_examples=300, deadline=None)
fractions = st.just(0.999) | st.floats(math.log(1e-6), math.log(0.999)).map(math.exp)


def leaky(a, b=1.0):
    return Activation("generalized_relu", a, b)


def rows_of(*rows):
    return torch.tensor(rows, dtype=torch.float64)


slopes = st.builds(
    lambda b, ratio: leaky(ratio * b, b), st.sampled_from([0.05, 0.5, 1.0, 4.0]), st.sampled_from([1, 0.999, 0.5, 0.01, 1e-4])
)


def direction(generator, *shape):
    """Random, with a Frobenius norm of 1 over the last two dimensions."""
    t = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return t / t.norm()


@st.composite
def layers(draw, widest=4, largest_norm=30.0):
    """(W, W*, x, norm): W and W* within the norm, the rows of x in the unit ball."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n_in, n_out, rows = draw(st.integers(1, 5)), draw(st.integers(1, widest)), draw(st.integers(1, 8))
    x = torch.randn(rows, n_in, generator=generator, dtype=torch.float64)
    x /= x.norm(dim=1, keepdim=True)
    x *= draw(st.sampled_from([torch.ones(1, 1), torch.rand(rows, 1, generator=generator)]))
    if draw(st.booleans()):
        x = x[:1].repeat(rows, 1)
    norm = draw(st.floats(math.log(0.05), math.log(largest_norm)).map(math.exp))
    w_star = norm * draw(st.sampled_from([1.0, 0.7, 0.01])) * direction(generator, n_out, n_in)
    anywhere = direction(generator, n_out, n_in)
    w = draw(st.sampled_from([-w_star, 0 * w_star, 0.999 * w_star + 0.001 * norm * anywhere, norm * anywhere]))
    return w, w_star, x, norm


def idealized(w_star, x, phi):
    return reference.layer_forward(x, w_star, None, phi)


def gap_of(w, w_star, x, target, **setting):
    return theory.objective(w, x, target, **setting)[0] - theory.objective(w_star, x, target, **setting)[0]


def assert_slqc(w, w_star, x, target, fraction, kappa_of, **setting):
    """SLQC by its second branch, at an epsilon which is this fraction of the gap."""
    gap = gap_of(w, w_star, x, target, **setting)
    assume(gap > 1e-9 if setting.get("loss", "mse") != "mse" else gap > 0)
    kappa = kappa_of(fraction * gap)
    found = theory.is_slqc(w, w_star, x, target, epsilon=fraction * gap, kappa=kappa, **setting)
    assert found.holds, (found, kappa)
    assert found.branch == 2
