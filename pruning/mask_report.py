"""The report of a pruning: what every layer kept, what its outputs changed by and the bound on it, and who is right."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from ellq.analysis import Calibration, cost, shared_look, track, write_text
from ellq.analysis.cost import Cost
from ellq.analysis.files import json_text
from ellq.analysis.tables import MODEL, ByLayer, ResultTable, plain_rows
from ellq.pruning.apply import finalize
from ellq.pruning.chain_bounds import chain_bounds
from ellq.pruning.chain_steps import BATCH_NORMS, as_double, norm_factors, steps_of
from ellq.pruning.masks import Maskable, maskable_weights, refuse_blocked
from ellq.pruning.output_errors import MANY_CALLS, NEVER, Answers, Distance, Examples, Probe, answers, refuse_shared
from ellq.pruning.plan import Plan, plan_table
from ellq.pruning.report import Picture, Report, Section, render_report
from ellq.pruning.walk import norms_of
from ellq.theory.rounding import norm_error, outward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "level",
    "layer",
    "units",
    "weights",
    "nonzeros_before",
    "nonzeros_after",
    "sparsity",
    "measured_at",
    "bound",
    "error_alone",
    "error_calibration",
    "error_held_out",
    "note",
)
_LISTED = 30  # examples and labels named on the page


@dataclass(frozen=True, eq=False, repr=False)
class MaskReport(ByLayer):
    """What pruning changed, layer by layer and example by example.

    The frame has one row per weight, in model order, and a last one for the model: ``level``, ``layer``, ``units``,
    ``weights``, ``nonzeros_before``, ``nonzeros_after``, ``sparsity`` = 1 − nonzeros_after/weights; then errors, each
    ‖pruned outputs − dense outputs‖_2/‖dense outputs‖_2 over all examples, units and positions:

    - ``error_calibration``, ``error_held_out``: of the layer's outputs as both networks run, the drift of all layers
      before included. In the last row: of the networks' outputs.
    - ``error_alone``: on calibration inputs, of the pruned layer fed what the dense network feeds it: exactly what
      pruning this one layer costs.
    - ``bound``: on ``error_calibration``; NaN where none is known, and ``no_bound`` says why.

    ``measured_at`` is the module whose outputs are meant: the layer, or the batch norm that alone reads it, through
    which refitting restores means. ``note`` says why a number is missing.

    Attributes:
        frame: the table.
        examples: one row per held-out example: ``label`` (missing where there are none), ``dense`` and ``pruned``, the
            places of the largest outputs; None where the models do not give (n, classes).
        samples: numbers of calibration and of held-out examples.
        costs: of the dense and of the pruned model.
        what: method and rule of the plan; empty without one.
        no_bound: why no bound is known; empty where it is.
    """

    frame: pd.DataFrame
    examples: pd.DataFrame | None
    samples: tuple[int, int]
    costs: tuple[Cost, Cost]
    what: str = ""
    no_bound: str = ""

    __hash__ = None  # type: ignore[assignment]

    @property
    def accuracies(self) -> tuple[float, float]:
        """The shares of held-out examples that the dense and the pruned model get right; NaN without labels."""
        right = [self._right(name) for name in ("dense", "pruned")]
        return (float(np.mean(right[0])), float(np.mean(right[1]))) if self._has_labels else (math.nan, math.nan)

    @property
    def agreement(self) -> float:
        """The share of held-out examples on which both models say the same; NaN where they do not choose a class."""
        return math.nan if self.examples is None else float((self.examples["dense"] == self.examples["pruned"]).mean())

    @property
    def lost(self) -> npt.NDArray[np.int64]:
        """The held-out examples, numbered as they came, that the dense model gets right and the pruned one wrong."""
        return np.flatnonzero(self._right("dense") & ~self._right("pruned"))

    @property
    def gained(self) -> npt.NDArray[np.int64]:
        """The held-out examples, numbered as they came, that the dense model gets wrong and the pruned one right."""
        return np.flatnonzero(~self._right("dense") & self._right("pruned"))

    @property
    def verdict(self) -> str:
        """The sentence a reader should take away."""
        row = self.model
        removed = f"{row['sparsity']:.1%} of {row['weights']:,} weights are zero or gone"
        if self.examples is None:
            return f"{removed}; held-out outputs are off by {_number(row['error_held_out'])} of their size."
        agreed = f"the two agree on {self.agreement:.2%} of {self.samples[1]:,} held-out examples"
        if not self._has_labels:
            return f"{removed}; {agreed}."
        before, after = self.accuracies
        return f"{removed}; accuracy {before:.2%} before and {after:.2%} after; {agreed}."

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the frame."""
        return self.frame.copy()

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as JSON; null stands for a value that is missing or infinite.

        Args:
            path: where to write it as well, whole or not at all.

        Raises:
            OSError: the place cannot be written.
        """
        before, after = (_or_none(share) for share in self.accuracies)
        content = {
            "verdict": self.verdict,
            "what": self.what,
            "samples": {"calibration": self.samples[0], "held_out": self.samples[1]},
            "costs": {name: vars(size) for name, size in zip(("dense", "pruned"), self.costs, strict=True)},
            "accuracy": {"dense": before, "pruned": after},
            "agreement": _or_none(self.agreement),
            "lost": self.lost.tolist(),
            "gained": self.gained.tolist(),
            "no_bound": self.no_bound,
            "columns": list(self.frame),
            "rows": plain_rows(self.frame.replace(math.inf, math.nan)),
            "examples": None
            if self.examples is None
            else {name: [row[i] for row in plain_rows(self.examples)] for i, name in enumerate(self.examples)},
        }
        return json_text(content, path)

    def to_html(self, path: str | os.PathLike[str] | None = None, *, title: str = "What pruning changed") -> str:
        """Return the report as one HTML page with everything inside it.

        Args:
            path: where to write it as well, whole or not at all.
            title: of the page.

        Raises:
            OSError: the place cannot be written.
        """
        provenance = {"ellq": version("ellq"), "torch": torch.__version__} | ({"plan": self.what} if self.what else {})
        page = render_report(Report(title, self.verdict, self.sections(), provenance))
        if path is not None:
            write_text(path, page)
        return page

    def sections(self) -> list[Section]:
        """Return what the page shows, for a page of one's own."""
        buffer = BytesIO()
        with shared_look():
            self.plot().savefig(buffer, format="svg", metadata={"Date": None})
        rows = self._shown().reset_index()
        bound = "" if self.no_bound else ", and the bound on it on calibration inputs"
        picture = Picture(buffer.getvalue(), f"Error of every layer's outputs relative to the dense ones{bound}")
        sections = [
            Section(
                "Before and after",
                f"{self.samples[0]:,} calibration and {self.samples[1]:,} held-out examples, none in both. FLOPs are"
                " those of dense kernels: a zero saves storage, not time.",
                tables=[("The two models; accuracy on held-out examples", self._shown_models())],
            ),
            Section(
                "Layer by layer",
                " ".join(self.remarks),
                tables=[("Weights, bounds and errors" if bound else "Weights and errors", rows)],
                pictures=[picture],
            ),
        ]
        if self.examples is not None:
            sections.append(self._example_section(self.examples))
        return sections

    def plot(self) -> Figure:
        """Draw bound and errors of every layer.

        Returns:
            A figure that belongs to no window; ``figure.savefig(path)`` writes it.
        """
        from ellq.pruning.mask_report_plot import draw_mask_report  # matplotlib takes a while to load

        return draw_mask_report(self)

    @property
    def remarks(self) -> list[str]:
        """What the columns mean, and what is missing from them and why."""
        said = [
            "Errors are changes of a layer's outputs, relative to the dense outputs (root mean squares). Alone:"
            " what pruning this layer by itself changes on calibration inputs, which is exact, so no bound on that is"
            " tighter. Calibration and held-out: with the drift of all layers before.",
        ]
        if self.no_bound:
            said.append(f"No bound on the error with drift is known: {self.no_bound}")
        else:
            said.append("Bound: on the error on calibration inputs, from weights and the dense network's features.")
        rows = self.layers
        if (rows["measured_at"] != rows["layer"].str.rpartition(".")[0]).any():
            said.append("A layer that a batch norm alone reads is measured after that norm.")
        return said + [f"{row.layer} {row.note}." for row in rows[rows["note"] != ""].itertuples()]

    def __repr__(self) -> str:
        return f"MaskReport({self.verdict})"

    @property
    def _has_labels(self) -> bool:
        return self.examples is not None and bool(self.examples["label"].notna().all())

    def _right(self, which: str) -> npt.NDArray[np.bool_]:
        if self.examples is None or not self._has_labels:
            return np.zeros(0, dtype=bool)
        return (self.examples[which] == self.examples["label"]).to_numpy(dtype=bool)

    def _table(self) -> ResultTable:
        return ResultTable(self.verdict, self._shown(), self.remarks)

    def _shown(self) -> pd.DataFrame:
        frame = self.frame
        names = {"bound": "bound", "error_alone": "alone, exact", "error_calibration": "calibration"}
        names["error_held_out"] = "held-out"
        if self.no_bound:
            del names["bound"]
        return pd.DataFrame(
            {
                "units": [f"{n:,}" for n in frame["units"]],
                "weights": [f"{n:,}" for n in frame["weights"]],
                "non-zeros": [f"{n:,}" for n in frame["nonzeros_before"]],
                "retained": [f"{n:,}" for n in frame["nonzeros_after"]],
                "sparsity": [f"{share:.1%}" for share in frame["sparsity"]],
                **{shown: frame[name].map(_number).tolist() for name, shown in names.items()},
            },
            index=pd.Index([name or MODEL for name in frame["layer"]], name="layer"),
        )

    def _shown_models(self) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "model": ["dense", "pruned"],
                "parameters": [f"{size.parameters:,}" for size in self.costs],
                "non-zeros": [f"{size.nonzeros:,}" for size in self.costs],
                "FLOPs": [f"{size.flops:,}" for size in self.costs],
                "accuracy": ["–" if math.isnan(share) else f"{share:.2%}" for share in self.accuracies],
            }
        )

    def _example_section(self, examples: pd.DataFrame) -> Section:
        said = [f"Both models say the same on {self.agreement:.2%} of {len(examples):,} held-out examples."]
        if not self._has_labels:
            return Section("Example by example", said[0])
        for change, found in (
            ("Right before and wrong after", self.lost),
            ("Wrong before and right after", self.gained),
        ):
            rows = examples.iloc[found[:_LISTED]].itertuples()
            listed = ", ".join(f"{row.Index} ({row.dense} → {row.pruned})" for row in rows)
            said.append(f"{change}: {listed or 'none'}{', …' if len(found) > _LISTED else ''}.")
        dense, pruned = self._right("dense"), self._right("pruned")
        counts = pd.DataFrame(
            [
                ["dense right", f"{(dense & pruned).sum():,}", f"{len(self.lost):,}"],
                ["dense wrong", f"{len(self.gained):,}", f"{(~dense & ~pruned).sum():,}"],
            ],
            columns=["", "pruned right", "pruned wrong"],
        )
        kinds = examples.assign(dense=dense, pruned=pruned, same=examples["dense"] == examples["pruned"]).groupby(
            "label"
        )
        shares = kinds.mean().assign(count=kinds.size())
        hurt = (shares["pruned"] - shares["dense"]).sort_values(kind="stable").index[:_LISTED]
        shown = pd.DataFrame(
            {
                "label": [str(label) for label in hurt],
                "examples": [f"{n:,}" for n in shares.loc[hurt, "count"]],
                "dense right": [f"{share:.1%}" for share in shares.loc[hurt, "dense"]],
                "pruned right": [f"{share:.1%}" for share in shares.loc[hurt, "pruned"]],
                "agree": [f"{share:.1%}" for share in shares.loc[hurt, "same"]],
            }
        )
        tables = [("Held-out examples", counts), ("By label, those that lose most first", shown)]
        return Section("Example by example", " ".join(said), tables=tables)


def compare_outputs(
    dense: nn.Module,
    pruned: nn.Module,
    plan: Plan | None = None,
    *,
    calibration: Calibration,
    held_out: Calibration,
    labels: Tensor | npt.ArrayLike | None = None,
    batch_size: int = 64,
) -> MaskReport:
    """Run a dense and a pruned network on the same inputs, and report what changed.

    Any network: layers are found by name and watched as they run; one that runs several times for a batch counts every
    time. For ``Sequential`` chains of the kind ``chain_bounds`` takes, a bound on every layer's error on the
    calibration inputs: what pruning the layer alone changes, plus what ``chain_bounds`` proves of its inputs, passed on
    by the row sums of its pruned weights' magnitudes (and the factors of its norm). It holds up to the rounding of the
    networks' own dtype. On held-out inputs nothing is proved.

    The two networks are copied, without masks, and run in eval mode; those given are not changed. The outputs of all
    layers on one batch are in memory at once.

    Args:
        dense: the network before.
        pruned: what became of it: masked, finalised, or with units removed.
        plan: that led from one to the other; None where zeros came about otherwise.
        calibration: inputs the plan was made with, or others: a tensor of shape (n, …), or an iterable of batches, such
            as a DataLoader (its labels are ignored).
        held_out: inputs no decision was made with, likewise; batches of (inputs, labels) bring their labels.
        labels: of the held-out inputs, in their order, shape (n,), whole numbers; in place of those in batches.
        batch_size: of the batches that a tensor is cut into, ≥ 1.

    Returns:
        The report.

    Raises:
        TypeError: a model, the plan or a data set of another type.
        ValueError: no prunable layer, data sets that are empty or share an example, labels that do not fit, a plan for
            another model, a model that does not run on a batch, or NaN or infinite outputs; the place is named.

    Reference: the bound is ``chain_bounds`` with the triangle inequality, ours.
    """
    for name, model in (("dense", dense), ("pruned", pruned)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, got {type(model).__name__}. Pass the model itself.")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be an ellq.Plan, got {type(plan).__name__}. Pass what ellq.plan returned.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is below 1. Pass batch_size >= 1.")
    with torch.random.fork_rng(devices=[]):  # a shuffling DataLoader draws from the global random state
        return _compared(dense, pruned, plan, calibration, held_out, labels, batch_size)


def _compared(
    dense: nn.Module,
    pruned: nn.Module,
    plan: Plan | None,
    calibration: Calibration,
    held_out: Calibration,
    labels: Tensor | npt.ArrayLike | None,
    batch_size: int,
) -> MaskReport:
    before, after = (finalize(model).eval() for model in (dense, pruned))
    weights, others = maskable_weights(before), {weight.name: weight for weight in maskable_weights(after)}
    refuse_blocked([*weights, *others.values()])
    _refuse_other_plan(before, weights, plan)
    sets = [Examples.of(calibration, "calibration", batch_size), Examples.of(held_out, "held_out", batch_size)]
    refuse_shared(*sets)
    truth = None if labels is None else _whole_numbers(labels, sets[1].count)
    probes = _probes(before, after, weights, others, plan)
    # Held-out inputs first: labels that do not fit are found sooner.
    found = answers(before, after, probes, sets[1], alone=False)
    examples = _examples(found, truth)
    fitted = answers(before, after, probes, sets[0], alone=True)
    chain = _chain(before, after, plan, sets[0])
    bounds = {} if isinstance(chain, str) else _bounds(chain, before, after, probes, fitted)
    rows = []
    for weight in weights:
        path = weight.name.rpartition(".")[0]
        probe = next((probe for probe in probes if probe.layer == path), None)
        row = _counts(weight, others.get(weight.name))
        rows.append(row | _errors(path, probe, bounds.get(path, math.nan), fitted.layers, found.layers))
    totals = {
        name: sum(row[name] for row in rows) for name in ("units", "weights", "nonzeros_before", "nonzeros_after")
    }
    whole = {"level": "model", "layer": "", **totals, "sparsity": 1 - totals["nonzeros_after"] / totals["weights"]}
    outputs = {MODEL: fitted.output}, {MODEL: found.output}
    rows.append(whole | _errors(MODEL, Probe(MODEL, ""), bounds.get(MODEL, math.nan), *outputs))
    first = next(iter(sets[1]))[0][:1]
    return MaskReport(
        pd.DataFrame(rows, columns=list(COLUMNS)),
        examples,
        (sets[0].count, sets[1].count),
        (cost(before, first), cost(after, first)),
        "" if plan is None else f"method {plan.method}, rule {plan.rule}",
        chain if isinstance(chain, str) else "",
    )


def _refuse_other_plan(model: nn.Module, weights: Sequence[Maskable], plan: Plan | None) -> None:
    if plan is None:
        return
    known = {weight.name for weight in weights} if plan.method == "lq" else set(dict(model.named_modules()))
    for name in plan.table["layer"]:
        if name not in known:
            raise ValueError(f"The plan is for another model: it has layer {name!r}, which the dense one lacks.")


def _whole_numbers(labels: Tensor | npt.ArrayLike, count: int) -> npt.NDArray[np.int64]:
    given = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if given.shape != (count,) or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"labels of shape {given.shape} and type {given.dtype} do not fit {count} held-out inputs. Pass one integer"
            " for each."
        )
    return given.astype(np.int64)


def _probes(
    dense: nn.Module,
    pruned: nn.Module,
    weights: Sequence[Maskable],
    others: Mapping[str, Maskable],
    plan: Plan | None,
) -> list[Probe]:
    """Return where the outputs of every layer that both networks have are looked at."""
    norms = norms_of(dense) or {}
    modules = dict(pruned.named_modules())
    corrections = () if plan is None else plan.corrections
    gives = {c.producer: torch.from_numpy(c.indices) for c in corrections}
    reads = {c.consumer: torch.from_numpy(c.indices) for c in corrections}
    probes: dict[str, Probe] = {}
    for weight in weights:
        path = weight.name.rpartition(".")[0]
        if path in probes or path not in modules or weight.name not in others:
            continue
        end = norms.get(path, path)
        shape = list(weight.tensor.shape)
        for axis, kept in enumerate((gives.get(path), reads.get(path))):
            shape[axis] = shape[axis] if kept is None else len(kept)
        is_alike = shape == list(others[weight.name].tensor.shape)
        probes[path] = Probe(path, end if end in modules else path, reads.get(path), gives.get(path), is_alike)
    return list(probes.values())


def _examples(found: Answers, truth: npt.NDArray[np.int64] | None) -> pd.DataFrame | None:
    """Return what both models say of every held-out example; refuse labels that do not fit."""
    if found.dense is None or found.pruned is None:
        if truth is not None:
            raise ValueError(
                "labels were given, but the models do not give outputs of shape (n, classes). Leave them out."
            )
        return None
    truth = found.labels if truth is None else truth
    if truth is not None and not 0 <= truth.min() <= truth.max() < found.classes:
        raise ValueError(
            f"labels lie in [{truth.min()}, {truth.max()}], but the models have {found.classes} outputs. Pass labels in"
            f" [0, {found.classes - 1}]."
        )
    label = pd.array([None] * len(found.dense) if truth is None else truth, dtype="Int64")
    return pd.DataFrame({"label": label, "dense": found.dense, "pruned": found.pruned})


def _chain(dense: nn.Module, pruned: nn.Module, plan: Plan | None, examples: Examples) -> pd.DataFrame | str:
    """Return what ``chain_bounds`` proves over all batches together, or why it cannot."""
    if not isinstance(dense, nn.Sequential) or not isinstance(pruned, nn.Sequential):
        return "the model is no chain (nn.Sequential)."
    plan = plan or Plan("lq", "", {}, plan_table([], [], [], [], []))
    sums: npt.NDArray[np.float64] | float = 0.0  # root sums of squares over the examples so far
    for inputs, _ in track(examples, "bounding", total=examples.length):
        try:
            table = chain_bounds(dense, pruned, inputs, plan)
        except ValueError as error:
            return str(error)
        sums = np.hypot(sums, math.sqrt(len(inputs)) * table["bound_measured"].to_numpy(dtype=np.float64))
    # The largest root mean square of a unit is at most that of the batches' largest.
    return table.assign(bound_measured=sums / math.sqrt(examples.count))


def _bounds(
    chain: pd.DataFrame, dense: nn.Module, pruned: nn.Module, probes: Sequence[Probe], fitted: Answers
) -> dict[str, float]:
    """Return the bound on every layer's relative error, by path, and on that of the outputs."""
    proved = chain["bound_measured"].tolist()  # of the largest rms change of what the next layer reads
    drifts = dict(zip(chain["layer"], [0.0, *proved[:-1]], strict=True))
    bounds = {MODEL: _over(proved[-1], fitted.output)}
    for probe in probes:
        distance = fitted.layers[probe.layer]
        if distance.calls != 1 or math.isnan(distance.alone):
            continue
        layer: Any = pruned.get_submodule(probe.layer)
        norm: Any = dense.get_submodule(probe.end)
        gains = layer.weight.detach().to("cpu", torch.float64).flatten(1).abs().sum(1)
        if isinstance(norm, BATCH_NORMS):
            factors = norm_factors(as_double(norm))
            gains = gains * (factors.max() if isinstance(layer, nn.Linear) else factors)
        alone = distance.alone / math.sqrt(distance.count)
        total = alone + float(gains.square().mean().sqrt()) * drifts[probe.layer]
        bounds[probe.layer] = _over(total, distance, layer.weight.numel())
    last = list(steps_of(dense, ""))[-1][0]
    if last in bounds:  # a layer ends the chain, so both bounds are on the same
        bounds[last] = bounds[MODEL] = min(bounds[last], bounds[MODEL])
    return bounds


def _over(bound: float, distance: Distance, terms: int = 0) -> float:
    """Return a bound, a sum of some terms, relative to the dense outputs, rounded up."""
    if distance.note or bound == 0:
        return math.nan if distance.note else 0.0
    return float(outward(bound / distance.rms, norm_error(distance.count + terms, 1.0))) if distance.rms else math.inf


def _counts(weight: Maskable, other: Maskable | None) -> dict[str, Any]:
    size = weight.tensor.numel()
    before, after = (0 if w is None else int((w.tensor.detach() != 0).sum()) for w in (weight, other))
    return {
        "level": "layer",
        "layer": weight.name,
        "units": weight.layer().shape[0],
        "weights": size,
        "nonzeros_before": before,
        "nonzeros_after": after,
        "sparsity": 1 - after / size,
    }


def _errors(
    path: str,
    probe: Probe | None,
    bound: float,
    calibration: Mapping[str, Distance],
    held_out: Mapping[str, Distance],
) -> dict[str, Any]:
    if probe is None:
        missing = dict.fromkeys(("bound", "error_alone", "error_calibration", "error_held_out"), math.nan)
        return {"measured_at": path, **missing, "note": "is not in the pruned network"}
    first, second = calibration[path], held_out[path]
    note = first.note or second.note or ("" if first.count else NEVER)
    if not note and first.calls > 1:
        note = MANY_CALLS.format(calls=first.calls)
    return {
        "measured_at": probe.end,
        "bound": bound,
        "error_alone": first.relative(first.alone),
        "error_calibration": first.relative(first.change),
        "error_held_out": second.relative(second.change),
        "note": note,
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if value >= 1000 else "0" if value < 1e-300 else f"{value:.3g}"
