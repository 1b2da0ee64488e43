"""How much one layer tells of the next: correlations, similarity and information of two layers on the same samples.

X (N, n) and Y (N, m) hold what two layers give on N samples. A dead or constant unit counts as zero flow everywhere.
What each needs of N, and what it ignores:

| flow | samples | unchanged by |
|---|---|---|
| ``signed_correlation`` | N ≥ 2, whatever the widths; each correlation is off by about 1/√N | shift, positive scale |
| ``absolute_correlation`` | the same; independent layers give about √(2/(πN)), not 0 | shift, scale and sign |
| ``rms_correlation`` | N ≥ 3, whatever the widths; the bias is removed | shift, scale and sign |
| ``linear_cka`` | N ≥ 4, whatever the widths; biased: N ≫ n + m | shift, rotations, one scale a layer |
| ``gaussian_information`` | N ≫ n + m; shrunk: any, but not valid below n + m | shift, scale; unshrunk: linear maps |
| ``copula_information`` | as Gaussian | rising maps of single units |

All ignore the order of units. From sums over batches: ``PairSums``, whose ``moments()`` has a method for every flow but
the copula's, which needs all samples at once. Correlation and information are those of a *model*: a deterministic
network has infinite information, and equal flow never certifies equal information (statement ``flow-no-upper``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from ellq.theory.arguments import Array, finite_array
from ellq.theory.pair_moments import PairMoments, centred, pair_moments

FLOWS: dict[str, Callable[[PairMoments], float]] = {
    "signed": PairMoments.signed,
    "absolute": PairMoments.absolute,
    "rms": PairMoments.rms,
    "cka": PairMoments.cka,
    "gaussian": PairMoments.gaussian,
}
"""The flows that second moments determine, each with its default estimator."""


def signed_correlation(X: npt.ArrayLike, Y: npt.ArrayLike) -> float:
    """Return the mean of all Pearson correlations between the units of two layers.

        Δ = (1/nm) Σ_ij ρ_ij = Cov(s_X, s_Y)        s_X = (1/n) Σ_i (x_i − x̄_i)/sd(x_i)

    The information flow of the released code of Gharatappeh & Yasaei Sekeh 2025. By the second form it costs
    O(N(n + m)), and it sees one direction of each layer: correlations of both signs cancel, and flipping the sign of a
    unit changes it. Ignores shift and positive scale of every unit, and the order of units.

    Args:
        X: shape (N, n), N ≥ 2, finite.
        Y: shape (N, m), on the same samples.

    Returns:
        Δ in [−1, 1], off by at most about 1/√N whatever the widths.

    Raises:
        TypeError: not numeric.
        ValueError: not two matrices of as many rows, fewer than two, no unit, or a NaN or infinite entry.

    Reference: definition as reconstructed from the authors' code; the second form ours, statement ``flow-probe``.
    """
    Z, V = centred(X, "X"), centred(Y, "Y")
    if len(Z) != len(V):
        raise ValueError(f"X has {len(Z)} samples but Y has {len(V)}. Pass both layers on the same samples.")
    return probe_covariance(Z, V)


def probe_covariance(Z: Array, V: Array) -> float:
    """Return the covariance of the averages over units of two standardised layers: (1/N) Σ_k s_Z(k)·s_V(k)."""
    return float(np.clip(Z.mean(axis=1) @ V.mean(axis=1) / len(Z), -1.0, 1.0))


def absolute_correlation(X: npt.ArrayLike, Y: npt.ArrayLike) -> float:
    """Return the mean absolute Pearson correlation between the units of two layers: (1/nm) Σ_ij |ρ_ij|.

    Nothing cancels. Ignores shift, scale and sign of every unit, and the order of units. Not corrected for chance:
    independent layers give about √(2/(πN)).

    Args:
        X: shape (N, n), N ≥ 2, finite.
        Y: shape (N, m), on the same samples.

    Returns:
        A value in [0, 1].

    Raises:
        TypeError, ValueError: as ``signed_correlation``.

    Reference: the information flow of the same group's earlier work on continual learning, over all classes at once.
    """
    return pair_moments(X, Y, standardised=True).absolute()


def rms_correlation(X: npt.ArrayLike, Y: npt.ArrayLike, *, corrected: bool = True) -> float:
    """Return the root mean square Pearson correlation between the units of two layers.

        √( (1/nm) Σ_ij [ρ_ij² − (1 − ρ_ij²)/(N − 2)] )        without the second term where not corrected

    Each corrected square has mean 0 for independent Gaussian units, whatever N; a negative mean of squares gives 0.
    Ignores shift, scale and sign of every unit, and the order of units.

    Args:
        X: shape (N, n), N ≥ 3, or 2 where not corrected; finite.
        Y: shape (N, m), on the same samples.
        corrected: whether what chance adds to the squares is removed.

    Returns:
        A value in [0, 1].

    Raises:
        TypeError, ValueError: as ``signed_correlation``; too few samples.

    Reference: the correction is that of the adjusted coefficient of determination, Ezekiel 1930.
    """
    return pair_moments(X, Y, standardised=True).rms(corrected=corrected)


def linear_cka(X: npt.ArrayLike, Y: npt.ArrayLike, *, unbiased: bool = True) -> float:
    """Return linear centred kernel alignment of two layers.

        CKA = HSIC(K, L)/√(HSIC(K, K)·HSIC(L, L))        K = XXᵀ, L = YYᵀ
        biased:   HSIC = ‖X_cᵀY_c‖_F²                     X_c, Y_c about their means
        unbiased: HSIC = [tr K̃L̃ + 1ᵀK̃1·1ᵀL̃1/((N−1)(N−2)) − 2·1ᵀK̃L̃1/(N−2)] / (N(N−3)),  K̃, L̃ without diagonals

    About the means 1ᵀK̃1 = −Σ‖x‖² and 1ᵀK̃L̃1 = Σ‖x‖²‖y‖², so both come from sums over samples. Ignores shift, rotations
    and one scale a layer; units of large variance decide. The biased form tends to 1 where N is below the widths.

    Args:
        X: shape (N, n), N ≥ 4, or 2 where biased; finite.
        Y: shape (N, m), on the same samples.
        unbiased: which estimate of HSIC; CKA, a ratio of them, is unbiased to first order only.

    Returns:
        A value at most 1 where biased; unbiased it may leave [0, 1] by chance. 0 where a layer is constant.

    Raises:
        TypeError, ValueError: as ``signed_correlation``; too few samples.

    Reference: Kornblith, Norouzi, Lee & Hinton 2019 (arXiv 1905.00414); unbiased HSIC: Song, Smola, Gretton, Bedo &
    Borgwardt 2012, Theorem 2; its form in sums over samples ours.
    """
    return pair_moments(X, Y).cka(unbiased=unbiased)


def gaussian_information(
    X: npt.ArrayLike, Y: npt.ArrayLike, *, shrinkage: float | None = None, corrected: bool = True
) -> float:
    """Return the mutual information that two layers would have if they were jointly Gaussian, in nats.

        I = ½[log det C_X + log det C_Y − log det C]        C ← (1 − λ)C + λ·Id, the joint correlation matrix

    Shrinking is adding noise: I_λ is exactly the information of √(1 − λ)·X + √λ·ξ and √(1 − λ)·Y + √λ·ζ, so it is
    finite and, on exact moments, never above I. By default λ is the oracle-approximating shrinkage
    (``oracle_shrinkage``), near 1 for layers that only chance correlates; nothing is subtracted then. With λ = 0 this
    is −½ Σ log(1 − κ_i²) of the sample canonical correlations, infinite where one layer is a linear function of the
    other without noise, and too large by exactly ``wishart_bias``, about nm/(2N), which is subtracted; it may then come
    out below 0.

    Ignores shift and scale of every unit and the order of units; with λ = 0 any invertible linear map of a layer.

    Args:
        X: shape (N, n), N ≥ 2, finite.
        Y: shape (N, m), on the same samples.
        shrinkage: λ in [0, 1]; None for the published rule.
        corrected: whether the bias is subtracted where λ = 0.

    Returns:
        The information in nats.

    Raises:
        TypeError, ValueError: as ``signed_correlation``; λ outside [0, 1]; N − 1 < n + m independent units with λ = 0.

    Warns:
        FewSamplesWarning: N ≤ n + m with λ > 0, where the value is mostly the shrinkage's.

    Reference: Gelfand & Yaglom 1957; shrinkage: Chen, Wiesel, Eldar & Hero 2010, equation 23; bias: Goodman 1963.
    """
    return pair_moments(X, Y, standardised=True).gaussian(shrinkage=shrinkage, corrected=corrected)


def copula_information(
    X: npt.ArrayLike, Y: npt.ArrayLike, *, shrinkage: float | None = None, corrected: bool = True
) -> float:
    """Return the Gaussian information of two layers whose units are first made Gaussian by their ranks, in nats.

        x_ki ← Φ⁻¹(rank_k(x_i)/(N + 1)), of ties the mean rank; then as ``gaussian_information``

    Ignores every rising map of a single unit. What it estimates is the information of a Gaussian copula: dependence
    that rank correlations of pairs do not show is not seen. The bias is that of Gaussian samples to first order.

    Args:
        X: shape (N, n), N ≥ 2, finite.
        Y: shape (N, m), on the same samples.
        shrinkage: as in ``gaussian_information``.
        corrected: as in ``gaussian_information``.

    Returns:
        The information in nats.

    Raises:
        TypeError, ValueError: as ``gaussian_information``.

    Reference: Liu, Lafferty & Wasserman 2009 for the transformation; Ince et al. 2017 (doi 10.1002/hbm.23471).
    """
    return gaussian_information(normal_scores(X, "X"), normal_scores(Y, "Y"), shrinkage=shrinkage, corrected=corrected)


def normal_scores(layer: npt.ArrayLike, name: str = "layer") -> Array:
    """Return Φ⁻¹(rank/(N + 1)) of every entry within its unit, of ties the mean rank; zeros for a constant unit.

    Args:
        layer: shape (N, n), N ≥ 2, finite.
        name: of the argument, for errors.

    Returns:
        Shape (N, n).

    Raises:
        TypeError: not numeric.
        ValueError: not a matrix of two rows or more, no unit, or a NaN or infinite entry.
    """
    from scipy.stats import rankdata  # half a second to load, for one function

    X = finite_array(layer, name, ndim=2)
    live = centred(layer, name, standardised=True).any(axis=0)
    scores = ndtri(rankdata(X, axis=0) / (len(X) + 1))
    return np.asarray(np.where(live, scores, 0.0))
