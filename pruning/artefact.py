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
from ellq.pruning.channel_report import plan_of, report_channels
from ellq.pruning.export import export_program, require_onnx, write_onnx, write_program
from ellq.pruning.json_format import MODEL, VERSIONS, read_json
from ellq.pruning.mask_parametrization import is_masked
from ellq.pruning.plan import Plan
from ellq.pruning.report import Page

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS = "model.safetensors"
DESCRIPTION = "plan.json"
PROGRAM = "model.pt2"
ONNX = "model.onnx"
REPORT = "report.html"
_FILES = (WEIGHTS, DESCRIPTION, PROGRAM, ONNX, f"{ONNX}.data", REPORT)
_WIDTHS = (
    *("in_channels", "out_channels", "groups", "num_features", "num_parameters"),
    *("num_channels", "num_groups", "embedding_dim"),
)
_PARTS = ("weight", "bias", "running_mean", "running_var")


def save(
    model: nn.Module | Mapping[str, Tensor],
    folder: str | Path,
    *,
    plan: Plan | None = None,
    example: Tensor | None = None,
    onnx: bool = False,
    report: Page | None = None,
) -> None:
    """Write a model to a folder, whole or not at all: its tensors, and what is needed to use them elsewhere.

    ``model.safetensors`` and ``plan.json``, which ``load`` reads. With ``example`` also ``model.pt2``, a program of
    torch.export that runs without the model's class, for batches of any size; with ``onnx`` also ``model.onnx``. Each
    is read again and run on the example, and must give the model's outputs. With a report, or the example and a plan
    for channels, also ``report.html``.

    Args:
        model: a module or a state dict, pruned or not; of a masked module what ``finalize`` makes of it is written.
        folder: where to; made if it does not exist, replaced if it holds nothing but these files.
        plan: kept in ``plan.json`` for the record; by default the one that ``ellq.prune`` left at ``model.ellq_plan``.
        example: a batch of inputs, which no file holds afterwards.
        onnx: whether to write ONNX too; needs the extra ``ellq[onnx]``, and ``example``.
        report: what ``report.html`` shows, from ``ellq.report``; by default what plan and example tell.

    Raises:
        TypeError: ``example`` that is no tensor, or with a state dict, which does not run.
        ModuleNotFoundError: ``onnx`` without its packages.
        ExportError: a ValueError: torch.export or ONNX cannot follow the model, or its program gives other outputs.
        ValueError: ``onnx`` without ``example``, or an empty one.
        FileExistsError: the folder holds other files.
        OSError: it cannot be written.
    """
    if onnx and example is None:
        raise ValueError("onnx=True runs the model. Pass example=, a batch of inputs.")
    if onnx:
        require_onnx()
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(f"example must be a tensor, got {type(example).__name__}. Pass a batch of inputs.")
    if example is not None and not isinstance(model, nn.Module):
        raise TypeError("example= runs the model. Pass the nn.Module, not its state dict.")
    plan = plan_of(model) if plan is None else plan
    with new_folder(folder, replaces=_FILES) as partial:
        if isinstance(model, nn.Module) and is_masked(model):
            model = finalize(model)
        write_into(partial, model, plan=plan)
        if example is not None:
            assert isinstance(model, nn.Module)
            program = export_program(model, example)
            write_program(program, model, example, partial / PROGRAM)
            if onnx:
                write_onnx(program, model, example, partial / ONNX)
            if report is None and plan is not None and plan.cuts:
                report = report_channels(plan, model, calibration=example)
        if report is not None:
            (partial / REPORT).write_text(report.to_html(), encoding="utf-8")


def write_into(folder: Path, model: nn.Module | Mapping[str, Tensor], *, plan: Plan | None = None) -> None:
    """Write what ``load`` reads into a folder that exists."""
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
        "sizes": {name: _sizes(module) for name, module in modules.items() if _sizes(module)},
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
        description["sizes"][name] = {"in_features": in_features, "out_features": out_features}
    try:
        _resize_(modules, description["sizes"], weights)
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
        others = {
            str(name): {str(part): int(size) for part, size in sizes.items()}
            for name, sizes in description.get("sizes", {}).items()
        }
        sizes = {
            str(name): (int(linear["in_features"]), int(linear["out_features"]))
            for name, linear in description["linears"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    return {"class": str(description.get("class")), "linears": sizes, "sizes": others}


def _sizes(module: nn.Module) -> dict[str, int]:
    """Return the widths, other than those of a Linear, that pruning can change."""
    return {part: size for part in _WIDTHS if isinstance(size := getattr(module, part, None), int)}


def _resize_(modules: Mapping[str, nn.Module], sizes: Mapping[str, Mapping[str, int]], weights: Path) -> None:
    """Give layers the saved widths, and where these differ tensors of the shapes in the file."""
    with safe_open(str(weights), framework="pt") as file:
        stored = set(file.keys())
        for name, own in sizes.items():
            module = modules.get(name)
            if module is None or all(getattr(module, width, None) == size for width, size in own.items()):
                continue  # load_model says which tensors do not fit
            for width, size in own.items():
                setattr(module, width, size)
            for part in _PARTS:
                key = f"{name}.{part}".removeprefix(".")
                if key in stored and hasattr(module, part):
                    _put_(module, part, torch.Size(file.get_slice(key).get_shape()))


def _put_(module: nn.Module, part: str, shape: torch.Size) -> None:
    old = getattr(module, part)
    like = module.weight if old is None else old  # a bias where there was none
    assert isinstance(like, Tensor)
    is_buffer = part in dict(module.named_buffers(recurse=False))
    new = like.new_empty(shape)
    setattr(module, part, new if is_buffer else nn.Parameter(new, requires_grad=like.requires_grad))


def _match_dtypes_(model: nn.Module, weights: Path) -> None:
    """Give every tensor of the model the saved dtype, so that loading copies bits instead of converting them."""
    # A shared tensor has several names, of which the file holds one that need not be the first.
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with safe_open(str(weights), framework="pt") as file, torch.no_grad():
        for name in set(file.keys()) & set(tensors):
            dtype = file.get_tensor(name).dtype
            if tensors[name].dtype != dtype:
                tensors[name].data = tensors[name].data.to(dtype)
