"""The theory of the DANTE papers in numbers: SLQC constants, the rates and counts of Theorem 8, a check of Definition 4.

Theorem numbers are those of the 2020 paper (10.1016/j.neunet.2020.07.026) unless another is named. They share a setting:

- f(W) sums over the outputs and takes the mean over the m rows, f(W) = 1/m sum_i ||y_i - phi(W x_i)||^2: the package's
  ``mse`` or ``binary_cross_entropy`` times the number of outputs, or its ``cross_entropy``. `epsilon` is a difference of f;
- every row of x has a Euclidean norm of at most 1, and there is no bias (one is a column of x, inside that norm);
- `norm` bounds ||W||_F wherever f is looked at, and ||W*||_F. Norms, distances and rates are lengths in W's unit;
- idealized: y_i = phi(W* x_i). Noisy: y_i in [0, 1], independent, with mean phi(<w*, x_i>), and one output.

Not all that was published holds: docs/theory.md has the counterexamples, and the proofs of what stands here instead. Every
function raises ValueError or TypeError that names the argument which is missing, out of range or of another type or shape.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import losses, reference
from .activations import Activation, resolve

Phi = Activation | str | nn.Module
Suffix = Sequence[tuple[Tensor, Tensor | None, Phi]]


@dataclass(frozen=True)
class Suggestion:
    """What Theorem 8 asks of SNGD on one layer.

    ``lr`` is the length of a step in the weights' unit, ``steps`` the number T of steps, ``batch_size`` the rows of each,
    drawn uniformly with replacement, and ``kappa`` the constant from which they come.
    """

    lr: float
    steps: int
    batch_size: int
    kappa: float


@dataclass(frozen=True)
class Slqc:
    """What `is_slqc` found.

    ``holds``: whether Definition 4 is met; ``branch``: 1 where f(W) - f(W*) <= epsilon, else 2 where the gradient points away
    from all of the ball around W*, else 0; ``gap``: f(W) - f(W*); ``radius``: of the largest ball around W* of which that is
    true (negative where it is not true of W* itself, so that no kappa serves; -inf where the gradient is zero); ``margin``:
    epsilon - gap on branch 1, else radius - epsilon / kappa, which is negative just where the definition fails. As a truth
    value it is ``holds``.
    """

    holds: bool
    branch: int
    margin: float
    gap: float
    radius: float

    def __bool__(self) -> bool:
        return self.holds


def layer_kappa(
    activation: Phi, norm: float | None = None, *, loss: str = "mse", epsilon: float | None = None, outputs: int = 1
) -> float:
    """The published kappa with which an idealized layer's f is (epsilon, kappa, W*)-SLQC at every ||W||_F <= norm.

    =================================  ===================================  ================================================
    activation, loss                   kappa                                source
    =================================  ===================================  ================================================
    generalized ReLU, mse              2 b^3 norm / a                       Theorem 1 (one output), 3 (any number)
    ReLU (a = 0), mse                  2 b^2 norm                           Corollaries 1, 2: do NOT hold as stated
    sigmoid, mse                       e^norm                               Hazan et al. 2015; layers: docs/theory.md
    identity, binary_cross_entropy     epsilon / (1 - e^-epsilon)^2         Theorem 6 (one output, any norm)
    identity, cross_entropy            outputs epsilon / (1-e^-epsilon)^2   Theorem 7 (any norm)
    =================================  ===================================  ================================================

    The cross-entropies take logits, so the theorems' sigmoid or softmax is in the loss. Corollaries 1 and 2 fail where the
    error sits at z < 0, where the gradient is zero; their constant serves where the part of f from z >= 0 alone exceeds
    epsilon.

    Args:
        activation: an `Activation`, a name or a module. tanh has no published constant, see `sharp_kappa`.
        norm: bound on ||W||_F and ||W*||_F (below 350 for sigmoid); for mse.
        loss: a loss's name.
        epsilon: accuracy in f; for the cross-entropies.
        outputs: number of outputs; for ``cross_entropy``.

    >>> layer_kappa("leaky_relu", 2.0)
    400.0
    """
    phi = _activation(activation, loss)
    if loss != "mse":
        epsilon, outputs = _positive("epsilon", epsilon), _outputs(loss, outputs)
        chance = math.expm1(-epsilon)
        return _in_range("epsilon", outputs * (epsilon / chance / chance))
    if phi.kind == "tanh":
        raise ValueError("activation: the papers give no kappa for tanh; sharp_kappa has one")
    if phi.kind == "sigmoid":
        return math.exp(_positive("norm", norm, below=350))
    norm = _positive("norm", norm)
    return _in_range("activation, norm", 2 * phi.b * phi.b * norm * (phi.b / phi.a if phi.a else 1))


def sharp_kappa(activation: Phi, norm: float | None = None, *, epsilon: float, loss: str = "mse") -> float:
    """A smaller kappa than the published one, for the same idealized layer; T of Theorem 8 shrinks with its square.

    For mse L^(3/2) sqrt(epsilon / s), where L = g(0) is phi's largest slope and s = g(-norm) the least within the norm; for a
    generalized ReLU b^(3/2) sqrt(epsilon / a), whatever the norm (needed for sigmoid and tanh only). For the
    cross-entropies, which are convex, a bound on the gradient, with any target: 1 for ``binary_cross_entropy`` (one output),
    sqrt(2) for ``cross_entropy``. ReLU has none (s = 0). Not in the papers: proved in docs/theory.md.

    >>> sharp_kappa(Activation("generalized_relu", 0.25, 1.0), epsilon=0.01)
    0.2
    """
    phi, epsilon = _activation(activation, loss), _positive("epsilon", epsilon)
    if loss != "mse":
        return 1.0 if loss == "binary_cross_entropy" else math.sqrt(2)
    depth = 1.0 if phi.kind == "generalized_relu" else _positive("norm", norm, below=350)
    steep, flat = phi.g(torch.tensor([0.0, -depth], dtype=torch.float64)).tolist()
    if flat == 0:
        raise ValueError(f"activation: expected one with a positive least slope, got {phi}")
    return _in_range("activation, epsilon", steep * math.sqrt(steep) * math.sqrt(epsilon / flat))


def inner_kappa(activation: Phi, norm: float, outer_norm: float, *, epsilon: float) -> float:
    """The published kappa of the inner layer of two, (a / (4 b^5 W2^2 W1) - W1 / epsilon)^-1: Theorems 4 and 5.

    Both layers have the generalized ReLU; W1 = `norm` bounds the inner layer's weights, W2 = `outer_norm` the outer ones.
    The theorems say nothing: kappa is positive, as Definition 4 asks, only for epsilon > 4 b^5 W2^2 W1^2 / a, and no f within
    these norms exceeds 4 b^4 W2^2 W1^2. For a small epsilon no kappa can serve (docs/theory.md). ValueError at or below
    that threshold.
    """
    phi = _leaky(activation)
    norm, outer_norm, epsilon = _positive("norm", norm), _positive("outer_norm", outer_norm), _positive("epsilon", epsilon)
    length = phi.b * phi.b * outer_norm * norm
    threshold = _in_range("activation, norm, outer_norm", 4 * length * length * (phi.b / phi.a))
    if epsilon <= threshold:
        raise ValueError(f"epsilon: Theorems 4 and 5 need more than 4 b^5 W2^2 W1^2 / a = {threshold:g}, got {epsilon:g}")
    return _in_range("norm, epsilon", threshold / norm * (epsilon / (epsilon - threshold)))


def noisy_kappa(activation: Phi, norm: float) -> float:
    """kappa of the noisy GLM (mse, one output): 2 b^2 (2 b norm + 1) / a for a generalized ReLU, e^norm for sigmoid.

    The f of `noisy_samples` rows is (epsilon, kappa, w*)-SLQC at a given w with probability 1 - delta. Theorem 2 has the
    idealized 2 b^3 norm / a here, with which it fails (docs/theory.md); the sigmoid's is as published.
    """
    phi = resolve(activation)
    if phi.kind == "sigmoid":
        return layer_kappa(phi, norm)
    phi, norm = _leaky(phi), _positive("norm", norm)
    return _in_range("activation, norm", 2 * phi.b * (2 * phi.b * norm + 1) * (phi.b / phi.a))


def noisy_samples(activation: Phi, norm: float, *, epsilon: float, delta: float) -> int:
    """Rows after which the noisy GLM is SLQC at a given w with probability 1 - delta, with `noisy_kappa`.

    Generalized ReLU: 288 b^4 norm^2 log(1/delta) / (a epsilon)^2, where Theorem 2 has norm^4. Sigmoid:
    4 norm^2 e^(2 norm) log(1/delta) / epsilon^2, where the papers have Omega(e^(2 norm) log(1/delta) / epsilon^2). From
    Hoeffding's inequality: docs/theory.md.
    """
    phi, kappa = resolve(activation), noisy_kappa(activation, norm)
    epsilon, delta = _positive("epsilon", epsilon), _positive("delta", delta, below=1)
    scale = (2 * norm * kappa if phi.kind == "sigmoid" else math.sqrt(288) * phi.b * norm * (phi.b / phi.a)) / epsilon
    return _ceil("norm, epsilon", scale * scale * -math.log(delta))


def steps(kappa: float, distance: float, epsilon: float) -> int:
    """T of Theorem 8: the least whole number >= (kappa distance / epsilon)^2, and at least 1.

    With `distance` = ||W_1 - W*||_F and f (epsilon, kappa, W*)-SLQC at the iterates, T steps of length epsilon / kappa against
    the normalized gradient of f meet a W_t, 1 <= t <= T + 1, with f(W_t) <= f(W*) + epsilon.

    >>> steps(kappa=4.0, distance=0.5, epsilon=0.1)
    400
    """
    ratio = _positive("kappa", kappa) / _positive("epsilon", epsilon)
    ratio *= 0.0 if _number("distance", distance) == 0 else _positive("distance", distance)
    return max(
        1, _ceil("kappa, distance, epsilon", ratio * ratio * (1 - 2.0**-50))
    )  # a whole number stays one in spite of rounding


def suggest(
    activation: Phi,
    *,
    epsilon: float,
    norm: float,
    loss: str = "mse",
    outputs: int = 1,
    distance: float | None = None,
    delta: float = 0.05,
    noisy: bool = False,
    outer_norm: float | None = None,
    kappa: float | None = None,
) -> Suggestion:
    """Rate, steps and mini-batch for SNGD on one layer: lr = epsilon / kappa, T = (kappa distance / epsilon)^2 and
    b = M^2 log(4 T / delta) / (2 epsilon^2), M a bound on f of a mini-batch within the norms: (2 b norm)^2 for a generalized
    ReLU, min(outputs, norm^2 / 4) for sigmoid, min(4 outputs, 4 norm^2) for tanh; noisy (2 b norm + 1)^2 and 1; with an outer
    layer (2 b^2 norm outer_norm)^2; norm + log 2 for ``binary_cross_entropy``, sqrt(2) norm + log(outputs) for
    ``cross_entropy``.

    With probability 1 - 2 delta the iterate W_t of least f_t(W_t) then has f(W_t) <= f(W*) + 3 epsilon. (Algorithm 1 of the
    papers returns the last iterate instead, of which the theorem says nothing.) These are worst cases, far slower than what
    trains well. ReLU gets numbers from a kappa that does not hold, and no promise.

    Args:
        activation: of the layer; ``"identity"`` for the cross-entropies.
        epsilon: accuracy in f: that of the package's ``mse`` times the number of outputs.
        norm: bound on ||W||_F at the start and at W*; for other than a generalized ReLU at every iterate (||W*||_F + distance
            is one).
        loss: a loss's name.
        outputs: number of the layer's outputs.
        distance: ||W_1 - W*||_F where it is known, else 2 norm.
        delta: chance of failure.
        noisy: the noisy GLM (mse, one output), whose mini-batches have at least ``noisy_samples(..., delta / T)`` rows.
        outer_norm: bound on the outer layer's weights, for the inner layer of two; see `inner_kappa`.
        kappa: a constant in place of the published one, such as `sharp_kappa`'s.

    Source: Theorem 8; the 2018 paper, section 3.3, and Hazan et al. 2015 for which iterate is meant.

    >>> suggest("leaky_relu", epsilon=0.01, norm=1.0, kappa=sharp_kappa("leaky_relu", epsilon=0.01)).steps
    40000
    """
    phi, outputs = _activation(activation, loss), _outputs(loss, outputs)
    epsilon, norm, delta = _positive("epsilon", epsilon), _positive("norm", norm), _positive("delta", delta, below=1)
    if (noisy or outer_norm is not None) and loss != "mse":
        raise ValueError(f"loss: expected 'mse' with noisy or outer_norm, got {loss!r}")
    if noisy and (outputs > 1 or outer_norm is not None):
        raise ValueError(f"noisy: its theorem has one layer with one output, got outputs={outputs}, outer_norm={outer_norm}")
    if kappa is not None:
        kappa = _positive("kappa", kappa)
    elif outer_norm is not None:
        kappa = inner_kappa(phi, norm, outer_norm, epsilon=epsilon)
    else:
        kappa = noisy_kappa(phi, norm) if noisy else layer_kappa(phi, norm, loss=loss, epsilon=epsilon, outputs=outputs)
    count = steps(kappa, 2 * norm if distance is None else distance, epsilon)
    largest = _largest_objective(phi, norm, loss, outputs, noisy, outer_norm) / epsilon
    rows = _ceil("norm, epsilon", largest * largest * (math.log(4) + math.log(count) - math.log(delta)) / 2)
    if noisy:
        rows = max(rows, noisy_samples(phi, norm, epsilon=epsilon, delta=delta / count))
    return Suggestion(_in_range("epsilon, kappa", epsilon / kappa), count, rows, kappa)


def objective(
    w: Tensor, x: Tensor, target: Tensor, *, activation: Phi, loss: str = "mse", suffix: Suffix = ()
) -> tuple[float, Tensor]:
    """f(W), summed over outputs, mean over rows, and its gradient (n_out, n_in), both in float64. Nothing is mutated.

    Args:
        w: (n_out, n_in), or (n_in,) for one output.
        x: (rows, n_in).
        target: values (rows, n_last), or (rows,) for one output; or class indices (rows,) int64.
        activation: phi of the layer; its subgradient at the kink is b.
        loss: a loss's name; the cross-entropies take the last layer's output as logits.
        suffix: (weight, bias or None, activation) of each frozen layer after this one.
    """
    code, phi = losses.code(loss), resolve(activation)
    weight, rows = _matrix("w", w), _matrix("x", x)
    if not isinstance(suffix, Sequence):
        raise TypeError(f"suffix: expected a sequence of layers, got {type(suffix).__name__}")
    layers = [_layer(layer) for layer in suffix]
    h = rows
    for s, b, p in [(weight, None, phi), *layers]:
        if s.shape[1] != h.shape[1]:
            raise ValueError(f"w, x, suffix: expected a weight with {h.shape[1]} inputs, got shape {tuple(s.shape)}")
        h = reference.layer_forward(h, s, b, p)
    if not isinstance(target, Tensor) or not (target.is_floating_point() or target.dtype == torch.int64):
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target: expected a tensor of values or of class indices int64, got {got}")
    values = target[:, None] if target.is_floating_point() and target.ndim == 1 else target
    if values.shape != (h.shape if values.is_floating_point() else h.shape[:1]):
        raise ValueError(f"target: expected values {tuple(h.shape)} or one class index a row, got shape {tuple(target.shape)}")
    values = losses.as_values(values, h.shape[1], h.dtype)
    if not values.isfinite().all():  # an index out of range has become a row of NaN
        expected = "finite values" if target.is_floating_point() else f"class indices from 0 to {h.shape[1] - 1}"
        raise ValueError(f"target: expected {expected}, got {target[~values.isfinite().all(dim=1)][0].tolist()}")
    gradient, _, _ = reference.layer_gradient(weight, None, rows, values, layers, phi, code)
    scale = 1 if loss == "cross_entropy" else h.shape[1]
    return scale * losses.value(code, h, values).item(), scale * gradient


def is_slqc(
    w: Tensor,
    w_star: Tensor,
    x: Tensor,
    target: Tensor,
    *,
    epsilon: float,
    kappa: float,
    activation: Phi,
    loss: str = "mse",
    suffix: Suffix = (),
) -> Slqc:
    """Whether f is (epsilon, kappa, W*)-SLQC in W by Definition 4, in float64.

    Branch 1: f(W) - f(W*) <= epsilon. Branch 2: the gradient is not zero, and <gradient, Y - W> <= 0 for all Y within
    epsilon / kappa of W*. The largest of these products is that of the Y along the gradient, so branch 2 is decided
    exactly: <gradient, W - W*> / ||gradient|| >= epsilon / kappa. No side condition of a theorem is checked here.

    Args:
        w: W, (n_out, n_in), or (n_in,) for one output.
        w_star: W*, of w's shape.
        epsilon, kappa: of the definition, positive.
        x, target, activation, loss, suffix: as in `objective`.

    >>> x = torch.tensor([[1.0]])
    >>> is_slqc(torch.tensor([-1.0]), torch.tensor([1.0]), x, x, epsilon=0.5, kappa=2.0, activation="relu").holds
    False
    """
    epsilon = _positive("epsilon", epsilon)
    asked = epsilon / _positive("kappa", kappa)
    start, star = _matrix("w", w), _matrix("w_star", w_star)
    if start.shape != star.shape:
        raise ValueError(f"w_star: expected the shape of w, {tuple(start.shape)}, got {tuple(star.shape)}")
    at_w, gradient = objective(w, x, target, activation=activation, loss=loss, suffix=suffix)
    at_star, _ = objective(w_star, x, target, activation=activation, loss=loss, suffix=suffix)
    gap, length = at_w - at_star, gradient.norm().item()
    radius = (gradient / length * (start - star)).sum().item() if length > 0 else -math.inf
    branch = 1 if gap <= epsilon else 2 if radius >= asked else 0
    return Slqc(branch > 0, branch, epsilon - gap if branch == 1 else radius - asked, gap, radius)


def _largest_objective(phi: Activation, norm: float, loss: str, outputs: int, noisy: bool, outer_norm: float | None) -> float:
    """M of Theorem 8: no mini-batch has a larger objective at weights within the norms."""
    if loss == "binary_cross_entropy":
        return norm + math.log(2)
    if loss == "cross_entropy":
        return math.sqrt(2) * norm + math.log(outputs)
    if outer_norm is not None:
        length = 2 * _leaky(phi).b * phi.b * norm * _positive("outer_norm", outer_norm)
        return length * length
    if phi.kind == "generalized_relu":
        length = 2 * phi.b * norm + noisy  # |y - phi(<w*, x>)| <= 1 where noisy
        return length * length
    if phi.kind == "tanh":
        return min(4.0 * outputs, 4 * norm * norm)
    return 1.0 if noisy else min(1.0 * outputs, norm * norm / 4)


def _activation(activation: Phi, loss: str) -> Activation:
    losses.code(loss)
    phi = resolve(activation)
    if loss != "mse" and phi != Activation.IDENTITY:
        raise ValueError(f"activation: expected 'identity' for {loss}, which takes logits, got {phi}")
    return phi


def _leaky(activation: Phi) -> Activation:
    phi = resolve(activation)
    if phi.kind != "generalized_relu" or phi.a == 0:
        raise ValueError(f"activation: expected a generalized ReLU with a > 0, got {phi}")
    return phi


def _number(name: str, value: object) -> float:
    """As a float, which a whole number may be too large for; numpy's are numbers too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _positive(name: str, value: object, below: float = math.inf) -> float:
    number = _number(name, value)
    if not 0 < number < below:
        raise ValueError(f"{name}: expected a number above 0 and below {below:g}, got {number:g}")
    return number


def _in_range(names: str, value: float) -> float:
    """A result, which is positive; ValueError where it came out as 0 or infinite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{names}: expected numbers of a usual size, with these a result came out as {value:g}")
    return value


def _outputs(loss: str, outputs: object) -> int:
    if isinstance(outputs, bool) or not isinstance(outputs, numbers.Integral):
        raise TypeError(f"outputs: expected a whole number, got {outputs!r}")
    count = int(outputs)
    if count < 1 or (loss == "binary_cross_entropy" and count > 1):
        raise ValueError(f"outputs: expected at least 1, and for binary_cross_entropy 1, got {count}")
    return count


def _ceil(name: str, value: float) -> int:
    if not math.isfinite(value):
        raise ValueError(f"{name}: too large, a count came out as {value}")
    return math.ceil(value)


def _matrix(name: str, t: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.ndim != 2 and (t.ndim != 1 or name == "x"):
        raise ValueError(f"{name}: expected a matrix, got shape {tuple(t.shape)}")
    if t.numel() == 0:
        raise ValueError(f"{name}: expected at least one row and one column, got shape {tuple(t.shape)}")
    if not t.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got {t[~t.isfinite()][0].item()}")
    return (t[None] if t.ndim == 1 else t).detach().double()


def _layer(layer: object) -> tuple[Tensor, Tensor | None, Activation]:
    """A layer of a suffix."""
    if not isinstance(layer, Sequence) or len(layer) != 3:
        got = f"{len(layer)} items" if isinstance(layer, Sequence) else type(layer).__name__
        raise TypeError(f"suffix: expected (weight, bias or None, activation) for each layer, got {got}")
    weight, bias = _matrix("suffix", layer[0]), layer[1]
    if bias is None:
        return weight, None, resolve(layer[2])
    if not isinstance(bias, Tensor):
        raise TypeError(f"suffix: expected a tensor or None as bias, got {type(bias).__name__}")
    if bias.shape != weight.shape[:1] or not bias.isfinite().all():
        raise ValueError(f"suffix: expected a finite bias ({len(weight)},), got shape {tuple(bias.shape)}")
    return weight, bias.detach().double(), resolve(layer[2])
