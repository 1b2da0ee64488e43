"""Removing hidden units by interpolative decomposition: which stay, and what the next layer becomes."""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ellq.analysis import inputs_of, track, weight_matrices
from ellq.pruning import masks
from ellq.pruning.allocate import retained_of
from ellq.pruning.coupling import HiddenLayer, hidden_layers, same_computation
from ellq.pruning.plan import Correction, Plan, plan_table
from ellq.pruning.surgery import cut_
from ellq.theory import Array, Gram, Refit, Selection, interpolate, output_aware, pivoted_qr, refit

RULES = ("ellq", "chee2021")


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
        tol: instead of ``sparsity``: the smallest widths whose error on the calibration inputs, in each consumer's
            pre-activations relative to the dense ones (about their mean where the bias is refitted), is within tol;
            where none is, those of the least error, and the plan says so.
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
    corrections, reasons = [], []
    for layer in layers:
        consumer = _module(dense, layer.consumer)
        gram = grams[layer] if layer in grams else _accumulate(dense, pruned, [layer], batches)[layer]
        intercept = sequential and consumer.bias is not None
        G, R, energy = gram.moments(centred=intercept)
        total = float(energy.sum())
        bar = partial(track, description=f"choosing units of {layer.producer}")
        if sparsity is not None:
            k = max(1, retained_of(layer.units, sparsity))
            selection = output_aware(G, R, k, progress=bar) if sequential else pivoted_qr(G, k, progress=bar)
        else:
            assert tol is not None
            k = layer.units
            path = output_aware(G, R, k, progress=bar) if sequential else pivoted_qr(G, k, progress=bar)
            k = _fewest_within(refit(gram, path, intercept=intercept).errors, tol**2 * total)
            selection = path.first(k)
        present = consumer.weight.detach().to("cpu", torch.float64).numpy().T
        solved = refit(gram, selection, intercept=intercept, present=present)
        relative = math.sqrt(solved.errors[-1] / total) if total > 0 else 0.0
        if gram.samples < 2 * k:
            warnings.warn(
                f"Calibration has {gram.samples} samples for the {k} units kept of {layer.producer!r}; at least"
                f" {2 * k} are needed for a correction that holds beyond them.",
                stacklevel=4,
            )
        correction = _correction(layer, consumer, gram, selection, solved, intercept)
        if sequential:
            cut_(pruned, correction)
        corrections.append(correction)
        budget = f"sparsity {sparsity:g}" if sparsity is not None else f"tol {tol:g}"
        if tol is not None and relative > tol * (1 + 1e-6):
            budget += ", which no width meets after the layers before"
        reasons.append(f"{budget}; relative output error {relative:.3g} on {gram.samples} calibration samples")
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


def _fewest_within(errors: Array, limit: float) -> int:
    """Return the least k ≥ 1 whose error is within the limit, or is the least there is where none is."""
    within = np.flatnonzero(errors <= limit)
    return max(1, int(within[0] if within.size else np.argmin(errors)))


def _correction(
    layer: HiddenLayer, consumer: nn.Linear, gram: Gram, selection: Selection, solved: Refit, intercept: bool
) -> Correction:
    order = np.argsort(solved.indices)
    bias = None
    if consumer.bias is not None:
        bias = consumer.bias.detach().to("cpu", torch.float64).numpy() + solved.intercept
    return Correction(
        producer=layer.producer,
        consumer=layer.consumer,
        indices=solved.indices[order].astype(np.int64),
        weight=np.ascontiguousarray(solved.coefficients[order].T),
        bias=bias,
        skeleton=interpolate(gram, selection, intercept=intercept),
    )


def _module(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
