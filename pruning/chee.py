"""The authors' two algorithms for deep networks (arXiv 2108.00065), as their released code does them.

One-shot: every group keeps the same fraction, chosen and interpolated by pivoted QR of the dense network's features.
Iterative: again and again, the group whose next pivot is smallest for the FLOPs that go is cut by a factor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from ellq.pruning.channel_features import accumulate, fold_
from ellq.pruning.coupling import ChannelGroup, Coupling
from ellq.pruning.structured import Narrowed
from ellq.pruning.width_costs import CostModel, flops_of_layers
from ellq.theory import Tsqr, pivoted_qr
from ellq.theory.arguments import Indices


def coverable(groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups that the authors cut, those that one layer makes and one reads, and why the others stay."""
    cut = [group for group in groups if len(group.producers) == 1 and len(group.consumers) == 1]
    left = {group.name: "the authors leave what several layers make or read" for group in groups if group not in cut}
    return cut, left


def one_shot(
    dense: nn.Module, groups: Sequence[ChannelGroup], batches: Sequence[Tensor], widths: Mapping[str, int]
) -> Narrowed:
    """Cut groups to widths by pivoted QR of the dense network's features, folding T into the readers.

    Features are taken where they are read, after norm, activation and pooling, neither centred nor scaled; no bias and
    no norm is changed; a flatten in between makes T ⊗ I.

    Args:
        dense: the network, in eval mode; not changed.
        groups: what is cut.
        batches: calibration inputs.
        widths: how many units each keeps, by name.

    Reference: Chee et al. 2021 (arXiv 2108.00065), the one-shot algorithm.
    """
    cut = [group for group in groups if widths[group.name] < group.units]
    changing = copy.deepcopy(dense)
    kept: dict[str, Indices] = {}
    triangles = accumulate(dense, cut, batches)
    for group in cut:
        selection = pivoted_qr(triangles[group.name].columns(centred=False), widths[group.name])
        fold_(changing, group, triangles[group.name], selection)
        kept[group.name] = np.sort(selection.indices)
    return Narrowed(changing, kept)


def widths_within(
    dense: nn.Module, groups: Sequence[ChannelGroup], batches: Sequence[Tensor], tol: float, *, least: int = 1
) -> dict[str, int]:
    """Return the fewest units of each group whose ID is ε-accurate: ‖A − A_J T‖₂ ≤ ε·‖A‖₂, A the features."""
    widths = {}
    for name, triangle in accumulate(dense, groups, batches).items():
        columns = triangle.columns(centred=False)
        full = pivoted_qr(columns, columns.features)
        norm = np.linalg.norm(full.factor, 2)
        low, high = min(least, columns.features), columns.features
        while low < high:  # the norm of what is left of the factor never rises
            middle = (low + high) // 2
            rest = full.factor[middle:]
            is_close = not rest.size or np.linalg.norm(rest, 2) <= tol * norm
            low, high = (low, middle) if is_close else (middle + 1, high)
        widths[name] = low
    return widths


def iterative(
    dense: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    flops: Callable[[Mapping[str, int]], Mapping[str, float]],
    cost: CostModel,
    budget: float,
    *,
    alpha: float = 0.9,
    least: int = 1,
) -> Narrowed:
    """Cut one group at a time by the factor α until the budget is met.

        k = ⌊α·m⌋        score = |r_{k+1,k+1}/r_11| / (0.1·F_producer + 0.1·F_reader)

    m is the group's present width, r the pivots of its features on the network so far, F the present costs of the layer
    that makes its units and the one that reads them; the group of least score is cut.

    Args:
        dense: the network, in eval mode; not changed.
        groups: what may be cut.
        batches: calibration inputs.
        flops: what each layer takes, by name, at some widths.
        cost: what is to be saved.
        budget: the fraction of the dense cost at which to stop.
        alpha: α, in (0, 1).
        least: where a group stops; the authors have no such limit.

    Returns:
        The narrowed network; where no group can be cut any more, what there is then.

    Reference: Chee et al. 2022 (NeurIPS), the released code's ``iditer``; 0.9 is its factor on CIFAR-10.
    """
    changing = copy.deepcopy(dense)
    kept: dict[str, Indices] = {group.name: np.arange(group.units) for group in groups}
    triangles: dict[str, Tsqr] = {}
    stale = list(groups)  # whose features have changed: what lies before a cut is as it was
    while cost.cost(_widths(kept)) > budget * cost.dense:
        triangles |= accumulate(changing, stale, batches, units=kept)
        spent = flops(_widths(kept))
        best: tuple[float, int] | None = None
        for place, group in enumerate(groups):
            m = len(kept[group.name])
            k = math.floor(alpha * m)
            if max(least, 1) <= k < m:
                around = 0.1 * spent[group.producers[0].module] + 0.1 * spent[group.consumers[0].module]
                score = _pivot_ratio(triangles[group.name], k) / around
                best = min(best or (score, place), (score, place))
        if best is None:
            break
        group = groups[best[1]]
        own = kept[group.name]
        selection = pivoted_qr(triangles[group.name].columns(centred=False), math.floor(alpha * len(own)))
        fold_(changing, group, triangles[group.name], selection, units=own)
        kept[group.name] = own[np.sort(selection.indices)]
        stale = list(groups[best[1] :])
    return Narrowed(changing, kept)


def flops_by_layer(
    dense: nn.Module, coupling: Coupling, example: Tensor
) -> Callable[[Mapping[str, int]], Mapping[str, float]]:
    """Return what each layer that a coupling cuts takes, as the authors count FLOPs, as a function of widths."""
    costs = flops_of_layers(dense, coupling, example, "chee2021")

    def at(widths: Mapping[str, int]) -> Mapping[str, float]:
        row = np.array([[widths.get(group.name, group.units) for group in coupling.groups]])
        return dict(zip(costs.widths.names, costs.by_layer(row)[0].tolist(), strict=True))

    return at


def _pivot_ratio(triangle: Tsqr, k: int) -> float:
    """Return |r_{k+1,k+1} / r_11|; 0 where the rank is no more than k."""
    selection = pivoted_qr(triangle.columns(centred=False), k + 1)
    if selection.rank <= k:
        return 0.0
    return abs(float(selection.factor[k, selection.indices[k]] / selection.factor[0, selection.indices[0]]))


def _widths(kept: Mapping[str, Indices]) -> dict[str, int]:
    return {name: len(own) for name, own in kept.items()}
