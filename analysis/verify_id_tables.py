"""What a grid of trials of the risk theorem says: which bounds held, how near they came, and how fast the risk fell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import bdtrc

from ellq.analysis.verify_id import BOUNDS, CERTAIN, FRESH_SHARE

TRIAL = ["data", "activation", "width", "seed", "n"]
PATH = ["data", "activation", "width", "rule", "k"]
_PARTS = ("risk_within", "risk_clipped")
_LEVEL = 0.01  # how improbable more violations than allowed would be, were the theorem true
_NEAR = 2.0  # bound ÷ observed below which a bound says something of use


def verdict_table(frame: pd.DataFrame, *, delta: float, by: Sequence[str] = ()) -> pd.DataFrame:
    """Judge every bound by its trials: how many broke it, against how many would if it fails with probability δ.

    A trial is one net with one choice of inputs; it breaks a bound where one of its skeletons does. Were δ exact, and
    the trials independent as those of random nets are, the number of such trials were binomial with 1.1·δ, the tenth
    being the share of errors of the fresh inputs. A bound that is certain allows none.

    Args:
        frame: rows of ``verify_net`` with the columns of ``TRIAL``.
        delta: δ the bounds were made for.
        by: columns to judge separately by, such as ``["data"]``.

    Returns:
        A row per bound that applied somewhere: ``bound``, ``by``'s columns, ``trials``, ``skeletons``, ``violated``
        (trials), ``allowed`` at level 0.01, ``p_value`` (the probability of as many or more), ``holds``; the least,
        median and largest slack (bound ÷ observed, where something was observed), ``near``, the share of skeletons
        with slack below 2, and ``covered``, the median share of R_ID that the bound is of: below 1 where changes out of
        reach are left out, or clipped.
    """
    rows = []
    groups = frame.groupby(list(by), sort=False) if by else [((), frame)]
    for key, part in groups:
        names = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        for bound, observed in BOUNDS.items():
            applied = part[part[f"bound_{bound}"].notna()]
            if applied.empty:
                continue
            is_broken = applied["violations"].str.split().map(lambda found, bound=bound: bound in found)
            trials = is_broken.groupby([applied[name] for name in TRIAL], sort=False).any()
            violated, total = int(trials.sum()), len(trials)
            chance = 0.0 if bound in CERTAIN else (1 + FRESH_SHARE) * delta
            tails = _tails(total, chance)
            slack = applied.loc[applied[observed] > 0, f"bound_{bound}"] / applied[observed][applied[observed] > 0]
            low, middle, high = np.quantile(slack, (0.0, 0.5, 1.0)) if len(slack) else [np.nan] * 3
            rows.append(
                {"bound": bound}
                | names
                | {
                    "trials": total,
                    "skeletons": len(applied),
                    "violated": violated,
                    "allowed": int(np.flatnonzero(tails >= _LEVEL)[-1]),
                    "p_value": float(tails[violated]),
                    "holds": bool(tails[violated] >= _LEVEL),
                    "least_slack": low,
                    "median_slack": middle,
                    "largest_slack": high,
                    "near": float((slack < _NEAR).mean()) if len(slack) else np.nan,
                    "covered": float((applied[observed] / applied["risk"]).median()) if observed in _PARTS else 1.0,
                }
            )
    return pd.DataFrame(rows)


def sample_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Fit how R_ID over fresh inputs approaches that over the choice as the choice grows: excess ∝ n^slope.

    The theorem promises an excess R_ID − R̂_ID of at most order n^(−1/2). Fitted are the logarithms of the mean over
    seeds, by least squares, over choices of n ≥ 2k inputs, where they are three or more and the means are positive.

    Args:
        frame: rows of ``verify_net`` with the columns of ``TRIAL``.

    Returns:
        A row per net, rule and width k that was asked for: ``sizes`` (how many n), ``slope`` of the excess observed,
        and ``slope_bernstein``, ``slope_relative``, ``slope_held_out`` of the excess of those bounds, NaN where one
        does not apply.
    """
    rows = []
    asked = frame[frame["tol"].isna() & (frame["n"] >= 2 * frame["k"])]
    for key, part in asked.groupby(PATH, sort=False):
        excess = {"slope": part["risk"] - part["risk_choice"]}
        excess |= {f"slope_{name}": part[f"bound_{name}"] - part["risk_choice"] for name in ("bernstein", "relative")}
        # What was held out has its own empirical risk, beside which the limit lies.
        excess["slope_held_out"] = part["bound_held_out"] - part["risk"]
        means = pd.DataFrame(excess).groupby(part["n"]).mean()
        if len(means) >= 3:
            rows.append(
                dict(zip(PATH, key, strict=True))
                | {"sizes": len(means)}
                | {name: fitted_slope(means.index.to_numpy(), means[name].to_numpy()) for name in excess}
            )
    return pd.DataFrame(rows, columns=[*PATH, "sizes", "slope", "slope_bernstein", "slope_relative", "slope_held_out"])


def width_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Fit how R_ID over fresh inputs falls with the singular values as more units stay: R_ID ∝ σ_{k+1}^slope.

    A slope of 2 is that of σ²_{k+1}, what the best matrix of rank k leaves in a direction. Each net at its largest
    choice; the logarithms of the mean over seeds, by least squares, over three widths or more.

    Args:
        frame: rows of ``verify_net`` with the columns of ``TRIAL``.

    Returns:
        A row per net and rule: ``n``, ``widths`` (how many k), ``slope``, and ``feature_excess``, the median of
        ‖A − A_J T‖_F² ÷ its Eckart–Young floor (``"chee2021"`` only).
    """
    keys = ["data", "activation", "width", "rule"]
    rows = []
    for key, part in frame[frame["tol"].isna()].groupby(keys, sort=False):
        largest = part[part["n"] == part["n"].max()]
        means = largest.groupby("k")[["risk", "singular_value"]].mean()
        if len(means) >= 3:
            excess = largest["feature_error"] / largest["feature_floor"]
            rows.append(
                dict(zip(keys, key, strict=True))
                | {
                    "n": int(part["n"].max()),
                    "widths": len(means),
                    "slope": fitted_slope(means["singular_value"].to_numpy(), means["risk"].to_numpy()),
                    "feature_excess": float(excess.median()),
                }
            )
    return pd.DataFrame(rows, columns=[*keys, "n", "widths", "slope", "feature_excess"])


def _tails(trials: int, chance: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return P(Bin(trials, chance) ≥ v) for v = 0 … trials."""
    if chance == 0:
        return np.array([1.0] + [0.0] * trials)
    return np.concatenate([[1.0], bdtrc(np.arange(trials), trials, chance)])


def fitted_slope(x: np.ndarray, y: np.ndarray) -> float:
    """Return the slope of log y on log x by least squares; NaN where a value is not positive, or there is one only."""
    if len(x) < 2 or not ((x > 0) & (y > 0)).all() or not np.isfinite(y).all():
        return np.nan
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
