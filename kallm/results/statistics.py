"""How sure a figure is: intervals over seeds, paired contrasts, equivalence, and what could have been seen.

Legend of the array shapes: S seeds, I items. A *stratum* is a BBH task; held-out text has one stratum. A score is the
mean over strata of the weighted mean over items, so cross-entropy (weights: tokens) and macro accuracy are one formula.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit

__all__ = [
    "CONFIDENCE",
    "POWER",
    "Comparison",
    "Interval",
    "Variance",
    "compare",
    "decide",
    "find_components",
    "find_interval",
    "find_score",
    "find_wilson",
    "flip_signs",
    "holm",
    "item_error",
]

CONFIDENCE = 0.95
POWER = 0.8
ALPHA = 1 - CONFIDENCE
NUM_FLIPS = 9_999
_SMALLEST_P = 1e-30
"""SciPy's quantiles of Student's t turn to minus infinity at far smaller probabilities."""


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds and half the width of its interval; ``half`` is None where one seed gives no interval."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Variance:
    """The variance of a mean over seeds and items, in its two parts, each with its degrees of freedom.

    Quantiles are the weighted mean of the two Student quantiles, weighted by the parts: Cochran & Cox, Experimental
    Designs (2nd ed., 1957), section 4.14. With three seeds they cover 95 to 97 % wherever the variance comes from;
    Satterthwaite's single degree of freedom falls to 91 %, and a percentile bootstrap of three seeds to 75 %.
    """

    seeds: float
    items: float
    seed_df: int
    item_df: int

    @property
    def error(self) -> float:
        """The standard error."""
        return math.sqrt(self.seeds + self.items)

    def quantile(self, probability: float) -> float:
        """Return the upper quantile in standard errors: P(T <= quantile) = probability."""
        return self._upper(1 - probability)

    def tail(self, statistic: float) -> float:
        """Return P(T > statistic), by solving ``quantile`` for its probability."""
        if statistic < 0:
            return 1 - self.tail(-statistic)
        if statistic >= self._upper(_SMALLEST_P):
            return _SMALLEST_P
        lowest, highest = math.log(_SMALLEST_P), math.log(0.5)
        if statistic <= self._upper(0.5):
            return 0.5
        return math.exp(brentq(lambda log_p: self._upper(math.exp(log_p)) - statistic, lowest, highest, xtol=1e-12))

    def _upper(self, probability: float) -> float:
        parts = ((self.seeds, self.seed_df), (self.items, self.item_df))
        live = [(part, df) for part, df in parts if part > 0 and df > 0]
        total = sum(part for part, _ in live)
        return sum(part * float(-stdtrit(df, probability)) for part, df in live) / total


@dataclass(frozen=True)
class Comparison:
    """A paired difference and all that the verdict rests on; None where one seed (or no variation) leaves it open."""

    difference: float
    half: float | None
    error: float | None
    p: float | None
    p_equivalent: float | None
    detectable: float | None
    seeds: int
    items: int


def find_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean and Student's interval over seeds; one value has no interval.

    Errors: an empty sequence has no mean; that is the caller's fault.
    """
    assert len(values) > 0
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, None, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * error, len(values))


def find_score(
    values: Float[ndarray, "S I"], weights: Float[ndarray, " I"], strata: Int[ndarray, " I"]
) -> Float[ndarray, " S"]:
    """Return the mean over strata of the weighted mean over items, for every seed."""
    return (values * _shares(weights, strata)).sum(-1)


def find_components(
    values: Float[ndarray, "S I"], weights: Float[ndarray, " I"], strata: Int[ndarray, " I"]
) -> Variance:
    """Return the variance of the mean over seeds when both seeds and items are samples.

    Every seed answers the same items, so the model is the crossed one without replication,
    ``x[s, i] = mean + seed[s] + item[i] + rest[s, i]``, and its analysis of variance (Searle, Casella & McCulloch,
    Variance Components, 1992, chapter 4) gives the variance of the grand mean as ``V_seed + (V_item - V_rest)``:

    - ``V_seed`` = variance of the S seed scores, divided by S (it holds the rest already);
    - ``V_item`` = the sum over strata of ``n / (n - 1) * sum u[i]**2``, with ``u[i]`` the share of item i in the score
      times its distance from its stratum's mean: the ratio estimator of Cochran, Sampling Techniques (1977), section
      6.4, with one conversation or question as the cluster, as Miller, arXiv:2411.00640, section 2.2;
    - ``V_rest`` = the same of the residuals, divided by S (S - 1), taken off so that it is not counted twice.
    """
    num_seeds, num_items = values.shape
    shares = _shares(weights, strata)
    _, index, counts = np.unique(strata, return_inverse=True, return_counts=True)
    factors = (counts / np.maximum(counts - 1, 1))[index]
    means = np.stack([np.bincount(index, shares * row) for row in values]) * len(counts)
    distances = (values - means[:, index]) * shares
    over_seeds = distances.mean(0)
    item = float((over_seeds**2 * factors).sum())
    item_df = num_items - len(counts)
    if num_seeds == 1:
        return Variance(0.0, item, 0, item_df)
    rest = float(((distances - over_seeds) ** 2 * factors).sum()) / (num_seeds * (num_seeds - 1))
    seed = float(np.var((values * shares).sum(-1), ddof=1)) / num_seeds
    return Variance(seed, max(item - rest, 0.0), num_seeds - 1, item_df)


def item_error(values: Float[ndarray, "S I"], weights: Float[ndarray, " I"], strata: Int[ndarray, " I"]) -> float:
    """Return the standard error of the mean over seeds as far as it comes from the choice of items."""
    return math.sqrt(find_components(values.mean(0, keepdims=True), weights, strata).items)


def compare(
    left: Float[ndarray, "S I"],
    right: Float[ndarray, "S I"],
    weights: Float[ndarray, " I"],
    strata: Int[ndarray, " I"],
    *,
    margin: float | None = None,
    seeded: bool = True,
) -> Comparison:
    """Compare two variants over the same seeds and the same items; the difference is left minus right.

    ``margin`` asks for the two one-sided tests of equivalence (Schuirmann, 1987). ``seeded=False`` says that neither
    side has a seed, so that items are the only sample. ``detectable`` is the true difference that an interval would
    keep from zero with 80 % power: the sum of the two quantiles times the standard error.
    """
    values = left - right
    difference = float(find_score(values, weights, strata).mean())
    counts = {"seeds": len(values), "items": values.shape[1]}
    variance = find_components(values, weights, strata)
    if (seeded and len(values) == 1) or variance.error == 0:
        half = 0.0 if len(values) > 1 and variance.error == 0 else None
        return Comparison(difference, half, None, None, None, None, **counts)
    error = variance.error
    upper = variance.quantile(1 - ALPHA / 2)
    equivalent = None if margin is None else variance.tail((margin - abs(difference)) / error)
    return Comparison(
        difference=difference,
        half=upper * error,
        error=error,
        p=min(2 * variance.tail(abs(difference) / error), 1.0),
        p_equivalent=equivalent,
        detectable=(upper + variance.quantile(POWER)) * error,
        **counts,
    )


def decide(p: float | None, p_equivalent: float | None) -> str:
    """Return the verdict's word; inside the declared margin even a difference that is not zero is equivalent."""
    if p_equivalent is not None and p_equivalent < ALPHA:
        return "equivalent"
    return "different" if p is not None and p < ALPHA else "not distinguished"


def flip_signs(
    differences: Float[ndarray, " I"], weights: Float[ndarray, " I"], strata: Int[ndarray, " I"], *, seed: int = 0
) -> float:
    """Return the two-sided p of the paired sign-flip test over items, for these trained models as they are.

    Under the null every item's difference could as well have had the other sign (Fisher's randomisation test); 9,999
    random flips and the observed one.
    """
    parts = differences * _shares(weights, strata)
    observed = abs(parts.sum()) - 1e-9 * np.abs(parts).sum()
    generator = np.random.default_rng(seed)
    num_bytes = -(-parts.size // 8)
    as_extreme = 1
    for first in range(0, NUM_FLIPS, 250):
        shape = (min(250, NUM_FLIPS - first), num_bytes)
        bits = np.unpackbits(generator.integers(0, 256, shape, dtype=np.uint8), axis=1, count=parts.size)
        as_extreme += int((np.abs(2 * (bits @ parts) - parts.sum()) >= observed).sum())
    return as_extreme / (NUM_FLIPS + 1)


def find_wilson(rate: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's score interval of a rate out of ``n``; a mean over seeds may be no whole count of items."""
    z = float(ndtri((1 + confidence) / 2))
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p (Scandinavian Journal of Statistics 6, 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _shares(weights: Float[ndarray, " I"], strata: Int[ndarray, " I"]) -> Float[ndarray, " I"]:
    """Return each item's share in the score; the shares sum to one."""
    _, index = np.unique(strata, return_inverse=True)
    totals = np.bincount(index, weights)
    return weights / (totals[index] * len(totals))
