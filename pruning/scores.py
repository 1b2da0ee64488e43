"""Rules that score every weight by more than its magnitude: what stays need not be the largest of each unit.

One function per rule, listed in ``SCORE_RULES``: layers in, scores ≥ 0 out, a tensor for each layer. The model is run
as a copy, in eval mode. To add a rule, write its function and name it there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from ellq.analysis import as_batches, track
from ellq.analysis.calibration import as_input
from ellq.pruning.copied import copied
from ellq.pruning.largest import first_largest
from ellq.pruning.layers import Layers
from ellq.theory.arguments import count


@dataclass(frozen=True)
class Share:
    """A budget for some layers together.

    Attributes:
        places: the layers' numbers.
        retained: how many of their weights stay.
    """

    places: tuple[int, ...]
    retained: int


@dataclass(frozen=True)
class ScoreRule:
    """A way to score weights.

    Attributes:
        scores: ``(layers, shares, **settings)`` → for each layer a tensor in the weight's shape.
        reason: why what stays does.
        by_unit: weights are compared within their unit only, and every unit keeps the same fraction.
    """

    scores: Callable[..., list[Tensor]]
    reason: str
    by_unit: bool = False


def synflow(layers: Layers, shares: Sequence[Share], *, rounds: int = 100) -> list[Tensor]:
    """Score weights by the synaptic flow through them, pruning in rounds.

        score(θ) = |θ·∂R/∂θ|,   R = Σ outputs of the net with |θ| for every parameter and buffer, on an input of ones

    In round t of T all but the fraction ρ^(t/T) of the weights are removed by their scores in what is left, ρ being
    the fraction retained in the end. Batch norm is in eval mode. In float64.

    Args:
        layers: those of a model; calibration inputs, where given, tell the shape of an input only. Without any, the
            model must begin with a Linear layer.
        shares: budgets.
        rounds: T ≥ 1; 1 is a single shot.

    Returns:
        The scores of the last round; 0 where an earlier one removed the weight.

    Raises:
        TypeError: a state dict, or outputs that are not a tensor.
        ValueError: an input whose shape is not known, or scores beyond float64.

    Reference: Tanaka et al. 2020 (arXiv 2006.05467), Algorithm 1, as in the authors' code.
    """
    model = _copy(layers, "synflow").double()
    with torch.no_grad():
        for value in model.state_dict().values():
            if not value.is_complex():
                value.abs_()
    return _in_rounds(layers, shares, model, "synflow", rounds)


def flow(layers: Layers, shares: Sequence[Share], *, rounds: int = 30) -> list[Tensor]:
    """Score weights by the energy that flows through them, pruning in rounds.

        score(θ) = θ²·∂R/∂θ²,   R = Σ outputs of the net with θ² for every weight, on an input of ones

    With linear activations R is the energy of the outputs averaged over all signs of the weights, and the score the
    part of it whose paths take the weight; the scores of every layer add up to the same. Biases are left out, and a
    batch norm multiplies energies by γ²/σ². Otherwise as ``synflow``, which adds up |θ| along paths: squares follow
    what sums of many uncorrelated terms do. Where every layer's outputs are normalised, what flows through a unit says
    little. ``ellq`` with its refit on made-up inputs is better (docs/adaptive.md).

    Args:
        layers: as for ``synflow``.
        shares: budgets.
        rounds: ≥ 1; 1 is a single shot.

    Returns:
        The scores of the last round; 0 where an earlier one removed the weight.

    Raises:
        TypeError, ValueError: as for ``synflow``.

    Reference: ours, after Tanaka et al. 2020.
    """
    model = _copy(layers, "flow").double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.rpartition(".")[2].startswith("bias"):
                value.zero_()
            elif not value.is_complex():
                value.square_()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                assert module.running_mean is not None
                # Its output is then γ²·x/σ².
                module.running_mean.zero_()
                module.running_var.add_(module.eps).square_().sub_(module.eps)
    return _in_rounds(layers, shares, model, "flow", rounds)


def _in_rounds(layers: Layers, shares: Sequence[Share], model: nn.Module, rule: str, rounds: int) -> list[Tensor]:
    """Score the weights of a model of non-negative ones by θ·∂R/∂θ, removing the least round by round."""
    rounds = count(rounds, "rounds", low=1, high=100_000)
    ones = _ones(layers, model, rule)
    parameters = [model.get_parameter(name).requires_grad_(True) for name in layers.names]
    scores: list[Tensor] = []
    for number in track(range(1, rounds + 1), f"rounds of {rule}"):
        with torch.enable_grad():
            output = model(ones)
            if not isinstance(output, Tensor):
                raise TypeError(f"The model gives a {type(output).__name__}, not a tensor. Wrap it to return one.")
            grads = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
        alive = [parameter.detach() != 0 for parameter in parameters]
        scores = [
            torch.zeros_like(parameter) if grad is None else (parameter * grad).detach().abs()
            for parameter, grad in zip(parameters, grads, strict=True)
        ]
        if not all(bool(torch.isfinite(score).all()) for score in scores):
            raise ValueError(f"The scores of rule={rule!r} leave float64 in this model. Choose another rule.")
        if number == rounds:
            break
        with torch.no_grad():
            for share in shares:
                size = sum(scores[place].numel() for place in share.places)
                kept = size - int((1 - (share.retained / size) ** (number / rounds)) * size)
                joined = torch.cat([scores[place].flatten() for place in share.places])
                mask = torch.from_numpy(first_largest(joined.cpu().numpy(), kept)).to(joined.device)
                for place in share.places:
                    own, mask = mask[: scores[place].numel()], mask[scores[place].numel() :]
                    parameters[place].mul_(own.view_as(parameters[place]))
    # What is left goes before what an earlier round removed, even where no flow reaches it.
    tiny = torch.finfo(torch.float64).tiny
    return [torch.where(is_left, score.clamp(min=tiny), 0.0) for score, is_left in zip(scores, alive, strict=True)]


def snip(layers: Layers, shares: Sequence[Share]) -> list[Tensor]:
    """Score weights by what removing each changes the loss, to first order: |w·Σ_b ∂L_b/∂w| over batches b.

    L is the cross-entropy for whole-number labels, else the mean squared error.

    Args:
        layers: those of a model, with calibration batches of (inputs, labels).
        shares: not looked at.

    Returns:
        The scores.

    Raises:
        TypeError: a state dict.
        ValueError: no batches, or batches without labels.

    Reference: Lee et al. 2019 (arXiv 1810.02340), connection sensitivity; up to a common factor.
    """
    total: list[Tensor] = []
    for gradients in _gradients(layers, "snip"):
        total = [t + g for t, g in zip(total, gradients, strict=True)] if total else gradients
    return [(g * w).abs() for g, w in zip(total, _values(layers), strict=True)]


def taylor(layers: Layers, shares: Sequence[Share]) -> list[Tensor]:
    """Score weights by the squared first-order change of the loss: Σ_b (w·∂L_b/∂w)² over batches b.

    L as for ``snip``.

    Args:
        layers: those of a model, with calibration batches of (inputs, labels).
        shares: not looked at.

    Returns:
        The scores.

    Raises:
        TypeError: a state dict.
        ValueError: no batches, or batches without labels.

    Reference: Molchanov et al. 2019 (arXiv 1906.10771), Equation 8, for single weights.
    """
    total: list[Tensor] = []
    for gradients in _gradients(layers, "taylor"):
        terms = [(g * w).square() for g, w in zip(gradients, _values(layers), strict=True)]
        total = [t + s for t, s in zip(total, terms, strict=True)] if total else terms
    return total


def wanda(layers: Layers, shares: Sequence[Share]) -> list[Tensor]:
    """Score weights by magnitude times the size of what they read: |w|·‖x‖_2 over all examples and positions.

    Compared within each unit; every unit keeps the same fraction.

    Args:
        layers: of Linear and convolutional modules of a model, with calibration inputs.
        shares: not looked at.

    Returns:
        The scores.

    Raises:
        TypeError: a state dict.
        ValueError: no inputs, a layer of another kind, or one that the forward pass does not reach as a module.

    Reference: Sun et al. 2024 (arXiv 2306.11695); convolutions, read patch by patch, are ours.
    """
    model = _copy(layers, "wanda")
    if layers.calibration is None:
        raise ValueError("rule='wanda' needs inputs. Pass some as the second argument.")
    place = {id(model.get_parameter(name)): number for number, name in enumerate(layers.names)}
    energies: list[Tensor | None] = [None] * len(place)
    hooks = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | _ConvNd) and id(weight) in place:
            # What it does to x² with any weights, summed up, has Σx² for its gradient in the weights.
            probe = copy.deepcopy(module).double()
            probe.bias = None
            probe.weight.requires_grad_(True)

            def add(
                _: nn.Module, args: tuple[Tensor, ...], number: int = place[id(weight)], probe: nn.Module = probe
            ) -> None:
                with torch.enable_grad():
                    result = probe(args[0].detach().double().square()).sum()
                    (energy,) = torch.autograd.grad(result, [probe.get_parameter("weight")])
                before = energies[number]
                energies[number] = energy if before is None else before + energy

            hooks.append(module.register_forward_pre_hook(add))
    with torch.no_grad():
        for batch in track(as_batches(layers.calibration), "reading inputs"):
            model(as_input(batch, model))
    scores = []
    for name, energy, value in zip(layers.names, energies, _values(layers), strict=True):
        if energy is None:
            raise ValueError(
                f"rule='wanda' found no inputs of {name!r}: it reads those of Linear and convolutional modules that"
                " run. Exclude it."
            )
        scores.append(value.abs() * energy.sqrt().to(value.device))
    return scores


SCORE_RULES = {
    "flow": ScoreRule(flow, "largest flow of energy"),
    "synflow": ScoreRule(synflow, "largest synaptic flow"),
    "snip": ScoreRule(snip, "largest |w·∂L/∂w|"),
    "taylor": ScoreRule(taylor, "largest (w·∂L/∂w)²"),
    "wanda": ScoreRule(wanda, "largest |w|·‖x‖ of the unit", by_unit=True),
}


def _copy(layers: Layers, rule: str) -> nn.Module:
    if layers.model is None:
        raise TypeError(f"rule={rule!r} runs the model. Pass the nn.Module, not its state dict.")
    return copied(layers.model).eval().requires_grad_(False)


def _values(layers: Layers) -> list[Tensor]:
    assert layers.model is not None
    return [layers.model.get_parameter(name).detach().double() for name in layers.names]


def _ones(layers: Layers, model: nn.Module, rule: str) -> Tensor:
    """Return one input of ones, of the shape of a calibration input or of what a first Linear layer reads."""
    if layers.calibration is not None:
        return torch.ones_like(as_input(next(iter(as_batches(layers.calibration)))[:1], model))
    first = next((m for m in model.modules() if list(m.parameters(recurse=False))), None)
    if not isinstance(first, nn.Linear):
        raise ValueError(f"rule={rule!r} must know the shape of an input. Pass one as the second argument.")
    return as_input(torch.ones(1, first.in_features), model)


def _gradients(layers: Layers, rule: str) -> Iterator[list[Tensor]]:
    """Yield the gradients of the mean loss of each batch, in float64."""
    model = _copy(layers, rule)
    if layers.calibration is None or isinstance(layers.calibration, Tensor):
        raise ValueError(f"rule={rule!r} needs labels. Pass batches of (inputs, labels) as the second argument.")
    parameters = [model.get_parameter(name).requires_grad_(True) for name in layers.names]
    empty = True
    for number, batch in enumerate(track(layers.calibration, "gradients")):
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)):
            raise ValueError(f"Batch {number} is no pair of inputs and labels, which rule={rule!r} needs. Pass both.")
        inputs, labels = batch
        with torch.enable_grad():
            output = model(as_input(inputs, model))
            labels = labels.to(output.device)
            whole = not labels.is_floating_point()
            loss = functional.cross_entropy(output, labels) if whole else functional.mse_loss(output, labels.to(output))
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        empty = False
        yield [
            torch.zeros_like(p, dtype=torch.float64) if g is None else g.detach().double()
            for g, p in zip(grads, parameters, strict=True)
        ]
    if empty:
        raise ValueError(f"rule={rule!r} needs labels, and there is no batch. Pass at least one.")
