"""How compressible weights are, as pictures and tables for a report; and the page that ``ellq measure`` writes."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ellq import __version__
from ellq.analysis import Profile, draw_curves, error_curves
from ellq.paper_figures import render
from ellq.pruning.report import Picture, Report, Section, render_report


def shown_profile(profile: Profile) -> pd.DataFrame:
    """Return a profile's summary with numbers as text."""
    summary = profile.summary().reset_index()
    return pd.DataFrame(
        {
            "layer": summary["layer"],
            "units": [f"{n:,}" for n in summary["units"]],
            "weights": [f"{n:,}" for n in summary["size"]],
            "‖w‖_q": [f"{v:.4g}" for v in summary["quasinorm"]],
            "mean SI_q of units": [f"{v:.4g}" for v in summary["mean_sparsity_index"]],
            "PQ index": [f"{v:.3f}" for v in summary["pq_index"]],
            "N/d": [f"{v:.3f}" for v in summary["effective_fraction"]],
            "N/d of the median unit": [f"{v:.3f}" for v in summary["unit_median"]],
        }
    )


def profile_pictures(name: str, profile: Profile, curves: pd.DataFrame) -> list[Picture]:
    """Return the pictures of a profile and of the error curves of the same weights."""
    captions = {
        "units": "share of its weights that each unit effectively uses",
        "quantiles": "the same, quantile by quantile of each layer's units",
        "depth": "the same, along the depth",
    }
    if len(profile.orders) > 1:
        captions["orders"] = "effective fraction of each layer as one vector, by the order of the quasi-norm"
    pictures = [Picture(render(profile.plot(kind), "svg"), f"{name}: {caption}") for kind, caption in captions.items()]
    caption = f"{name}: error of keeping the k largest weights, and the tightest ℓq bound on it with its order"
    return [*pictures, Picture(render(draw_curves(curves), "svg"), caption)]


def weights_page(source: Any, profile: Profile, name: str) -> str:
    """Return the report on a checkpoint as one HTML page.

    Args:
        source: what was measured.
        profile: its profile.
        name: what the page calls it.
    """
    tables = [(f"Profile of {name}, q = {profile.q:g}", shown_profile(profile))]
    if len(profile.retained):
        wholes = profile.retained[profile.retained["level"] != "unit"]
        counts = wholes.assign(
            layer=wholes["layer"].replace("", "(model)"), fraction=wholes["fraction"].map("{:.1%}".format)
        )
        columns = ["layer", "tol", "retained", "fraction", "sufficient"]
        tables.append(("Fewest weights that keep the relative error within tol", counts[columns]))
    model = profile.model
    return render_report(
        Report(
            title=f"How compressible the weights of {name} are",
            summary=(
                f"{model['size']:,} weights, of which {model['effective_count'] / model['size']:.1%} are effectively"
                f" used at q = {profile.q:g}."
            ),
            sections=[
                Section(
                    "Compressibility",
                    "ℓq measures of the weights alone; no data was used. The effective fraction N/d is how many equal"
                    " weights would be as spread out, per weight: the smaller, the more compressible.",
                    tables=tables,
                    pictures=profile_pictures(name, profile, error_curves(source)),
                )
            ],
            provenance={"command": "ellq measure --report", "ellq": __version__},
        )
    )
