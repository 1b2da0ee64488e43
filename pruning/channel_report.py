"""The report of a network with fewer channels: widths and reasons, what stays dense, sizes, outputs and answers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from ellq.analysis import Calibration, cost, shared_look, write_text
from ellq.analysis.activation_memory import peak_activation_bytes
from ellq.analysis.files import json_text
from ellq.analysis.tables import plain_rows
from ellq.pruning.apply import finalize
from ellq.pruning.mask_report import MaskReport, compare_outputs
from ellq.pruning.output_errors import Answers, Examples, answers, refuse_shared
from ellq.pruning.plan import Plan
from ellq.pruning.report import Picture, Report, Section, render_report

_BATCH = 64
_SIZES = {
    "parameters": "parameters",
    "bytes": "bytes of parameters and buffers",
    "flops": "FLOPs of one example",
    "activations": "peak bytes of activations",
}
_MEASURES = ("examples", "error", "agreement", "accuracy_dense", "accuracy_pruned")


@dataclass(frozen=True, eq=False, repr=False)
class ChannelReport:
    """What cutting channels changed.

    Attributes:
        plan: what was decided.
        groups: one row per group of channels that could be cut: ``group``, ``made_by``, ``read_by`` (layers, for the
            groups that are cut), ``units``, ``retained``, ``reason``.
        sizes: one row per network that is known (``dense``, ``pruned``): ``parameters``; ``bytes`` of parameters and
            buffers, a shared one once, as ``model.safetensors`` holds them; ``flops`` of one example, a multiply–add
            counted as two; ``activations``, the most bytes alive at once in a forward pass of one example. NaN where
            no inputs were given.
        outputs: one row per set of inputs (``calibration``, ``held-out``): ``examples``; ``error``, ‖pruned outputs −
            dense outputs‖_2/‖dense outputs‖_2; ``agreement``, the share on which the largest outputs are in the same
            place; ``accuracy_dense`` and ``accuracy_pruned``. NaN where it does not apply.
    """

    plan: Plan
    groups: pd.DataFrame
    sizes: pd.DataFrame
    outputs: pd.DataFrame

    __hash__ = None  # type: ignore[assignment]

    @property
    def verdict(self) -> str:
        """The sentence a reader should take away."""
        if "dense" not in self.sizes.index:
            return f"{_share(1 - self.plan.sparsity)} of {self.groups['units'].sum():,} units stay."
        said = []
        sizes = self.sizes.to_dict("index")
        for name, shown in (("flops", "FLOPs"), ("parameters", "parameters")):
            before, after = sizes["dense"][name], sizes["pruned"][name]
            if before > 0:
                said.append(f"{_share(after / before)} of the {shown}")
        measured = self.outputs.to_dict("index")
        which = next((name for name in ("held-out", "calibration") if name in measured), None)
        if which is not None:
            row = measured[which]
            said.append(f"{which} outputs off by {_number(row['error'])} of their size")
            if not math.isnan(row["accuracy_dense"]):
                said.append(f"accuracy {row['accuracy_dense']:.2%} before and {row['accuracy_pruned']:.2%} after")
            if not math.isnan(row["agreement"]):
                said.append(f"the two agree on {row['agreement']:.2%} of {row['examples']:,.0f} examples")
        return f"{'; '.join(said)}."

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as JSON; null stands for a value that is missing or infinite.

        Args:
            path: where to write it as well, whole or not at all.

        Raises:
            OSError: the place cannot be written.
        """
        frames = {
            "groups": self.groups,
            "sizes": self.sizes.rename_axis("network").reset_index(),
            "outputs": self.outputs.rename_axis("inputs").reset_index(),
        }
        content: dict[str, Any] = {"verdict": self.verdict, "what": self._what, "left": dict(self.plan.left)}
        for name, frame in frames.items():
            rows = plain_rows(frame.replace(math.inf, math.nan))
            content[name] = [dict(zip(frame, row, strict=True)) for row in rows]
        return json_text(content, path)

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, title: str = "What cutting channels changed"
    ) -> str:
        """Return the report as one HTML page with everything inside it.

        Args:
            path: where to write it as well, whole or not at all.
            title: of the page.

        Raises:
            OSError: the place cannot be written.
        """
        provenance = {"ellq": version("ellq"), "torch": torch.__version__, "plan": self._what}
        page = render_report(Report(title, self.verdict, self.sections(), provenance))
        if path is not None:
            write_text(path, page)
        return page

    def sections(self) -> list[Section]:
        """Return what the page shows, for a page of one's own."""
        found = [Section("Size", self._about_size(), tables=[("The networks", self._shown_sizes())])]
        if len(self.outputs):
            found.append(
                Section(
                    "Outputs",
                    "Error: the change of the outputs, relative to the dense ones (root mean squares). Agreement: the"
                    " share of examples on which both networks say the same. The plan was made with the calibration"
                    " inputs; held-out ones it has not seen.",
                    tables=[("Both networks on the same inputs", self._shown_outputs())],
                )
            )
        buffer = BytesIO()
        with shared_look():
            self.plan.plot().savefig(buffer, format="svg", metadata={"Date": None})
        picture = Picture(buffer.getvalue(), "The fraction of its units that every group retains")
        about = (
            "Layers that make, carry or read the same channels form a group and are cut together; it is named after the"
            " first layer that makes them."
        )
        tables = [("Groups of channels", self._shown_groups())]
        found.append(Section("Widths", about, tables=tables, pictures=[picture]))
        found.append(self._dense_section())
        return found

    def __repr__(self) -> str:
        return f"ChannelReport({self.verdict})"

    @property
    def _what(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.plan.settings.items())
        return f"method {self.plan.method}, rule {self.plan.rule}" + (f", {settings}" if settings else "")

    def _about_size(self) -> str:
        said = "Weights are counted as they are stored; a multiply–add is two FLOPs."
        return said if "dense" in self.sizes.index else f"{said} The dense network was not given."

    def _shown_sizes(self) -> pd.DataFrame:
        rows = []
        for name, title in _SIZES.items():
            values = self.sizes[name]
            row = {"": title} | {which: _whole(value) for which, value in values.items()}
            if "dense" in values.index:
                row["retained"] = _share(values["pruned"] / values["dense"]) if values["dense"] > 0 else "–"
            rows.append(row)
        return pd.DataFrame(rows)

    def _shown_outputs(self) -> pd.DataFrame:
        frame = self.outputs
        return pd.DataFrame(
            {
                "inputs": list(frame.index),
                "examples": [_whole(n) for n in frame["examples"]],
                "error": [_number(value) for value in frame["error"]],
                "agreement": [_share(value) for value in frame["agreement"]],
                "accuracy dense": [_share(value) for value in frame["accuracy_dense"]],
                "accuracy pruned": [_share(value) for value in frame["accuracy_pruned"]],
            }
        )

    def _shown_groups(self) -> pd.DataFrame:
        frame = self.groups
        return pd.DataFrame(
            {
                "group": frame["group"],
                "made by": [_listed(names) for names in frame["made_by"]],
                "read by": [_listed(names) for names in frame["read_by"]],
                "units": [f"{n:,}" for n in frame["units"]],
                "retained": [f"{n:,}" for n in frame["retained"]],
                "fraction": [_share(k / n) for k, n in zip(frame["retained"], frame["units"], strict=True)],
                "reason": frame["reason"],
            }
        )

    def _dense_section(self) -> Section:
        uncut = self.groups[self.groups["retained"] == self.groups["units"]]
        rows = [*self.plan.left.items(), *zip(uncut["group"], uncut["reason"], strict=True)]
        if not rows:
            return Section("What stays dense", "Every layer whose outputs are read inside the network was narrowed.")
        text = f"{len(rows):,} {'layer keeps all its' if len(rows) == 1 else 'layers keep all their'} outputs."
        table = pd.DataFrame(rows, columns=["layer", "why"])
        return Section("What stays dense", text, tables=[("Layers, and why their units stay", table)])


def report(
    dense: nn.Module,
    pruned: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    calibration: Calibration | None = None,
    held_out: Calibration | None = None,
    labels: Tensor | npt.ArrayLike | None = None,
    plan: Plan | None = None,
) -> ChannelReport | MaskReport:
    """Report what pruning changed, with everything that the arguments allow.

    Masks, and hidden units of one Linear chain, are reported layer by layer with bounds (``compare_outputs``), which
    needs both sets of inputs. Channels: widths with their reasons, what stays dense and why, sizes; with inputs also
    FLOPs, memory, errors of the outputs, agreement and accuracy.

    Both networks are copied and run in eval mode; those given are not changed.

    Args:
        dense: the network before.
        pruned: what became of it.
        path: where to write the report as one HTML page.
        calibration: the inputs the plan was made with: a tensor of shape (n, …), or an iterable of batches.
        held_out: inputs no decision was made with, likewise; batches of (inputs, labels) bring their labels.
        labels: of the held-out inputs, shape (n,), whole numbers.
        plan: that led from one to the other; by default the one that ``ellq.prune`` left at ``pruned.ellq_plan``.

    Returns:
        The report, which also gives JSON.

    Raises:
        TypeError: a model, the plan or inputs of another type.
        ValueError: no plan for channels, a plan for another model, inputs missing, empty or in both sets, labels that
            do not fit, networks that do not run on a batch, or NaN or infinite outputs.
        OSError: the place cannot be written.
    """
    for name, model in (("dense", dense), ("pruned", pruned)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, got {type(model).__name__}. Pass the model itself.")
    plan = plan_of(pruned) if plan is None else plan
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be an ellq.Plan, got {type(plan).__name__}. Pass what ellq.plan returned.")
    found: ChannelReport | MaskReport
    if plan is not None and plan.method == "id" and not plan.corrections:
        found = report_channels(plan, pruned, dense, calibration=calibration, held_out=held_out, labels=labels)
    elif calibration is None or held_out is None:
        raise ValueError(
            "A report on masks runs both networks on two sets of inputs. Pass calibration= and held_out=; of channels,"
            " pass plan=."
        )
    else:
        found = compare_outputs(dense, pruned, plan, calibration=calibration, held_out=held_out, labels=labels)
    if path is not None:
        found.to_html(path)
    return found


def report_channels(
    plan: Plan,
    pruned: nn.Module,
    dense: nn.Module | None = None,
    *,
    calibration: Calibration | None = None,
    held_out: Calibration | None = None,
    labels: Tensor | npt.ArrayLike | None = None,
) -> ChannelReport:
    """Report what cutting channels changed; see ``report``. Without the dense network, what is known of the pruned.

    Args:
        plan: what was decided.
        pruned: what became of it.
        dense: the network before.
        calibration: the inputs the plan was made with.
        held_out: inputs no decision was made with.
        labels: of the held-out inputs.
    """
    if labels is not None and held_out is None:
        raise ValueError("labels= are those of held-out inputs. Pass held_out= too.")
    models = {"dense": dense, "pruned": pruned} if dense is not None else {"pruned": pruned}
    networks = {name: finalize(model).eval() for name, model in models.items()}
    _refuse_other(plan, networks)
    given = {"calibration": calibration, "held-out": held_out}
    with torch.random.fork_rng(devices=[]):  # a shuffling DataLoader draws from the global random state
        sets = {name: Examples.of(data, name, _BATCH) for name, data in given.items() if data is not None}
        if len(sets) == 2:
            refuse_shared(*sets.values())
        example = next((inputs[:1] for found in sets.values() for inputs, _ in found), None)
        outputs = {}
        if "dense" in networks:
            for name, found in sets.items():
                compared = answers(networks["dense"], networks["pruned"], [], found, alone=False)
                outputs[name] = _measured(compared, found.count, labels if name == "held-out" else None)
        sizes = {name: _sizes(network, example) for name, network in networks.items()}
    return ChannelReport(
        plan,
        _groups(plan),
        pd.DataFrame.from_dict(sizes, orient="index", columns=list(_SIZES)),
        pd.DataFrame.from_dict(outputs, orient="index", columns=list(_MEASURES)),
    )


def plan_of(model: object) -> Plan | None:
    """Return the plan that ``ellq.prune`` left at a model, if it is there."""
    found = getattr(model, "ellq_plan", None)
    return found if isinstance(found, Plan) else None


def _refuse_other(plan: Plan, networks: Mapping[str, nn.Module]) -> None:
    for which, network in networks.items():
        modules = dict(network.named_modules())
        for name in plan.table["layer"]:
            if name not in modules:
                raise ValueError(f"The plan is for another model: it has layer {name!r}, which the {which} one lacks.")


def _groups(plan: Plan) -> pd.DataFrame:
    members = {one.group.name: one.group for one in plan.cuts}
    table = plan.table
    made, read = (
        [[m.module for m in getattr(members[name], side)] if name in members else [] for name in table["layer"]]
        for side in ("producers", "consumers")
    )
    return pd.DataFrame(
        {
            "group": table["layer"].tolist(),
            "made_by": pd.Series(made, dtype="object"),
            "read_by": pd.Series(read, dtype="object"),
            "units": table["size"].tolist(),
            "retained": table["retained"].tolist(),
            "reason": table["reason"].tolist(),
        }
    )


def _sizes(network: nn.Module, example: Tensor | None) -> list[float]:
    tensors = {(t.data_ptr(), t.shape) if t.numel() else id(t): t for t in network.state_dict().values()}
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if example is None:
        return [parameters, stored, math.nan, math.nan]
    return [parameters, stored, cost(network, example).flops, peak_activation_bytes(network, example)]


def _measured(found: Answers, count: int, labels: Tensor | npt.ArrayLike | None) -> list[float]:
    error = found.output.relative(found.output.change)
    if found.dense is None or found.pruned is None:
        if labels is not None:
            raise ValueError("labels were given, but the models do not give outputs of shape (n, classes).")
        return [count, error, math.nan, math.nan, math.nan]
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    truth = found.labels if labels is None else np.asarray(labels)
    right = [math.nan, math.nan]
    if truth is not None:
        if truth.shape != (count,) or not np.issubdtype(truth.dtype, np.integer):
            raise ValueError(
                f"labels of shape {truth.shape} and type {truth.dtype} do not fit {count} held-out inputs. Pass one"
                " integer for each."
            )
        right = [float((place == truth).mean()) for place in (found.dense, found.pruned)]
    return [count, error, float((found.dense == found.pruned).mean()), *right]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "–"


def _whole(value: float) -> str:
    return "–" if math.isnan(value) else f"{int(value):,}"


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.3g}"
