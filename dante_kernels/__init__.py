"""Custom kernels that train neural networks by DANTE: one layer at a time, by stochastic normalized gradient descent."""

from . import ops, theory
from .activations import Activation, GeneralizedReLU
from .training import (
    Alternating,
    Explanation,
    FitManyError,
    History,
    NonFiniteError,
    RoundRobin,
    StackedAutoencoder,
    explain,
    fit,
    fit_many,
)

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Alternating",
    "Explanation",
    "FitManyError",
    "GeneralizedReLU",
    "History",
    "NonFiniteError",
    "RoundRobin",
    "StackedAutoencoder",
    "explain",
    "fit",
    "fit_many",
    "ops",
    "theory",
]
