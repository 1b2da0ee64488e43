"""The picture of a profile: how many of its weights each unit effectively uses, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ellq.analysis.style import FAINT, INK, PALETTE, new_figure, shared_look
from ellq.theory.arguments import Array

_ROW = 0.23  # inches a layer takes while there is room
_TALLEST = 16.0  # inches; beyond it rows get thinner and only some are named
_NAME = 42  # characters of a layer's name that are shown


def draw_profile(frame: pd.DataFrame, q: float) -> Figure:
    """Draw the effective fraction N/d of every layer's units, a row per layer in model order.

    Bar: the middle half of the units, with the median across it; line: from least to most. Diamond: the layer
    taken as one vector. Dotted: what Gaussian weights have in the limit of many entries.

    Args:
        frame: the tidy frame of a ``Profile``.
        q: its order.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    fraction = frame["effective_count"] / frame["size"]
    is_unit, is_layer = frame["level"] == "unit", frame["level"] == "layer"
    names = frame.loc[is_layer, "layer"].tolist()
    spread = fraction[is_unit].groupby(frame.loc[is_unit, "layer"], sort=False)
    low, q1, median, q3, high = (spread.quantile(share).loc[names].to_numpy() for share in (0, 0.25, 0.5, 0.75, 1))
    rows = np.arange(len(names))
    height = min(1.5 + _ROW * len(names), _TALLEST)
    thick = min(1.0, (_TALLEST - 1.5) / (_ROW * len(names)))  # share of the usual thickness

    figure, axes = new_figure(6.9, height)
    with shared_look():
        gaussian = _gaussian_fraction(q)
        axes.hlines(rows, low, high, color=FAINT, linewidth=1.0, label="all units")
        box: dict[str, Any] = {"color": PALETTE[4], "edgecolor": PALETTE[0], "linewidth": 0.8 * thick}
        axes.barh(rows, q3 - q1, left=q1, height=0.62, label="middle half", **box)
        axes.vlines(median, rows - 0.31, rows + 0.31, color=INK, linewidth=1.8, label="median unit")
        diamond: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": INK, "markeredgewidth": thick}
        own = fraction[is_layer].to_numpy()
        axes.plot(own, rows, "D", markersize=4.2 * thick**0.5, label="layer as one vector", **diamond)
        axes.axvline(gaussian, color=INK, linestyle=":", linewidth=1.0, label="Gaussian weights", zorder=0)
        axes.set_xlim(*_rounded_range(np.concatenate([low, high, own, [gaussian]])))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(len(names) - 0.4, -0.6)  # first layer on top
        step = math.ceil(len(names) / ((_TALLEST - 1.5) / 0.15))
        axes.set_yticks(rows[::step], _short(names[::step]))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"effective fraction of weights, N/d, at q = {q:g}\n← sparser        more even →")
        axes.set_ylabel("layer")
        axes.set_title("Share of its weights that each unit effectively uses", loc="left")
        figure.legend(loc="outside lower center", ncols=5, handlelength=1.3, columnspacing=1.4)
    return figure


def _gaussian_fraction(q: float) -> float:
    """Return N_{q,1}/d of independent normal entries as d → ∞: (E|x|^q / (E|x|)^q)^(1/(1−q))."""
    log_moment = q / 2 * math.log(2) + math.lgamma((q + 1) / 2) - math.lgamma(0.5)
    log_mean = 0.5 * math.log(2 / math.pi)
    return math.exp((log_moment - q * log_mean) / (1 - q))


def _rounded_range(shares: Array) -> tuple[float, float]:
    """Return whole tenths in [0, 1] that hold all the shares with a little room, at least two apart."""
    low = max(math.floor(10 * (shares.min() - 0.01)), 0)
    high = min(math.ceil(10 * (shares.max() + 0.01)), 10)
    return min(low, high - 2, 8) / 10 if high > 1 else 0.0, max(high, 2) / 10


def _short(names: Sequence[str]) -> list[str]:
    """Return the names without a final .weight, and the middle of long ones left out."""
    shown = [name.removesuffix(".weight") for name in names]
    front, back = 2 * _NAME // 3, _NAME // 3 - 1
    return [name if len(name) <= _NAME else f"{name[:front]}…{name[-back:]}" for name in shown]
