from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ellq
from ellq.pruning.pattern import keep_pattern, pattern_count, pattern_numbers


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 14), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_keeps_the_largest_of_every_group(units, size, n, more, seed):
    m = n + more
    w = np.random.default_rng(seed).integers(-3, 4, (units, size)).astype(np.float32)
    kept = keep_pattern(w, n, m).numpy()
    assert (kept.sum(axis=1) == pattern_count(size, n, m)).all()
    for row, mask in zip(np.abs(w), kept, strict=True):
        for start in range(0, size, m):
            group, own = row[start : start + m], mask[start : start + m]
            expected = np.zeros(len(group), dtype=bool)
            expected[np.argsort(-group, kind="stable")[:n]] = True
            assert own.tolist() == expected.tolist()


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "2", "a:b", "2:4:8", "", " 2:4"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="is no N:M pattern"):
        pattern_numbers(pattern)


def test_a_minimum_beside_it_is_refused():
    with pytest.raises(ValueError, match="least=1 has no place beside pattern="):
        ellq.plan(nn.Linear(8, 3), pattern="2:4", least=1)


def test_a_plan_of_two_of_four_is_what_semi_structured_tensors_hold():
    net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
    pruned = ellq.prune(net, pattern="2:4", refit="none")
    for before, after in ((net[0].weight, pruned[0].weight), (net[2].weight, pruned[2].weight)):
        groups = after.view(-1, 4)
        assert ((groups != 0).sum(1) == 2).all()
        kept = before.view(-1, 4).abs().topk(2).indices
        assert torch.equal(groups.gather(1, kept), before.view(-1, 4).gather(1, kept))
    decided = ellq.plan(net, pattern="2:4")
    assert decided.sparsity == 0.5
    assert set(decided.table["reason"]) == {"2 of every 4"}
    assert ellq.Plan.from_json(decided.to_json()).to_json() == decided.to_json()


def test_groups_of_a_convolution_run_over_its_flattened_input_and_the_last_may_be_short():
    layer = nn.Conv2d(3, 2, 3)
    pruned = ellq.prune(layer, pattern="1:4").weight.reshape(2, 27)
    assert ((pruned[:, :24].reshape(-1, 4) != 0).sum(1) == 1).all()
    assert ((pruned[:, 24:] != 0).sum(1) == 1).all()


def test_scores_choose_within_groups_too():
    net = nn.Linear(8, 3)
    inputs = torch.ones(5, 8) * torch.tensor([1e-6, 1e-6, 1, 1, 1, 1, 1e-6, 1e-6])
    pruned = ellq.prune(net, inputs, rule="wanda", pattern="2:4")
    assert (pruned.weight != 0).tolist() == [[False, False, True, True, True, True, False, False]] * 3


def test_a_transposed_convolution_keeps_the_pattern_in_its_output_channels():
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)
    pruned = ellq.prune(layer, pattern="1:2")
    units = pruned.weight.reshape(2, 2, 3, 4).transpose(1, 2).reshape(6, 4, 2)
    assert ((units != 0).sum(-1) == 1).all()
