"""Upper limits of a mean and of a share, from independent samples and at any number of them.

The randomness is that of the samples: independent of one another, of one law. δ is the probability that a limit falls
below what it limits, which must be fixed before the samples are seen: to limit one of N at choice, use δ/N.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import betaincc

from ellq.theory.arguments import Array, count, finite_array, nonnegative, open_fraction
from ellq.theory.rounding import UNIT_ROUNDOFF, norm_error, outward, product_error

_LARGEST_STAKE = 0.9  # short of 1, so that no logarithm is of a number near 0
_BINOMIAL = 1e-9  # relative error allowed SciPy's incomplete beta function, which is good to about 1e-13


def mean_upper_limit(values: npt.ArrayLike, *, largest: float, delta: float) -> float:
    """Limit a mean from above with probability 1 − δ, by betting that the samples fall short of it.

        the least μ with  mean over λ of Π_i (1 + λ(μ − Y_i)/b) ≥ 1/δ        λ = 0.9·2^(−j), j = 0 … ⌈½ log₂ n⌉ + 1

    Each product is the wealth of a gambler who stakes the share λ on every sample. For the true mean its expectation is
    1, so by Markov's inequality it reaches 1/δ with probability at most δ. Adapts to a variance V nobody knows: about
    √(2V·ln(1/δ)/n) above the mean of the samples for large n, and b·ln(1/δ)/0.9n at the least. Scales with the values,
    ignores their order, never above b. Rounded up.

    Args:
        values: Y, shape (n,), n ≥ 1, each in [0, b].
        largest: b ≥ 0, which no sample can exceed, seen or unseen; in the units of the values.
        delta: δ in (0, 1).

    Returns:
        The limit, in the units of the values.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: no values, a value outside [0, b], or ``delta`` outside (0, 1).

    Reference: after Waudby-Smith & Ramdas 2024 (arXiv 2010.09686); the mixture of fixed stakes ours.
    """
    Y, b = _bounded(values, largest)
    need = -math.log(open_fraction(delta, "delta"))
    if b == 0:
        return 0.0
    n, scaled = Y.size, Y / b
    stakes = _LARGEST_STAKE * 0.5 ** np.arange(2 + math.ceil(math.log2(n) / 2))
    # Each 1 + λ(μ − Y) ≥ 0.1 is off by 3u, its logarithm by 30u and 8u of its own, the sum by n·u times Σ|log| ≤ 2.4n.
    need += math.log(stakes.size) + UNIT_ROUNDOFF * (n * (40.0 + 2.5 * n) + 100)

    def covers(mean: float) -> bool:
        wealth = np.log1p(stakes[:, None] * (mean - scaled)).sum(axis=1)
        return bool(np.logaddexp.reduce(wealth) >= need)

    if not covers(1.0):
        return b
    low, high = float(scaled.mean()), 1.0
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if covers(middle) else (middle, high)
    return min(float(outward(high * b, product_error(1))), b)


def mean_upper_limit_bernstein(values: npt.ArrayLike, *, largest: float, delta: float) -> float:
    """Limit a mean from above with probability 1 − δ, by the variance of the samples.

        Ȳ + √(2V·ln(2/δ)/n) + 7b·ln(2/δ)/(3(n − 1))        V = Σ(Y_i − Ȳ)²/(n − 1)

    In closed form, and never much better than ``mean_upper_limit``. Scales with the values, ignores their order.
    Rounded up.

    Args:
        values: Y, shape (n,), n ≥ 2, each in [0, b].
        largest: b ≥ 0, which no sample can exceed, seen or unseen; in the units of the values.
        delta: δ in (0, 1).

    Returns:
        The limit, in the units of the values; above b where it says nothing.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: fewer than two values, a value outside [0, b], or ``delta`` outside (0, 1).

    Reference: Maurer & Pontil 2009 (arXiv 0907.3740), Theorem 4.
    """
    Y, b = _bounded(values, largest, least=2)
    log = math.log(2) - math.log(open_fraction(delta, "delta"))
    if b == 0:
        return 0.0
    n, scaled = Y.size, Y / b
    mean = float(outward(scaled.mean(), norm_error(n, 1.0)))
    # (Y − Ȳ)² is off by 2|Y − Ȳ|·(n + 2)u at most, so is their mean: take the rounded mean for Ȳ, which can only add.
    variance = float(outward(((scaled - mean) ** 2).sum() / (n - 1), norm_error(n, 1.0))) + 4 * (n + 2) * UNIT_ROUNDOFF
    limit = mean + math.sqrt(2 * variance * log / n) + 7 * log / (3 * (n - 1))
    with np.errstate(over="ignore"):
        return float(outward(limit * b, product_error(8)))


def share_upper_limit(successes: int, samples: int, *, delta: float) -> float:
    """Limit a probability from above with probability 1 − δ, by how often it happened.

        the p with  P(Bin(n, p) ≤ s) = δ;   1 − δ^(1/n) ≤ ln(1/δ)/n for s = 0

    Exact: of all limits that rise with s it is the lowest. 1 for s = n. Rounded up.

    Args:
        successes: s, 0 ≤ s ≤ n.
        samples: n ≥ 1.
        delta: δ in (0, 1).

    Returns:
        The limit, in (0, 1].

    Raises:
        TypeError: a count is not a whole number.
        ValueError: ``samples`` < 1, ``successes`` outside [0, n], or ``delta`` outside (0, 1).

    Reference: Clopper & Pearson 1934.
    """
    n = count(samples, "samples", low=1, high=2**53)
    s = count(successes, "successes", low=0, high=n)
    chance = open_fraction(delta, "delta")
    if s == n:
        return 1.0
    if s == 0:
        return min(float(outward(-math.expm1(math.log(chance) / n), product_error(3))), 1.0)
    low, limit = 0.0, 1.0  # P(Bin(n, p) ≤ s) falls with p
    while low < (middle := (low + limit) / 2) < limit:  # until there is no number between them
        low, limit = (low, middle) if betaincc(s + 1, n - s, middle) <= chance * (1 - _BINOMIAL) else (middle, limit)
    return limit


def _bounded(values: npt.ArrayLike, largest: float, least: int = 1) -> tuple[Array, float]:
    Y, b = finite_array(values, "values", ndim=1), nonnegative(largest, "largest")
    if Y.size < least:
        raise ValueError(f"values has {Y.size} entries. Pass at least {least}.")
    if Y.min() < 0 or Y.max() > b:
        raise ValueError(f"values reach from {Y.min():g} to {Y.max():g}, outside [0, {b:g}]. Pass a larger largest.")
    return Y, b
