"""What reweighting the survivors gains over dropping the rest, where inputs are correlated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from ellq.analysis import INK, PALETTE, new_figure, shared_look, track
from ellq.paper_figures.digits import digits_splits, train_net
from ellq.theory import Gram, output_aware, refit
from ellq.theory.input_moments import moment_error, second_moments
from ellq.theory.reweighting import reweight, unit_error_resampled

LAW, NET = "power law", "digits"
ORDER = 0.5  # the entries of the power law are i^(−1/q)
SIZE = 1000
CORRELATIONS = (0.0, 0.5, 1.0)
LAW_COUNTS = (4, 6, 8, 11, 16, 23, 32, 45, 64)
NET_COUNTS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
DROPPING, REWEIGHTING, REFIT = "dropping", "reweighting", "selection and refit"
ROUNDING = 1e-5  # errors below this share of the output are of rounding size

Row = tuple[str, float, str, int, float, float]


def compute(*, seed: int = 0) -> pd.DataFrame:
    """Measure both on a power law with equicorrelated inputs, and on the output units of a net trained on digits.

    Args:
        seed: of training.

    Returns:
        One row per panel, case (a correlation, or a unit), method and retained count, with the error and what bounds
        it, both divided by the rms of the unit's output. Power law: the bound knows the weights alone; digits: also
        the second moments.
    """
    splits = digits_splits()
    net = train_net("mlp", splits, seed=seed)
    rows = [*power_law_rows(SIZE, LAW_COUNTS), *unit_rows(net, splits.calibration, NET_COUNTS)]
    return pd.DataFrame(rows, columns=["panel", "case", "method", "retained", "error", "bound"])


def power_law_rows(size: int, counts: Sequence[int]) -> list[Row]:
    """Return the rows of w_i = i^(−1/q) over inputs of unit rms, every two of which have the same correlation."""
    w = np.arange(1.0, size + 1) ** (-1 / ORDER)
    rows: list[Row] = []
    for rho, k in track(list(product(CORRELATIONS, counts)), "reweighting a power law"):
        moments = (1 - rho) * np.eye(size) + rho
        rms = float(np.sqrt(w @ moments @ w))
        for method, heavy in ((DROPPING, k), (REWEIGHTING, None)):
            found = reweight(w, moments, k, heavy=heavy)
            bound = unit_error_resampled(w, k, scale=1.0, heavy=heavy)
            rows.append((LAW, rho, method, k, found.error / rms, bound / rms))
    return rows


def unit_rows(net: nn.Sequential, inputs: torch.Tensor, counts: Sequence[int]) -> list[Row]:
    """Return the rows of every output unit of a net that ends in a Linear, over what its last layer reads."""
    last = net[len(net) - 1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        features = nn.Sequential(*list(net)[:-1])(inputs).double().numpy()
        units = last.weight.double().numpy()
    n = len(features)
    moments = second_moments(features)
    rows: list[Row] = []
    for unit, w in track(list(enumerate(units)), "reweighting output units"):
        gram = Gram(w.size, 1)
        gram.update(features, (features @ w)[:, None])
        columns = gram.columns(centred=False)
        rms = float(np.sqrt(gram.moments(centred=False)[2][0] / n))
        refitted = np.sqrt(refit(gram, output_aware(columns, max(counts)), intercept=False).errors / n)
        for k in counts:
            for method, heavy in ((DROPPING, k), (REWEIGHTING, None)):
                found = reweight(w, moments, k, heavy=heavy, entry_error=moment_error(n))
                rows.append((NET, unit, method, k, found.error / rms, found.bound / rms))
            rows.append((NET, unit, REFIT, k, float(refitted[k]) / rms, np.nan))
    return rows


def slope(retained: npt.ArrayLike, error: npt.ArrayLike) -> float:
    """Return the exponent s of error ≈ c·k^s, by least squares of the logarithms."""
    return float(np.polyfit(np.log(retained), np.log(error), 1)[0])


def draw(table: pd.DataFrame) -> Figure:
    """Draw one panel per experiment: error against retained count on log scales, bounds dashed.

    Errors of rounding size (of equal inputs one stands for all) are left out.

    Args:
        table: from ``compute``.

    Returns:
        A figure that belongs to no window.
    """
    figure, first = new_figure(6.9, 4.4)
    first.remove()
    with shared_look():
        left, right = figure.subplots(1, 2)
        _draw_law(left, table[(table["panel"] == LAW) & (table["error"] > ROUNDING)])
        _draw_net(right, table[table["panel"] == NET])
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("weights retained")
            axes.grid(axis="y")
        left.legend(
            loc="upper left", bbox_to_anchor=(0.0, -0.17), title="measured slope (rate proved)", alignment="left"
        )
        right.legend(loc="upper left", bbox_to_anchor=(0.0, -0.17))
        left.set_ylabel("rms change ÷ rms of the output")
    return figure


def _draw_law(axes: Axes, rows: pd.DataFrame) -> None:
    slow, fast = 1 - 1 / ORDER, 1 / 2 - 1 / ORDER
    middle = CORRELATIONS[1]
    curves = (
        (DROPPING, CORRELATIONS[2], slow, INK, "o"),
        (DROPPING, middle, slow, PALETTE[0], "o"),
        (DROPPING, CORRELATIONS[0], fast, PALETTE[4], "o"),
        (REWEIGHTING, middle, fast, PALETTE[3], "s"),
    )
    for method, rho, rate, colour, marker in curves:
        curve = rows[(rows["method"] == method) & (rows["case"] == rho)]
        measured = slope(curve["retained"], curve["error"])
        label = f"{method}, ρ = {rho:g}: {measured:.2f} ({rate:g})".replace("-", "−")
        axes.plot(curve["retained"], curve["error"], f"{marker}-", markersize=3.5, color=colour, label=label)
    bound = rows[(rows["method"] == REWEIGHTING) & (rows["case"] == middle)]
    axes.plot(bound["retained"], bound["bound"], "--", color=PALETTE[3], label=f"{REWEIGHTING}, bound for any ρ")
    axes.set_title("weights 1/i², correlation ρ")


def _draw_net(axes: Axes, rows: pd.DataFrame) -> None:
    for method, colour, marker in (
        (DROPPING, PALETTE[0], "o"),
        (REWEIGHTING, PALETTE[3], "s"),
        (REFIT, PALETTE[2], "^"),
    ):
        middle = rows[rows["method"] == method].groupby("retained")[["error", "bound"]].median()
        axes.plot(middle.index, middle["error"], f"{marker}-", markersize=3.5, color=colour, label=method)
        if method == REWEIGHTING:
            axes.plot(middle.index, middle["bound"], "--", color=colour, label=f"{method}, bound")
    axes.set_title("output units on digits, median")
