from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellq.pruning.resumable import identity
from ellq.pruning.stopping import (
    Flow,
    History,
    accuracy_back,
    all_of,
    any_of,
    fixed,
    flow_back,
    gradient_back,
    masks_stable,
    monitors_of,
    needs_drawn_masks,
    patience,
    random_stop,
    reason_of,
)


class Constant:
    """A monitor that is never called here."""

    pairs = ("a", "b")

    def __init__(self, name="constant"):
        self.name = name

    def __call__(self, model):
        return np.zeros(2)

    def identity(self):
        return {"name": self.name}


MONITOR = Constant()


def history(
    accuracies=(0.5,),
    *,
    epochs=None,
    dense=0.9,
    iteration=1,
    distances=None,
    turnover=None,
    values=None,
    reference=None,
) -> History:
    n = len(accuracies)
    nothing = np.full(n, np.nan)
    flows = () if values is None else (Flow(MONITOR, np.array(values, float), np.array(reference, float)),)
    return History(
        iteration=iteration,
        epochs=tuple(range(1, n + 1)) if epochs is None else epochs,
        losses=nothing,
        accuracies=np.array(accuracies, dtype=float),
        dense_accuracy=dense,
        mask_distances=nothing if distances is None else np.array(distances),
        mask_turnover=nothing if turnover is None else np.array(turnover),
        flows=flows,
    )


def after(epochs: int, iteration: int = 1) -> History:
    return history([0.5] * epochs, iteration=iteration)


accuracies = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(st.integers(1, 20), st.integers(1, 20))
def test_fixed_stops_at_its_epoch_and_not_before(epochs, used):
    assert fixed(epochs)(after(used)) == ("fixed" if used >= epochs else None)


@given(accuracies, st.floats(0, 1), st.floats(0, 0.5))
def test_accuracy_back_compares_the_last_accuracy_with_the_dense_best(seen, dense, tolerance):
    expected = "accuracy" if seen[-1] >= dense - tolerance else None
    assert accuracy_back(tolerance)(history(seen, dense=dense)) == expected
    assert accuracy_back(tolerance, to=dense)(history(seen, dense=2.0)) == expected


@given(accuracies, st.integers(1, 5), st.floats(0, 0.3))
def test_patience_stops_once_the_last_epochs_bring_no_gain(seen, epochs, least_gain):
    expected = None
    if len(seen) > epochs:
        best_before = max(seen[: len(seen) - epochs])
        expected = "patience" if all(value <= best_before + least_gain for value in seen[-epochs:]) else None
    assert patience(epochs, least_gain)(history(seen)) == expected


def test_patience_counts_epochs_and_not_checks():
    seen = history([0.5, 0.4, 0.4], epochs=(3, 6, 9))
    assert patience(6)(seen) == "patience"
    assert patience(7)(seen) is None


vectors = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=2, max_size=6)


@given(vectors, st.floats(0, 3))
def test_flow_back_stops_strictly_within_epsilon_of_the_dense_net(rows, epsilon):
    *values, reference = rows
    distance = math.dist(values[-1], reference)
    for rule, name in {flow_back: "flow", gradient_back: "gradient"}.items():
        found = rule(MONITOR, epsilon)(history([0.5] * len(values), values=values, reference=reference))
        if abs(distance - epsilon) > 1e-12:
            assert found == (name if distance < epsilon else None)


@given(vectors)
def test_an_epsilon_of_zero_never_fires_and_one_above_the_range_always(rows):
    *values, reference = rows
    seen = history([0.5] * len(values), values=values, reference=reference)
    assert flow_back(MONITOR, 0.0)(seen) is None
    assert flow_back(MONITOR, 2 * math.sqrt(2) * (1 + 1e-9))(seen) == "flow"


def test_a_flow_of_a_monitor_that_was_not_called_is_missing():
    with pytest.raises(KeyError, match="lacks this monitor"):
        flow_back(Constant(), 0.1)(history(values=[[0, 0]], reference=[0, 0]))


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(1e-3, 1), st.integers(1, 4))
def test_masks_are_stable_after_enough_small_distances_in_a_row(distances, threshold, epochs):
    rows = [math.nan, *distances]
    expected = "early-bird" if len(distances) >= epochs and max(distances[-epochs:]) < threshold else None
    large = [2.0] * len(rows)
    assert masks_stable(threshold, epochs)(history(rows, distances=rows, turnover=large)) == expected
    assert masks_stable(threshold, epochs, relative=True)(history(rows, distances=large, turnover=rows)) == expected


def test_random_stop_is_uniform_over_its_range_and_follows_from_seed_and_iteration():
    low, high = 3, 7
    stopped = []
    for iteration in range(1, 2001):
        rule = random_stop(low, high, seed=5)
        first = next(used for used in range(1, 20) if rule(after(used, iteration)))
        assert first == next(used for used in range(1, 20) if random_stop(low, high, 5)(after(used, iteration)))
        stopped.append(first)
    counts = np.bincount(stopped, minlength=high + 1)
    assert counts[:low].sum() == counts[high + 1 :].sum() == 0
    assert ((counts[low:] - 400) ** 2 / 400).sum() < 23.5  # of chi square with 4 degrees of freedom: p = 1e-4
    others = [
        next(used for used in range(1, 20) if random_stop(low, high, 6)(after(used, iteration)))
        for iteration in range(1, 101)
    ]
    assert others != stopped[:100]


@given(st.lists(st.sampled_from([None, "a", "b"]), min_size=1, max_size=4))
def test_any_and_all_compose_as_their_names_say(reasons):
    rules = [lambda history, reason=reason: reason for reason in reasons]
    given_reasons = [reason for reason in reasons if reason]
    seen = history()
    assert any_of(*rules)(seen) == (" + ".join(given_reasons) if given_reasons else None)
    assert all_of(*rules)(seen) == (" & ".join(reasons) if len(given_reasons) == len(reasons) else None)


def test_composed_rules_pass_on_what_their_parts_need():
    other = Constant("other")
    inner = any_of(flow_back(MONITOR, 0.1), flow_back(MONITOR, 0.2), lambda history: None)
    rule = all_of(inner, gradient_back(other, 0.1), masks_stable())
    assert [monitor.name for monitor in monitors_of(rule)] == ["constant", "other"]
    assert needs_drawn_masks(rule)
    assert not needs_drawn_masks(inner)
    assert monitors_of(lambda history: None) == ()
    assert monitors_of(None) == ()
    assert not needs_drawn_masks(None)


def test_rules_nest_and_any_of_all_of_differ():
    seen = history([0.95], dense=0.9)
    assert any_of(accuracy_back(), fixed(2))(seen) == "accuracy"
    assert all_of(accuracy_back(), fixed(2))(seen) is None
    assert all_of(accuracy_back(), any_of(fixed(1), fixed(2)))(seen) == "accuracy & fixed"


@pytest.mark.parametrize("odd", [True, False, 1, "", ["flow"]])
def test_a_rule_that_gives_no_reason_is_refused(odd):
    with pytest.raises(TypeError, match="where a reason to stop or None is expected"):
        reason_of(lambda history: odd, history())
    with pytest.raises(TypeError, match="where a reason"):
        any_of(lambda history: odd)(history())


def test_rules_are_told_apart_by_their_settings_as_json():
    rules = [
        fixed(2),
        fixed(3),
        accuracy_back(),
        accuracy_back(0.1),
        accuracy_back(to=0.1),
        patience(2),
        patience(2, 0.1),
        flow_back(MONITOR, 0.1),
        flow_back(MONITOR, 0.2),
        flow_back(Constant("other"), 0.1),
        gradient_back(MONITOR, 0.1),
        masks_stable(),
        masks_stable(relative=True),
        random_stop(1, 3),
        random_stop(1, 3, 1),
        any_of(fixed(2)),
        all_of(fixed(2)),
        any_of(fixed(2), fixed(3)),
        any_of(any_of(fixed(2))),
    ]
    told = [json.dumps(identity(rule)) for rule in rules]
    assert len(set(told)) == len(rules)
    assert json.dumps(identity(random_stop(1, 3))) in told


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: fixed(0), ValueError, "epochs=0"),
        (lambda: fixed(1.5), TypeError, "epochs must be a whole number"),
        (lambda: accuracy_back(-0.1), ValueError, "tolerance"),
        (lambda: accuracy_back(to="0.9"), TypeError, "to must be one real number"),
        (lambda: patience(0), ValueError, "epochs=0"),
        (lambda: patience(2, -1), ValueError, "least_gain"),
        (lambda: flow_back(MONITOR, -1e-3), ValueError, "epsilon=-0.001 is below every distance"),
        (lambda: flow_back(MONITOR, math.nan), ValueError, "epsilon is NaN"),
        (lambda: flow_back(lambda model: np.zeros(2), 0.1), TypeError, "attribute pairs, got function"),
        (lambda: masks_stable(0.0), ValueError, "threshold=0 is never undercut"),
        (lambda: masks_stable(0.1, 0), ValueError, "epochs=0"),
        (lambda: random_stop(0, 3), ValueError, "low=0"),
        (lambda: random_stop(4, 3), ValueError, "high"),
        (lambda: random_stop(1, 3, -1), ValueError, "seed=-1"),
        (lambda: any_of(), TypeError, "at least one; got nothing"),
        (lambda: all_of(fixed(1), "accuracy"), TypeError, "got str"),
    ],
)
def test_bad_settings_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


@given(accuracies)
def test_a_history_cannot_be_changed(seen):
    with pytest.raises(AttributeError):
        history(seen).iteration = 2
