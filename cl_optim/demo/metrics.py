"""What is measured of a run, and over runs.

A run's accuracy matrix is R [T, T]: R[i, j] is the accuracy on task j after learning task i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def acc(r: Matrix) -> float:
    """Return the mean accuracy over all tasks at the end (Lopez-Paz & Ranzato 2017, eq. 2)."""
    return float(r[-1].mean())


def bwt(r: Matrix) -> float:
    """Return backward transfer, final minus just-learned accuracy.

    Lopez-Paz & Ranzato 2017, eq. 3: the mean over the T−1 tasks before the last; 0
    where there is only one task.
    """
    return float((r[-1] - r.diagonal())[:-1].mean()) if len(r) > 1 else 0.0


def forgetting(r: Matrix) -> float:
    """Return the best accuracy before the last task minus the final one.

    Chaudhry et al. 2018, eq. 3: the mean over the T−1 tasks before the last; 0
    where there is only one task.
    """
    return float((r[:-1].max(axis=0) - r[-1])[:-1].mean()) if len(r) > 1 else 0.0


def learning_accuracy(r: Matrix) -> float:
    """Return the mean accuracy on each task right after learning it: does it still learn?"""
    return float(r.diagonal().mean())


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % t-interval.

    Attributes:
        mean: The mean.
        half_width: Half of the interval's width; NaN for a single value.
    """

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return the interval of one value per seed; of paired differences, a paired interval."""
        from scipy.stats import t

        n = len(values)
        if n == 1:
            return cls(values[0], math.nan)
        standard_error = float(np.std(values, ddof=1)) / math.sqrt(n)
        return cls(float(np.mean(values)), float(t.ppf(0.975, n - 1)) * standard_error)
