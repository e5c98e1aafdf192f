"""Training: schedules, the thin trainer that walks them, and what it records."""

from .explain import Explanation, explain
from .fit import fit
from .history import BlockRecord, History, RoundRecord
from .many import FitManyError, fit_many
from .schedules import Alternating, RoundRobin, Schedule, StackedAutoencoder
from .trainer import NonFiniteError

__all__ = [
    "Alternating",
    "BlockRecord",
    "Explanation",
    "FitManyError",
    "History",
    "NonFiniteError",
    "RoundRecord",
    "RoundRobin",
    "Schedule",
    "StackedAutoencoder",
    "explain",
    "fit",
    "fit_many",
]
