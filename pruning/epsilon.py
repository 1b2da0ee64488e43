"""How near to the dense net's a flow must come: ε from how far flows lie apart that mean the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ellq.pruning.resumable import random_state
from ellq.pruning.stopping import Monitor
from ellq.theory import open_fraction
from ellq.theory.arguments import count, finite_array


def calibrate_epsilon(vectors: Sequence[npt.ArrayLike], *, quantile: float = 0.95) -> float:
    """Return a quantile of the distances between flows of nets that are alike: other seeds, or epochs of one.

        ε = quantile of ‖F_i − F_j‖₂ over i < j

    Pairs of few vectors are not independent; of n there are n(n−1)/2, and only n − 1 say something new.

    Args:
        vectors: two or more of one length, such as ``[monitor(net) for net in dense_nets]``.
        quantile: in (0, 1).

    Returns:
        ε, in the units of the flow.

    Raises:
        ValueError: fewer than two vectors, other lengths, entries that are not finite, or all vectors equal, which
            leaves no ε above 0.
    """
    quantile = open_fraction(quantile, "quantile")
    rows = [finite_array(vector, f"vectors[{place}]", ndim=1) for place, vector in enumerate(vectors)]
    if len(rows) < 2:
        raise ValueError(f"vectors holds {len(rows)}, and distances are between two. Pass at least two vectors.")
    odd = next((place for place, row in enumerate(rows) if len(row) != len(rows[0])), None)
    if odd is not None:
        raise ValueError(f"vectors[{odd}] has {len(rows[odd])} entries, vectors[0] {len(rows[0])}. Pass one length.")
    distances = [np.linalg.norm(first - second) for first, second in itertools.combinations(rows, 2)]
    return _above_zero(float(np.quantile(distances, quantile)))


def calibrate_epsilon_on_halves(
    make: Callable[..., Monitor],
    model: nn.Module,
    *examples: Tensor,
    quantile: float = 0.95,
    repeats: int = 20,
    seed: int = 0,
) -> float:
    """Return a quantile of the distances between a dense net's flows on the two halves of the data, drawn at random.

    On halves noise is larger than on all N examples, so that ε is on the generous side: where the variance of a flow is
    σ²/N, the difference of two halves spreads by 2σ/√N, that of two measurements on all examples by √2·σ/√N.

    Args:
        make: makes a monitor from a half of the examples, such as ``FlowMonitor`` or ``GradientMonitor``.
        model: the dense net.
        *examples: inputs, and labels if ``make`` takes them, cut along the first axis.
        quantile: in (0, 1).
        repeats: how many ways of halving, ≥ 1.
        seed: of the halves.

    Returns:
        ε, in the units of the flow.

    Raises:
        ValueError: examples of other lengths or fewer than four, or no distance above 0.
    """
    quantile = open_fraction(quantile, "quantile")
    repeats, seed = count(repeats, "repeats", low=1, high=10**6), count(seed, "seed", low=0, high=2**63 - 1)
    lengths = [len(part) for part in examples]
    if not lengths or set(lengths) != {lengths[0]} or lengths[0] < 4:
        raise ValueError(f"examples have lengths {lengths}. Pass at least four examples, labels as many as inputs.")
    distances = []
    with random_state(seed, 0):
        for _ in range(repeats):
            order = torch.randperm(lengths[0])
            middle = lengths[0] // 2
            halves = order[:middle].sort().values, order[middle : 2 * middle].sort().values
            first, second = (
                finite_array(make(*(part[half] for part in examples))(model), "flow", ndim=1) for half in halves
            )
            distances.append(np.linalg.norm(first - second))
    return _above_zero(float(np.quantile(distances, quantile)))


def _above_zero(epsilon: float) -> float:
    if not epsilon:
        raise ValueError("All flows are equal, which leaves no epsilon above 0. Pass nets or halves that differ.")
    return epsilon
