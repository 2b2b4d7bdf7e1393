"""Means and paired differences with their 95 % intervals.

The prompt is the unit: answers to one prompt are averaged first. An interval is the normal one, mean ± 1.96 standard errors
(ddof = 1), fit for some thirty prompts and more; it has no width where all values are equal, and is NaN for one prompt. Verdicts of
judges, few and on a short scale, have intervals of the bootstrap.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

QUANTILE = 1.959964  # of the normal distribution, at 97.5 %


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def by_prompt(ids: Iterable[str], values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The mean of the values of each prompt, in order of first appearance."""
    found: dict[str, list[float]] = {}
    for name, value in zip(ids, values, strict=True):
        found.setdefault(name, []).append(float(value))
    return {name: sum(group) / len(group) for name, group in found.items()}


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of the values, one per prompt, with its interval."""
    array = np.fromiter(values, np.float64)
    mean = float(array.mean())
    half = QUANTILE * float(array.std(ddof=1)) / math.sqrt(array.size) if array.size > 1 else math.nan
    return Estimate(mean, mean - half, mean + half)


def bootstrap(values: Iterable[float], resamples: int = 2000) -> Estimate:
    """The mean of the values, one per prompt, with the percentile interval of the bootstrap (Efron, 1979); the same every time.

    For few prompts and for values that pile up at the ends of a scale, as verdicts do. One prompt has no interval (NaN).
    """
    array = np.fromiter(values, np.float64)
    if array.size < 2:
        return Estimate(float(array.mean()), math.nan, math.nan)
    rng = np.random.default_rng(0)
    means = [array[rng.integers(0, array.size, array.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))


def paired_difference(
    values: Mapping[str, float], baseline: Mapping[str, float], interval: Callable[[Iterable[float]], Estimate] = estimate
) -> Estimate:
    """The mean of `values - baseline`, prompt by prompt: what prompts have in common does not widen the interval.

    Raises:
        ValueError: the two are not of the same prompts.
    """
    if values.keys() != baseline.keys():
        raise ValueError(f"{len(values.keys() ^ baseline.keys())} prompts are only on one side of a paired difference")
    return interval(value - baseline[name] for name, value in values.items())
