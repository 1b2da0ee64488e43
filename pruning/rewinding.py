"""What goes back when a pruned net is retrained: weights, the optimiser's state, the place in the schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral

from torch import Tensor

from ellq.theory.arguments import count

NAMES = ("warm-up", "start", "none", "rate")
ComesBack = Callable[[str, Tensor, int], bool]


def every_tensor(name: str, tensor: Tensor, iteration: int) -> bool:
    """Return True: parameters and buffers all come back, every time."""
    return True


@dataclass(frozen=True)
class Rewinding:
    """How far back, and what of it.

    Attributes:
        epoch: of the dense net's warm-up, 0 to its length: what was stored after it comes back; None, nothing does.
        position: the place in the learning-rate schedule at which retraining begins; None, where it was left.
        comes_back: whether a tensor of this name and value does, at the beginning of this iteration.
    """

    epoch: int | None
    position: int | None
    comes_back: ComesBack = every_tensor

    def tensors(self, now: Mapping[str, Tensor], then: Mapping[str, Tensor], iteration: int) -> dict[str, Tensor]:
        """Return what a net goes on with: of each tensor what it is now, or what it was then."""
        return {name: then[name] if self.comes_back(name, value, iteration) else value for name, value in now.items()}


def rewinding(rewind: str | int, warm_up: int, cap: int) -> Rewinding:
    """Return what ``rewind`` means.

    - ``"warm-up"``: the tensors after the dense net's warm-up.
    - ``"start"``: those it began with.
    - r: those after r of its epochs.
    - ``"none"``: nothing goes back.
    - ``"rate"``: only the learning rate, to place max(0, warm_up − cap), so that retraining as long as the cap allows
      goes through the end of the dense net's schedule again.

    Tensors come back with the optimiser's state and the place in the schedule that went with them.

    Args:
        rewind: one of these.
        warm_up: epochs of the dense net, ≥ 0.
        cap: the most epochs of an iteration, ≥ 1.

    Raises:
        TypeError: it is neither a name nor a whole number.
        ValueError: an unknown name, or r > warm_up.

    Reference: Frankle et al. 2019 (arXiv 1903.01611) for epoch r; Renda et al. 2020 (arXiv 2003.02389) for ``"rate"``.
    """
    if isinstance(rewind, str):
        if rewind not in NAMES:
            known = ", ".join(map(repr, NAMES))
            raise ValueError(f"rewind={rewind!r} is unknown. Choose one of {known}, or an epoch of the warm-up.")
        if rewind == "none":
            return Rewinding(None, None)
        if rewind == "rate":
            return Rewinding(None, max(0, warm_up - cap))
        rewind = 0 if rewind == "start" else warm_up
    elif isinstance(rewind, bool) or not isinstance(rewind, Integral):
        raise TypeError(f"rewind must be a name or an epoch of the warm-up, got {type(rewind).__name__} {rewind!r}.")
    epoch = count(rewind, "rewind", low=0, high=warm_up)
    return Rewinding(epoch, epoch)
