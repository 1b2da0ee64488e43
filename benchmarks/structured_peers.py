"""The ways to narrow a network that are measured side by side: ours, the authors', Torch-Pruning's and random.

Torch-Pruning follows the zero-padded shortcuts of the pretrained ResNets wrongly: cut with the default arguments, the
net does not run (its last layer gets 56 of the 32 channels it reads). So it cuts the channels inside the blocks and
leaves the residual stream, which is what the authors' rules do too; "ours, inside blocks" is ours with that handicap.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ellq
from ellq.analysis import as_batches, cost
from ellq.pruning.recalibrate import recalibrate_

Contender = Callable[[nn.Module, Tensor, Tensor, float], nn.Module]
"""Maps a net, images, their labels and the fraction of FLOPs to retain at most to a smaller net."""

_BISECTIONS = 12
_INSIDE = re.compile(r"layer\d+\.\d+\.conv1")


def by_ellq(net: nn.Module, images: Tensor, labels: Tensor, fraction: float, **arguments: Any) -> nn.Module:
    """Prune by ``ellq.prune``; labels are not looked at."""
    return ellq.prune(net, images, method="id", flops=fraction, **arguments)


def by_torch_pruning(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    fraction: float,
    *,
    importance: Callable[[], Any],
    is_global: bool = False,
    has_gradients: bool = False,
    recalibrate: bool = False,
) -> nn.Module:
    """Prune by Torch-Pruning, its pruning ratio bisected for the most FLOPs that are not above the fraction.

    Where each layer loses the same share, as many layers as can be lose a channel less.

    Args:
        net: not changed.
        images: for gradients and batch norms' statistics.
        labels: for gradients.
        fraction: of the dense FLOPs.
        importance: makes the importance.
        is_global: whether channels of all layers are ranked together; otherwise each layer loses the same share.
        has_gradients: whether the importance looks at the gradients of the cross-entropy.
        recalibrate: whether batch norms' statistics are estimated anew.
    """
    layers = _inside(net)
    gradients = _gradients(net, images, labels) if has_gradients else None
    allowed = fraction * cost(net, images[:1]).flops
    best, most = net, 0

    def fits(ratios: Sequence[float]) -> bool:
        nonlocal best, most
        found = _at_ratios(net, images[:1], dict(zip(layers, ratios, strict=True)), importance(), is_global, gradients)
        flops = cost(found, images[:1]).flops
        if most < flops <= allowed:
            best, most = found, flops
        return flops <= allowed

    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits([middle] * len(layers)) else (middle, high)
    if not is_global:  # all widths step down at once where the ratio does; so the last ones need not
        fewest, enough = 0, len(layers)
        while enough - fewest > 1:
            number = (fewest + enough) // 2
            fewest, enough = (
                (fewest, number) if fits([high] * number + [low] * (len(layers) - number)) else (number, enough)
            )
    if not most:
        raise ValueError(f"No pruning ratio reaches {fraction:.0%} of the FLOPs.")
    for parameter in best.parameters():
        parameter.grad = None
    if recalibrate:
        recalibrate_(best, list(as_batches(images)))
    return best


def _at_ratios(
    net: nn.Module,
    example: Tensor,
    ratios: Mapping[str, float],
    importance: Any,
    is_global: bool,
    gradients: Sequence[Tensor] | None,
) -> nn.Module:
    pruned = copy.deepcopy(net).eval()
    if gradients is not None:
        for parameter, gradient in zip(pruned.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
    layers = {name: m for name, m in pruned.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    first = next(iter(ratios.values()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the random importance
        tp.pruner.BasePruner(
            pruned,
            example,
            importance=importance,
            global_pruning=is_global,
            pruning_ratio=first,
            pruning_ratio_dict=None if is_global else {layers[name]: ratio for name, ratio in ratios.items()},
            ignored_layers=[layer for name, layer in layers.items() if name not in ratios],
        ).step()
    return pruned


def _inside(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_modules() if _INSIDE.fullmatch(name)]


def _gradients(net: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the gradients of the mean cross-entropy on all the images."""
    differentiated = copy.deepcopy(net).eval()
    for batch, own in zip(torch.split(images, 250), torch.split(labels, 250), strict=True):
        loss = cross_entropy(differentiated(batch), own, reduction="sum") / len(images)
        loss.backward()  # type: ignore[no-untyped-call]
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in differentiated.parameters()]


_IMPORTANCES: dict[str, dict[str, Any]] = {
    "tp magnitude": {"importance": tp.importance.MagnitudeImportance},
    "tp magnitude, global": {"importance": tp.importance.MagnitudeImportance, "is_global": True},
    "tp bn scale": {"importance": tp.importance.BNScaleImportance},
    "tp taylor": {"importance": tp.importance.TaylorImportance, "has_gradients": True},
    "tp fpgm": {"importance": tp.importance.FPGMImportance},
    "random": {"importance": tp.importance.RandomImportance},
}

CONTENDERS: dict[str, Contender] = {
    "ours": by_ellq,
    "ours, inside blocks": partial(by_ellq, include="layer*"),
    "ours, uniform": partial(by_ellq, widths="uniform"),
    "ours, sequential": partial(by_ellq, refit="sequential"),
    "chee2021": partial(by_ellq, rule="chee2021"),
    "chee2021 + bn": partial(by_ellq, rule="chee2021", recalibrate=True),
    "chee2022": partial(by_ellq, rule="chee2022"),
    "chee2022 + bn": partial(by_ellq, rule="chee2022", recalibrate=True),
    **{
        name + (" + bn" if recalibrate else ""): partial(by_torch_pruning, recalibrate=recalibrate, **arguments)
        for name, arguments in _IMPORTANCES.items()
        for recalibrate in (False, True)
    },
}
OURS = ("ours", "ours, inside blocks", "ours, uniform", "ours, sequential")
