"""The demo: two small nets on real digits, measured, pruned and bounded; a report, a table and the pruned models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box as rich_box
from rich.console import Console
from rich.table import Table
from torch import nn

from ellq import __version__
from ellq.analysis import Comparison, Profile, accuracy, compare, cost, error_curves, measure, new_folder, track
from ellq.paper_figures import FIGURES, render
from ellq.paper_figures.digits import RULES, SPARSITIES, digits_splits, net_sweeps, train_net
from ellq.pruning import Plan, Splits, apply, chain_bounds, finalize, largest_within, plan, sweep, write_into
from ellq.pruning.report import Picture, Report, Section, render_report
from ellq.theory import registry
from ellq.weights_page import profile_pictures, shown_profile

ACCEPTED_DROP = 0.01  # of accuracy on the selection set, when choosing how much to prune
NETS = {"mlp": "one hidden layer, 64–128–10", "conv": "two convolutions, one hidden layer of 64"}
MASKS_ALONE = {"lq": "none", "id": "auto"}  # refit= of each method
FILES = ("report.html", "profile.csv", "summary.json", *(f"{net}-{method}" for net in NETS for method in RULES))


@dataclass(frozen=True)
class NetResult:
    """What the demo found for one net."""

    name: str
    profile: Profile
    curves: pd.DataFrame  # every method, rule and sparsity
    summary: pd.DataFrame  # the dense net and the chosen sparsity of each method, by every rule
    layers: pd.DataFrame  # bounds layer by layer for our chosen plans
    pruned: Mapping[str, tuple[nn.Module, Plan]]  # method → model
    errors: pd.DataFrame  # best k-term errors of the dense net's weights
    comparison: Comparison  # of the dense net's weights and those method lq left


def run_demo(out: str | Path = "ellq-demo", *, seed: int = 0) -> pd.DataFrame:
    """Train, measure, prune, bound, and write everything to a folder; the folder appears when all is done.

    Args:
        out: the folder; replaced if it holds nothing but an earlier demo.
        seed: of training. The same seed gives the same numbers on the same machine.

    Returns:
        The summary: one row per net, method and rule.

    Raises:
        FileExistsError: ``out`` holds other files.
        OSError: ``out`` cannot be written; found out before the work starts.
    """
    with new_folder(out, replaces=FILES) as folder:
        splits = digits_splits()
        results: dict[str, NetResult] = {}
        stages = [(net, stage) for net in NETS for stage in ("train", "measure and prune", "bound")]
        work = {net: _stages(net, splits, seed, results) for net in NETS}
        for net, _ in track(stages, "ellq demo", describe=lambda s: f"{s[1]} {s[0]}", patience=0.0):
            next(work[net])
        summary = pd.concat([result.summary for result in results.values()], ignore_index=True)
        layers = pd.concat([result.layers for result in results.values()], ignore_index=True)
        profiles = pd.concat(
            [result.profile.frame.assign(net=net) for net, result in results.items()], ignore_index=True
        )
        profiles = profiles[["net", *profiles.columns.drop("net")]]
        profiles.to_csv(folder / "profile.csv", index=False)
        for net, result in results.items():
            for method, (model, decided) in result.pruned.items():
                (folder / f"{net}-{method}").mkdir()
                write_into(folder / f"{net}-{method}", model, plan=decided)
        record = {
            "seed": seed,
            "versions": _versions(),
            "summary": _records(summary),
            "layers": _records(layers),
        }
        (folder / "summary.json").write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
        page = render_report(_report(list(results.values()), summary, layers, seed))
        (folder / "report.html").write_text(page, encoding="utf-8")
    return summary


def _stages(net: str, splits: Splits, seed: int, results: dict[str, NetResult]) -> Iterator[None]:
    """Do the work on one net, pausing after each stage."""
    dense = train_net(net, splits, seed=seed)
    yield
    profile = measure(dense)
    curves = net_sweeps(net, dense, splits, sparsities=SPARSITIES)
    yield
    test_inputs, test_labels = splits.test
    size = cost(dense, test_inputs[:1])
    before = accuracy(dense, test_inputs, test_labels)
    floor = accuracy(dense, *splits.selection) - ACCEPTED_DROP
    rows = [
        {
            "net": net,
            "method": "dense",
            "rule": "",
            "sparsity": 0.0,
            "parameters": size.parameters,
            "nonzeros": size.nonzeros,
            "flops": size.flops,
            "accuracy_before": before,
            "accuracy_after": before,
            "bound": 0.0,
            "bound_measured": 0.0,
            "observed": 0.0,
        }
    ]
    layers, pruned = [], {}
    for method, rules in RULES.items():
        of_method = curves[curves["method"] == method]
        chosen = largest_within(of_method[of_method["rule"] == "ellq"], floor)
        for rule in rules:
            row = of_method[(of_method["rule"] == rule) & (of_method["sparsity"] == chosen)].iloc[0]
            rows.append({"net": net} | _row(row, before))
        if method == "lq":
            refitted = sweep(dense, splits, method=method, rules=("ellq",), sparsities=(chosen,), refit="auto").iloc[0]
            rows.append({"net": net} | _row(refitted, before) | {"rule": "refitted"})
        decided = plan(dense, splits.calibration, method=method, sparsity=chosen, refit=MASKS_ALONE[method])
        model = finalize(apply(dense, decided))
        pruned[method] = (model, decided)
        bounds = chain_bounds(dense, model, test_inputs, decided)
        bounds.insert(0, "method", method)
        bounds.insert(0, "net", net)
        layers.append(bounds)
    summary = pd.DataFrame(rows)
    results[net] = NetResult(
        net,
        profile,
        curves,
        summary,
        pd.concat(layers, ignore_index=True),
        pruned,
        error_curves(dense),
        compare(dense, pruned["lq"][0], paired=True, names=("dense", "lq"), seed=seed),
    )
    yield


def _row(row: pd.Series[Any], before: float) -> dict[str, object]:
    """Return what the summary says of a row of ``sweep``."""
    return (
        {name: row[name] for name in ("method", "rule", "sparsity", "parameters", "nonzeros", "flops")}
        | {"accuracy_before": before, "accuracy_after": row["accuracy"]}
        | {name: row[name] for name in ("bound", "bound_measured", "observed")}
    )


def summary_table(summary: pd.DataFrame) -> Table:
    """Return the summary as a rich table that fits 80 columns."""
    table = Table(
        title="ellq demo · scikit-learn digits, test split · no retraining",
        title_justify="left",
        box=rich_box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    shown = _shown_summary(summary)
    cells = pd.DataFrame(
        {
            "net": [
                net or f" {how.replace(' ·', '')}" for net, how in zip(shown["net"], shown["pruned by"], strict=True)
            ],
            "params": shown["params"],
            "non-zero": shown["non-zeros"],
            "FLOPs": shown["FLOPs"],
            "accuracy": [
                f"{before} → {after}" for before, after in zip(shown["acc. before"], shown["acc. after"], strict=True)
            ],
            **{name: shown[name] for name in ("bound", "by layer", "observed")},
        }
    )
    for name in cells.columns:
        table.add_column(name, justify="left" if name == "net" else "right", no_wrap=True)
    for i, row in enumerate(cells.itertuples(index=False)):
        table.add_row(*map(str, row), end_section=i + 1 < len(shown) and shown["net"].iloc[i + 1] != "")
    return table


def print_summary(summary: pd.DataFrame, out: str | Path, console: Console) -> None:
    """Print the summary and where things are."""
    console.print(summary_table(summary))
    console.print("lq sets weights to zero: saves storage, not FLOPs. id removes hidden units.")
    console.print("refitted: lq ellq as it is by default, what stays refitted on training inputs.")
    console.print("Largest rms change of a logit over the test inputs:")
    console.print("  bound     proved from the sizes of what was removed")
    console.print("  by layer  proved from each layer's own error on the dense net's features")
    console.print("  observed  the change itself")
    console.print(f"Report: {Path(out) / 'report.html'}", soft_wrap=True)


def _shown_summary(summary: pd.DataFrame) -> pd.DataFrame:
    nets = summary["net"].where(summary["net"] != summary["net"].shift(), "")
    method = [
        "dense" if row.method == "dense" else f"{row.method} · {row.rule} · {row.sparsity:.0%}"
        for row in summary.itertuples()
    ]
    is_dense = summary["method"] == "dense"
    return pd.DataFrame(
        {
            "net": nets,
            "pruned by": method,
            "params": [f"{n:,}" for n in summary["parameters"]],
            "non-zeros": [f"{n:,}" for n in summary["nonzeros"]],
            "FLOPs": [f"{n:,}" for n in summary["flops"]],
            "acc. before": [f"{a:.2%}" for a in summary["accuracy_before"]],
            "acc. after": [f"{a:.2%}" for a in summary["accuracy_after"]],
            "bound": ["–" if d else _number(b) for b, d in zip(summary["bound"], is_dense, strict=True)],
            "by layer": ["–" if d else _number(b) for b, d in zip(summary["bound_measured"], is_dense, strict=True)],
            "observed": ["–" if d else _number(o) for o, d in zip(summary["observed"], is_dense, strict=True)],
        }
    )


def _report(results: list[NetResult], summary: pd.DataFrame, layers: pd.DataFrame, seed: int) -> Report:
    curves = pd.concat([result.curves for result in results], ignore_index=True)
    best = summary[(summary["rule"] == "ellq") & (summary["method"] == "id")]
    headline = "; ".join(
        f"{row.net}: {row.parameters:,} parameters after removing {row.sparsity:.0%} of the hidden units,"
        f" accuracy {row.accuracy_before:.2%} before and {row.accuracy_after:.2%} after"
        for row in best.itertuples()
    )
    error = FIGURES["error-against-retained"]
    spread = FIGURES["accuracy-against-sparsity"]
    return Report(
        title="ellq demo: how compressible two small nets are, and what pruning them costs",
        summary=f"Without retraining, on test digits no choice was made with: {headline}.",
        sections=[
            Section(
                "Summary",
                "Each net is trained and calibrated on one part of the digits. How much to prune was chosen on a second"
                f" part: the most that costs at most {ACCEPTED_DROP:.0%} accuracy there. All numbers are from a third."
                " lq sets weights to zero unit by unit, which saves storage but no FLOPs; id removes hidden units and"
                " corrects the layer that reads them. Rule ellq is ours, yang2022 and chee2021 are the authors'; they"
                " are compared by what they remove alone. Refitted: rule ellq as it is by default, its entries chosen"
                " and its weights refitted on the inputs of the first part. The last"
                " columns are the largest root mean square change of a logit over the test inputs: 'bound' is proved"
                " from the sizes of what was removed, 'by layer' from each layer's own error measured on the dense"
                " net's features; 'observed' is the change itself.",
                tables=[("Dense and pruned nets", _shown_summary(summary))],
            ),
            Section(
                "Accuracy against sparsity",
                "All sizes tried, without retraining.",
                pictures=[Picture(render(spread.draw(curves), "svg"), spread.title)],
            ),
            Section(
                "Error and its bound",
                "Bounds use weights and the dense net's features over the test inputs, never the pruned net's outputs,"
                " and hold for those inputs without probability. From the least knowledge to the most: ‖w‖_q and counts"
                " alone; what was removed; each layer's own error on dense features, passed on unit by unit."
                " Statements linear-unit-l1, multilayer, risk-empirical and multilayer-units below.",
                tables=[("Layer by layer, rule ellq, at the chosen sparsity", _shown_layers(layers))],
                pictures=[
                    Picture(
                        render(error.draw(result.curves), "svg"),
                        f"{result.name} ({NETS[result.name]}): output error against what is retained, its bound above",
                    )
                    for result in results
                ],
            ),
            Section(
                "Compressibility",
                "ℓq measures of the dense nets' weights. The effective fraction N/d is how many equal weights would be"
                " as spread out, per weight: the smaller, the more compressible. Every unit is in profile.csv.",
                tables=[
                    (f"Profile of {result.name}, q = {result.profile.q:g}", shown_profile(result.profile))
                    for result in results
                ],
                pictures=[
                    picture
                    for result in results
                    for picture in profile_pictures(result.name, result.profile, result.errors)
                ],
            ),
            Section(
                "Dense and pruned weights",
                "The dense net's weights beside those that method lq left of them: effective fraction of every layer's"
                f" units, and the difference with its {results[0].comparison.confidence:.0%} bootstrap interval over"
                " units.",
                pictures=[
                    Picture(render(result.comparison.plot(), "svg"), f"{result.name}: {result.comparison.verdict}")
                    for result in results
                ],
            ),
            Section(
                "Statements",
                "The theorems behind the bounds, with where they come from. Reconstructed: derived by us from partial"
                " sources of the paper, whose own text we have not seen. All are attacked by property tests.",
                tables=[
                    (
                        "Registered statements",
                        pd.DataFrame(
                            [(s.id, s.title, s.status, s.reference) for s in registry().values()],
                            columns=["id", "says", "status", "reference"],
                        ),
                    )
                ],
            ),
        ],
        provenance={"command": f"ellq demo --seed {seed}"} | _versions(),
    )


def _shown_layers(layers: pd.DataFrame) -> pd.DataFrame:
    first = (layers["net"] + layers["method"]) != (layers["net"] + layers["method"]).shift()
    return pd.DataFrame(
        {
            "net": layers["net"].where(first, ""),
            "method": layers["method"].where(first, ""),
            "layer": layers["layer"],
            "B": layers["scale"].map(_number),
            "own error ≤": layers["local_bound"].map(_number),
            "gain": layers["gain"].map(_number),
            "observed after it": layers["observed"].map(_number),
            "bound by layer": layers["bound_measured"].map(_number),
            "bound": layers["bound"].map(_number),
            "bound from ‖w‖_q": layers["bound_lq"].map(_number),
        }
    )


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    if value >= 1000:
        return f"{value:,.0f}"
    # An exact zero, rounded outward, is the least float there is.
    return "0" if value < 1e-300 else f"{value:.3g}"


def _versions() -> dict[str, str]:
    return {"ellq": __version__} | {name: version(name) for name in ("torch", "numpy", "scikit-learn")}


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    # JSON has no NaN or infinity: null stands for a bound that does not apply and for slack over no error.
    finite = table.astype(object).where(table.notna() & ~table.isin([math.inf]), None)
    return [{str(name): value for name, value in row.items()} for row in finite.to_dict("records")]
