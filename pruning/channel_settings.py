"""The settings of the rules for channels, and what they may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ellq.pruning.structured import CHANNEL_REFITS, SELECTIONS
from ellq.theory import open_fraction
from ellq.theory.arguments import count

CHANNEL_RULES = ("ellq", "chee2021", "chee2022")
_SETTINGS: dict[str, dict[str, Any]] = {
    "ellq": {
        "selection": "elimination",
        "refit": "joint",
        "widths": None,
        "rounds": 1,
        "tol_of": "layers",
        "recalibrate": False,
        "seed": 0,
    },
    "chee2021": {"recalibrate": False},
    "chee2022": {"alpha": 0.9, "recalibrate": False},
}


def channel_settings(rule: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a rule, those given checked and the others at their defaults.

    Raises:
        TypeError: a setting that the rule does not take.
        ValueError: an unknown rule, or a setting out of range.
    """
    if rule not in CHANNEL_RULES:
        raise ValueError(f"rule={rule!r} is unknown. Choose one of {', '.join(map(repr, CHANNEL_RULES))}.")
    known = _SETTINGS[rule]
    stray = next((name for name in given if name not in known), None)
    if stray is not None:
        raise TypeError(f"{stray}= is no setting of rule={rule!r} for channels, which takes {', '.join(known)}.")
    chosen = known | dict(given)
    allowed = {
        "selection": SELECTIONS,
        "refit": CHANNEL_REFITS,
        "widths": (None, "measured", "uniform"),
        "tol_of": ("layers", "outputs"),
    }
    for name, options in allowed.items():
        if name in chosen and chosen[name] not in options:
            shown = ", ".join(repr(option) for option in options if option is not None)
            raise ValueError(f"{name}={chosen[name]!r} is unknown. Choose one of {shown}.")
    if rule == "ellq":
        is_default = chosen["selection"] == "elimination"
        if chosen["refit"] == "fold" and chosen["selection"] in ("elimination", "magnitude"):
            raise ValueError("refit='fold' needs the features of a selection such as 'pivoted-qr'. Choose that too.")
        if chosen["widths"] is None:
            chosen["widths"] = "measured" if is_default else "uniform"
        chosen["rounds"] = count(chosen["rounds"], "rounds", low=1, high=100)
        chosen["seed"] = count(chosen["seed"], "seed", low=0, high=2**32 - 1)
    if chosen["recalibrate"] not in (False, True):
        raise ValueError(f"recalibrate={chosen['recalibrate']!r} is no truth value. Pass True or False.")
    if "alpha" in chosen:
        chosen["alpha"] = open_fraction(chosen["alpha"], "alpha")
    return chosen
