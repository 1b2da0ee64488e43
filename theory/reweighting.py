"""Few terms for many in a Hilbert space: the heaviest keep their weights, equal weights on others represent the tail.

f = Σ θ_j X_j, and only the inner products Σ = E[XXᵀ] are known. Dropping the tail errs by up to its ℓ1 norm when the
X_j are correlated; what stays can make up for what goes, and the error falls by another √k. ``interpolative.refit``
finds the best weights of what stays; here they are bounded, ‖θ̂‖_1 ≤ ‖θ‖_1, and so is the error beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ellq.theory.approximation import best_term_errors, tightest_bounds
from ellq.theory.arguments import (
    Array,
    Indices,
    count,
    finite_array,
    nonnegative,
    order_below_one,
    refuse_mixed_devices,
)
from ellq.theory.input_moments import layer_errors, moment_matrix
from ellq.theory.rounding import UNIT_ROUNDOFF, log_error, outward, product_error, product_up, tail_error
from ellq.theory.selection import Progress

_SHARES = 8  # numbers of heavy entries are searched in steps of an eighth of the retained count


@dataclass(frozen=True)
class Reweighted:
    """A vector with few non-zero entries that stands for another.

    Attributes:
        weights: θ̂, shape (d,), at most ``retained`` non-zeros, ‖θ̂‖_1 ≤ ‖θ‖_1.
        heavy: h, how many entries keep their own weight.
        picks: the entries that represent the tail, in order of choice, shape (m,); one picked twice weighs double.
        error: ‖Σ (θ_j − θ̂_j) X_j‖, rounded up; never above ``bound``.
        bound: what is proved before a pick is made, rounded up.
    """

    weights: Array
    heavy: int
    picks: Indices
    error: float
    bound: float


def reweight(
    w: npt.ArrayLike,
    gram: npt.ArrayLike,
    retained: int,
    *,
    heavy: int | None = None,
    entry_error: float = 0.0,
    progress: Progress = iter,
) -> Reweighted:
    """Represent Σ θ_j X_j by few terms: h keep their weights, k − h picks of equal weight represent the rest, ω.

        ‖f − f̂‖² ≤ (A·Σ_tail |θ_j|·‖X_j‖² − ‖ω‖²)/(k − h) ≤ K²A²/(k − h)        A = ‖tail‖_1,  K = max ‖X_j‖

    The i-th pick is the j of the tail that brings the sum of the picks' sign(θ_j)·A·X_j nearest to i·ω, which is no
    worse than the average over picks drawn with probability |θ_j|/A; it weighs sign(θ_j)·A/(k − h).

    With ``heavy`` given, the h largest |θ_j| keep their weights. Without, several h from 0 to k are tried, the heavy
    ones being the largest by |θ_j| and by |θ_j|·‖X_j‖, and what has the least error is returned. h = k is plain
    dropping, so the error is never above that of dropping by either rule. Scales with θ and with the X_j; ignores
    their order and common signs, ties aside; an input that is 0 gets no weight. Time O(d·k) for each h, and d³ for
    checking ``gram``.

    Args:
        w: θ, shape (d,), finite.
        gram: Σ = E[XXᵀ], shape (d, d), symmetric positive semidefinite, as from ``second_moments``.
        retained: k, 0 ≤ k ≤ d.
        heavy: h, 0 ≤ h ≤ k; None searches.
        entry_error: by how much entry (i, j) of ``gram`` may be off, relative to √(Σ_ii Σ_jj): ``moment_error(n)`` for
            ``second_moments`` of n samples; 0 takes ``gram`` as exact.
        progress: wraps the range of the h that are tried, to show a bar.

    Returns:
        The new weights, their error and its bound.

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: ``retained`` outside [0, d], ``heavy`` outside [0, k], shapes that do not fit, an entry that is not
            finite, ``entry_error`` < 0, or a matrix that is no second-moment matrix.
        OverflowError: a new weight exceeds float64.

    Reference: ours; proof in docs/theorems.md, ``hilbert-sampling``. To sample a tail is from Gao, Ing & Yang 2013,
    Theorem 2.
    """
    refuse_mixed_devices(w=w, gram=gram)
    theta = finite_array(w, "w", ndim=1)
    S, half = moment_matrix(gram)
    d = theta.size
    if len(S) != d:
        raise ValueError(f"gram has shape {S.shape} but w has {d} entries. Pass one row and column for each.")
    k = count(retained, "retained", low=0, high=d)
    given = None if heavy is None else count(heavy, "heavy", low=0, high=k)
    strays = nonnegative(entry_error, "entry_error")
    S = (S + S.T) / 2
    splits: list[tuple[Indices, int]] = []
    proved: list[float] = []
    for order in _orders(theta, S) if given is None else _orders(theta, S)[:1]:
        bounds = _bounds(theta, S, half, order, k, strays)
        if given is None:
            tried = sorted({int(bounds.argmin()), *(round(k * i / _SHARES) for i in range(_SHARES + 1))})
        else:
            tried = [given]
        splits += [(order, h) for h in tried]
        proved += [float(bounds[h]) for h in tried]
    weights, picks = np.zeros((len(splits), d)), []
    for i in progress(range(len(splits))):
        order, h = splits[i]
        weights[i, order[:h]] = theta[order[:h]]
        picks.append(_pick(theta, S, order[h:], k - h))
        weights[i] += _equal_weights(theta, order[h:], picks[i])
    # A difference is off by u of itself, which ``layer_errors`` leaves room for.
    errors = np.minimum(layer_errors(theta - weights, gram, entry_error=strays), proved)
    best = int(errors.argmin())
    return Reweighted(weights[best], splits[best][1], picks[best], float(errors[best]), min(proved))


def _orders(theta: Array, S: Array) -> list[Indices]:
    """Return the entries that matter, heaviest first: by |θ_j|, and by |θ_j|·‖X_j‖ where that differs."""
    matter = np.flatnonzero((theta != 0) & S.any(axis=1))
    weight, length = np.abs(theta[matter]), np.sqrt(np.diag(S)[matter])
    by_weight = np.argsort(-weight, kind="stable")
    by_length = np.argsort(-length[by_weight] * weight[by_weight], kind="stable")
    is_same = (by_length == np.arange(matter.size)).all()
    return [matter[by_weight]] if is_same else [matter[by_weight], matter[by_weight[by_length]]]


def _bounds(theta: Array, S: Array, half: int, order: Indices, k: int, entry_error: float) -> Array:
    """Return the bound for every h = 0 … k, the first h of ``order`` being heavy; the moments are 4^half·S."""
    exponent = int(np.frexp(np.abs(theta).max(initial=0.0))[1])
    v = np.ldexp(theta, -exponent)
    bounds = np.zeros(k + 1)  # 0 where all entries that matter are heavy
    most = min(k, order.size)
    magnitude, energy, reach = np.abs(v[order]), np.diag(S)[order], np.abs(S).max(axis=1, initial=0.0)[order]
    # Sums over the tail from its small end, so that each is accurate to its own size; so is ‖ω‖².
    mass = _from_the_end(np.add, magnitude)[: most + 1]
    spread = _from_the_end(np.add, magnitude * energy)[: most + 1]
    largest = _from_the_end(np.maximum, reach)[: most + 1]
    norms = np.zeros(most + 1)
    tail = np.zeros_like(v)
    tail[order[most:]] = v[order[most:]]
    products = S @ tail
    norms[most] = tail @ products
    for i in reversed(range(most)):
        j = order[i]
        norms[i] = norms[i + 1] + v[j] * (2 * products[j] + v[j] * S[j, j])
        products += v[j] * S[j]
    h = np.arange(most + 1)
    picks = np.maximum(k - h, 1)
    squares = np.maximum(np.where(h < k, mass * spread - norms, norms), 0.0) / picks
    # What rounding adds, in this and in the choice of picks, and what the entries' own errors do: see the proof.
    slack = log_error(24.0 * v.size + 120) + 3 * log_error(1.0) * picks + 4.01 * entry_error
    squares = outward(squares + mass * mass * largest * slack, product_error(3), underflows=4 * (v.size + 1) ** 2)
    with np.errstate(over="ignore"):
        rounded = outward(np.ldexp(np.sqrt(squares), exponent + half), product_error(1))
    # Each of the equal weights, if subnormal, is off by up to 2⁻¹⁰⁷³.
    bounds[: most + 1] = np.where(h < order.size, rounded + np.ldexp(float(k), half - 1073), 0.0)
    return bounds


def _from_the_end(operation: np.ufunc, values: Array) -> Array:
    """Return what ``operation`` makes of values[h:] for every h = 0 … n; 0 of none."""
    return np.append(operation.accumulate(values[::-1])[::-1], 0.0)


def _pick(theta: Array, S: Array, tail: Indices, m: int) -> Indices:
    """Choose m entries of the tail, each to bring the sum of those so far nearest to its share of ω."""
    if not tail.size:
        return np.zeros(0, dtype=np.intp)
    shares = np.zeros_like(theta)
    shares[tail] = np.ldexp(theta[tail], -np.frexp(np.abs(theta[tail]).max())[1])
    shares /= np.abs(shares).sum()
    towards = S @ shares  # ⟨X_j, ω⟩/A
    ahead = -towards  # ⟨X_j, S − (i + 1)·ω⟩/A for the sum S of i picks
    energy = np.full(theta.size, np.inf)
    energy[tail] = np.diag(S)[tail]
    signs = np.sign(theta)
    picks = np.zeros(m, dtype=np.intp)
    for i in range(m):
        j = int(np.argmin(energy + 2 * signs * ahead))
        picks[i] = j
        ahead += signs[j] * S[j]
        ahead -= towards
    return picks


def _equal_weights(theta: Array, tail: Indices, picks: Indices) -> Array:
    """Return sign(θ_j)·A/m for every pick, rounded towards 0 so that ‖θ̂‖_1 stays within ‖θ‖_1."""
    if not picks.size:
        return np.zeros_like(theta)
    exponent = np.frexp(np.abs(theta[tail]).max())[1]
    mass = np.abs(np.ldexp(theta[tail], -exponent)).sum() * (1 - (tail.size + 8) * UNIT_ROUNDOFF)
    with np.errstate(over="ignore"):
        each = np.ldexp(mass / picks.size, exponent)
        together = np.bincount(picks).max() * each
    if np.isinf(together):
        raise OverflowError("A new weight exceeds float64: it stands for many. Scale w down.")
    each = np.nextafter(each, 0.0)
    return np.asarray(np.sign(theta) * np.bincount(picks, minlength=theta.size) * each)


def unit_error_resampled(w: npt.ArrayLike, retained: int, *, scale: float, heavy: int | None = None) -> float:
    """Bound a linear unit's error after reweighting by the ℓ1 norm of the tail beyond its heavy weights.

        ‖f − f̂‖_{L2} ≤ B·σ_h(w)_1/√(k − h)        B ≥ max_j ‖X_j‖_{L2}

    For the weights of ``reweight``, and inputs correlated in any way; for h = k, plain dropping, B·σ_k(w)_1. Compare
    ``unit_error_l1``. Orthonormal inputs and equal weights come arbitrarily close at h = 0. Rounded up.

    Args:
        w: weights, shape (d,), finite.
        retained: k, 0 ≤ k ≤ d.
        scale: B ≥ 0, in the units of the inputs.
        heavy: h, 0 ≤ h ≤ k, how many keep their weight; None takes the least bound over all h.

    Returns:
        The bound, in the units of the unit's output.

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: ``retained`` outside [0, d], ``heavy`` outside [0, k], ``scale`` < 0, or ``w`` not a finite vector.
        OverflowError: ‖w‖_1 exceeds float64.

    Reference: the linear-unit theorem of Yang et al. 2022 (arXiv 2206.05604) as reconstructed, case (b); proof in
    docs/theorems.md, ``linear-unit-resampled``.
    """
    tails = best_term_errors(w, 1.0)
    k = count(retained, "retained", low=0, high=tails.size - 1)
    tails = np.where(tails > 0, outward(tails, tail_error(tails.size, 1.0)), 0.0)
    return product_up(nonnegative(scale, "scale"), _least_resampled(tails, k, heavy))


def hilbert_sampling_bound(
    w: npt.ArrayLike, retained: int, *, q: float, scale: float, heavy: int | None = None
) -> float:
    """Bound how well k terms approximate a combination Σ θ_j X_j in a Hilbert space, from ‖θ‖_q alone.

        ‖f − f̂‖ ≤ K·‖θ‖_q·max_{h<m≤n} (m − h)·m^(−1/q)/√(k − h)        K ≥ max_j ‖X_j‖,  n non-zeros

    For the terms of ``reweight``, whatever the X_j. Where h = k(2 − 2q)/(2 − q) is whole, it is at most
    2·c_{q,2}·K·‖θ‖_q·k^(1/2 − 1/q): twice the sharp bound for dropping from orthonormal X_j, and an order √k below the
    best for dropping from equal ones. For h = k, plain dropping, the root is 1. Rounded up.

    Args:
        w: θ, shape (d,), d ≥ 1, finite.
        retained: k, 0 ≤ k ≤ d.
        q: order, 0 < q < 1.
        scale: K ≥ 0, in the units of the X_j.
        heavy: h, 0 ≤ h ≤ k, how many keep their weight; None takes the least bound over all h.

    Returns:
        The bound, in the units of f.

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: ``q`` outside (0, 1), ``retained`` outside [0, d], ``heavy`` outside [0, k], ``scale`` < 0, or ``w``
            not a finite vector.
        OverflowError: the bound exceeds float64.

    Reference: ours, with a constant below that of Gao, Ing & Yang 2013, Theorem 2; proof in docs/theorems.md,
    ``hilbert-sampling``.
    """
    theta = finite_array(w, "w", ndim=1)
    k = count(retained, "retained", low=0, high=theta.size)
    tails = tightest_bounds(theta, range(k + 1), [order_below_one(q)], 1.0)[1]
    bound = product_up(nonnegative(scale, "scale"), _least_resampled(tails, k, heavy))
    if bound == np.inf:
        raise OverflowError(f"The bound exceeds float64 for q={q:g}. Choose a larger q, or scale w down.")
    return bound


def _least_resampled(tails: Array, k: int, heavy: int | None) -> float:
    h = np.arange(k + 1) if heavy is None else np.array([count(heavy, "heavy", low=0, high=k)])
    least = (tails[h] / np.sqrt(np.maximum(k - h, 1))).min()
    return float(outward(least, product_error(2))) if least > 0 else 0.0
