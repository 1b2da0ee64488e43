"""A network as a program that runs without its class: torch.export and ONNX, each checked by running it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ellq.analysis import as_input
from ellq.pruning.apply import finalize
from ellq.pruning.walk import tensors_in

_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_CHECKED = 16  # examples on which a program is run
_AGREES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest output: other kernels round otherwise
_ALWAYS = 1e-4
_WITHOUT = "Save it without (no example=; --export none)."


class ExportError(ValueError):
    """A model that cannot be exported, or whose program does not give its outputs."""


def export_program(model: nn.Module, example: Tensor) -> ExportedProgram:
    """Trace a model, as it is in eval mode on the CPU, for batches of any size.

    Args:
        model: the model; not changed. Masks are baked into what is traced.
        example: a batch of inputs; the program does not hold it.

    Raises:
        ExportError: torch.export cannot follow ``forward``, or not for every batch size.
    """
    traced, inputs = _on_cpu(model, example)
    pair = torch.cat([inputs[:2], inputs[:2]])[:2]  # a batch of one would be taken for a constant
    try:
        with _quiet():
            program = torch.export.export(traced, (pair,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # torch's, or the model's own
        raise ExportError(f"The model cannot be exported by torch.export: {_reason(error)} {_WITHOUT}") from error
    program.example_inputs = None
    return program


def write_program(program: ExportedProgram, model: nn.Module, example: Tensor, path: Path) -> None:
    """Write a program as ``.pt2``, read it again and compare its outputs with the model's.

    Args:
        program: what ``export_program`` made of the model.
        model: the model.
        example: inputs to compare on: the first sixteen together, and the first alone.
        path: the file.

    Raises:
        ExportError: the program cannot be written or run, or the outputs differ.
        OSError: the file cannot be written.
    """
    try:
        with _quiet():
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()
        _require_same(model, example, lambda batch: tensors_in(loaded(batch)), path.name)
    except (ExportError, OSError):
        raise
    except Exception as error:  # torch's own
        raise ExportError(f"The exported program cannot be written and run: {_reason(error)} {_WITHOUT}") from error


def write_onnx(program: ExportedProgram, model: nn.Module, example: Tensor, path: Path) -> None:
    """Write a program as ONNX and compare what onnxruntime makes of it, on the CPU, with the model's outputs.

    Tensors of more than 2 GB go to a file beside it, of the same name with ``.data`` after it.

    Args:
        program: what ``export_program`` made of the model.
        model: the model.
        example: inputs to compare on, as ``write_program`` does.
        path: the file.

    Raises:
        ModuleNotFoundError: a package of the extra ``onnx`` is missing.
        ExportError: ONNX has no such operation, onnxruntime does not run it, or the outputs differ.
        OSError: the file cannot be written.
    """
    require_onnx()
    from onnxruntime import InferenceSession

    try:
        with _quiet():
            made = torch.onnx.export(program, dynamo=True, verbose=False)
            assert made is not None
            made.save(path)
            session = InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(batch: Tensor) -> list[Tensor]:
            return [torch.from_numpy(value) for value in session.run(None, {name: batch.numpy()})]

        _require_same(model, example, run, path.name)
    except (ExportError, OSError):
        raise
    except Exception as error:  # of any of the three packages
        raise ExportError(
            f"The model cannot be written as ONNX and run: {_reason(error)} Leave it out (no onnx=True; --export pt2)."
        ) from error


def require_onnx() -> None:
    """Raise ModuleNotFoundError if a package of the extra ``onnx`` is missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"onnx=True needs {', '.join(missing)}. Run: pip install 'ellq[onnx]'.")


def _on_cpu(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    if example.ndim == 0 or example.shape[0] == 0:
        raise ValueError(f"example has shape {tuple(example.shape)}. Pass a batch with at least one input.")
    plain = finalize(model).to("cpu").eval()
    return plain, as_input(example.detach(), plain)


@torch.no_grad()
def _require_same(model: nn.Module, example: Tensor, run: Callable[[Tensor], list[Tensor]], name: str) -> None:
    plain, inputs = _on_cpu(model, example)
    for batch in (inputs[:_CHECKED], inputs[:1]):
        expected, found = tensors_in(plain(batch.clone())), run(batch.clone())
        if [a.shape for a in expected] != [b.shape for b in found]:
            raise ExportError(f"{name} gives outputs of other shapes than the model for {len(batch)} inputs.")
        for a, b in zip(expected, found, strict=True):
            scale = float(a.double().abs().max()) if a.numel() else 0.0
            gap = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
            if not gap <= _AGREES.get(a.dtype, _ALWAYS) * scale:
                raise ExportError(f"{name} gives outputs that differ from the model's by {gap:.3g} of {scale:.3g}.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch logs, prints and warns of its own insides; what fails is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: Exception) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return said if said.endswith(".") else f"{said}."
