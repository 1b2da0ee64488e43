"""Units of a group as columns of features where they are read, after norm, activation and pooling; and folding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from ellq.analysis import gather, track
from ellq.pruning.coupling import ChannelGroup, Member
from ellq.pruning.layer_problem import on_host
from ellq.pruning.walk import walk
from ellq.theory import Array, Selection, Triangle, Tsqr, interpolate
from ellq.theory.arguments import Indices
from ellq.theory.swaps import Rule


def features(module: nn.Module, x: Tensor, entries: Indices) -> Tensor:
    """Return a reader's input as one column per unit.

    Args:
        module: a Linear, or a convolution.
        x: what it receives: channels along the last axis for a Linear, along the second for a convolution.
        entries: which channels belong to each unit, shape (units, r).

    Returns:
        Shape (n·r, units): a row for every sample, place in space and channel of a unit. Flattened feature maps, where
        r is the number of places, so count as what they were: T is then used as T ⊗ I.
    """
    rows = x.reshape(-1, x.shape[-1]) if isinstance(module, nn.Linear) else x.movedim(1, -1).flatten(0, -2)
    return rows[:, torch.from_numpy(entries).to(rows.device)].movedim(1, 2).flatten(0, 1)


def accumulate(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    *,
    units: Mapping[str, Indices] | None = None,
) -> dict[str, Tsqr]:
    """Return for each group the triangle of its features at its first reader.

    Args:
        model: the network they are of.
        groups: which.
        batches: calibration inputs.
        units: which units are looked at, by group, rising; all of groups that are not named.

    Raises:
        ValueError: a NaN or infinite feature; the layer is named.
    """
    present = {group.name: np.arange(group.units) for group in groups} | dict(units or {})
    several: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        several.setdefault(group.consumers[0].module, []).append(group)
    found: dict[str, Tsqr] = {}
    arrivals = walk(model, model, batches, list(several))
    for arrival in track(arrivals, "measuring features", total=len(several)):
        module = model.get_submodule(arrival.name)
        for group in several[arrival.name]:
            own = present[group.name]
            triangle = found.setdefault(group.name, Tsqr(len(own)))
            for number, x in enumerate(arrival.inputs):
                columns = on_host(features(module, x, group.consumers[0].entries[own]))
                if not torch.isfinite(columns).all():
                    raise ValueError(
                        f"Batch {number} of the calibration set gives NaN or infinite inputs of {arrival.name!r}."
                        " Nothing was changed."
                    )
                triangle.update(columns.numpy())
    found = {name: gather(triangle) for name, triangle in found.items()}
    _warn_of_few_samples([group for group in groups if len(present[group.name]) == group.units], found)
    return found


def _warn_of_few_samples(groups: Sequence[ChannelGroup], triangles: Mapping[str, Tsqr]) -> None:
    few = [(group.units / triangles[group.name].samples, group) for group in groups if group.name in triangles]
    ratio, group = max(few, key=lambda pair: pair[0], default=(0.0, None))
    if group is not None and ratio > 1:
        warnings.warn(
            f"Group {group.name!r} has features of {triangles[group.name].samples} samples for {group.units} units."
            f" Pass about {math.ceil(ratio)} times as many calibration inputs.",
            stacklevel=3,
        )


def select(model: nn.Module, group: ChannelGroup, triangle: Tsqr, rule: Rule, k: int) -> Selection:
    """Choose k units by their features; rules that look at outputs see those of all readers, position by position."""
    plain = triangle.columns(centred=False)
    read = [_by_unit(cast(Tensor, model.get_submodule(m.module).weight), m) for m in group.consumers]
    U = np.concatenate([weights.reshape(group.units, -1) for weights in read], axis=1)
    return rule(Triangle(plain.X, plain.X @ U), k)


def fold_(
    changing: nn.Module,
    group: ChannelGroup,
    triangle: Tsqr,
    selection: Selection,
    *,
    units: Indices | None = None,
    elsewhere: Mapping[str, Tsqr] | None = None,
) -> None:
    """Fold the interpolation of units by those selected into their readers: W ← W·Tᵀ at every tap; biases stay.

    Columns of units that are not selected become 0.

    Args:
        changing: the network; changed.
        group: whose units.
        triangle: of their features at the first reader.
        selection: made on it.
        units: which units the triangle is of, rising; None for all.
        elsewhere: of their features at other readers, by layer; those have an interpolation of their own.
    """
    present = np.arange(group.units) if units is None else units
    skeleton = interpolate(triangle, selection, intercept=False)
    for member in group.consumers:
        weight = cast(Tensor, changing.get_submodule(member.module).weight)
        own = _by_unit(weight, member)  # (units, r, c, taps)
        folded = np.zeros_like(own)
        T = skeleton.interpolation
        if elsewhere is not None and member.module in elsewhere:
            T = _by_least_squares(elsewhere[member.module], skeleton.indices)
        folded[present[skeleton.indices]] = np.einsum("ku,urct->krct", T, own[present])
        write_(weight, member, folded)


def _by_least_squares(triangle: Tsqr, chosen: Indices) -> Array:
    """Return how every unit is interpolated by chosen ones, shape (k, units)."""
    X = triangle.columns(centred=False).X
    T = np.asarray(scipy.linalg.lstsq(X[:, chosen], X)[0])
    T[:, chosen] = np.eye(len(chosen))
    return T


def zero_(changing: nn.Module, group: ChannelGroup, kept: Indices) -> None:
    """Set the readers' columns of units that are not kept to 0."""
    for member in group.consumers:
        weight = cast(Tensor, changing.get_submodule(member.module).weight)
        own = _by_unit(weight, member)
        own[np.setdiff1d(np.arange(group.units), kept)] = 0.0
        write_(weight, member, own)


def write_(weight: Tensor, member: Member, values: Array) -> None:
    """Write columns, shape (units, r, c, taps), into a reader's weight."""
    columns = torch.from_numpy(member.entries.ravel()).to(weight.device)
    taps = values.transpose(2, 0, 1, 3).reshape(len(weight), columns.numel(), *weight.shape[2:])
    with torch.no_grad():
        weight[:, columns] = torch.from_numpy(taps).to(weight)


def _by_unit(weight: Tensor, member: Member) -> Array:
    """Return a reader's columns, shape (units, r, c, taps)."""
    own = weight.detach().cpu().double().flatten(2) if weight.ndim > 2 else weight.detach().cpu().double()[:, :, None]
    return own.numpy()[:, member.entries].transpose(1, 2, 0, 3).copy()


def magnitudes(model: nn.Module, group: ChannelGroup) -> Array:
    """Return for each unit the Euclidean norm of the weights that make it, shape (units,)."""
    total = np.zeros(group.units)
    for member in group.producers:
        weight = cast(Tensor, model.get_submodule(member.module).weight).detach().cpu().double()
        rows = weight.t() if isinstance(model.get_submodule(member.module), nn.Embedding) else weight.flatten(1)
        total += np.square(rows.numpy())[member.entries].sum(axis=(1, 2))
    return np.asarray(np.sqrt(total))
