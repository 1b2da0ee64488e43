from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ellq.pruning.resumable import decoded, encoded, finite_number, identity, random_state

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3), st.just(torch.ones(2))
)
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.integers(), st.text(max_size=3)), inner, max_size=3),
    ),
    max_leaves=12,
)


def equal(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


@given(states)
def test_any_state_comes_back_through_json(value):
    tensors: dict[str, torch.Tensor] = {}
    assert equal(decoded(json.loads(json.dumps(encoded(value, tensors))), tensors), value)


def test_the_state_of_an_optimiser_comes_back_bit_for_bit_and_is_a_copy():
    net = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    content = encoded(optimizer.state_dict(), tensors)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer.step()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    state = decoded(content, tensors)
    state["state"][0]["exp_avg"].fill_(7.0)
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    torch.optim.AdamW(net.parameters()).load_state_dict(decoded(content, tensors))


@pytest.mark.parametrize("odd", [object(), {1, 2}, np.ones(2), lambda: None])
def test_what_a_file_cannot_hold_is_refused(odd):
    with pytest.raises(TypeError, match=r"which a checkpoint cannot\. Hold tensors, numbers, texts"):
        encoded({"a": [odd]}, {})


@dataclass
class _Settings:
    rate: float
    data: torch.Tensor


def test_identity_tells_dataclasses_and_modules_by_what_they_hold():
    one, other = torch.ones(2), torch.zeros(2)
    told = [identity(_Settings(*parts)) for parts in [(0.1, one), (0.2, one), (0.1, other)]]
    assert len({json.dumps(each) for each in told}) == 3
    assert identity(_Settings(0.1, torch.ones(2))) == told[0]
    assert identity(_Settings) == "_Settings"
    torch.manual_seed(0)
    first = nn.Linear(2, 2)
    assert identity(first) != identity(nn.Linear(2, 2))
    assert identity(first) == identity(first)


def test_random_states_follow_from_seed_and_place():
    def drawn(*place):
        with random_state(*place):
            return torch.rand(1).item(), np.random.random()  # noqa: NPY002

    places = [(0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 1, 1), (0, 1, 1, 2)]
    assert len({drawn(*place) for place in places}) == len(places) - 1  # zeros at the end change nothing
    assert drawn(0, 1) == drawn(0, 1)


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), np.array([0.5]), torch.tensor(0.5), torch.tensor([[1]])])
def test_a_finite_number_may_come_in_any_form(value):
    assert finite_number(value, "evaluate", "accuracy") in (0.5, 1.0)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ("a", TypeError, "evaluate returned a str, where one number, the accuracy, is expected"),
        (None, TypeError, "returned a NoneType"),
        (True, TypeError, "returned a bool"),
        (1j, TypeError, "returned a complex"),
        (torch.ones(2), TypeError, "returned a Tensor"),
        (math.nan, ValueError, "evaluate returned the accuracy nan"),
        (-math.inf, ValueError, "returned the accuracy -inf"),
    ],
)
def test_what_is_no_finite_number_is_refused(value, error, match):
    with pytest.raises(error, match=match):
        finite_number(value, "evaluate", "accuracy")
