"""From neurons without weights to a smaller dense net: constant and unread units are cut out, outputs unchanged."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ellq.analysis.nets import ZeroPadShortcut
from ellq.pruning.feature_graph import Feature, Indices, Mask, Network, Reader
from ellq.pruning.features import by_units, follow, swapped, taps
from ellq.pruning.mask_parametrization import is_masked
from ellq.pruning.masks import refuse_computed, refuse_quantised
from ellq.pruning.output_gap import output_gap
from ellq.pruning.traced import calls, copy_of, symbolic, trace

TOLERANCE = 1e-6  # largest change of an output, relative to the largest output
_STRONG = 1 / 16  # of the largest constant: another that is as large can stand for it without harm to precision

M = TypeVar("M", bound=nn.Module)
_Edits = dict[str, dict[str, Tensor | int]]  # layer → attribute → what it becomes


def compact(model: M, example: Tensor | tuple[Tensor, ...], *, inplace: bool = False) -> M:
    """Cut out every unit that is constant or that nothing reads; outputs in eval mode stay the same.

        next(x) = W_A x_A + W_C v + b = W_A x_A + b′      b′ = b + W_C v,   C the constant units, v their values

    A unit is constant when its weights are zero, when it reads only constant units, or when a batch norm with scale 0
    makes it so; the constant is followed through activations, batch norm in eval mode, pooling, dropout, residual sums,
    concatenation and flattening, and folded into the bias of what reads it, or into the running mean of the batch norm
    behind it where there is no bias (in training mode that batch norm subtracts the mean of the batch, constant
    included, so neither is felt). A unit is unread when all weights on every way from it to the outputs are zero.
    Units that must have the same index (residual streams, depthwise filters, a group of a grouped convolution with all
    that it reads) go together or stay together.

    A non-zero constant in front of a zero-padded convolution adds less at the borders than inside, which no bias can
    do; of several such constants one channel stays and stands for all. Every layer keeps at least one unit. What is
    not understood (attention, recurrent layers, layer and group norm, layers called twice, shared parameters, layers
    with hooks, ``forward`` methods that write widths as numbers) is left as it is. ``removable_units`` says which.

    Parameters become new tensors, so an optimiser made before must be made again. In training mode outputs are the
    same where no batch norm stands between a constant and its reader: there the two modes see different constants.

    Args:
        model: a plain module, masks baked in; not changed unless ``inplace``.
        example: inputs the model can be called on, batched along the first axis; a tuple for several arguments.
        inplace: change ``model`` itself and return it. Nothing is changed when an error is raised.

    Returns:
        A plain module of the same class, with the same dtypes, device, hooks, modes and widths of inputs and outputs.
        In float64 its outputs on the example, and on Gaussian inputs of its shape where the model has finite outputs
        there, are within 1e-6 of the model's, relative to the largest; so they are with the new weights rounded to the
        model's own type, or within 16 of its roundings where those are coarser.

    Raises:
        TypeError: not a module, or an example that is not of tensors.
        ValueError: a model that cannot be traced (the line is quoted) or run; masked, parametrised, quantised or
            lazy layers; weights or outputs that are not finite; a ``forward`` that computes with the width of a layer;
            or constants that the model's type is too coarse to hold.
        RuntimeError: the outputs would differ, which is a defect of ellq; the first layer that does is named.

    Reference: ours.
    """
    inputs = _checked(model, example)
    return _compacted(model, inputs, _decide(model, inputs), inplace=inplace)


def removable_units(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> pd.DataFrame:
    """List the units of a model that are constant or unread: which ``compact`` removes, which it cannot, and why.

    Args:
        model: as for ``compact``; not changed.
        example: as for ``compact``.

    Returns:
        One row per such unit of a linear or convolutional layer: ``layer``, ``unit``, ``removed`` and ``reason``. Then
        one row, without a unit, for everything that was not understood.

    Raises:
        TypeError, ValueError: as for ``compact``, but for the comparison of outputs, which is not made.
    """
    decided = _decide(model, _checked(model, example))
    rows: list[tuple[str, int | None, bool, str]] = []
    for name, reader in decided.network.readers.items():
        groups, kept = decided.network.groups.roots(reader.output.groups), decided.kept(reader.output)
        for unit in np.flatnonzero(~reader.output.needed | reader.output.is_constant).tolist():
            group = int(groups[unit])
            if kept[unit]:
                rows.append((name, unit, False, decided.stays[group]))
            else:
                rows.append((name, unit, True, ", ".join(decided.folded.get(group, ["nothing reads it"]))))
    rows += [(label, None, False, why) for label, why in decided.network.unknown.items()]
    table = pd.DataFrame(rows, columns=["layer", "unit", "removed", "reason"])
    return table.astype({"layer": "object", "unit": "Int64", "removed": "bool", "reason": "object"})


@dataclass(frozen=True)
class _Decision:
    """Which groups stay and why; what becomes of the layers; where the constants of the others went."""

    network: Network
    stays: dict[int, str]
    edits: _Edits
    folded: dict[int, list[str]]

    def kept(self, feature: Feature) -> Mask:
        return _kept(self.network, self.stays, feature)


def _kept(network: Network, stays: dict[int, str], feature: Feature) -> Mask:
    return np.array([group in stays for group in network.groups.roots(feature.groups).tolist()], dtype=bool)


def _decide(model: nn.Module, inputs: list[Tensor]) -> _Decision:
    exact = copy_of(model)
    # Tracing runs the model's own code, which may keep the symbols it is fed: each time on a copy.
    graphs = [trace(copy_of(model), inputs)]
    if calls(symbolic(copy_of(model), len(inputs), training=True)) != calls(graphs[0].graph):
        graphs.append(trace(copy_of(model), inputs, training=True))
    dense = _run(exact, inputs)
    if not dense:
        raise ValueError("The model returns no tensor to compare. Compact a submodule that does.")
    if not all(torch.isfinite(y).all() for y in dense):
        raise ValueError("The model's outputs on the example are not finite. Pass inputs it is made for.")
    gap = output_gap(dense, list(_tensors(graphs[0].output)))
    if not gap <= TOLERANCE:
        raise ValueError(
            f"The model's forward does something that its traced graph does not: their outputs differ by {gap:.3g} of"
            " the largest. Compact a submodule with a plain forward."
        )
    network = follow(exact, graphs)
    stays = _staying(network)
    edits: _Edits = {}
    folded: dict[int, list[str]] = defaultdict(list)
    for name, reader in network.readers.items():
        _edit_layer(name, reader, exact, network, stays, edits, folded)
    for name, feature in network.channelwise.items():
        _edit_channelwise(name, _kept(network, stays, feature), exact, edits)
    for name, feature in network.shortcuts.items():
        kept, shortcut = _kept(network, stays, feature), exact.get_submodule(name)
        assert isinstance(shortcut, ZeroPadShortcut)
        if not kept.all():
            before, after = kept[: shortcut.before].sum(), kept[len(kept) - shortcut.after :].sum()
            edits[name] = {"before": int(before), "after": int(after)}
    return _Decision(network, stays, edits, dict(folded))


# Which units stay ----------------------------------------------------------------------------------------------------


def _staying(network: Network) -> dict[int, str]:
    """Return the groups that must stay, each with the reason: pinned, read, standing for others, or the last."""
    groups = network.groups
    stays: dict[int, str] = {}

    def stay(members: Indices, reason: str) -> None:
        for group in groups.roots(members).tolist():
            stays.setdefault(group, reason)

    for pinned, reason in groups.pinned.items():
        stay(np.array([pinned]), reason)
    steps = [step for graph in network.steps for step in graph]
    readers = [step for step in steps if isinstance(step, Reader)]
    for reader in readers:
        if reader.source is not None:
            read = reader.touches[_varying(reader.output)].any(axis=0) & ~reader.source.is_constant
            stay(reader.source.groups[read], f"it, or what must be cut with it, varies where {reader.name!r} reads it")
    for reader in readers:
        if reader.source is None or reader.is_uniform:
            continue
        values = np.nan_to_num(abs(reader.source.constants))
        asked = values * reader.touches[_varying(reader.output)].any(axis=0)
        if asked.any() and not (values * _kept(network, stays, reader.source) >= _STRONG * asked.max()).any():
            reason = f"its constant cannot be folded into the zero-padded {reader.name!r}; it stands for all such"
            stay(reader.source.groups[[asked.argmax()]], reason)
    for feature in [s for step in steps for s in (step.source, step.output) if s is not None]:
        if not _kept(network, stays, feature).any():
            stay(feature.groups[:1], "the last unit of a layer stays")
    return stays


def _varying(feature: Feature) -> Mask:
    return feature.needed & ~feature.is_constant


# What becomes of the layers ------------------------------------------------------------------------------------------


def _edit_layer(
    name: str,
    reader: Reader,
    model: nn.Module,
    network: Network,
    stays: dict[int, str],
    edits: _Edits,
    folded: dict[int, list[str]],
) -> None:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    kept_out, source = _kept(network, stays, reader.output), reader.source
    width = reader.touches.shape[1]
    kept_in = np.ones(width, dtype=bool) if source is None else _kept(network, stays, source)
    if kept_in.all() and kept_out.all():
        return
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    weight = by_units(module).clone()
    shift = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    if groups == 1 and source is not None:
        # Constant rows too: where one stays, it must go on making its constant.
        sound = kept_out & (reader.output.needed | reader.output.is_constant)
        gone = np.flatnonzero(~kept_in & source.is_constant & reader.touches[sound].any(axis=0))
        values = torch.from_numpy(source.constants[gone]).to(weight)
        removed, where = weight[:, torch.from_numpy(gone).to(weight.device)], ""
        if reader.is_uniform:
            shift = taps(removed).sum(-1) @ values
            where = _bias_name(name, module, reader)
        elif source.constants[gone].any():
            stand_in = int(np.where(kept_in, np.nan_to_num(abs(source.constants)), 0.0).argmax())
            ratios = values / source.constants[stand_in]
            weight[:, stand_in] += torch.einsum("oc...,c->o...", removed, ratios)
            where = f"{name}.weight, column {stand_in}"
        for group, value in zip(
            network.groups.roots(source.groups[gone]).tolist(), source.constants[gone], strict=True
        ):
            told = f"constant {value:.6g}, folded into {where}" if value else f"constant 0 where {name!r} reads it"
            if told not in folded[group]:
                folded[group].append(told)
    edit = edits.setdefault(name, {})
    rows, columns = (torch.from_numpy(np.flatnonzero(kept)).to(weight.device) for kept in (kept_out, kept_in))
    weight = weight[rows] if groups > 1 else weight[rows][:, columns]
    shift = shift[rows]
    if isinstance(module, nn.Linear):
        edit |= {"in_features": len(columns), "out_features": len(rows)}
    else:
        groups = groups if groups == 1 else len(rows) * groups // len(kept_out)
        edit |= {"in_channels": len(columns), "out_channels": len(rows), "groups": groups}
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            weight = swapped(weight, groups)
    edit["weight"] = weight
    if module.bias is not None:
        edit["bias"] = module.bias.detach()[rows] + shift
    elif shift.any() and reader.norm is not None:
        norm = model.get_submodule(reader.norm)
        assert isinstance(norm.running_mean, Tensor)
        full = torch.zeros_like(norm.running_mean).index_copy(0, rows, shift)
        edits.setdefault(reader.norm, {})["running_mean"] = norm.running_mean - full
    elif shift.any():
        edit["bias"] = shift


def _bias_name(name: str, module: nn.Module, reader: Reader) -> str:
    return f"{reader.norm}.running_mean" if module.bias is None and reader.norm is not None else f"{name}.bias"


def _edit_channelwise(name: str, kept: Mask, model: nn.Module, edits: _Edits) -> None:
    if kept.all():
        return
    module = model.get_submodule(name)
    edit = edits.setdefault(name, {})
    for part in ("weight", "bias", "running_mean", "running_var"):
        values = edit.get(part, getattr(module, part, None))  # the mean may have taken up a shift
        if isinstance(values, Tensor):
            edit[part] = values.detach()[torch.from_numpy(kept).to(values.device)]
    edit["num_parameters" if isinstance(module, nn.PReLU) else "num_features"] = int(kept.sum())


def _install_(model: nn.Module, edits: _Edits) -> None:
    for name, edit in edits.items():
        module = model.get_submodule(name)
        for part, value in edit.items():
            if not isinstance(value, Tensor):
                setattr(module, part, value)
                continue
            old = getattr(module, part)
            like = module.weight if old is None else old  # a bias where there was none
            assert isinstance(like, Tensor)
            new = value.to(like.device, like.dtype).clone()
            is_buffer = part in dict(module.named_buffers(recurse=False))
            setattr(module, part, new if is_buffer else nn.Parameter(new, requires_grad=like.requires_grad))


# Checks --------------------------------------------------------------------------------------------------------------


def _checked(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Return the inputs in float64, two examples at least; refuse a model that cannot be made smaller in place."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    inputs = [example] if isinstance(example, Tensor) else list(example) if isinstance(example, tuple) else []
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"example must be a tensor or a tuple of tensors, got {type(example).__name__}.")
    if any(x.ndim == 0 or x.numel() == 0 for x in inputs):
        raise ValueError(f"example has shape {tuple(inputs[0].shape)}. Pass at least one input, batched along axis 0.")
    if is_masked(model):
        raise ValueError("The model carries masks. Call ellq.finalize first.")
    refuse_quantised(model)
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        refuse_computed(module, path or type(module).__name__, own)
        for name, tensor in (own | dict(module.named_buffers(recurse=False))).items():
            full = f"{path}.{name}" if path else name
            if nn.parameter.is_lazy(tensor):
                raise ValueError(f"{full!r} is lazy and has no values yet. Run the model on a batch first.")
            if tensor.is_meta:
                raise ValueError(f"{full!r} is on the meta device and has no values. Load the model's weights first.")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{full!r} holds NaN or infinite values. Repair the weights first.")
    moved = [x.detach().to("cpu", torch.float64 if x.is_floating_point() else x.dtype) for x in inputs]
    # One example alone would not tell the axis of examples from others of size 1.
    is_single = all(x.ndim > 1 and len(x) == 1 for x in moved)
    return [torch.cat([x, x]) for x in moved] if is_single else moved


def _compacted(model: M, inputs: list[Tensor], decided: _Decision, *, inplace: bool) -> M:
    small, exact = copy.deepcopy(model), copy_of(model)
    for net in (small, exact):
        _install_(net, decided.edits)
    for training in (False, True):
        before, after = (calls(symbolic(copy_of(net), len(inputs), training=training)) for net in (model, small))
        for old, new in zip(before, after, strict=True):
            if old != new:
                raise ValueError(
                    f"The model's forward computes with the width of a layer: {old} would become {new}. Nothing was"
                    " changed. Compact a submodule that does not."
                )
    generator = torch.Generator().manual_seed(0)
    gaussian = [
        torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x for x in inputs
    ]
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    rounding = max((16 * torch.finfo(dtype).eps for dtype in types), default=0.0)
    for batch in (inputs, gaussian):
        dense = _run(copy_of(model), batch)
        if batch is gaussian and not all(torch.isfinite(y).all() for y in dense):
            continue  # outside the domain of the model
        gap = output_gap(dense, _run(exact, batch))
        if not gap <= TOLERANCE:
            raise RuntimeError(
                f"Removing units would change outputs by {gap:.3g} of the largest, from"
                f" {_first_difference(model, exact, decided, batch)} on. Nothing was changed. This is a defect of ellq."
            )
        gap = output_gap(dense, _run(copy_of(small), batch))
        if not gap <= max(TOLERANCE, rounding):
            names = ", ".join(sorted(str(dtype) for dtype in types))
            raise ValueError(
                f"Rounding the folded constants to {names} would change outputs by {gap:.3g} of the largest. Nothing"
                " was changed. Convert the model to float64 first."
            )
    if not inplace:
        return small
    _install_(model, decided.edits)
    return model


def _run(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return list(_tensors(model(*(x.clone() for x in inputs))))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _first_difference(model: nn.Module, small: nn.Module, decided: _Decision, inputs: list[Tensor]) -> str:
    """Return the first layer whose inputs are not those of the dense model, among the units that stay."""
    seen: list[dict[str, Tensor]] = []
    for net in (copy_of(model), copy.deepcopy(small)):
        received: dict[str, Tensor] = {}
        for name in decided.network.readers:

            def keep(_: nn.Module, args: tuple[Any, ...], name: str = name, received: Any = received) -> None:
                received[name] = args[0].clone()

            net.get_submodule(name).register_forward_pre_hook(keep)
        _run(net, inputs)
        seen.append(received)
    for name, reader in decided.network.readers.items():
        if reader.source is None:
            continue
        kept = decided.kept(reader.source)
        needed = reader.source.needed | reader.source.is_constant
        axis = reader.source.axis
        dense = seen[0][name].index_select(axis, torch.from_numpy(np.flatnonzero(kept & needed)))
        cut = seen[1][name].index_select(axis, torch.from_numpy(np.flatnonzero(needed[kept])))
        if not output_gap([dense], [cut]) <= TOLERANCE:
            return f"the input of {name!r}"
    return "the output"
