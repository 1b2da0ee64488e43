"""What is proved of a net with one hidden layer after pruning: on the inputs it was pruned with, and on all others."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ellq.analysis import Calibration, as_batches, inputs_of
from ellq.theory import (
    Array,
    Gram,
    leverages,
    mean_upper_limit,
    moments_limit,
    open_fraction,
    output_change,
    ridged,
    risk_split,
    risk_whole,
    share_upper_limit,
    spectral_norm,
)

if TYPE_CHECKING:
    from ellq.pruning.plan import Plan

_REACH = 4.0  # inputs count up to this multiple of the largest change seen beforehand
_RIDGE = 1e-2  # of the metric: sharper here than a smaller one, which lets few directions decide how far inputs reach
_HELD = 2**25  # features kept at once to make a bound from the calibration inputs, 256 MiB


@dataclass(frozen=True)
class Guarantee:
    """How much pruning changes the outputs h of the layer that reads the hidden one, on average over new inputs.

        E ‖h_p − h_0‖²·1{x counts} ≤ risk_bound    and    P(x does not count) ≤ share_left_out

    both with probability 1 − δ over the inputs the bound was made from, which must be independent draws of the same
    law as new ones. With held-out inputs, an input counts whose squared change is at most ``limit``; without, one whose
    leverage zᵀW⁻¹z is, z being its features and W their second moments in one half of the calibration inputs. The
    bound is then for every choice of units and weights at once, and the less sharp.

    Attributes:
        calibration_risk: R̂_ID, the mean of ‖h_p − h_0‖² over the calibration inputs.
        output_energy: the mean of ‖h_0‖² about its mean over the calibration inputs.
        calibration_samples: how many those are.
        basis: ``"held-out"`` or ``"calibration"``: which inputs the bound was made from.
        samples: how many of them it was made from.
        observed: the mean of ‖h_p − h_0‖² over them.
        risk_bound: see above.
        share_left_out: see above.
        limit: up to what an input counts.
        delta: δ.
        change_norm: ‖Q‖₂, the largest change by features of length 1 (and the constant 1, where the bias changes).
    """

    calibration_risk: float
    output_energy: float
    calibration_samples: int
    basis: str
    samples: int
    observed: float
    risk_bound: float
    share_left_out: float
    limit: float
    delta: float
    change_norm: float

    @property
    def relative_error(self) -> float:
        """The root mean square change over the calibration inputs, relative to that of the outputs about their mean."""
        return _relative(self.calibration_risk, self.output_energy)

    @property
    def relative_bound(self) -> float:
        """The square root of ``risk_bound``, relative to the same."""
        return _relative(self.risk_bound, self.output_energy)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the bound assumes, a sentence each."""
        which = "held-out" if self.basis == "held-out" else "calibration"
        found = [
            f"The {which} inputs are independent draws of the law of new inputs.",
            "The dense net does not depend on them.",
        ]
        return (*found, "Nor does the choice of what to prune.") if self.basis == "held-out" else tuple(found)

    def pruned_risk(self, dense_risk: float) -> float:
        """Bound the squared loss of the pruned net over the inputs that count: ``risk_split``.

            E ‖h_p − y‖²·1{x counts} ≤ (√R_0 + √risk_bound)²        R_0 = E ‖h_0 − y‖²

        Args:
            dense_risk: R_0, whatever the targets y.

        Raises:
            ValueError: a negative or infinite risk.
        """
        return risk_split(self.risk_bound, dense_risk)

    def whole_risk(self, radius: float) -> float:
        """Bound R_ID = E ‖h_p − h_0‖² over all inputs, where no features are longer than a radius: ``risk_whole``.

        Args:
            radius: B with ‖(z, 1)‖ ≤ B always, such as from ``ellq.analysis.feature_norm_bound``.

        Raises:
            ValueError: a negative or infinite radius.
        """
        return risk_whole(self.risk_bound, self.share_left_out, largest=(self.change_norm * radius) ** 2)

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes and assumptions as values that JSON holds; None for what is infinite."""
        values = {name: None if value == math.inf else value for name, value in asdict(self).items()}
        return values | {"assumptions": list(self.assumptions)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Guarantee:
        """Return the guarantee that ``to_dict`` made.

        Raises:
            KeyError, TypeError, ValueError: an attribute is missing or of another kind.
        """
        kinds = {"int": int, "float": float, "str": str}
        values: dict[str, Any] = {}
        for field in fields(Guarantee):
            value = data[field.name]
            values[field.name] = math.inf if value is None else kinds[str(field.type)](value)
        return Guarantee(**values)

    def __str__(self) -> str:
        lines = [
            f"measured:   relative output error {self.relative_error:.3g} on {self.calibration_samples} calibration"
            " samples"
        ]
        if math.isfinite(self.risk_bound):
            why = "changes are larger" if self.basis == "held-out" else "features are out of reach"
            unless = "something was chosen by" if self.basis == "held-out" else "the net was trained on"
            lines += [
                f"guaranteed: relative output error <= {self.relative_bound:.3g} on new inputs, without at most"
                f" {self.share_left_out:.2g} of them, whose {why};",
                f"            with probability {1 - self.delta:g}, by {self.samples} {self.basis} samples,"
                f" unless {unless} them",
                f"so:         E|h_p - y|^2 <= (sqrt(E|h_0 - y|^2) + {math.sqrt(self.risk_bound):.3g})^2 on the same",
            ]
        else:
            lines.append("guaranteed: nothing on new inputs; pass held_out= for a bound")
        return "\n".join(lines)


def guarantee(
    dense: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    calibration: Calibration,
    held_out: Calibration | None = None,
    *,
    delta: float = 0.05,
) -> Guarantee:
    """Measure what pruning one hidden layer changed, and bound what it changes on new inputs.

    With held-out inputs, of which no example may be among the calibration ones, the bound is that of a mean (by
    betting) and of a share (exact binomial), δ/2 each, of changes up to 4 times the largest seen in calibration.
    Without, the calibration inputs are halved: the second moments of one half are the measure for those of the other.
    That needs many more samples than units, features that fit in 256 MiB, and one position per example; there is no
    bound otherwise.

    Args:
        dense: the model before.
        pruned: ``apply(dense, plan)``.
        plan: of method ``"id"``, for one hidden layer.
        calibration: the inputs the plan was made with.
        held_out: inputs that had no part in making the model or the plan.
        delta: δ in (0, 1).

    Returns:
        The guarantee.

    Raises:
        TypeError: inputs of the wrong kind.
        ValueError: a plan for none or several hidden layers, ``delta`` out of range, held-out examples that are among
            the calibration ones, or inputs the model does not run on.

    Reference: ours; ``mean_upper_limit``, ``share_upper_limit``, ``moments_limit`` and ``risk_split`` of the theory.
    """
    chance = open_fraction(delta, "delta")
    if len(plan.corrections) != 1:
        raise ValueError(
            f"The plan cuts {len(plan.corrections)} hidden layers; the guarantee is for one. Leave out held_out=, or"
            " use chain_bounds for what several change on given inputs."
        )
    correction = plan.corrections[0]
    dense = copy.deepcopy(dense)  # a forward pass may change buffers or keep what it saw
    change = _change(dense, pruned, plan)
    seen: set[bytes] = set()
    changes, kept, outputs, held = [], [], Gram(len(change), 0), 0
    for batch in as_batches(calibration):
        seen.update(_digests(batch))
        x, before, squares = _compared(dense, pruned, correction.consumer, batch)
        changes.append(squares)
        outputs.update(before.reshape(-1, before.shape[-1]), np.zeros((before[..., 0].size, 0)))
        held += x.size
        if held_out is None and x.ndim == 2 and held <= _HELD:
            kept.append(x)
    calibrated = np.concatenate(changes)
    energy = float(np.trace(outputs.moments(centred=True)[0])) / outputs.samples
    basis: dict[str, Any]
    if held_out is not None:
        losses = np.concatenate(list(_held_out_losses(dense, pruned, correction.consumer, held_out, seen)))
        basis = {"basis": "held-out"} | _by_held_out(losses, _REACH * float(calibrated.max()), chance)
    else:
        Z = np.concatenate(kept) if kept and held <= _HELD else np.zeros((0, 0))
        basis = {"basis": "calibration"} | _by_halves(Z, change, chance)
        basis |= {"samples": len(calibrated), "observed": float(calibrated.mean())}
    return Guarantee(
        calibration_risk=float(calibrated.mean()),
        output_energy=energy,
        calibration_samples=len(calibrated),
        delta=chance,
        change_norm=spectral_norm(change),
        **basis,
    )


def _by_held_out(losses: Array, limit: float, delta: float) -> dict[str, Any]:
    counted = losses <= limit
    return {
        "samples": losses.size,
        "observed": float(losses.mean()),
        "risk_bound": mean_upper_limit(np.where(counted, losses, 0.0), largest=limit, delta=delta / 2),
        "share_left_out": share_upper_limit(int((~counted).sum()), losses.size, delta=delta / 2),
        "limit": limit,
    }


def _by_halves(Z: Array, change: Array, delta: float) -> dict[str, Any]:
    if len(Z) < 4 or not Z[::2].any():
        return {"risk_bound": math.inf, "share_left_out": 0.0, "limit": math.inf}
    Z = np.hstack([Z, np.ones((len(Z), change.shape[1] - Z.shape[1]))])
    first, second = Z[::2], Z[1::2]
    metric = ridged(first.T @ first / len(first), _RIDGE)
    reach = float(leverages(first, metric).max())
    found = moments_limit([second], metric, reach=reach, delta=delta)
    return {"risk_bound": found.risk(change), "share_left_out": found.share_outside, "limit": reach}


def _change(dense: nn.Module, pruned: nn.Module, plan: Plan) -> Array:
    """Return Q, with the change of the bias as its last column where there is one."""
    correction = plan.corrections[0]
    before, after = (model.get_submodule(correction.consumer) for model in (dense, pruned))
    assert isinstance(before, nn.Linear)
    assert isinstance(after, nn.Linear)
    U, W = (layer.weight.detach().to("cpu", torch.float64).numpy() for layer in (before, after))
    if before.bias is None:
        return output_change(U, correction.indices, W)
    shift = (after.bias.detach().double() - before.bias.detach().double()).cpu().numpy()
    return output_change(U, correction.indices, W, shift=shift)


def _compared(dense: nn.Module, pruned: nn.Module, name: str, batch: Tensor) -> tuple[Array, Array, Array]:
    """Return the dense net's features and outputs, and every example's squared change, averaged over positions."""
    found: list[tuple[Array, Array]] = []
    for model in (dense, pruned):
        x = inputs_of(model, [name], batch)[0]
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            outputs = linear(x, layer.weight, layer.bias)
        found.append((x.to("cpu", torch.float64).numpy(), outputs.to("cpu", torch.float64).numpy()))
    (features, before), (_, after) = found
    squares = ((after - before) ** 2).sum(axis=-1)
    return features, before, squares.reshape(len(squares), -1).mean(axis=1)


def _held_out_losses(
    dense: nn.Module, pruned: nn.Module, name: str, held_out: Calibration, seen: set[bytes]
) -> Iterator[Array]:
    for number, batch in enumerate(as_batches(held_out)):
        shared = sum(digest in seen for digest in _digests(batch))
        if shared:
            raise ValueError(
                f"Batch {number} of held_out shares {shared} {'example' if shared == 1 else 'examples'} with"
                " calibration. Bound with inputs that nothing was chosen by."
            )
        yield _compared(dense, pruned, name, batch)[2]


def _digests(batch: Tensor) -> list[bytes]:
    """Return a hash of every example, the same for the same numbers of whatever type."""
    rows = batch.detach().to("cpu", torch.float64 if batch.is_floating_point() else batch.dtype).contiguous()
    return [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in rows]


def _relative(risk: float, energy: float) -> float:
    return math.sqrt(risk / energy) if energy > 0 else (math.inf if risk > 0 else 0.0)
