from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import nn

import ellq
from ellq.pruning.storage import storage_bytes
from pruned_nets import mlp

FORMATS = ["csr", "coo", "bitmask"]


def test_counts_what_scipy_holds():
    net = nn.Linear(40, 30)
    pruned = ellq.prune(net, sparsity=0.8)
    matrix = pruned.weight.detach().numpy()
    csr, coo = sparse.csr_array(matrix), sparse.coo_array(matrix)
    assert storage_bytes(pruned, "csr") == csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes
    assert storage_bytes(pruned, "coo") == coo.data.nbytes + sum(c.nbytes for c in coo.coords)
    assert storage_bytes(pruned, "dense") == matrix.nbytes
    assert storage_bytes(pruned, "bitmask") == csr.data.nbytes + np.packbits(matrix != 0).nbytes


def test_of_two_in_four_is_nine_sixteenths_of_float16():
    net = nn.Linear(64, 64, bias=False).half()
    assert storage_bytes(ellq.prune(net, pattern="2:4"), "2:4") == 64 * 64 * 2 * 9 // 16


def test_of_a_plan_is_that_of_the_pruned_model():
    net = mlp(12, 20, 5)
    decided = ellq.plan(net, sparsity=0.7)
    for storage in FORMATS:
        assert storage_bytes(net, storage, plan=decided) == storage_bytes(ellq.prune(net, sparsity=0.7), storage)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 3000), st.booleans(), st.sampled_from(["ellq", "global", "uniform"]))
def test_a_budget_in_bytes_retains_the_most_that_fits(storage, limit, is_mixed, rule):
    net = mlp(12, 20, 5)
    if is_mixed:
        net[2].half()
    held = storage_bytes(net, storage, plan=ellq.plan(net, rule=rule, nonzeros=25 if rule == "ellq" else 0))
    if limit < held:
        with pytest.raises(ValueError, match=f"bytes={limit} .*Choose bytes >= {held}") as refused:
            ellq.plan(net, rule=rule, bytes=limit, storage=storage)
        assert refused.value.nearest == held
        limit = held
    decided = ellq.plan(net, rule=rule, bytes=limit, storage=storage)
    assert storage_bytes(net, storage, plan=decided) <= limit
    retained = int(decided.table["retained"].sum())
    if retained < decided.table["size"].sum():
        more = ellq.plan(net, rule=rule, nonzeros=retained + 1)
        assert storage_bytes(net, storage, plan=more) > limit


def test_a_budget_for_two_in_four_is_that_pattern_or_refused():
    net = mlp(16, 20, 8)
    needed = storage_bytes(net, "2:4", plan=ellq.plan(net, pattern="2:4"))
    assert ellq.plan(net, bytes=needed, storage="2:4").sparsity == 0.5
    with pytest.raises(ValueError, match=f"below the {needed}"):
        ellq.plan(net, bytes=needed - 1, storage="2:4")


def test_two_in_four_stays_so_when_it_is_refitted():
    net = mlp(16, 20, 8)
    pruned = ellq.prune(net, torch.randn(64, 16), bytes=10**6, storage="2:4")
    for layer in (module for module in pruned if isinstance(module, nn.Linear)):
        assert (layer.weight.reshape(-1, 4) != 0).sum(1).max() <= 2
    with pytest.raises(ValueError, match="against a pattern"):
        ellq.plan(net, torch.randn(64, 16), bytes=10**6, storage="2:4", refit="obs")


def test_a_dense_format_keeps_all_or_does_not_fit():
    net = mlp(16, 20, 8)
    assert ellq.plan(net, bytes=4 * (16 * 20 + 20 * 8), storage="dense").sparsity == 0.0
    with pytest.raises(ValueError, match=r"Choose bytes >= 1920"):
        ellq.plan(net, bytes=1919, storage="dense")


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(ValueError, match="storage='zip' is unknown"):
        storage_bytes(nn.Linear(4, 4), "zip")
    with pytest.raises(ValueError, match="'weight' has 16 of 16 weights retained"):
        storage_bytes(nn.Linear(4, 4), "2:4")
    with pytest.raises(ValueError, match="'weight' has units of 6 weights"):
        storage_bytes(nn.Linear(6, 4), "2:4")
    with pytest.raises(ValueError, match=r"layer '2\.weight', which the model lacks"):
        storage_bytes(nn.Sequential(nn.Linear(4, 7)), plan=ellq.plan(mlp(4, 7, 3), sparsity=0.5))


def test_a_tied_weight_counts_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert storage_bytes(net, "dense") == 64
    assert storage_bytes(torch.nn.ModuleDict({"a": net}).state_dict(), "dense") == 64
