"""A pruned model on disk without pickles: its tensors, and what turns a fresh instance of its class into it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn

from ellq.analysis import new_folder
from ellq.pruning.apply import finalize
from ellq.pruning.json_format import MODEL, VERSIONS, read_json
from ellq.pruning.mask_parametrization import is_masked
from ellq.pruning.plan import Plan

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS = "model.safetensors"
DESCRIPTION = "plan.json"


def save(model: nn.Module | Mapping[str, Tensor], folder: str | Path, *, plan: Plan | None = None) -> None:
    """Write a model as ``model.safetensors`` and ``plan.json``; never half-written.

    Args:
        model: a module or a state dict, pruned or not; of a masked module what ``finalize`` makes of it is written.
        folder: where to; made if it does not exist, replaced if it holds nothing but these two files.
        plan: kept in ``plan.json`` for the record.

    Raises:
        FileExistsError: the folder holds other files.
        OSError: it cannot be written.
    """
    with new_folder(folder, replaces=(WEIGHTS, DESCRIPTION)) as partial:
        write_into(partial, model, plan=plan)


def write_into(folder: Path, model: nn.Module | Mapping[str, Tensor], *, plan: Plan | None = None) -> None:
    """Write the two files of ``save`` into a folder that exists."""
    if isinstance(model, nn.Module):
        model = finalize(model) if is_masked(model) else model
        save_model(model, str(folder / WEIGHTS))
    else:
        # Cloned, because safetensors refuses tensors that share memory.
        tensors = {name: torch.as_tensor(value).clone().contiguous() for name, value in model.items()}
        save_file(tensors, str(folder / WEIGHTS))
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    description = {
        "format": MODEL,
        "version": VERSIONS[MODEL],
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "linears": {
            name: {"in_features": module.in_features, "out_features": module.out_features}
            for name, module in modules.items()
            if isinstance(module, nn.Linear)
        },
        "plan": None if plan is None else json.loads(plan.to_json()),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, ensure_ascii=False, indent=1), encoding="utf-8")


def load(folder: str | Path, factory: Callable[[], Model]) -> Model:
    """Rebuild a saved model: a fresh instance, cut to the saved widths, with the saved tensors.

    Args:
        folder: what ``save`` wrote.
        factory: makes an instance of the original, unpruned class.

    Returns:
        The model in eval mode on the CPU, with outputs bit-equal to those of the saved one there.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: ``factory`` makes no module.
        ValueError: a file is damaged, or ``factory`` makes another architecture; the first mismatch is named.
    """
    folder = Path(folder)
    description = _read_description(folder / DESCRIPTION)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} does not exist. Pass a folder that ellq.save wrote.")
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"factory must make an nn.Module, got {type(model).__name__}. Pass the class or a function.")
    modules = dict(model.named_modules())
    for name, (in_features, out_features) in description["linears"].items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"The saved model has a Linear {name!r}; the one that factory makes does not. Pass the factory of the"
                f" class {description['class']}."
            )
        _resize_(module, in_features, out_features)
    try:
        _match_dtypes_(model, weights)
        load_model(model, str(weights))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{weights} does not fit the model that factory makes: {reason}") from error
    return model.eval()


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Pass a folder that ellq.save wrote.")
    description = read_json(path.read_bytes(), MODEL, name=str(path))
    try:
        sizes = {
            str(name): (int(linear["in_features"]), int(linear["out_features"]))
            for name, linear in description["linears"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    return {"class": str(description.get("class")), "linears": sizes}


def _resize_(linear: nn.Linear, in_features: int, out_features: int) -> None:
    if (linear.in_features, linear.out_features) == (in_features, out_features):
        return
    linear.in_features, linear.out_features = in_features, out_features
    linear.weight = nn.Parameter(
        linear.weight.new_empty(out_features, in_features), requires_grad=linear.weight.requires_grad
    )
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.new_empty(out_features), requires_grad=linear.bias.requires_grad)


def _match_dtypes_(model: nn.Module, weights: Path) -> None:
    """Give every tensor of the model the saved dtype, so that loading copies bits instead of converting them."""
    # A shared tensor has several names, of which the file holds one that need not be the first.
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with safe_open(str(weights), framework="pt") as file, torch.no_grad():
        for name in set(file.keys()) & set(tensors):
            dtype = file.get_tensor(name).dtype
            if tensors[name].dtype != dtype:
                tensors[name].data = tensors[name].data.to(dtype)
