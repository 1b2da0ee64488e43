"""What a layer is to give, and what it is given, in second moments: the least-squares problem of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ellq.analysis import gather
from ellq.pruning.patches import PatchLayer, as_rows, outputs_at, patches, positions_of
from ellq.pruning.walk import Arrival
from ellq.theory import Array, Gram, row_errors
from ellq.theory.input_moments import layer_errors_observed, moment_error

Kept = npt.NDArray[np.bool_]

RIDGE = 1e-2
"""What is added to the diagonal of the inputs' second moments, relative to its mean."""
SAMPLES = 100
"""Positions per weight of a unit that are looked at; more do not change the fit, fewer do."""


@dataclass(frozen=True)
class Problem:
    """One group of rows: what they are to give, in second moments (about the means where a shift is refitted).

    Attributes:
        H: E[xxᵀ], shape (d, d).
        R: E[yxᵀ], shape (c, d).
        energy: E[y²], shape (c,).
        x_mean, y_mean: means, shapes (d,) and (c,); 0 where no shift is refitted.
        samples: how many positions they are of.
        dense: the weights so far, shape (c, d).
        kept: which of them the plan retains.
        is_exact: whether the targets are exactly what the dense weights give on x.
    """

    H: Array
    R: Array
    energy: Array
    x_mean: Array
    y_mean: Array
    samples: int
    dense: Array
    kept: Kept
    is_exact: bool = False

    def ridged(self, relative: float) -> tuple[Array, Array]:
        """Return H and R with a ridge towards the dense weights, which leaves what the samples do not say as it was."""
        amount = relative * float(np.diag(self.H).mean())
        amount = amount if amount > 0 else 1.0  # dead inputs: keep the weights
        return self.H + amount * np.eye(len(self.H)), self.R + amount * self.dense

    def errors(self, weights: Array) -> Array:
        """Return the mean squared error of every row, about the means where a shift is refitted."""
        if self.is_exact:
            return np.square(layer_errors_observed(weights - self.dense, self.H))
        return row_errors(self.H, self.R, self.energy, weights)

    def without_noise(self) -> Problem:
        """Return the problem with targets that are exactly what the dense weights give."""
        R = self.dense @ self.H
        return replace(self, R=R, energy=np.einsum("ij,ij->i", R, self.dense), is_exact=True)

    @property
    def stray(self) -> float:
        """By how much an entry of H may be off, relative to √(H_ii H_jj)."""
        # Sums about means, joined and taken back to 0, stray by up to four times what plain ones do.
        return 4 * moment_error(self.samples)


def problems_of(
    layer: PatchLayer, arrival: Arrival, mask: Tensor | None, *, centred: bool, draw: torch.Generator
) -> Iterator[Problem]:
    """Accumulate what a layer meets, and yield one problem for each group of its units.

    Where ``torch.distributed`` is initialised, of the inputs of all processes, the same bits in each.

    Args:
        layer: of the dense network.
        arrival: what it meets, and is to give.
        mask: which weights a plan retains; None for all.
        centred: whether a shift of every unit is fitted too.
        draw: of the positions that are looked at where there are more than 100 for each weight of a unit.

    Raises:
        ValueError: a NaN or infinite input or output.
    """
    dense = as_rows(layer, layer.weight.detach().to("cpu", torch.float64)).numpy()
    stays = np.ones(dense.shape, dtype=bool) if mask is None else as_rows(layer, mask).numpy()
    d = dense.shape[2]
    limit = math.ceil(SAMPLES * d / len(arrival.inputs))
    grams = [Gram(d, dense.shape[1]) for _ in dense]
    for number, (x, y) in enumerate(zip(arrival.inputs, arrival.targets, strict=True)):
        count = positions_of(layer, y)
        places = torch.randperm(count, generator=draw)[:limit] if count > limit else torch.arange(count)
        places = places.to(x.device)
        X, Y = on_host(patches(layer, x, places)), on_host(outputs_at(layer, y, places))
        if not (torch.isfinite(X).all() and torch.isfinite(Y).all()):
            raise ValueError(
                f"Batch {number} of the calibration set gives NaN or infinite inputs or outputs of {arrival.name!r}."
                " Nothing was changed."
            )
        for gram, features, targets in zip(grams, X, Y, strict=True):
            gram.update(features.numpy(), targets.numpy())
    bias = np.zeros(len(dense) * dense.shape[1])
    if layer.bias is not None:
        bias = layer.bias.detach().double().cpu().numpy()
    grams = [gather(gram) for gram in grams]
    for gram, own, keep, shift in zip(grams, dense, stays, np.split(bias, len(dense)), strict=True):
        n = gram.samples
        H, R, energy = (part / n for part in gram.moments(centred=centred))
        if centred:
            yield Problem(H, R.T, energy, gram.x_mean, gram.y_mean, n, own, keep)
        else:  # the bias stays, so the weights account for the rest
            R, energy = R - np.outer(gram.x_mean, shift), energy - 2 * shift * gram.y_mean + shift**2
            nothing = np.zeros(len(H)), np.zeros(len(R.T))
            yield Problem(H, R.T, energy, *nothing, n, own, keep)


def on_host(x: Tensor) -> Tensor:
    """Return a tensor on the CPU, of a type that NumPy has."""
    return x.detach().cpu().to(torch.promote_types(x.dtype, torch.float32))
