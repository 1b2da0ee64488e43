"""Represent all columns by a few of them: the interpolation matrix, and the refit of what reads them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from ellq.theory.accumulators import Accumulator, Gram, Tsqr
from ellq.theory.arguments import Array, Indices, count, nonnegative, real_number
from ellq.theory.array_kinds import beside, namespace, on_host, solve_upper, zeros
from ellq.theory.columns import Columns, Moments, Triangle
from ellq.theory.elimination import ROUNDING, Progress, Selection, explain_targets
from ellq.theory.id_bounds import frobenius_norm, unit_scaled
from ellq.theory.input_moments import layer_errors, moment_error
from ellq.theory.rounding import norm_error, outward, product_error
from ellq.theory.selection import exhaustive, leverage, output_aware, pivoted_qr, random_columns, residual_trace
from ellq.theory.swaps import Rule, strong_rrqr, swap_refined

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "pivoted-qr": pivoted_qr,
        "strong-rrqr": strong_rrqr,
        "output-aware": output_aware,
        "residual-trace": residual_trace,
        "swap-refined": swap_refined,
        "random": random_columns,
        "leverage": leverage,
        "exhaustive": exhaustive,
    }
)
_NESTED = (pivoted_qr, output_aware, residual_trace, random_columns)  # the first choices of more are those of fewer


@dataclass(frozen=True)
class Skeleton:
    """X ≈ 1·offsetᵀ + X[:, indices] @ interpolation, and what that costs at every k along the way.

    Attributes:
        indices: the skeleton, in order of choice, shape (k,).
        interpolation: T, shape (k, m), with T[:, indices] = I.
        offset: constant part, shape (m,); 0 without an intercept and at the skeleton.
        feature_errors: ‖X − 1·offsetᵀ − X_S T‖_F² with 0 … k columns, shape (k + 1,).
    """

    indices: Indices
    interpolation: Array
    offset: Array
    feature_errors: Array


@dataclass(frozen=True)
class Refit:
    """Y ≈ 1·interceptᵀ + X[:, indices] @ coefficients by least squares, with its error at every k.

    Attributes:
        indices: the skeleton, in order of choice, shape (k,).
        coefficients: shape (k, c).
        intercept: shape (c,); 0 where none was asked for.
        errors: Σ‖y − ŷ‖² of least squares with the first 0 … k columns of the skeleton, shape (k + 1,).
        ridge: the penalty of the coefficients, in units of the mean squared length of the independent columns chosen.
        error: Σ‖y − ŷ‖² of these coefficients; above ``errors[k]`` by what the ridge costs.
    """

    indices: Indices
    coefficients: Array
    intercept: Array
    errors: Array
    ridge: float
    error: float


@dataclass(frozen=True)
class Interpolative:
    """A ≈ 1·offsetᵀ + A_S T with the errors at every k beside what no k columns could do better than; prints a table.

    Everything refers to A less its column means where an intercept was asked for. Values of A are NumPy's, or tensors
    on the GPU that A lay on.

    Attributes:
        skeleton: the chosen columns in order of choice, T, and the constant part.
        refit: least squares of the targets, if asked for.
        selection: the choice with its factor.
        columns: the second moments, or the triangle, of A.
        samples: n.
    """

    skeleton: Skeleton
    refit: Refit | None
    selection: Selection
    columns: Columns
    samples: int

    @property
    def indices(self) -> Indices:
        """Return the skeleton, in order of choice, shape (k,)."""
        return self.skeleton.indices

    @property
    def interpolation(self) -> Array:
        """Return T, shape (k, m), the identity at the skeleton."""
        return self.skeleton.interpolation

    @property
    def errors(self) -> Array:
        """Return ‖A − A_S T‖_F with the first 0 … k columns of the skeleton, shape (k + 1,)."""
        return self.selection.errors

    @cached_property
    def error_bound(self) -> float:
        """Return what ‖A − A_S T‖_F of this T is at most, whatever rounding did to the sums, the factor and T.

        At the last k. Near ``errors[k]`` where that is resolved and T is moderate. Where chosen columns nearly cancel,
        as in Kahan's matrix, T is large and magnifies the rounding: then errors from moments can be reported far too
        small, even as 0, and this is what is known. Rounded up; a triangle is taken to hold each column to 8·eps·m of
        its length, as the rules take it.

        Reference: ours, by ``layer_errors``; Higham 2002, section 3.5, for products of matrices.
        """
        m, S, T = self.columns.features, self.indices, on_host(self.interpolation)
        gaps = -np.eye(m)  # x_j − X_S t_j is −X times row j
        gaps[:, S] += T.T
        columns = self.columns.cpu()
        if isinstance(columns, Moments):
            # Twice, for the roundings of centring.
            lengths = layer_errors(gaps, columns.G, entry_error=2 * moment_error(self.samples))
            return frobenius_norm(lengths[None])
        X, unit = unit_scaled(columns.X)
        size = frobenius_norm(X @ gaps.T) + norm_error(m + 2, 1.0) * frobenius_norm(abs(X) @ abs(gaps).T)
        size += ROUNDING * m * frobenius_norm((abs(gaps) @ np.linalg.norm(X, axis=0))[None])
        return float(np.ldexp(outward(size, product_error(4)), unit)) if size else 0.0

    @cached_property
    def singular_values(self) -> Array:
        """Return the singular values of A in decreasing order, shape (m,); 0 where nothing is resolved."""
        values = np.zeros(self.columns.features)
        if isinstance(self.columns, Moments):
            xp = namespace(self.columns.G)
            squares = on_host(xp.linalg.eigvalsh(self.columns.G))[::-1]
            values[:] = np.sqrt(np.where(squares > ROUNDING * len(squares) * squares[0], squares, 0.0))
        else:
            xp = namespace(self.columns.X)
            found = on_host(xp.linalg.svdvals(self.columns.X))
            values[: len(found)] = np.where(found > ROUNDING * len(values) * found.max(initial=0.0), found, 0.0)
        return values

    @property
    def spectral_floors(self) -> Array:
        """Return σ_(k+1), the least spectral error of any approximation of rank 0 … k, shape (k + 1,)."""
        return np.asarray(np.append(self.singular_values, 0.0)[: self.errors.size])

    @property
    def floors(self) -> Array:
        """Return √(Σ_(i>k) σ_i²), the least Frobenius error of any approximation of rank 0 … k, shape (k + 1,).

        Cut off at the error, which it exceeds by rounding only.

        Reference: Eckart & Young 1936.
        """
        values = self.singular_values
        unit = values[0] if values[0] > 0 else 1.0
        tails = np.append(np.cumsum((values[::-1] / unit) ** 2)[::-1], 0.0)[: self.errors.size]
        return np.asarray(np.minimum(np.sqrt(tails) * unit, self.errors))

    @cached_property
    def spectral_error(self) -> float:
        """Return ‖A − A_S T‖_2 at the last k; 0 where nothing is resolved."""
        rest = self.selection.factor
        S = self.indices[: self.selection.rank]
        if isinstance(self.columns, Moments):
            schur = self.columns.G - rest.T @ rest
            size = math.sqrt(max(float(namespace(rest).linalg.eigvalsh(schur)[-1]), 0.0))
        else:
            xp = namespace(rest)
            Q = xp.linalg.qr(self.columns.X[:, S])[0]
            left = self.columns.X - Q @ (Q.T @ self.columns.X)
            size = float(xp.linalg.svdvals(left).max()) if math.prod(left.shape) else 0.0
        # Never above the Frobenius error, in which what is rounding counts as 0.
        return min(size, float(self.errors[-1]))

    def __str__(self) -> str:
        """Return the errors at 0, 1, 2, 4, … k columns, and what they are relative to."""
        k, m = len(self.indices), self.columns.features
        shown = sorted({0, *(2**i for i in range(k.bit_length())), k})
        size = self.errors[0]
        unit = size if size > 0 else 1.0
        lines = [
            f"{k} of {m} columns stand for all, on {self.samples} samples; relative to ‖A‖_F = {size:.4g}:",
            f"{'k':>6}{'‖A − A_S T‖_F':>16}{'least possible':>16}{'σ_(k+1)':>12}",
        ]
        curves = (self.errors / unit, self.floors / unit, self.spectral_floors / unit)
        lines += [f"{i:>6}{curves[0][i]:>16.4g}{curves[1][i]:>16.4g}{curves[2][i]:>12.4g}" for i in shown]
        lines.append(f"‖A − A_S T‖_2 = {self.spectral_error / unit:.4g} with {k} columns")
        if self.error_bound > 2 * self.errors[-1]:
            lines.append(f"but for rounding, which may hide a ‖A − A_S T‖_F of up to {self.error_bound / unit:.2g}")
        if self.refit is not None:
            energy = self.refit.errors[0]
            relative = math.sqrt(self.refit.error / energy) if energy > 0 else 0.0
            lines.append(f"outputs refitted to {relative:.4g} of their root mean square")
        return "\n".join(lines)


def interpolative(
    A: Any,
    *,
    k: int | None = None,
    tol: float | None = None,
    select: str | Rule = "pivoted-qr",
    refit: Literal["interpolate", "least-squares"] = "interpolate",
    targets: Any = None,
    intercept: bool = False,
    ridge: float | Literal["gcv"] = 0.0,
    accumulate: Literal["gram", "tsqr"] = "gram",
    progress: Progress = iter,
) -> Interpolative:
    """Choose a few columns of A and express all of them, or what reads them, by those.

        A ≈ A_S T        T[:, S] = I

    One pass over A; the n × m matrix need not be in memory at once. Scaling A scales the errors.

    Args:
        A: the matrix, shape (n, m), as an array or a tensor; or an iterable of batches of its rows, each a matrix or a
            pair of rows of A and of the targets; or an accumulator that was fed with them.
        k: how many columns, 1 ≤ k ≤ m.
        tol: instead of ``k``: the fewest of the columns that the rule chooses one after another whose error is within
            ``tol`` relative to A, or, for ``"least-squares"``, of the targets' error to the targets.
        select: a name in ``RULES``, or a rule, such as ``partial(strong_rrqr, f=1.5)``.
        refit: ``"interpolate"`` for T alone, ``"least-squares"`` also for the weights that best reproduce the targets.
        targets: Y, shape (n, c), where A is one matrix; what ``"output-aware"`` and ``"least-squares"`` go by.
        intercept: whether a constant column may be used, which a consumer's bias absorbs.
        ridge: penalty on the refitted weights, as for the function ``refit``.
        accumulate: ``"gram"`` is several times as fast, ``"tsqr"`` resolves errors below 1e-6 of A, to about 1e-12.
        progress: wraps the range of choices, to show a bar.

    Returns:
        The skeleton, T, and the error at every k, beside the least possible.

    Raises:
        TypeError: ``k`` not a whole number, or values that are not real numbers.
        ValueError: ``k`` outside [1, m]; ``tol`` not positive, below what the accumulator resolves, or met by no k;
            both of them or neither; an unknown word; targets missing or without a matrix; an empty A, a batch of
            another shape, or one with NaN or infinite entries, which is named.

    Warns:
        UserWarning: there are fewer samples than columns, so that a small error on them means little; or rounding,
            magnified by a large T, may hide an error above twice ``tol`` (``error_bound``).

    Reference: Chee et al. 2021 (arXiv 2108.00065) for pivoted QR and T; the rest as the rule says.
    """
    if (k is None) == (tol is None):
        raise ValueError(f"k={k} and tol={tol}. Pass one of the two: how many columns, or which error to accept.")
    if refit not in ("interpolate", "least-squares"):
        raise ValueError(f"refit={refit!r} is unknown. Choose 'interpolate' or 'least-squares'.")
    if isinstance(select, str) and select not in RULES:
        raise ValueError(f"select={select!r} is unknown. Choose one of {', '.join(map(repr, RULES))}, or pass a rule.")
    rule = RULES[select] if isinstance(select, str) else select
    accumulator = _accumulated(A, targets, accumulate)
    columns = accumulator.columns(centred=intercept)
    m, n = columns.features, accumulator.samples - intercept
    if refit == "least-squares" and not columns.targets:
        raise ValueError("refit='least-squares' needs targets. Pass targets=, or batches that are pairs.")

    def relative_errors(selection: Selection) -> Array:
        errors = np.sqrt(explain_targets(columns, selection)[2]) if refit == "least-squares" else selection.errors
        return errors / errors[0] if errors[0] > 0 else errors

    if k is not None:
        selection = rule(columns, count(k, "k", low=1, high=m), progress=progress)
    else:
        selection = _within(columns, rule, _tolerance(tol, columns), relative_errors, progress)
    if n < m:
        warnings.warn(
            f"{accumulator.samples} samples cannot tell {m} columns apart: at most {max(n, 0)} are independent on them,"
            f" here {selection.rank} of the {selection.indices.size} chosen, and errors on other samples may be larger."
            f" Use at least {m + intercept} samples.",
            stacklevel=2,
        )
    solved = None
    if refit == "least-squares":
        solved = _refit(accumulator, columns, selection, intercept=intercept, present=None, ridge=ridge)
    skeleton = _interpolate(accumulator, columns, selection, intercept=intercept)
    found = Interpolative(skeleton, solved, selection, columns, accumulator.samples)
    if tol is not None and refit == "interpolate" and found.error_bound > 2 * tol * found.errors[0]:
        hidden, largest = found.error_bound / found.errors[0], float(abs(found.interpolation).max())
        other = "accumulate='tsqr' or " if isinstance(columns, Moments) else ""
        warnings.warn(
            f"Rounding may hide an error of up to {hidden:.2g} of A, more than tol={tol:g}: T has entries of up to"
            f" {largest:.2g}. Use {other}select='strong-rrqr'.",
            stacklevel=2,
        )
    return found


def interpolate(accumulator: Accumulator, selection: Selection, *, intercept: bool) -> Skeleton:
    """Express every feature by the chosen ones, with least squares over the accumulated samples.

    Features that are exact combinations of the skeleton are met to rounding, zero features get a zero column. From
    moments, a feature parallel to a chosen one, to what they resolve, is expressed by that one alone; so a duplicate is
    met to rounding, however ill-conditioned the others are.

    Args:
        accumulator: of the features.
        selection: made on the same features, centred if ``intercept``.
        intercept: whether a constant column may be used.

    Returns:
        The skeleton.

    Raises:
        ValueError: ``accumulator`` is empty.

    Reference: Chee et al. 2021 (arXiv 2108.00065): T = R11⁻¹[R11 R12]Πᵀ; the constant column is ours.
    """
    return _interpolate(accumulator, accumulator.columns(centred=intercept), selection, intercept=intercept)


def refit(
    accumulator: Accumulator,
    selection: Selection,
    *,
    intercept: bool,
    present: Array | None = None,
    ridge: float | Literal["gcv"] = 0.0,
) -> Refit:
    """Solve for the weights that reproduce the targets from the chosen features alone.

        min Σ‖y − U'ᵀx_S‖² + λ‖U'‖_F²        λ = ridge · mean squared length of the independent x_j, j ∈ S

    Chosen features that the samples cannot tell apart from others (dead ones, duplicates) keep their present weights,
    so that one which only comes alive on other inputs still counts; the rest are solved for what remains. On a triangle
    no square is formed.

    ``ridge="gcv"`` takes the penalty of least generalised cross-validation score n·error/(n − df)², df being the
    effective number of weights per target: an estimate of the error on other samples. It matters where there are few
    times as many samples as weights, and is negligible where there are many.

    Args:
        accumulator: of features and targets.
        selection: made on the same features, centred if ``intercept``.
        intercept: whether a constant, without a penalty, may be added to each target.
        present: the weights that read the features now, shape (m, c); 0 if not given.
        ridge: the penalty ≥ 0, or ``"gcv"``; 0 is least squares.

    Returns:
        The solution, its squared error, and that of least squares after each choice.

    Raises:
        ValueError: ``accumulator`` is empty, ``present`` has another shape than (m, c), or ``ridge`` is negative.

    Reference: normal equations through the factor of ``selection``, or QR of the chosen columns; Golub, Heath & Wahba
    1979 for the penalty.
    """
    columns = accumulator.columns(centred=intercept)
    return _refit(accumulator, columns, selection, intercept=intercept, present=present, ridge=ridge)


def _interpolate(accumulator: Accumulator, columns: Columns, selection: Selection, *, intercept: bool) -> Skeleton:
    chosen, rank = selection.indices, selection.rank
    independent, factor = chosen[:rank], selection.factor
    T = zeros(factor, len(chosen), columns.features)
    if rank:
        T[:rank] = solve_upper(factor[:, independent], factor)
        if isinstance(columns, Moments):
            _match_parallel(T[:rank], columns.G, independent)
    T[:, chosen] = 0.0
    T[np.arange(len(chosen)), chosen] = 1.0
    offset = zeros(factor, columns.features)
    if intercept:
        offset = accumulator.x_mean - accumulator.x_mean[chosen] @ T
        offset[chosen] = 0.0
    return Skeleton(chosen, T, offset, selection.feature_errors)


def _match_parallel(T: Array, G: Array, independent: Indices) -> None:
    """Express every column parallel to a chosen one, as far as moments tell, by that one alone."""
    xp, energy = namespace(G), G.diagonal()
    lengths = xp.where(energy > 0, energy, 1.0) ** 0.5
    weights = G[independent] / energy[independent][:, None]
    cosines = abs(weights * (lengths[independent][:, None] / lengths))
    best = cosines.argmax(0)
    which = xp.where((cosines[best, np.arange(len(G))] ** 2 >= 1 - ROUNDING * len(G)) & (energy > 0))[0]
    T[:, which] = 0.0
    T[best[which], which] = weights[best[which], which]


def _refit(
    accumulator: Accumulator,
    columns: Columns,
    selection: Selection,
    *,
    intercept: bool,
    present: Array | None,
    ridge: float | Literal["gcv"],
) -> Refit:
    c = columns.targets
    if present is not None and tuple(present.shape) != (columns.features, c):
        raise ValueError(
            f"present has shape {tuple(present.shape)}, expected {(columns.features, c)}: one row per feature."
        )
    penalty = None if ridge == "gcv" else nonnegative(ridge, "ridge")
    chosen, rank = selection.indices, selection.rank
    redundant = chosen[rank:]
    coefficients = zeros(selection.factor, len(chosen), c)
    upper, explained, errors = explain_targets(columns, selection)
    if present is not None and redundant.size:
        coefficients[rank:] = present[redundant]
        upper, explained, _ = explain_targets(_without(columns, redundant, coefficients[rank:]), selection)
    error = float(errors[-1])
    if rank and penalty == 0:
        coefficients[:rank] = solve_upper(upper, explained)
    elif rank:
        U, values, Vt = namespace(upper).linalg.svd(upper)
        turned = U.T @ explained
        squares = on_host(values) ** 2
        unit = float(squares.mean())
        energies = on_host((turned * turned).sum(axis=1))
        if penalty is None:
            penalty = _least_score(squares, energies, error, accumulator.samples, intercept) / unit
        weight = beside(values, np.sqrt(squares) / (squares + penalty * unit))
        coefficients[:rank] = Vt.T @ (weight[:, None] * turned)
        error += float(((penalty * unit / (squares + penalty * unit)) ** 2 * energies).sum())
    shift = zeros(selection.factor, c)
    if intercept:
        shift = accumulator.y_mean - accumulator.x_mean[chosen] @ coefficients
    return Refit(chosen, coefficients, shift, errors, penalty or 0.0, error)


def _least_score(squares: Array, energies: Array, error: float, samples: int, intercept: bool) -> float:
    """Return the penalty of least n·error/(n − df)², among 20 a decade."""
    penalties = np.append(0.0, squares.max() * 10.0 ** np.arange(-12, 3.01, 0.05))
    shares = penalties[:, None] / (squares + penalties[:, None])
    freedom = samples - intercept - (1 - shares).sum(axis=1)
    scores = np.full(penalties.size, np.inf)
    np.divide(error + (shares**2 * energies).sum(axis=1), freedom**2, out=scores, where=freedom > 1e-9 * samples)
    return float(penalties[np.argmin(scores)])


def _without(columns: Columns, which: Indices, weights: Array) -> Columns:
    """Return the columns with targets less what some of them contribute."""
    if isinstance(columns, Moments):
        return Moments(columns.G, columns.R - columns.G[:, which] @ weights)
    return Triangle(columns.X, columns.Y - columns.X[:, which] @ weights)


def _accumulated(A: Any, targets: Any, accumulate: str) -> Accumulator:
    kinds: dict[str, type[Gram] | type[Tsqr]] = {"gram": Gram, "tsqr": Tsqr}
    if accumulate not in kinds:
        raise ValueError(f"accumulate={accumulate!r} is unknown. Choose 'gram' or 'tsqr'.")
    is_matrix = hasattr(A, "__array__")  # NumPy's, a tensor, a table of pandas
    if targets is not None and not is_matrix:
        raise ValueError("targets= goes with one matrix A. Feed pairs of rows of A and of the targets instead.")
    if isinstance(A, Gram | Tsqr):
        return A
    if not is_matrix and (isinstance(A, str | bytes | Mapping) or not isinstance(A, Iterable)):
        raise TypeError(f"A must be a matrix, an iterable of batches or an accumulator, got {type(A).__name__}.")
    accumulator: Accumulator | None = None
    for batch in [A if targets is None else (A, targets)] if is_matrix else A:
        x, y = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
        if accumulator is None:
            shapes = [tuple(np.shape(part)) for part in (x, y) if part is not None]
            if any(len(shape) != 2 or not shape[1] for shape in shapes):
                raise ValueError(f"A begins with values of shape {shapes}. Pass matrices of at least one column.")
            accumulator = kinds[accumulate](*(shape[1] for shape in shapes))
        accumulator.update(x, y)
    if accumulator is None or not accumulator.samples:
        raise ValueError("A holds no samples. Pass at least one row.")
    return accumulator


def _tolerance(tol: float | None, columns: Columns) -> float:
    number = real_number(tol, "tol")
    if not number > 0:
        raise ValueError(f"tol={number:g} is not positive. Choose tol > 0, such as 0.01, or pass k.")
    least = math.sqrt(ROUNDING * columns.features) if isinstance(columns, Moments) else ROUNDING * columns.features
    if number < least:
        other = " Use accumulate='tsqr'." if isinstance(columns, Moments) else ""
        raise ValueError(f"tol={number:g} is below {least:.1g}, the least error that is told from rounding.{other}")
    return number


def _within(columns: Columns, rule: Rule, tol: float, relative_errors: Any, progress: Progress) -> Selection:
    """Choose as few columns as meet the tolerance, without choosing many more first."""
    m, k = columns.features, 32
    while True:
        k = min(2 * k, m)
        selection = rule(columns, k, progress=progress)
        errors = relative_errors(selection)
        if errors[-1] <= tol:
            break
        if k == m:
            raise ValueError(f"tol={tol:g} is met by no columns: all of them leave {errors[-1]:.3g} of the targets.")
    k = max(int(np.argmax(errors <= tol)), 1)
    if rule in _NESTED:
        return selection.first(k)
    while relative_errors(selection := rule(columns, k, progress=progress))[-1] > tol:
        k += 1
    return selection
