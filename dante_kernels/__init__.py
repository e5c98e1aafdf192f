"""Custom kernels that train neural networks by DANTE: one layer at a time, by stochastic normalized gradient descent."""

from . import ops
from .activations import Activation, GeneralizedReLU
from .training import Alternating, Explanation, History, NonFiniteError, RoundRobin, StackedAutoencoder, explain, fit

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Alternating",
    "Explanation",
    "GeneralizedReLU",
    "History",
    "NonFiniteError",
    "RoundRobin",
    "StackedAutoencoder",
    "explain",
    "fit",
    "ops",
]
