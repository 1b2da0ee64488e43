"""Second moments of two layers on the same examples, from arrays or from batches, and the flows they give.

A dead or constant unit has no correlation with anything: its flow is 0, and it counts in every mean as 0.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import digamma

from ellq.theory.accumulators import Gram
from ellq.theory.arguments import Array, finite_array, is_tensor, real_number

_RESOLVED = 1e-10  # eigenvalues of a correlation matrix below this share of the largest are taken for rounding
_LINEAR = 1e-9  # canonical correlations closer than this to 1 are taken for 1: a direction is passed on without noise


class FewSamplesWarning(UserWarning):
    """Fewer samples than an estimate needs for layers of these widths; it is made all the same."""


@dataclass(frozen=True, eq=False)
class PairMoments:
    """Second moments of layers X (N, n) and Y (N, m) about their means, and every flow that they determine.

    The flows do not change when a layer is multiplied by a number, so the moments may be in any units.

    Attributes:
        samples: N.
        xx: Σ (x − x̄)(x − x̄)ᵀ, shape (n, n); a row and column of zeros for a unit that is constant.
        xy: Σ (x − x̄)(y − ȳ)ᵀ, shape (n, m).
        yy: Σ (y − ȳ)(y − ȳ)ᵀ, shape (m, m).
        fourth: Σ‖x − x̄‖⁴, Σ‖x − x̄‖²‖y − ȳ‖² and Σ‖y − ȳ‖⁴, which unbiased CKA needs.
    """

    samples: int
    xx: Array
    xy: Array
    yy: Array
    fourth: tuple[float, float, float]

    @property
    def correlations(self) -> Array:
        """Pearson correlations of all pairs of units, shape (n, m); 0 where one is constant."""
        x, y = _inverse_roots(self.xx), _inverse_roots(self.yy)
        return np.asarray(np.clip(x[:, None] * self.xy * y, -1.0, 1.0))

    def signed(self) -> float:
        """Return the mean of all correlations, as ``signed_correlation``."""
        return float(self.correlations.mean())

    def absolute(self) -> float:
        """Return the mean absolute correlation, as ``absolute_correlation``."""
        return float(np.abs(self.correlations).mean())

    def rms(self, *, corrected: bool = True) -> float:
        """Return the root mean square correlation, as ``rms_correlation``."""
        squares = self.correlations**2
        if corrected:
            self._require(3, "rms_correlation with corrected=True")
            squares = squares - (1 - squares) / (self.samples - 2)
            squares = squares * np.outer(np.diag(self.xx) > 0, np.diag(self.yy) > 0)
        return math.sqrt(max(float(squares.mean()), 0.0))

    def cka(self, *, unbiased: bool = True) -> float:
        """Return linear CKA, as ``linear_cka``."""
        x, y = float(np.trace(self.xx)), float(np.trace(self.yy))
        if x == 0 or y == 0:
            return 0.0
        xx, xy, yy = self.xx / x, self.xy / math.sqrt(x) / math.sqrt(y), self.yy / y
        squares = [float((part**2).sum()) for part in (xx, xy, yy)]
        if not unbiased:
            self._warn_below(max(self.xy.shape), "Biased CKA tends to 1 there, whatever the layers")
            return min(squares[1] / math.sqrt(squares[0] * squares[2]), 1.0)
        self._require(4, "linear_cka with unbiased=True")
        N = self.samples
        fourth = (self.fourth[0] / x / x, self.fourth[1] / x / y, self.fourth[2] / y / y)
        # About the means rows and columns of K sum to 0, so those of K without its diagonal to −‖x_i‖².
        own_x, both, own_y = (
            square - each + 1 / ((N - 1) * (N - 2)) - 2 * each / (N - 2)
            for square, each in zip(squares, fourth, strict=True)
        )
        if own_x <= 0 or own_y <= 0:
            raise ValueError(
                f"Unbiased CKA has no value on these {N} samples: a layer's own similarity is estimated as not"
                " positive. Pass more samples, or unbiased=False."
            )
        return both / math.sqrt(own_x) / math.sqrt(own_y)

    def gaussian(self, *, shrinkage: float | None = None, corrected: bool = True) -> float:
        """Return the Gaussian mutual information, as ``gaussian_information``."""
        if shrinkage is not None and not 0 <= real_number(shrinkage, "shrinkage") <= 1:
            raise ValueError(f"shrinkage={shrinkage:g} is outside [0, 1]. Choose a share, or None for OAS.")
        self._require(2, "gaussian_information")
        C, n = self._live_correlations()
        m = len(C) - n
        if not n or not m:
            return 0.0
        if shrinkage == 0:
            return self._maximum_likelihood(C, n, corrected)
        rate = oracle_shrinkage(C, self.samples) if shrinkage is None else float(shrinkage)
        self._warn_below(n + m + 1, f"The Gaussian information is mostly that of the shrinkage, {rate:.3g}")
        S = (1 - rate) * C + rate * np.eye(len(C))
        # Rounding may leave C with eigenvalues of −1e-16, which a tiny shrinkage does not lift.
        parts = [np.linalg.slogdet(part) for part in (S[:n, :n], S[n:, n:], S)]
        if any(sign <= 0 for sign, _ in parts):
            raise ValueError(
                f"The correlations shrunk by {rate:.3g} are singular to float64. Choose a larger shrinkage, or None."
            )
        return max(0.5 * float(parts[0][1] + parts[1][1] - parts[2][1]), 0.0)

    def _live_correlations(self) -> tuple[Array, int]:
        """Return the joint correlation matrix of all units that vary, and how many of them are of X."""
        x, y = np.diag(self.xx) > 0, np.diag(self.yy) > 0
        joint = np.block([[self.xx, self.xy], [self.xy.T, self.yy]])
        live = np.concatenate([x, y])
        roots = _inverse_roots(joint)[live]
        C = np.clip(roots[:, None] * joint[np.ix_(live, live)] * roots, -1.0, 1.0)
        np.fill_diagonal(C, 1.0)
        return np.asarray(C), int(x.sum())

    def _maximum_likelihood(self, C: Array, n: int, corrected: bool) -> float:
        """Return −½ Σ log(1 − κ²) over the directions both layers have, less its bias."""
        X, Y = _whitening(C[:n, :n]), _whitening(C[n:, n:])
        rank_x, rank_y = X.shape[1], Y.shape[1]
        if self.samples - 1 < rank_x + rank_y:
            raise ValueError(
                f"{self.samples} samples are too few for {rank_x} + {rank_y} independent units: the sample covariance"
                " is singular, whatever the layers. Pass more samples, or shrinkage=None; signed, absolute and rms"
                " correlation and unbiased CKA stay valid."
            )
        kappa = np.linalg.svd(X.T @ C[:n, n:] @ Y, compute_uv=False)
        if kappa.size and kappa[0] >= 1 - _LINEAR:
            return math.inf
        plug_in = -0.5 * float(np.log1p(-(kappa**2)).sum())
        if not corrected:
            return plug_in
        return plug_in - wishart_bias(rank_x, rank_y, self.samples)

    def _require(self, least: int, what: str) -> None:
        if self.samples < least:
            raise ValueError(f"{what} needs at least {least} samples, got {self.samples}. Pass more.")

    def _warn_below(self, least: int, why: str) -> None:
        if self.samples < least:
            n, m = self.xy.shape
            warnings.warn(
                f"{self.samples} samples for layers of {n} and {m} units. {why}; signed, absolute and rms correlation"
                " and unbiased CKA stay valid.",
                FewSamplesWarning,
                stacklevel=4,
            )


class PairSums:
    """Second moments of two layers, fed in batches and mergeable: a ``Gram`` of [x, ‖x‖², y, ‖y‖²].

    Memory does not depend on the number of samples. Tensors on a GPU are added up there.

    Attributes:
        units: n and m.

    Args:
        x_units: n ≥ 1.
        y_units: m ≥ 1.

    Raises:
        TypeError: counts that are not whole numbers.
        ValueError: counts out of range.

    Reference: Chan, Golub & LeVeque 1983; the squared lengths, which make unbiased CKA a function of sums, are ours.
    """

    def __init__(self, x_units: int, y_units: int) -> None:
        self.units = (x_units, y_units)
        self._gram = Gram(x_units + y_units + 2)

    @property
    def samples(self) -> int:
        """Return N so far."""
        return self._gram.samples

    def update(self, x: npt.ArrayLike, y: npt.ArrayLike) -> None:
        """Add a batch: arrays or tensors of shapes (b, n) and (b, m), of any real dtype.

        Raises:
            TypeError: values that are not real numbers.
            ValueError: a shape that does not fit, a NaN or infinite entry, or fourth powers beyond float64.
        """
        for what, values, units in zip("xy", (x, y), self.units, strict=True):
            if np.ndim(values) != 2 or np.shape(values)[1] != units:
                raise ValueError(f"{what} has shape {tuple(np.shape(values))}, expected (b, {units}).")
        if np.shape(x)[0] != np.shape(y)[0]:
            raise ValueError(f"x has {np.shape(x)[0]} rows but y has {np.shape(y)[0]}. Pass the same examples.")
        self._gram.update(_beside(x, y))

    def merge(self, other: PairSums) -> PairSums:
        """Return the sums of both sets of samples; neither part changes.

        Raises:
            ValueError: the two are of layers of other widths.
        """
        if self.units != other.units:
            raise ValueError(
                f"Cannot merge sums of layers of {self.units} units with {other.units}. Accumulate the same layers."
            )
        merged = PairSums(*self.units)
        merged._gram = self._gram.merge(other._gram)
        return merged

    def moments(self, *, least_spread: float = 4 * 2.0**-52) -> PairMoments:
        """Return the moments of the samples so far.

        Args:
            least_spread: a unit counts as constant up to this standard deviation, relative to its root mean square:
                a few roundings of the numbers that were fed.

        Raises:
            ValueError: fewer than two samples were accumulated.
        """
        if self.samples < 2:
            raise ValueError(f"{self.samples} samples have no correlations. Feed at least two.")
        (n, m), N, gram = self.units, self._gram.samples, self._gram.to(None)
        G, mean = gram.xx, gram.x_mean
        x, y = slice(0, n), slice(n + 1, n + 1 + m)
        # ‖x − x̄‖² = ‖x‖² − 2x̄ᵀx + ‖x̄‖² is linear in what was accumulated.
        length_x, length_y = np.zeros(len(G)), np.zeros(len(G))
        length_x[x], length_x[n] = -2 * mean[x], 1.0
        length_y[y], length_y[-1] = -2 * mean[y], 1.0
        traces = float(np.trace(G[x, x])), float(np.trace(G[y, y]))
        fourth = (
            float(length_x @ G @ length_x) + traces[0] * traces[0] / N,
            float(length_x @ G @ length_y) + traces[0] * traces[1] / N,
            float(length_y @ G @ length_y) + traces[1] * traces[1] / N,
        )
        variances = np.diag(G) / N
        live = variances > least_spread**2 * (mean**2 + variances)
        G = G * np.outer(live, live)
        return PairMoments(N, G[x, x], G[x, y], G[y, y], fourth)


def pair_moments(X: npt.ArrayLike, Y: npt.ArrayLike, *, standardised: bool = False) -> PairMoments:
    """Return the moments of two layers on the same samples, in two passes of float64.

    Args:
        X: shape (N, n), N ≥ 2, n ≥ 1, finite.
        Y: shape (N, m), m ≥ 1, finite.
        standardised: with every unit divided by its standard deviation, which correlations and information ignore and
            CKA does not; sizes from 1e-300 to 1e300 may then meet in one layer.

    Returns:
        The moments. A unit whose standard deviation is within four roundings of its dtype counts as constant.

    Raises:
        TypeError: not numeric.
        ValueError: not two matrices of as many rows, fewer than two, no unit, or a NaN or infinite entry.
    """
    Z, V = (centred(layer, name, standardised=standardised) for layer, name in ((X, "X"), (Y, "Y")))
    if len(Z) != len(V):
        raise ValueError(f"X has {len(Z)} samples but Y has {len(V)}. Pass both layers on the same samples.")
    lengths = [np.square(part).sum(axis=1) for part in (Z, V)]
    fourth = float(lengths[0] @ lengths[0]), float(lengths[0] @ lengths[1]), float(lengths[1] @ lengths[1])
    return PairMoments(len(Z), Z.T @ Z, Z.T @ V, V.T @ V, fourth)


def centred(layer: npt.ArrayLike, name: str, *, standardised: bool = True) -> Array:
    """Return a layer about its means, every unit over its standard deviation, or all over one power of two.

    Args:
        layer: shape (N, n), N ≥ 2, n ≥ 1, finite.
        name: of the argument, for errors.
        standardised: whether every unit gets standard deviation 1.

    Returns:
        Shape (N, n); zeros for a unit that is constant.

    Raises:
        TypeError: not numeric.
        ValueError: not a matrix of two rows or more, no unit, or a NaN or infinite entry.
    """
    X = finite_array(layer, name, ndim=2)
    if len(X) < 2 or X.shape[1] == 0:
        raise ValueError(f"{name} has shape {X.shape}. Pass at least two samples of at least one unit.")
    # By powers of two to at most 1 in size: exact, and no square leaves float64.
    exponents = np.frexp(np.abs(X).max(axis=0))[1]
    Z = np.ldexp(X, -exponents)
    sizes = np.square(Z).mean(axis=0)
    Z = Z - Z[0]  # exactly 0 where a unit is constant
    Z -= Z.mean(axis=0)
    Z -= Z.mean(axis=0)  # what rounding of the mean has left
    variances = np.square(Z).mean(axis=0)
    live = variances > (4 * precision_of(layer)) ** 2 * sizes
    if standardised:
        return np.asarray(Z * np.where(live, 1 / np.sqrt(np.where(live, variances, 1.0)), 0.0))
    largest = int(exponents[live].max(initial=-(2**15)))
    with np.errstate(under="ignore"):
        return np.asarray(np.ldexp(np.where(live, Z, 0.0), np.where(live, exponents - largest, 0)))


def precision_of(values: Any) -> float:
    """Return the spacing of the numbers next to 1 in the dtype of an array or tensor; float64's for other types."""
    dtype = getattr(values, "dtype", None)
    if is_tensor(values) and values.is_floating_point():
        import torch

        return float(torch.finfo(values.dtype).eps)
    if isinstance(dtype, np.dtype) and dtype.kind == "f":
        return max(float(np.finfo(dtype).eps), 2.0**-52)
    return 2.0**-52


def oracle_shrinkage(C: Array, samples: int) -> float:
    """Return by how much a sample correlation matrix of p units is shrunk to the identity, in [0, 1].

        λ = min(1, [(1 − 2/p)·tr C² + p²] / [(ν + 1 − 2/p)·(tr C² − p)])        ν = N − 1

    The oracle-approximating shrinkage for Gaussian samples, of covariance matrices of equal variances, used for
    correlations: near 1 where they are what chance gives, of order p/N where they are not.

    Args:
        C: sample correlation matrix, shape (p, p), p ≥ 1.
        samples: N ≥ 2.

    Returns:
        λ.

    Reference: Chen, Wiesel, Eldar & Hero 2010 (doi 10.1109/TSP.2010.2053029), equation 23.
    """
    p = len(C)
    square = float((C**2).sum())
    excess = square - p
    if excess <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / p) * square + p**2) / ((samples - 2 / p) * excess))


def wishart_bias(n: int, m: int, samples: int) -> float:
    """Return by how much the maximum-likelihood information of Gaussian layers is too large on average.

        ½(B_n + B_m − B_{n+m})        B_p = Σ_{i=1}^p ψ((N − i)/2),  about nm/(2N) for N ≫ n + m

    Exact for every covariance, as E log det of a Wishart matrix is.

    Args:
        n: independent units of the one layer.
        m: independent units of the other.
        samples: N > n + m.

    Returns:
        The bias in nats, ≥ 0.

    Reference: Goodman 1963; Misra, Singh & Demchuk 2005 (doi 10.1016/j.jmva.2003.10.003).
    """
    terms = digamma((samples - np.arange(1, n + m + 1)) / 2)
    return 0.5 * float(terms[:n].sum() - terms[m:].sum())


def _whitening(C: Array) -> Array:
    """Return W with WᵀCW = Id on the directions that C has, shape (p, rank)."""
    values, vectors = np.linalg.eigh(C)
    kept = values > _RESOLVED * values[-1]
    return np.asarray(vectors[:, kept] / np.sqrt(values[kept]))


def _inverse_roots(S: Array) -> Array:
    diagonal = np.diag(S)
    return np.where(diagonal > 0, 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0)), 0.0)


def _beside(x: Any, y: Any) -> Any:
    """Return the rows [x, ‖x‖², y, ‖y‖²] in float64, as a tensor where both are tensors."""
    if is_tensor(x) and is_tensor(y):
        import torch

        tensors = [part.detach().to("cpu" if part.device.type == "mps" else part.device).double() for part in (x, y)]
        return torch.cat([part for t in tensors for part in (t, (t * t).sum(1, keepdim=True))], dim=1)
    arrays = [finite_array(x, "x"), finite_array(y, "y")]
    with np.errstate(over="ignore"):
        return np.hstack([part for a in arrays for part in (a, np.square(a).sum(1, keepdims=True))])
