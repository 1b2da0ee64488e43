from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ellq.pruning.rewinding import Rewinding, rewinding


@given(st.integers(0, 50), st.integers(1, 50), st.data())
def test_an_epoch_of_the_warm_up_brings_back_tensors_and_position_together(warm_up, cap, data):
    epoch = data.draw(st.integers(0, warm_up))
    assert rewinding(epoch, warm_up, cap) == Rewinding(epoch, epoch)
    assert rewinding("warm-up", warm_up, cap) == rewinding(warm_up, warm_up, cap)
    assert rewinding("start", warm_up, cap) == rewinding(0, warm_up, cap)
    assert rewinding("none", warm_up, cap) == Rewinding(None, None)
    rate = rewinding("rate", warm_up, cap)
    assert rate.epoch is None
    assert rate.position == (warm_up - cap if cap <= warm_up else 0)


def test_tensors_are_those_of_now_unless_they_come_back():
    now, then = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert Rewinding(1, 1).tensors(now, then, 1) == then
    some = Rewinding(1, 1, lambda name, tensor, iteration: name == "a" and iteration == 2)
    assert some.tensors(now, then, 1) == now
    assert some.tensors(now, then, 2) == {"a": then["a"], "b": now["b"]}


@pytest.mark.parametrize(
    ("rewind", "error", "match"),
    [
        ("begin", ValueError, "Choose one of 'warm-up', 'start', 'none', 'rate', or an epoch"),
        (6, ValueError, r"rewind=6 is outside \[0, 5\]"),
        (-1, ValueError, "rewind=-1"),
        (1.0, TypeError, "got float 1.0"),
        (False, TypeError, "got bool False"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_not_known_is_refused(rewind, error, match):
    with pytest.raises(error, match=match):
        rewinding(rewind, 5, 3)
