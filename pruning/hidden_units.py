"""Removing hidden units by interpolative decomposition: which stay, and what the next layer becomes."""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize

from ellq.analysis import inputs_of, track, weight_matrices
from ellq.pruning import masks
from ellq.pruning.allocate import retained_of
from ellq.pruning.hidden_layers import HiddenLayer, hidden_layers, same_computation
from ellq.pruning.plan import Correction, Plan, plan_table
from ellq.pruning.surgery import cut_
from ellq.theory import Array, Gram, Selection, interpolate, output_aware, pivoted_qr, refit

RULES = ("ellq", "chee2021")
_ROUNDING = 8 * float(np.finfo(np.float64).eps)  # relative error of a squared error from moments, for each unit


def plan_hidden_units(
    model: nn.Module, batches: Iterable[Tensor], *, sparsity: float | None, tol: float | None, rule: str
) -> Plan:
    """Choose which hidden units of every ``Linear → element-wise → Linear`` stay, and correct what reads them.

    ``rule="ellq"`` (ours): layers in order; features are those of the net pruned so far, targets the dense net's
    pre-activations, so each layer also repairs the drift of those before; units chosen by how much they reduce that
    output error; the consumer is refitted by least squares, with its bias where it has one.

    ``rule="chee2021"``: features of the dense net for every layer, column-pivoted QR, the same fraction everywhere,
    the interpolation matrix folded into the consumer, biases untouched.

    Args:
        model: the dense model; not changed.
        batches: calibration inputs, gone through once per layer (``ellq``) or once (``chee2021``).
        sparsity: fraction of each layer's units to remove, 0 < sparsity < 1; one unit always stays.
        tol: instead of ``sparsity``: the smallest widths whose error on the calibration inputs is within tol: the
            root mean square change of each consumer's pre-activations, measured on the pruned net in its own type,
            relative to that of the dense ones (about their mean where the bias is refitted). Where no width is, those
            of the least error, and the plan says so.
        rule: one of ``RULES``.

    Returns:
        The plan, with its corrections.

    Raises:
        ValueError: no hidden layer to prune, inputs the model does not run on, NaN or infinite weights or features,
            a layer that is quantised, without data or normalised by a hook, or a ``forward`` that computes with the
            width of a layer.

    Reference: Chee et al. 2021 (arXiv 2108.00065); selection and refit of ``"ellq"`` are ours.
    """
    _refuse_unfit(model)
    layers = hidden_layers(model)
    if not layers:
        raise ValueError(
            "The model holds no hidden layer to prune: no Linear → activation → Linear chain whose units only one"
            " Linear reads. Use method='lq', or prune a submodule that has one."
        )
    # Copies run in place of the model, for a forward pass may change buffers or keep what it saw; and a shuffling
    # DataLoader draws from the global random state.
    with torch.random.fork_rng(devices=[]):
        return _plan(copy.deepcopy(model), layers, batches, sparsity=sparsity, tol=tol, rule=rule)


def _plan(
    dense: nn.Module,
    layers: list[HiddenLayer],
    batches: Iterable[Tensor],
    *,
    sparsity: float | None,
    tol: float | None,
    rule: str,
) -> Plan:
    sequential = rule == "ellq"
    pruned = copy.deepcopy(dense) if sequential else dense
    grams = {} if sequential else _accumulate(dense, dense, layers, batches)
    corrections: list[Correction] = []
    reasons = []
    for layer in layers:
        consumer = _module(dense, layer.consumer)
        gram = grams[layer] if layer in grams else _accumulate(dense, pruned, [layer], batches)[layer]
        intercept = sequential and consumer.bias is not None
        columns = gram.columns(centred=intercept)
        total = _signal(gram, columns.yy)
        bar = partial(track, description=f"choosing units of {layer.producer}")
        k = layer.units if sparsity is None else max(1, retained_of(layer.units, sparsity))
        path = (output_aware if sequential else pivoted_qr)(columns, k, progress=bar)
        errors = refit(gram, path, intercept=intercept).errors
        has_drift = sequential and bool(corrections)
        correct = partial(_correction, layer, consumer, gram, path, intercept=intercept, has_drift=has_drift)
        if sparsity is not None:
            relative = math.sqrt(errors[k] / total) if total > 0 else 0.0
            reason = f"sparsity {sparsity:g}"
        else:
            assert tol is not None
            measured = cache(partial(_measured_error, dense, pruned, correct, batches, total))
            k = _smallest_width(errors, measured, tol, total)
            relative = measured(k)
            reason = f"tol {tol:g}" + (", which no width meets after the layers before" if relative > tol else "")
        if gram.samples < 2 * k:
            warnings.warn(
                f"Calibration has {gram.samples} samples for the {k} units kept of {layer.producer!r}; at least"
                f" {2 * k} are needed for a correction that holds beyond them.",
                stacklevel=4,
            )
        correction = correct(k)
        if sequential:
            cut_(pruned, correction)
        corrections.append(correction)
        reasons.append(f"{reason}; relative output error {relative:.3g} on {gram.samples} calibration samples")
    _require_same_computation(dense, corrections, batches)
    table = plan_table(
        layer=[layer.producer for layer in layers],
        unit=[None] * len(layers),
        size=[layer.units for layer in layers],
        retained=[c.indices.size for c in corrections],
        reason=reasons,
    )
    settings: dict[str, float | str] = {"sparsity": sparsity} if sparsity is not None else {"tol": float(tol or 0)}
    return Plan("id", rule, settings, table, tuple(corrections))


def _refuse_unfit(model: nn.Module) -> None:
    """Refuse, by name, what cannot be copied, run or solved for."""
    masks.refuse_quantised(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not parametrize.is_parametrized(module):
            masks.refuse_computed(module, path or type(module).__name__, dict(module.named_parameters(recurse=False)))
    weight_matrices(model)  # refuses what has no data or no entries
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"Weight {name!r} holds NaN or an infinite entry. Only finite values can be pruned.")


def _require_same_computation(dense: nn.Module, corrections: list[Correction], batches: Iterable[Tensor]) -> None:
    """Carry the plan out on a copy, which must compute the same, its widths aside, and run."""
    trial = copy.deepcopy(dense)
    for correction in corrections:
        cut_(trial, correction)
    if not same_computation(dense, trial):
        raise ValueError(
            f"The model's forward computes with the width of a layer, such as {corrections[0].producer!r}, so cutting"
            " it would change more than the layer. Keep the number in a constant."
        )
    inputs_of(trial, [corrections[-1].consumer], next(iter(batches)))


def _accumulate(
    dense: nn.Module, pruned: nn.Module, layers: list[HiddenLayer], batches: Iterable[Tensor]
) -> dict[HiddenLayer, Gram]:
    """Feed one accumulator per layer with the pruned net's features and the dense net's outputs without bias."""
    grams: dict[HiddenLayer, Gram] = {}
    names = [layer.consumer for layer in layers]
    description = f"calibrating {names[0]}" if len(names) == 1 else "calibrating"
    for number, batch in enumerate(track(batches, description, total=operator.length_hint(batches) or None)):
        targets = inputs_of(dense, names, batch)
        features = targets if pruned is dense else inputs_of(pruned, names, batch)
        for layer, x, z in zip(layers, features, targets, strict=True):
            W = _module(dense, layer.consumer).weight.detach().to("cpu", torch.float64)
            X = x.reshape(-1, x.shape[-1]).to("cpu", torch.float64)
            Z = z.reshape(-1, z.shape[-1]).to("cpu", torch.float64)
            for tensor in (X, Z):
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"Batch {number} of the calibration set gives NaN or infinite inputs of {layer.consumer!r}."
                        " Nothing was changed."
                    )
            gram = grams.setdefault(layer, Gram(X.shape[1], W.shape[0]))
            gram.update(X.numpy(), (Z @ W.T).numpy())
    return grams


def _smallest_width(errors: Array, measured: Callable[[int], float], tol: float, total: float) -> int:
    """Return the least width ≥ 1 whose measured error is within tol; that of the least error where none is.

    The errors computed from moments say where to look. They are off by rounding in float64, and know nothing of that
    in the model's own type.
    """
    units = errors.size - 1
    within = np.flatnonzero(errors <= (tol**2 + _ROUNDING * units) * total)
    if not within.size:
        return max(1, int(np.argmin(errors)))
    low = max(1, int(within[0]))
    if measured(low) <= tol:
        return low
    if measured(units) > tol:
        return min((low, units), key=measured)
    high = units
    while high - low > 1:
        middle = (low + high) // 2
        if measured(middle) <= tol:
            high = middle
        else:
            low = middle
    return high


def _signal(gram: Gram, energy: Array) -> float:
    """Return the energy of the targets; 0 where it is rounding beside that of their means."""
    total, uncentred = float(energy.sum()), float(gram.moments(centred=False)[2].sum())
    return total if total > _ROUNDING * gram.x_mean.size * uncentred else 0.0


def _measured_error(
    dense: nn.Module,
    pruned: nn.Module,
    correct: Callable[[int], Correction],
    batches: Iterable[Tensor],
    total: float,
    k: int,
) -> float:
    """Run both nets, k units of one more layer left, and return the relative error of what reads them."""
    if total == 0:
        return 0.0
    correction = correct(k)
    trial = copy.deepcopy(pruned)
    cut_(trial, correction)
    squares = 0.0
    for batch in track(batches, f"measuring {correction.consumer}", total=operator.length_hint(batches) or None):
        before, after = (_outputs_of(model, correction.consumer, batch) for model in (dense, trial))
        squares += float((after - before).square().sum())
    return math.sqrt(squares / total)


def _outputs_of(model: nn.Module, name: str, batch: Tensor) -> Tensor:
    layer = _module(model, name)
    with torch.no_grad():
        outputs = linear(inputs_of(model, [name], batch)[0], layer.weight, layer.bias)
    return outputs.to("cpu", torch.float64)


def _correction(
    layer: HiddenLayer,
    consumer: nn.Linear,
    gram: Gram,
    path: Selection,
    k: int,
    *,
    intercept: bool,
    has_drift: bool,
) -> Correction:
    """Solve for what the consumer becomes when the first k units of the path stay."""
    selection = path.first(k)
    present = consumer.weight.detach().to("cpu", torch.float64).numpy().T
    if k == layer.units and not has_drift:  # nothing is cut, so nothing is to be solved for
        order, weight, shift = np.arange(k), present, np.zeros(present.shape[1])
    else:
        solved = refit(gram, selection, intercept=intercept, present=present)
        order = np.argsort(solved.indices)
        weight, shift = solved.coefficients[order], solved.intercept
        order = solved.indices[order]
    bias = None
    if consumer.bias is not None:
        bias = consumer.bias.detach().to("cpu", torch.float64).numpy() + shift
    return Correction(
        producer=layer.producer,
        consumer=layer.consumer,
        indices=order.astype(np.int64),
        weight=np.ascontiguousarray(weight.T),
        bias=bias,
        skeleton=interpolate(gram, selection, intercept=intercept),
    )


def _module(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
