"""How many bytes weights take in a file or in memory, by format and by how many of them are retained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ellq.pruning.masks import Maskable, maskable_weights, refuse_blocked
from ellq.pruning.plan import Plan

STORAGES = ("csr", "coo", "bitmask", "dense", "2:4")


def storage_bytes(model: nn.Module | Mapping[str, Tensor], storage: str = "csr", *, plan: Plan | None = None) -> int:
    """Count the bytes of a model's prunable weights in a format; biases, norms and embeddings are not counted.

    With n weights of b bytes in u units, k of them retained:

        dense     b·n
        csr       b·k + 4·k + 4·(u + 1)      values, int32 columns, int32 row pointers; a row is a unit
        coo       b·k + 8·k                  values, int32 rows and columns
        bitmask   b·k + ⌈n/8⌉                values, one bit per weight
        2:4       b·k + ⌈k/4⌉                values, two bits for the place of each in its four; every unit a
                                             multiple of 4 wide

    Args:
        model: the model or state dict.
        storage: one of ``STORAGES``.
        plan: what is retained, of the weights it covers; without it the weights that are not 0.

    Returns:
        The bytes of the weights the plan covers, or of all prunable ones, each tied one once.

    Raises:
        ValueError: an unknown format, more than two of four retained in ``"2:4"``, or a plan for another model.
    """
    require_storage(storage)
    weights = {weight.name: weight for weight in maskable_weights(model)}
    if plan is None:
        refuse_blocked([*weights.values()])
        retained = {name: int(weight.tensor.count_nonzero()) for name, weight in weights.items()}
    else:
        retained = {
            str(name): int(kept) for name, kept in plan.table.groupby("layer", sort=False)["retained"].sum().items()
        }
    missing = next((name for name in retained if name not in weights), None)
    if missing is not None:
        raise ValueError(f"The plan is for another model: it has layer {missing!r}, which the model lacks.")
    return sum(layer_bytes(weights[name], kept, storage) for name, kept in retained.items())


def layer_bytes(weight: Maskable, retained: int, storage: str) -> int:
    """Count the bytes of one weight of which some entries are retained; see ``storage_bytes``."""
    units, size = len(weight.layer()), weight.tensor.numel()
    each = weight.tensor.element_size()
    if storage == "dense":
        return each * size
    if storage == "2:4":
        width = size // units
        if width % 4 or 2 * retained > size:
            problem = f"units of {width} weights" if width % 4 else f"{retained} of {size} weights retained"
            raise ValueError(f"Layer {weight.name!r} has {problem}, which storage='2:4' cannot hold.")
        return each * retained + math.ceil(retained / 4)
    overhead = {"csr": 4 * retained + 4 * (units + 1), "coo": 8 * retained, "bitmask": math.ceil(size / 8)}
    return each * retained + overhead[storage]


def most_that_fits(weights: Sequence[Maskable], limit: int, storage: str) -> int:
    """Return the most weights that fit into ``limit`` bytes if all have the narrowest type; −1 if none fit."""
    fixed = sum(layer_bytes(weight, 0, storage) for weight in weights)
    total = sum(weight.tensor.numel() for weight in weights)
    if fixed > limit:
        return -1
    if storage == "dense":
        return total
    each = min(weight.tensor.element_size() for weight in weights) + {"csr": 4, "coo": 8, "bitmask": 0}[storage]
    return min(total, (limit - fixed) // each)


def require_storage(storage: str) -> None:
    """Refuse a format that is not known."""
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r} is unknown. Choose one of {', '.join(map(repr, STORAGES))}.")
