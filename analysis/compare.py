"""Which of two models is more compressible, and by how much: ``compare(first, second)`` gives a ``Comparison``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import nn

from ellq.analysis.files import json_text
from ellq.analysis.profile import LayerShape, Profile, measure
from ellq.analysis.progress import track
from ellq.analysis.tables import MODEL, ByLayer, ResultTable, plain_rows
from ellq.theory.arguments import Array, count, open_fraction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DIGITS = 12  # of a fraction; what is beyond is rounding
_MANY = 4096  # units from which the mean of resampled ones is normal for all purposes
_BATCH = 2**22  # resampled values held at once


def compare(
    first: nn.Module | Mapping[str, Any],
    second: nn.Module | Mapping[str, Any],
    /,
    *,
    q: float = 0.5,
    confidence: float = 0.95,
    resamples: int = 9999,
    paired: bool = False,
    names: tuple[str, str] = ("first", "second"),
    seed: int = 0,
) -> Comparison:
    """Say which of two models of one architecture is more compressible, by how much, and how sure that is.

    A layer's figure is the mean over its units of the effective fraction N_{q,1}/d, the model's the mean of its
    layers' by size: the share of weights effectively used if every unit is compressed on its own. The difference is
    second − first, so that it is positive where the first is more compressible.

    The interval is the studentised bootstrap's, units drawn with replacement within layers. Its randomness is that
    of which units the layers happen to have; it says nothing of training again from another seed. From 4096 units
    on, resampled means are drawn from their normal limit. A layer of one unit has no interval, and the model's takes
    its difference for given.

    Args:
        first: an ``nn.Module``, or a state dict such as ``ellq.read_checkpoint(path)`` gives.
        second: the other one; its weights have the same names and shapes.
        q: order of the quasi-norm, 0 < q < 1.
        confidence: of each interval, in (0, 1).
        resamples: how many times units are drawn, at least 99.
        paired: whether unit i of one model stands for unit i of the other, as in checkpoints of one training or
            before and after pruning; then pairs are drawn, and the interval is usually much shorter.
        names: what the two are called.
        seed: of the draws.

    Returns:
        The comparison.

    Raises:
        TypeError, ValueError: as ``measure``, naming which of the two; or an argument out of range.
        ValueError: the architectures differ; the first layer that does is named.

    Reference: Efron & Tibshirani 1993, section 12.5, the bootstrap-t interval; ours for the statistic.
    """
    confidence = open_fraction(confidence, "confidence")
    resamples = enough_resamples(resamples, confidence)
    seed = count(seed, "seed", low=0, high=2**63 - 1)
    names = _checked_names(names)
    profiles = [_measured(source, q, name) for source, name in zip((first, second), names, strict=True)]
    refuse_other_architecture(names[0], profiles[0].layer_shapes, names[1], profiles[1].layer_shapes)
    layers = [layer.name for layer in profiles[0].layer_shapes]
    values = [_fractions(profile.units) for profile in profiles]
    sizes = profiles[0].layers["size"].to_numpy()
    random = np.random.default_rng(seed)
    draws = [
        _Draws.of(values[0][name], values[1][name], resamples, paired, random) for name in track(layers, "compare")
    ]
    rows = []
    for name, size, drawn in zip(layers, sizes.tolist(), draws, strict=True):
        means = (values[0][name].mean(), values[1][name].mean())
        rows.append(("layer", name, len(values[0][name]), size, *means, *drawn.interval(confidence)))
    shares = sizes / sizes.sum()
    model = _Draws.weighted(draws, shares)
    means = (float(shares @ [row[4] for row in rows]), float(shares @ [row[5] for row in rows]))
    rows.append(("model", "", sum(row[2] for row in rows), int(sizes.sum()), *means, *model.interval(confidence)))
    columns = ["level", "layer", "units", "size", "first", "second", "difference", "low", "high"]
    return Comparison(pd.DataFrame(rows, columns=columns), q, confidence, resamples, paired, names)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(ByLayer):
    """How two models differ in compressibility, layer by layer and as a whole.

    The frame has one row per layer, in model order, and a last one for the model: ``level``, ``layer``, ``units``,
    ``size``, the effective fractions ``first`` and ``second``, ``difference`` = second − first, and its interval from
    ``low`` to ``high``. Each interval is for its own row; many layers compared at once include some that differ by
    chance.

    Attributes:
        frame: the table.
        q: order of the quasi-norm.
        confidence: of each interval.
        resamples: how many times units were drawn.
        paired: whether pairs of units were drawn.
        names: what the two models are called.
    """

    frame: pd.DataFrame
    q: float
    confidence: float
    resamples: int
    paired: bool
    names: tuple[str, str]

    __hash__ = None  # type: ignore[assignment]

    @property
    def verdict(self) -> str:
        """The sentence that answers which model is more compressible."""
        row = self.model
        points, low, high = (100 * float(row[name]) for name in ("difference", "low", "high"))
        if math.isnan(low):
            return f"{self._winner(points)}; no layer has the two units an interval needs."
        interval = f"{100 * self.confidence:g} % interval"
        if low <= 0 <= high:
            return (
                f"No difference in compressibility is established: {self.names[1]} − {self.names[0]} is {points:+.2f}"
                f" points of effectively used weights at q = {self.q:g} ({interval} {low:+.2f} to {high:+.2f})."
            )
        near, far = sorted((abs(low), abs(high)))
        return f"{self._winner(points)} ({interval} {near:.2f} to {far:.2f})."

    def plot(self) -> Figure:
        """Draw both models' fractions and their differences with intervals; ``figure.savefig(path)`` writes it."""
        # Drawing is the slowest import of all and not everyone draws.
        from ellq.analysis.compare_plot import draw_comparison

        return draw_comparison(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the comparison as JSON: the verdict, how it was made, and the rows; a missing value is null.

        Args:
            path: where to write it as well, whole or not at all.

        Raises:
            OSError: the place cannot be written.
        """
        content = {
            "verdict": self.verdict,
            "names": list(self.names),
            "q": self.q,
            "confidence": self.confidence,
            "resamples": self.resamples,
            "paired": self.paired,
            "columns": list(self.frame),
            "rows": plain_rows(self.frame),
        }
        return json_text(content, path)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Comparison):
            return NotImplemented
        settings = ("q", "confidence", "resamples", "paired", "names")
        return self.frame.equals(other.frame) and all(getattr(self, s) == getattr(other, s) for s in settings)

    def __repr__(self) -> str:
        return f"Comparison(q={self.q:g}: {self.verdict})"

    def _winner(self, points: float) -> str:
        name = self.names[0] if points > 0 else self.names[1]
        if points == 0:
            return "Neither is more compressible"
        return f"{name} is more compressible by {abs(points):.2f} points of effectively used weights at q = {self.q:g}"

    def _table(self) -> ResultTable:
        frame = self.frame
        ends = [
            "–" if math.isnan(low) else f"{100 * low:+.2f} to {100 * high:+.2f}"
            for low, high in zip(frame["low"], frame["high"], strict=True)
        ]
        columns = {
            "units": [str(n) for n in frame["units"]],
            "first": [f"{share:.1%}" for share in frame["first"]],
            "second": [f"{share:.1%}" for share in frame["second"]],
            "difference": [f"{100 * difference:+.2f}" for difference in frame["difference"]],
            f"{100 * self.confidence:g}% interval": ends,
        }
        rows = pd.DataFrame(columns, index=pd.Index([name or MODEL for name in frame["layer"]], name="layer"))
        remarks = [
            f"first: {self.names[0]}; second: {self.names[1]}",
            "Mean over units of N/d; difference second − first in points, above 0 where the first is sparser.",
        ]
        lone = self.layers.loc[self.layers["units"] == 1, "layer"].tolist()
        remarks += [f"{name} has one unit and no interval; the model's takes its difference for given" for name in lone]
        return ResultTable(self.verdict, rows, remarks)


def enough_resamples(resamples: int, confidence: float) -> int:
    """Return the number of resamples; raise ValueError if an interval of this confidence needs more."""
    resamples = count(resamples, "resamples", low=99, high=10**7)
    if (1 - confidence) / 2 * (resamples + 1) < 1:
        raise ValueError(
            f"resamples={resamples} is too few for confidence={confidence:g}. Choose at least"
            f" {math.ceil(2 / (1 - confidence)) - 1}."
        )
    return resamples


def refuse_other_architecture(
    first: str, shapes: Sequence[LayerShape], second: str, others: Sequence[LayerShape]
) -> None:
    """Raise ValueError naming the first layer in which two models differ.

    Args:
        first: what the first model is called.
        shapes: its layers.
        second: what the second model is called.
        others: its layers, in any order.
    """
    by_name = {layer.name: layer.shape for layer in others}
    for layer in shapes:
        if layer.name not in by_name:
            raise ValueError(f"{first} has a layer {layer.name!r} and {second} has none. {_SAME}")
        if by_name.pop(layer.name) != layer.shape:
            other = next(o.shape for o in others if o.name == layer.name)
            raise ValueError(
                f"layer {layer.name!r} has shape {list(layer.shape)} in {first} and {list(other)} in {second}. {_SAME}"
            )
    if by_name:
        raise ValueError(f"{second} has a layer {next(iter(by_name))!r} and {first} has none. {_SAME}")


_SAME = "Compare models of one architecture."


@dataclass(frozen=True)
class _Draws:
    """A difference of means and what resampling its units gives; those of layers add up to the model's.

    Attributes:
        difference: observed.
        variance: its estimated variance, 0 where units are alike; NaN where a single unit tells none.
        shifts: resampled difference minus the observed one, shape (resamples,).
        variances: their estimated variances, shape (resamples,).
    """

    difference: float
    variance: float
    shifts: Array
    variances: Array

    @staticmethod
    def of(first: Array, second: Array, resamples: int, paired: bool, random: np.random.Generator) -> _Draws:
        difference = float(second.mean() - first.mean())
        if len(first) == 1:
            return _Draws(difference, math.nan, np.zeros(resamples), np.zeros(resamples))
        samples = [(1.0, second - first)] if paired else [(1.0, second), (-1.0, first)]
        variance, shifts, variances = 0.0, np.zeros(resamples), np.zeros(resamples)
        for sign, sample in samples:
            means, spreads = _resampled(sample, resamples, random)
            variance += float(sample.var()) / (len(sample) - 1) if np.ptp(sample) > 0 else 0.0
            shifts += sign * means
            variances += spreads
        return _Draws(difference, variance, shifts, variances)

    @staticmethod
    def weighted(draws: Sequence[_Draws], weights: Array) -> _Draws:
        every = list(zip(weights.tolist(), draws, strict=True))
        known = [(weight, drawn) for weight, drawn in every if not math.isnan(drawn.variance)]
        return _Draws(
            math.fsum(weight * drawn.difference for weight, drawn in every),
            sum(weight**2 * drawn.variance for weight, drawn in known) if known else math.nan,
            sum((weight * drawn.shifts for weight, drawn in known), np.zeros(1)),
            sum((weight**2 * drawn.variances for weight, drawn in known), np.zeros(1)),
        )

    def interval(self, confidence: float) -> tuple[float, float, float]:
        """Return the difference and the ends of its interval; NaN where there is none."""
        if math.isnan(self.variance):
            return self.difference, math.nan, math.nan
        if self.variance == 0:
            return self.difference, self.difference, self.difference
        with np.errstate(divide="ignore", invalid="ignore"):
            # A draw of equal units has no spread of its own: infinitely far from the mean, or at it.
            ratios = np.where(self.shifts == 0, 0.0, self.shifts / np.sqrt(self.variances))
        ratios.sort()
        below = math.floor((1 - confidence) / 2 * (len(ratios) + 1) + 1e-9)
        error = math.sqrt(self.variance)
        low, high = self.difference - error * ratios[-below], self.difference - error * ratios[below - 1]
        return self.difference, float(max(low, -1.0)), float(min(high, 1.0))  # shares differ by 1 at most


def _resampled(sample: Array, resamples: int, random: np.random.Generator) -> tuple[Array, Array]:
    """Return the means of resampled units less their mean, and the variances estimated for them."""
    n = len(sample)
    if np.ptp(sample) == 0:
        return np.zeros(resamples), np.zeros(resamples)
    centred = sample - sample.mean()
    if n >= _MANY:
        variance = float(centred.var()) / (n - 1)
        return random.normal(0.0, math.sqrt(variance), resamples), np.full(resamples, variance)
    means, variances = np.empty(resamples), np.empty(resamples)
    step = max(1, _BATCH // n)
    for start in range(0, resamples, step):
        drawn = centred[random.integers(n, size=(min(step, resamples - start), n))]
        means[start : start + step] = drawn.mean(axis=1)
        variances[start : start + step] = np.where(np.ptp(drawn, axis=1) > 0, drawn.var(axis=1), 0.0) / (n - 1)
    return means, variances


def _measured(source: nn.Module | Mapping[str, Any], q: float, name: str) -> Profile:
    try:
        return measure(source, q=q)
    except (TypeError, ValueError, OverflowError) as error:
        raise type(error)(f"{name}: {error}") from None


def _checked_names(names: object) -> tuple[str, str]:
    if not isinstance(names, tuple) or len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a pair of strings, got {names!r}.")
    if names[0] == names[1]:
        raise ValueError(f"names holds {names[0]!r} twice. Call the two models differently.")
    return names


def _fractions(units: pd.DataFrame) -> dict[str, Array]:
    """Return name → the effective fractions of the layer's units."""
    shares = (units["effective_count"] / units["size"]).round(_DIGITS)
    return {str(name): group.to_numpy() for name, group in shares.groupby(units["layer"], sort=False)}
