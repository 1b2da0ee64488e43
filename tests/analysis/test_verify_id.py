from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binom

from ellq.analysis import mlp, verify_id
from ellq.analysis.verify_id import BOUNDS, CERTAIN, RULES, Draws, verify_net
from ellq.analysis.verify_id_plot import draw_samples, draw_slack, draw_widths
from ellq.analysis.verify_id_tables import fitted_slope, sample_rates, verdict_table, width_rates

PROBABLE = [name for name in BOUNDS if name not in CERTAIN]


def net_of(activation="tanh", width=12, seed=0):
    torch.manual_seed(seed)
    return mlp(5, width, outputs=3, activation=activation)


def draws(n=120, fresh=4000, seed=1, bounded=True):
    generator = torch.Generator().manual_seed(seed)
    low, high = (-1.0, 1.0) if bounded else (-math.inf, math.inf)

    def draw(count):
        x = torch.randn(count, 5, generator=generator)
        return torch.clip(x, low, high)

    return Draws(draw(n), draw(n), draw(fresh), np.ones((fresh, 3)), low, high)


def verified(activation="tanh", bounded=True, n=120, delta=0.05, **settings):
    arguments = {"retained": [3, 6, 9], "tolerances": [0.2, 0.05]} | settings
    return pd.DataFrame(verify_net(net_of(activation), draws(n, bounded=bounded), delta=delta, **arguments))


@pytest.fixture(scope="module")
def frame():
    return verified()


class TestVerifyNet:
    def test_gives_a_row_per_rule_and_width_or_tolerance(self, frame):
        assert frame["rule"].tolist() == [rule for rule in RULES for _ in range(5)]
        assert frame["k"][:3].tolist() == [3, 6, 9]
        assert frame["tol"].isna().tolist() == [True, True, True, False, False] * 2
        assert not frame.drop(columns=["tol", *(f"bound_{name}" for name in BOUNDS)]).loc[:4].isna().any().any()

    def test_measures_what_a_pruned_module_does(self, frame):
        # By the definition: copy the net, cut it by hand, run it.
        net, data = net_of().double(), draws()
        with torch.no_grad():
            A, Z = (net[:3](x.double()).numpy() for x in (data.choice, data.fresh))
        U = net[3].weight.detach().numpy()
        residual, kept = A.copy(), []
        for _ in range(6):
            kept.append(int(np.argmax((residual**2).sum(axis=0))))
            residual = A - A[:, kept] @ np.linalg.lstsq(A[:, kept], A, rcond=None)[0]
        T = np.linalg.lstsq(A[:, kept], A, rcond=None)[0]
        losses = (((Z[:, kept] @ T - Z) @ U.T) ** 2).sum(axis=1)
        row = frame[(frame["rule"] == "chee2021") & (frame["k"] == 6)].iloc[0]
        assert row["risk"] == pytest.approx(losses.mean(), rel=1e-9)
        assert row["risk_error"] == pytest.approx(losses.std(ddof=1) / math.sqrt(len(losses)), rel=1e-9)
        assert row["risk_choice"] == pytest.approx((((residual @ U.T) ** 2).sum(axis=1)).mean(), rel=1e-9)
        assert row["interpolation"] == pytest.approx(np.linalg.norm(T, 2), rel=1e-9)
        assert row["largest_ratio"] == pytest.approx((losses / (Z**2).sum(axis=1)).max(), rel=1e-9)
        sigma = np.linalg.svd(A, compute_uv=False)
        assert row["singular_value"] == pytest.approx(sigma[6] / math.sqrt(120), rel=1e-6)
        assert row["feature_error"] == pytest.approx((residual**2).sum() / 120, rel=1e-9)
        assert row["feature_floor"] == pytest.approx((sigma[6:] ** 2).sum() / 120, rel=1e-6)
        outputs = Z @ U.T + net[3].bias.detach().numpy()
        pruned = Z[:, kept] @ T @ U.T + net[3].bias.detach().numpy()
        assert row["dense_risk"] == pytest.approx(((outputs - 1) ** 2).sum(axis=1).mean(), rel=1e-9)
        assert row["pruned_risk"] == pytest.approx(((pruned - 1) ** 2).sum(axis=1).mean(), rel=1e-9)

    def test_a_tolerance_takes_the_fewest_units_within_it(self):
        widths = verified(retained=list(range(1, 12)))
        for rule, rows in widths.groupby("rule"):
            asked = rows[rows["tol"].isna()].set_index("k")["risk_choice"]
            with torch.no_grad():
                outputs = (net_of().double()[:3](draws().choice.double()) @ net_of().double()[3].weight.T).numpy()
            energy = ((outputs - outputs.mean(0) * (rule == "ellq")) ** 2).sum(axis=1).mean()
            for tol, k in rows.loc[rows["tol"].notna(), ["tol", "k"]].itertuples(index=False):
                assert asked[k] <= tol**2 * energy * (1 + 1e-9)
                assert k == 1 or asked[k - 1] > tol**2 * energy

    def test_all_bounds_hold_here_and_the_certain_ones_are_near(self, frame):
        assert (frame["violations"] == "").all()
        for name, observed in BOUNDS.items():
            applied = frame[frame[f"bound_{name}"].notna()]
            if name != "outside":
                assert (applied[f"bound_{name}"] >= applied[observed] * (1 - 1e-9)).all(), name
        assert (frame["bound_split"] < 6 * frame["pruned_risk"]).all()

    def test_held_out_inputs_bound_the_risk_within_a_factor_of_two(self):
        found = verified(n=1000)
        assert (found["bound_held_out_clipped"] < 2 * found["risk_clipped"]).all()
        assert (found["risk_clipped"] > 0.999 * found["risk"]).all()

    @pytest.mark.parametrize(("activation", "bounded"), [("relu", True), ("gelu", True), ("sigmoid", False)])
    def test_bounds_apply_to_every_net_of_bounded_features(self, activation, bounded):
        found = verified(activation, bounded)
        assert found[[f"bound_{name}" for name in PROBABLE if name != "pseudodim"]].notna().all().all()
        assert (found["violations"] == "").all()

    def test_without_a_radius_the_bounds_that_need_one_are_missing(self):
        found = verified("relu", bounded=False)
        need = {"bernstein", "shortfall", "relative", "held_out", "pseudodim"}
        for name in PROBABLE:
            assert found[f"bound_{name}"].isna().all() == (name in need), name

    def test_the_pseudo_dimension_form_needs_as_many_samples(self):
        few, enough = (verified(n=n)["bound_pseudodim"] for n in (77, 78))  # m(m + 1)/2 for m = 12
        assert few.isna().all()
        assert enough[:5].notna().all()
        assert enough[5:].isna().all()

    def test_the_same_call_gives_the_same_numbers_and_leaves_the_net_alone(self):
        net, data = net_of(), draws()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        first, second = (verify_net(net, data, retained=[3], tolerances=[0.1], delta=0.05) for _ in range(2))
        assert json.dumps(first) == json.dumps(second)
        assert net[1].weight.dtype == torch.float32
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_a_smaller_delta_widens_every_probable_bound(self):
        wide, narrow = verified(delta=1e-4), verified(delta=0.2)
        for name in PROBABLE:
            if name != "pseudodim":
                assert (wide[f"bound_{name}"] >= narrow[f"bound_{name}"]).all(), name

    @pytest.mark.parametrize("name", ["risk_bernstein", "risk_shortfall", "risk_relative"])
    def test_a_bound_that_forgets_its_excess_is_caught(self, monkeypatch, name):
        # The empirical risk itself, for few inputs far below the risk.
        monkeypatch.setattr(verify_id, name, lambda Q, empirical, **_: empirical)
        found = verified(n=24, retained=[9], tolerances=[0.5])
        assert found["violations"].str.contains(name.removeprefix("risk_")).any()

    def test_a_certain_bound_one_percent_too_small_is_caught(self, monkeypatch):
        exact = verify_id.risk_split
        # Where the dense net is right everywhere, the pruned risk is that of the change: equality.
        data = draws()
        with torch.no_grad():
            targets = net_of().double()(data.fresh.double()).numpy()
        data = Draws(data.choice, data.held_out, data.fresh, targets, data.low, data.high)
        for factor in (1.0, 0.99):
            monkeypatch.setattr(verify_id, "risk_split", lambda *a, factor=factor: factor * exact(*a))
            rows = verify_net(net_of(), data, retained=[4], tolerances=[0.1], delta=0.05)
            assert all(("split" in row["violations"]) == (factor < 1) for row in rows)


def trials(count, broken, *, bound="bernstein", rows=3):
    """Trials of three skeletons, of which the first ``broken`` break a bound at one of them."""
    table = []
    for number in range(count):
        for k in range(rows):
            values = {f"bound_{name}": 2.0 for name in BOUNDS} | dict.fromkeys(BOUNDS.values(), 1.0)
            trial = {"data": "d", "activation": "relu", "width": 8, "seed": number, "n": 10}
            table.append(trial | values | {"violations": f"{bound} relative" if number < broken and k == 1 else ""})
    return pd.DataFrame(table)


def verdict(frame, bound, delta=0.05):
    return verdict_table(frame, delta=delta).set_index("bound").loc[bound]


class TestVerdicts:
    @pytest.mark.parametrize("count", [1, 20, 200])
    @pytest.mark.parametrize("delta", [0.01, 0.05, 0.3])
    def test_allow_what_the_binomial_tail_does(self, count, delta):
        allowed = int(verdict(trials(count, 0), "bernstein", delta)["allowed"])
        tail = binom.sf(allowed - 1, count, 1.1 * delta)
        assert tail >= 0.01
        assert allowed == count or binom.sf(allowed, count, 1.1 * delta) < 0.01
        at = verdict(trials(count, allowed), "bernstein", delta)
        assert at["holds"]
        assert at["violated"] == allowed
        assert at["p_value"] == pytest.approx(tail)
        if allowed < count:
            assert not verdict(trials(count, allowed + 1), "bernstein", delta)["holds"]

    def test_allow_no_violation_of_what_is_certain(self):
        assert verdict(trials(100, 0, bound="split"), "split")["holds"]
        assert not verdict(trials(100, 1, bound="split"), "split")["holds"]

    def test_count_a_trial_once_however_many_skeletons_break(self):
        found = verdict(trials(10, 10).assign(violations="bernstein"), "bernstein")
        assert (found["violated"], found["trials"], found["skeletons"]) == (10, 10, 30)

    def test_do_not_take_one_name_for_another(self):
        found = verdict_table(trials(5, 0).assign(violations="held_out_clipped"), delta=0.05).set_index("bound")
        assert found.loc["held_out_clipped", "violated"] == 5
        assert found.loc["held_out", "violated"] == 0

    def test_leave_out_what_never_applied_and_judge_by_columns(self):
        table = trials(4, 0).assign(bound_relative=np.nan)
        table.loc[table["seed"] > 1, "data"] = "e"
        found = verdict_table(table, delta=0.05, by=["data"])
        assert "relative" not in found["bound"].tolist()
        assert found.groupby("data")["trials"].unique().map(list).to_dict() == {"d": [2], "e": [2]}

    def test_slack_is_of_what_was_observed_above_zero(self):
        table = trials(4, 0)
        table.loc[:1, "risk"] = 0.0
        table.loc[2, "bound_bernstein"] = 10.0
        found = verdict(table, "bernstein")
        assert (found["least_slack"], found["median_slack"], found["largest_slack"]) == (2, 2, 10)
        assert found["near"] == 0
        assert np.isnan(verdict(table.assign(risk=0.0), "bernstein")["median_slack"])


def grid_rows(slope=-1.0, power=2.0):
    rows = []
    for n in (100, 1000, 10_000):
        for k, sigma in ((2, 1.0), (4, 0.3), (8, 0.1)):
            risk = sigma**power + n**slope
            rows.append(
                {"data": "d", "activation": "relu", "width": 16, "seed": 0, "n": n, "rule": "chee2021", "tol": np.nan}
                | {"k": k, "risk": risk, "risk_choice": sigma**power, "singular_value": sigma}
                | {"feature_error": 2.0, "feature_floor": 1.0, "risk_within": risk, "risk_clipped": risk}
                | {f"bound_{name}": sigma**power + n**-0.5 for name in BOUNDS}
                | {"pruned_risk": 1.0, "largest_ratio": 1.0, "share_outside": 0.0, "violations": ""}
            )
    return pd.DataFrame(rows)


class TestRates:
    @pytest.mark.parametrize("slope", [-0.5, -1.0])
    def test_find_the_slope_in_samples(self, slope):
        found = sample_rates(grid_rows(slope))
        np.testing.assert_allclose(found["slope"], slope, rtol=1e-9)
        np.testing.assert_allclose(found["slope_bernstein"], -0.5, rtol=1e-9)
        assert found["k"].tolist() == [2, 4, 8]

    def test_find_the_slope_in_singular_values(self):
        found = width_rates(grid_rows(-3.0, 2.0))
        assert found["slope"].item() == pytest.approx(2.0, abs=1e-6)
        assert found["feature_excess"].item() == 2.0
        assert found["n"].item() == 10_000

    def test_need_three_sizes(self):
        frame = grid_rows()
        assert sample_rates(frame[frame["n"] > 100]).empty
        assert width_rates(frame[frame["k"] > 2]).empty
        assert sample_rates(frame[frame["n"] > 100]).columns.tolist() == sample_rates(frame).columns.tolist()

    def test_say_nothing_of_what_is_not_positive(self):
        assert math.isnan(fitted_slope(np.array([1.0, 2.0]), np.array([1.0, -1.0])))
        assert math.isnan(fitted_slope(np.array([1.0]), np.array([1.0])))
        assert fitted_slope(np.array([1.0, 2.0, 4.0]), np.array([1.0, 4.0, 16.0])) == pytest.approx(2)


def test_pictures_are_drawn_of_any_verification(tmp_path, frame):
    trial = {"data": "d", "activation": "tanh", "width": 12, "seed": 0, "n": 120}
    both = pd.concat([grid_rows(), grid_rows().assign(rule="ellq")])
    for number, table in enumerate((both, frame.assign(**trial))):
        for draw in (draw_slack, draw_samples, draw_widths):
            path = tmp_path / f"{draw.__name__}{number}.png"
            draw(table).savefig(path)
            assert path.stat().st_size > 5000
