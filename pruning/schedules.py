"""How much is removed at each step of pruning that goes in steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real

Schedule = Callable[[int, int, float], float]


def geometric(step: int, steps: int, sparsity: float) -> float:
    """Return 1 − (1 − s)^(t/T): every step keeps the same fraction of what the one before kept.

    Args:
        step: t, in [0, T].
        steps: T ≥ 1.
        sparsity: s, at the last step, in [0, 1).

    Returns:
        The sparsity at step t; exactly s at T.

    Reference: iterative magnitude pruning, as in Han et al. 2015 (arXiv 1506.02626).
    """
    return sparsity if step == steps else -math.expm1(math.log1p(-sparsity) * step / steps)


def cubic(step: int, steps: int, sparsity: float, initial: float = 0.0) -> float:
    """Return s_f + (s_i − s_f)·(1 − t/T)³: much at first, while the net has most to spare, and little at the end.

    Args:
        step: t, in [0, T].
        steps: T ≥ 1.
        sparsity: s_f, at the last step.
        initial: s_i, at step 0.

    Returns:
        The sparsity at step t.

    Reference: Zhu & Gupta 2017 (arXiv 1710.01878), §3.
    """
    return sparsity + (initial - sparsity) * (1.0 - step / steps) ** 3


def one_shot(step: int, steps: int, sparsity: float) -> float:
    """Return the final sparsity from the first step on."""
    return sparsity if step >= 1 else 0.0


SCHEDULES: Mapping[str, Schedule] = {"geometric": geometric, "cubic": cubic, "one-shot": one_shot}


def targets_of(schedule: str | Schedule, steps: int, sparsity: float, *, regrow: bool | None = None) -> list[float]:
    """Return the sparsity a schedule asks for at each of the steps 1 to ``steps``.

    Args:
        schedule: one of ``SCHEDULES`` by name, or a function of step, steps and sparsity.
        steps: T ≥ 1.
        sparsity: at the last step.
        regrow: whether it may fall; None where there is no such choice.

    Returns:
        One sparsity in [0, 1) for each step.

    Raises:
        TypeError: schedule is neither.
        ValueError: an unknown name, a value outside [0, 1), or one below that of the step before.
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        known = ", ".join(map(repr, SCHEDULES))
        raise ValueError(f"schedule={schedule!r} is unknown. Choose one of {known}, or pass a function.")
    function = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    if not callable(function):
        raise TypeError(f"schedule must be a name or a function, got {type(schedule).__name__}.")
    targets: list[float] = []
    for step in range(1, steps + 1):
        value: object = function(step, steps, sparsity)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) < 1.0:
            raise ValueError(f"schedule gives {value!r} at step {step} of {steps}. Return a sparsity in [0, 1).")
        if targets and float(value) < targets[-1] and not regrow:
            otherwise = "" if regrow is None else ", or pass regrow=True"
            raise ValueError(
                f"schedule falls from {targets[-1]:g} to {float(value):g} at step {step}, but masks only shrink. Let it"
                f" rise{otherwise}."
            )
        targets.append(float(value))
    return targets
