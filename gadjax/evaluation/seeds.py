"""Means over a few seeds, or starts, with the 95 % interval of Student's t."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from gadjax.evaluation.statistics import Estimate


def spread(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Over the first axis: the mean and half the width of its 95 % interval, which is NaN of one value."""
    found = np.asarray(values, np.float64)
    if len(found) < 2:
        return found.mean(axis=0), np.full(found.shape[1:], np.nan)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    return found.mean(axis=0), stdtrit(len(found) - 1, 0.975) * error


def over_seeds(values: ArrayLike) -> Estimate:
    """The mean of one value a seed with its interval; without one (NaN) for one seed."""
    mean, half = map(float, spread(values))
    return Estimate(mean, mean - half, mean + half)
