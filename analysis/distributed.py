"""What every process of ``torch.distributed`` found on its own batches, made one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ellq.theory.accumulators import Gram, Tsqr

AnyAccumulator = TypeVar("AnyAccumulator", Gram, Tsqr)


def gather(accumulator: AnyAccumulator, *, group: dist.ProcessGroup | None = None) -> AnyAccumulator:
    """Return the accumulator of all processes' samples, the same bits in every one of them.

    Every process of the group must call it. The parts are merged in the order of the ranks, one at a time, so a
    process never holds more than two; where they were cut changes the last digits only. Works with gloo, and with
    nccl after ``torch.cuda.set_device``. The result is where ``accumulator`` is.

    Args:
        accumulator: what this process accumulated, which may be nothing; not changed.
        group: the processes that take part; all of them by default.

    Returns:
        The merged accumulator; ``accumulator`` itself if no process group was initialised.

    Raises:
        TypeError: the processes hold different kinds of accumulators.
        ValueError: they hold different numbers of features or targets, or the sums overflow. Every process raises it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return accumulator
    layouts: list[Any] = [None] * dist.get_world_size(group)
    layout = (type(accumulator).__name__, accumulator.features, accumulator.targets)
    dist.all_gather_object(layouts, layout, group=group)
    _refuse_other_layouts(layouts)
    mine = accumulator.to(None)
    total = type(accumulator)(accumulator.features, accumulator.targets)
    for rank in range(len(layouts)):
        total = total.merge(_from(rank, mine, group))
    # Sent once more, for processors that round differently would merge to different bits.
    return _from(0, total, group).to(accumulator.device)


def add_up(value: float) -> float:
    """Return the sum of all processes' values, in the order of the ranks; the value itself without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return float(sum(values))


def mean_of(tensors: Sequence[Tensor], weight: float) -> list[Tensor]:
    """Return the mean of all processes' tensors by their weights; the tensors themselves without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(tensors)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, ([tensor.detach().double().cpu() for tensor in tensors], weight))
    total = sum(share for _, share in found)
    means = [sum(share / total * parts[number] for parts, share in found) for number in range(len(tensors))]
    return [mean.to(tensor) for mean, tensor in zip(means, tensors, strict=True)]


def joined(tensor: Tensor) -> Tensor:
    """Return all processes' tensors one after another along the first axis; the tensor without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, tensor.detach().cpu())
    return torch.cat(found).to(tensor.device)


def _from(rank: int, value: AnyAccumulator, group: dist.ProcessGroup | None) -> AnyAccumulator:
    """Return the value that the process of this rank passes."""
    box = [value if dist.get_rank(group) == rank else None]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, rank) if group else rank, group=group)
    return cast("AnyAccumulator", box[0])


def _refuse_other_layouts(layouts: list[tuple[str, int, int]]) -> None:
    for rank, (kind, features, targets) in enumerate(layouts):
        if kind != layouts[0][0]:
            raise TypeError(f"Rank {rank} holds a {kind} but rank 0 a {layouts[0][0]}. Use one kind in all processes.")
        if (features, targets) != layouts[0][1:]:
            raise ValueError(
                f"Rank {rank} accumulated {features} features and {targets} targets, but rank 0"
                f" {layouts[0][1]} and {layouts[0][2]}. Accumulate the same layer in all processes."
            )
