from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ellq.analysis import accuracy, agreement, cost
from ellq.pruning import Splits, apply, chain_bounds, largest_within, plan, sweep
from pruned_nets import assert_unchanged, gaussian, mlp, snapshot


def splits() -> Splits:
    calibration, selection, test = (gaussian(n, 4, seed=n) for n in (80, 40, 41))
    labels = [np.arange(len(x)) % 3 for x in (calibration, selection, test)]
    return Splits(calibration, labels[0], (selection, labels[1]), (test, labels[2]))


class TestSweep:
    @pytest.mark.parametrize(("method", "rules"), [("lq", ("ellq", "yang2022")), ("id", ("ellq", "chee2021"))])
    def test_has_a_row_for_every_case_that_says_what_pruning_gives(self, method, rules):
        net, data = mlp(4, 9, 3), splits()
        before = snapshot(net)
        table = sweep(net, data, method=method, rules=rules, sparsities=(0.2, 0.6))
        assert_unchanged(net, before)
        assert list(zip(table["rule"], table["sparsity"], strict=True)) == [(r, s) for r in rules for s in (0.2, 0.6)]
        for row in table.itertuples():
            masks = {"refit": "none"} if method == "lq" else {}
            decided = plan(net, data.calibration, method=method, rule=row.rule, sparsity=row.sparsity, **masks)
            pruned = apply(net, decided)
            assert row.accuracy == accuracy(pruned, *data.test)
            assert row.selection_accuracy == accuracy(pruned, *data.selection)
            assert row.agreement == agreement(net, pruned, data.test[0])
            size = cost(pruned, data.test[0][:1])
            assert (row.parameters, row.nonzeros, row.flops) == (size.parameters, size.nonzeros, size.flops)
            last = chain_bounds(net, pruned, data.test[0], decided).iloc[-1]
            assert (row.observed, row.bound, row.bound_measured) == tuple(last[["observed", "bound", "bound_measured"]])
            assert math.isnan(row.bound_lq) == (method == "id")


def test_refitted_masks_are_nearer_than_masks_alone():
    net, data = mlp(4, 9, 3), splits()
    alone, refitted = (
        sweep(net, data, method="lq", rules=("ellq",), sparsities=(0.6,), refit=refit).iloc[0]
        for refit in ("none", "auto")
    )
    assert refitted["observed"] < alone["observed"]
    assert refitted["observed"] <= refitted["bound_measured"] <= refitted["bound"]
    assert refitted["nonzeros"] == alone["nonzeros"]


def table(accuracies: dict[float, float]) -> pd.DataFrame:
    return pd.DataFrame({"sparsity": list(accuracies), "selection_accuracy": list(accuracies.values())})


class TestLargestWithin:
    def test_stops_at_the_first_that_falls_below(self):
        assert largest_within(table({0.1: 0.9, 0.2: 0.9, 0.3: 0.7, 0.4: 0.9}), 0.8) == 0.2

    def test_takes_rows_in_any_order_and_the_floor_itself(self):
        assert largest_within(table({0.4: 0.5, 0.1: 0.9, 0.2: 0.8}), 0.8) == 0.2

    def test_gives_the_smallest_where_none_will_do(self):
        assert largest_within(table({0.2: 0.3, 0.1: 0.2}), 0.8) == 0.1

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1))
    def test_all_up_to_it_are_accepted_and_the_next_is_not(self, accuracies, floor):
        sparsities = [(i + 1) / 10 for i in range(len(accuracies))]
        chosen = largest_within(table(dict(zip(sparsities, accuracies, strict=True))), floor)
        accepted = sum(1 for _ in np.flatnonzero(np.cumprod([a >= floor for a in accuracies])))
        assert chosen == sparsities[max(accepted - 1, 0)]
