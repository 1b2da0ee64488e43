"""The pictures of a profile: how many of its weights each unit effectively uses, by layer, depth and order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ellq.analysis.layer_axis import PERCENT, height_for, name_rows, short_names, thickness_for
from ellq.analysis.style import FAINT, INK, PALETTE, new_figure, shared_look
from ellq.theory.arguments import Array

if TYPE_CHECKING:
    from ellq.analysis.profile import Profile

_WIDTH = 6.9
_QUANTILES = np.linspace(0, 1, 41)
_MAP = "viridis"  # its lightness rises evenly, so it survives greyscale and colour blindness
_NAMED = 24  # layers whose names fit below a horizontal axis


def draw_profile(profile: Profile, kind: str) -> Figure:
    """Draw a profile in one of the ways that ``Profile.plot`` lists.

    Args:
        profile: what was measured.
        kind: the name of the picture.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: an unknown kind, or ``orders`` for a profile of one order.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is no picture of a profile. Choose one of {', '.join(KINDS)}.")
    return KINDS[kind](profile)


def _draw_units(profile: Profile) -> Figure:
    """Draw the effective fraction N/d of every layer's units, a row per layer in model order.

    Bar: the middle half of the units, with the median across it; line: from least to most. Diamond: the layer
    taken as one vector. Dotted: what Gaussian weights have in the limit of many entries.
    """
    names = [layer.name for layer in profile.layer_shapes]
    low, q1, median, q3, high = _unit_quantiles(profile, [0, 0.25, 0.5, 0.75, 1]).T
    own = _fractions(profile.layers)
    thick = thickness_for(len(names))
    figure, axes = new_figure(_WIDTH, height_for(len(names)))
    with shared_look():
        rows = name_rows(axes, names)
        gaussian = _gaussian_fraction(profile.q)
        axes.hlines(rows, low, high, color=FAINT, linewidth=1.0, label="all units")
        box: dict[str, Any] = {"color": PALETTE[4], "edgecolor": PALETTE[0], "linewidth": 0.8 * thick}
        axes.barh(rows, q3 - q1, left=q1, height=0.62, label="middle half", **box)
        axes.vlines(median, rows - 0.31, rows + 0.31, color=INK, linewidth=1.8, label="median unit")
        axes.plot(own, rows, "D", markersize=4.2 * thick**0.5, label="layer as one vector", **_diamond(thick))
        axes.axvline(gaussian, color=INK, linestyle=":", linewidth=1.0, label="Gaussian weights", zorder=0)
        axes.set_xlim(*_rounded_range(np.concatenate([low, high, own, [gaussian]])))
        axes.xaxis.set_major_formatter(PERCENT)
        axes.grid(axis="x")
        axes.set_xlabel(f"{_fraction_label(profile.q)}\n← sparser        more even →")
        axes.set_ylabel("layer")
        axes.set_title("Share of its weights that each unit effectively uses", loc="left")
        figure.legend(loc="outside lower center", ncols=5, handlelength=1.3, columnspacing=1.4)
    return figure


def _draw_quantiles(profile: Profile) -> Figure:
    """Draw the quantiles of the units' effective fraction as a map: a row per layer, sparsest unit on the left."""
    names = [layer.name for layer in profile.layer_shapes]
    figure, axes = new_figure(_WIDTH, height_for(len(names)))
    with shared_look():
        _map(figure, axes, names, _unit_quantiles(profile, _QUANTILES), (0.0, 1.0), _fraction_label(profile.q))
        axes.xaxis.set_major_formatter(PERCENT)
        axes.set_xlabel("quantile of the layer's units, sparsest first")
        axes.set_title("Effective fraction by layer and quantile of units", loc="left")
    return figure


def _draw_depth(profile: Profile) -> Figure:
    """Draw the effective fraction along the depth of the model: the units' quartiles, and layers as one vector."""
    names = [layer.name for layer in profile.layer_shapes]
    q1, median, q3 = _unit_quantiles(profile, [0.25, 0.5, 0.75]).T
    own = _fractions(profile.layers)
    whole = profile.model["effective_count"] / profile.model["size"]
    gaussian = _gaussian_fraction(profile.q)
    depth = np.arange(1, len(names) + 1)
    figure, axes = new_figure(_WIDTH, 3.9)
    with shared_look():
        thick = min(1.0, (60 / len(names)) ** 0.5)
        if len(names) > 1:
            axes.fill_between(depth, q1, q3, color=PALETTE[4], alpha=0.45, linewidth=0, label="middle half of units")
        else:
            axes.vlines(depth, q1, q3, color=PALETTE[4], linewidth=6, label="middle half of units")
        axes.plot(depth, median, marker="o", markersize=3.5 * thick, color=PALETTE[0], label="median unit")
        axes.plot(depth, own, "D", markersize=4.2 * thick, label="layer as one vector", **_diamond(thick))
        axes.axhline(whole, color=PALETTE[3], linewidth=1.2, linestyle="--", label="whole model")
        axes.axhline(gaussian, color=INK, linewidth=1.0, linestyle=":", label="Gaussian weights", zorder=0)
        axes.set_ylim(*_rounded_range(np.concatenate([q1, q3, own, [whole, gaussian]])))
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set_xlim(0.5, len(names) + 0.5)
        axes.grid(axis="y")
        if len(names) <= _NAMED:
            slant: dict[str, Any] = {"rotation": 50, "ha": "right", "rotation_mode": "anchor"} if len(names) > 5 else {}
            axes.set_xticks(depth, short_names(names, 22), **slant)
            axes.set_xlabel("layer, in the order of the model")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("number of the layer, in the order of the model")
        axes.set_ylabel(f"effective fraction, N/d, q = {profile.q:g}")
        axes.set_title("Compressibility by depth: lower is sparser", loc="left")
        figure.legend(loc="outside lower center", ncols=5, handlelength=1.6, columnspacing=1.4)
    return figure


def _draw_orders(profile: Profile) -> Figure:
    """Draw the effective fraction of every layer as one vector, and of the model, at every order."""
    orders = [q for q in profile.orders if q != 1]  # where N is undefined
    if len(orders) < 2:
        raise ValueError("kind='orders' needs several orders besides 1. Call measure(..., orders=(0.25, 0.5, 0.75)).")
    table = profile.by_order()
    table = table[table["level"] != "unit"]
    names = [*(layer.name for layer in profile.layer_shapes), "(model)"]
    values = np.stack([_fractions(table[table["q"] == q]) for q in orders], axis=1)
    figure, axes = new_figure(_WIDTH, height_for(len(names)))
    with shared_look():
        sides = (-0.5, len(orders) - 0.5)
        _map(figure, axes, names, values, sides, "effective fraction of the layer as one vector, N/d")
        step = math.ceil(len(orders) / 20)
        axes.set_xticks(np.arange(len(orders))[::step], [f"{q:g}" for q in orders[::step]])
        axes.axhline(len(names) - 1.5, color="white", linewidth=2.5 * thickness_for(len(names)))
        axes.set_xlabel("order q of the quasi-norm")
        axes.set_title("Effective fraction by layer and order", loc="left")
    return figure


KINDS: dict[str, Callable[[Profile], Figure]] = {
    "units": _draw_units,
    "quantiles": _draw_quantiles,
    "depth": _draw_depth,
    "orders": _draw_orders,
}


def _map(figure: Figure, axes: Axes, names: list[str], values: Array, sides: tuple[float, float], label: str) -> None:
    """Draw values as colours, a row per layer, with a colour bar."""
    name_rows(axes, names)
    low, high = math.floor(100 * values.min()) / 100, math.ceil(100 * values.max()) / 100
    extent = (*sides, len(names) - 0.5, -0.5)
    # An image, not a mesh: a mesh of a thousand layers would make a vector file of tens of thousands of shapes.
    image = axes.imshow(
        values, cmap=_MAP, vmin=low, vmax=max(high, low + 0.01), aspect="auto", interpolation="nearest", extent=extent
    )
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines["bottom"].set_visible(False)
    axes.set_ylabel("layer")
    inch = 1 / figure.get_figheight()
    bar = figure.colorbar(
        image, ax=axes, location="bottom", fraction=0.12 * inch, aspect=45, pad=0.12 * inch, format=PERCENT
    )
    bar.outline.set_visible(False)
    bar.set_label(f"{label}\n← sparser        more even →")


def _unit_quantiles(profile: Profile, shares: Any) -> Array:
    """Return quantiles of the units' effective fraction, shape (layers, shares)."""
    units = profile.units
    spread = pd.Series(_fractions(units)).groupby(units["layer"], sort=False)
    names = [layer.name for layer in profile.layer_shapes]
    return np.stack([spread.quantile(share).loc[names].to_numpy() for share in shares], axis=1)


def _fractions(rows: pd.DataFrame) -> Array:
    return (rows["effective_count"] / rows["size"]).to_numpy()


def _fraction_label(q: float) -> str:
    return f"effective fraction of weights, N/d, at q = {q:g}"


def _diamond(thick: float) -> dict[str, Any]:
    return {"markerfacecolor": "white", "markeredgecolor": INK, "markeredgewidth": thick}


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
