"""How many weights each unit keeps, the largest ones: one function per rule, listed in ``RULES``.

A rule for a budget gets the layers and how many weights they retain together; a rule for a tolerance decides unit by
unit. To add a rule, write its function and name it in ``RULES``. Rules that do not keep the largest weights of each
unit are in ``scores.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ellq.pruning.authors import diao2023, diao2023_budget, yang2022, yang2022_budget
from ellq.pruning.largest import Counts, Layer, Survey, count_largest, magnitudes
from ellq.pruning.layers import Allocation, Layers, same_reason
from ellq.pruning.least_bound import least_bound
from ellq.theory import Array


@dataclass(frozen=True)
class Rule:
    """A way to decide how many of its largest weights each unit keeps.

    Attributes:
        by_budget: ``(layers, retained, **settings) → Allocation``.
        by_tolerance: ``(layers, tol, **settings) → Allocation``; None where the rule knows no tolerance.
        least: what every unit keeps at least unless the caller says otherwise: 1 for ours, 0 where others left it open.
        takes_eta: ``tol`` is the authors' η ≥ 0, not a relative error in (0, 1).
    """

    by_budget: Callable[..., Allocation]
    by_tolerance: Callable[..., Allocation] | None = None
    least: int = 0
    takes_eta: bool = False


def retained_of(total: int, sparsity: float) -> int:
    """Return how many of ``total`` stay when at least the fraction ``sparsity`` goes, the fraction taken as typed.

    In decimals 0.9 of 10 leaves exactly 1; in binary floating point it would leave 0.
    """
    return total - math.ceil(Fraction(repr(float(sparsity))) * total)


def ellq(layers: Layers, retained: int) -> Allocation:
    """Keep as large a share of the signal as a budget allows, through all layers after each other.

        maximise Π_l ‖W_l restricted to what stays‖_F² / ‖W_l‖_F²   subject to Σ k_i = retained, k_i ≥ minimum

    A factor is the share of a layer's output energy that stays when its inputs are uncorrelated and of one size. In
    logarithms the objective is a sum; the loss of each layer rises faster the more is gone, so taking the weight whose
    removal costs least is optimal. That weight is the one of least ``lamp`` score: the counts are those of LAMP, with
    a minimum for each unit, here derived from what they maximise. Ignores the scale of every layer.

    Args:
        layers: what is decided on.
        retained: the total to keep.

    Reference: Lee et al. 2021 (arXiv 2010.07611) for the scores; the objective and its minima are ours.
    """
    return _by_lamp_scores(layers, retained, "largest product of the layers' energies")


def exact(layers: Layers, retained: int) -> Allocation:
    """Make the exact squared errors of all units, added up, as small as a budget allows.

        minimise Σ_i σ_{k_i}(w_i)_2²   subject to Σ k_i = retained, k_i ≥ minimum

    The largest weights of all layers together; with no minimum it is ``global``.

    Args:
        layers: what is decided on.
        retained: the total to keep.

    Reference: ours; the errors are convex in each k_i, so the largest weights first is optimal.
    """
    counts = count_largest(layers.weights, retained, minima=layers.minima)
    return same_reason(counts, f"least Σσ_k(w)² with {retained:,} retained")


def global_magnitude(layers: Layers, retained: int) -> Allocation:
    """Keep the largest weights of all layers together, as ``torch.nn.utils.prune.global_unstructured`` does."""
    counts = count_largest(layers.weights, retained, minima=layers.minima)
    return same_reason(counts, f"largest {retained:,} of all layers together")


def uniform(layers: Layers, retained: int) -> Allocation:
    """Keep the same fraction of every layer, its largest weights."""
    return _by_layer(layers, _shares(layers, layers.sizes, retained), "the same fraction of every layer")


def erk(layers: Layers, retained: int) -> Allocation:
    """Keep of every layer a fraction that falls with its size (Erdős–Rényi kernel), its largest weights.

        retained fraction of layer l = min(1, ε·Σ_a n_a / Π_a n_a)      n_a the lengths of the weight's axes

    with ε such that the total is met.

    Args:
        layers: what is decided on.
        retained: the total to keep.

    Reference: Evci et al. 2020 (RigL, arXiv 1911.11134), after Mocanu et al. 2018.
    """
    weights = [sum(shape) for shape in layers.shapes]
    return _by_layer(layers, _shares(layers, weights, retained), "Erdős–Rényi kernel: fraction ∝ Σn/Πn of its shape")


def lamp(layers: Layers, retained: int) -> Allocation:
    """Keep the weights with the largest layer-adaptive magnitude scores.

        score(w_u) = w_u² / Σ_{v in the layer : |w_v| ≥ |w_u|} w_v²

    Among equal magnitudes the earlier weight counts as the larger, as in the authors' sort. Ignores the scale of every
    layer.

    Args:
        layers: what is decided on.
        retained: the total to keep.

    Reference: Lee et al. 2021 (arXiv 2010.07611).
    """
    return _by_lamp_scores(layers, retained, "largest layer-adaptive magnitude scores")


def _by_lamp_scores(layers: Layers, retained: int, reason: str) -> Allocation:
    cases = zip(layers.weights, layers.surveys, layers.minima, strict=True)
    scores = [_lamp_scores(layer, found, minimum) for layer, found, minimum in cases]
    shares = [int(minimum.sum()) for minimum in layers.minima]
    places = [place for place, score in enumerate(scores) if score.size]
    if places:
        free = count_largest([scores[i][None] for i in places], retained - sum(shares), minima=None)
        for place, own in zip(places, free, strict=True):
            shares[place] += int(own[0])
    return _by_layer(layers, shares, reason)


def _lamp_scores(layer: Layer, found: Survey, minimum: Counts) -> Array:
    """Return the scores of the weights that no unit's minimum holds, from the largest to the smallest; they fall.

    What is held counts as larger than all of them.
    """
    free, held = [], 0.0
    for rows, block in magnitudes(layer):
        low = minimum[rows]
        if low.any():
            block.sort(axis=1)
            is_held = np.arange(block.shape[1]) >= block.shape[1] - low[:, None]
            held += float(np.square(np.ldexp(block[is_held].astype(np.float64), -found.exponent)).sum())
            block = block[~is_held]
        free.append(block.ravel())
    joined = np.concatenate(free)
    joined.sort()
    squares = np.ldexp(joined.astype(np.float64), -found.exponent)[::-1] ** 2
    totals = held + np.cumsum(squares)
    return np.asarray(np.divide(squares, totals, out=np.zeros_like(squares), where=squares > 0))


def by_tolerance(layers: Layers, tol: float) -> Allocation:
    """Keep, of every unit, the fewest weights whose removed rest is within ``tol``·‖w‖_2; at least its minimum.

    Args:
        layers: what is decided on.
        tol: relative tolerance, 0 < tol < 1.

    Reference: ours; exact, by one sort per unit.
    """
    counts = []
    for layer, minimum in zip(layers.weights, layers.minima, strict=True):
        fewest = np.empty(len(layer), dtype=np.int64)
        for rows, block in magnitudes(layer):
            fewest[rows] = np.count_nonzero(_tail_shares(block) > tol**2, axis=1)
        counts.append(np.maximum(fewest, minimum))
    return same_reason(counts, f"fewest with relative error <= {tol:g}")


def _tail_shares(magnitude: npt.NDArray[np.floating]) -> Array:
    """Return σ_i(w)_2²/‖w‖_2² of every unit for i = 0 … d − 1 weights kept; 0 throughout for a zero unit."""
    rising = np.sort(magnitude, axis=1).astype(np.float64)
    largest = rising[:, -1:]
    # Divided by the largest, so that squares of tiny weights do not vanish.
    tails = np.cumsum(np.divide(rising, largest, out=np.zeros_like(rising), where=largest > 0) ** 2, axis=1)[:, ::-1]
    total = tails[:, :1]
    return np.asarray(np.divide(tails, total, out=np.zeros_like(tails), where=total > 0))


def _by_layer(layers: Layers, shares: Sequence[int], reason: str) -> Allocation:
    """Keep the largest weights of every layer, as many as its share."""
    counts = [
        count_largest([layer], share, minima=[minimum])[0]
        for layer, share, minimum in zip(layers.weights, shares, layers.minima, strict=True)
    ]
    sizes = layers.sizes
    reasons = [f"{reason}: {share / size:.4g} of it" for share, size in zip(shares, sizes, strict=True)]
    return Allocation(counts, reasons)


def _shares(layers: Layers, weights: Sequence[float], total: int) -> list[int]:
    """Share a total among layers in proportion to their weights, none above its size or below its units' minima."""
    return proportional_shares(weights, total, sizes=layers.sizes, minima=[int(m.sum()) for m in layers.minima])


def proportional_shares(
    weights: Sequence[float], total: int, *, sizes: Sequence[int], minima: Sequence[int]
) -> list[int]:
    """Share a total in proportion to weights: clip(c·weight, minimum, size), in whole numbers.

    Args:
        weights: > 0.
        total: from the sum of the minima to the sum of the sizes.
        sizes: the most each can get.
        minima: the least.

    Returns:
        Shares that sum to ``total``; what is left by rounding down goes to the largest fractions, the first of equals.
    """
    weight, cap, low = np.array(weights, dtype=np.float64), np.array(sizes), np.array(minima)
    few, many = 0.0, float(np.max(cap / weight))
    for _ in range(100):
        middle = (few + many) / 2
        few, many = (middle, many) if np.clip(middle * weight, low, cap).sum() < total else (few, middle)
    real = np.clip(many * weight, low, cap)
    shares = np.clip(np.floor(real + 1e-9), low, cap).astype(np.int64)
    left = total - int(shares.sum())
    order = np.argsort(-(real - shares), kind="stable")
    while left:  # more than one round only where limits or rounding are in the way
        for i in order:
            step = (left > 0) - (left < 0)
            if step and low[i] <= shares[i] + step <= cap[i]:
                shares[i] += step
                left -= step
    return [int(share) for share in shares]


RULES = {
    "ellq": Rule(ellq, by_tolerance, least=1),
    "exact": Rule(exact, by_tolerance, least=1),
    "least_bound": Rule(least_bound, least=1),
    "yang2022": Rule(yang2022_budget, yang2022, takes_eta=True),
    "diao2023": Rule(diao2023_budget, diao2023, takes_eta=True),
    "uniform": Rule(uniform),
    "global": Rule(global_magnitude),
    "lamp": Rule(lamp),
    "erk": Rule(erk),
}
