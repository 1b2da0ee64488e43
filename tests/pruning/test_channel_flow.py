from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from ellq.pruning.channel_flow import FIXED, PADDING, Labels, along, carry, operation_name, spread

SHAPE = (2, 6, 4, 4)

MOVES = {
    "View": lambda x: x.reshape(2, 96),
    "Transpose": lambda x: x.transpose(-1, 1),
    "Permute": lambda x: x.permute(0, -1, 1, 2),
    "Slice": lambda x: x[:, 1::2],
    "Select": lambda x: x[:, -1],
    "Index": lambda x: x[:, torch.tensor([4, 0, 0])],
    "IndexSelect": lambda x: x.index_select(1, torch.tensor([5, 2])),
    "Flip": lambda x: x.flip(1, -1),
    "Repeat": lambda x: x.repeat(1, 2, 1, 1),
    "Expand": lambda x: x.expand(3, *SHAPE),
    "Unsqueeze": lambda x: x.unsqueeze(1),
    "Unbind": lambda x: x.unbind(1)[3],
    "Split": lambda x: x.chunk(3, -3)[1],
    "SplitWithSizes": lambda x: x.split([1, 5], 1)[1],
    "Clone": lambda x: x.clone(),
}


def traced(function, *tensors: torch.Tensor):
    """Run a function on numbers of these tensors' shapes; return the output, which knows its operation."""
    return function(*(torch.rand(x.shape, requires_grad=True) * 1 for x in tensors))


def carried(function, *inputs: torch.Tensor, labels: Labels | None = None) -> torch.Tensor:
    output = traced(function, *inputs)
    labels = labels or Labels()
    return carry(output.grad_fn, inputs, [None] * len(inputs), labels)[output.output_nr]


def stuck(labels: Labels) -> dict[int, str]:
    """Why labels must stay."""
    units, reasons = labels.units()
    return {label: reasons[unit] for label, unit in enumerate(units.tolist()) if unit in reasons}


def partition(labels: Labels) -> set[frozenset[int]]:
    units, _ = labels.units()
    return {frozenset(np.flatnonzero(units == unit).tolist()) for unit in units}


class TestMoves:
    @pytest.mark.parametrize("name", MOVES)
    def test_labels_move_as_values_do(self, name):
        x = torch.arange(192).reshape(SHAPE)
        assert operation_name(traced(MOVES[name], x).grad_fn) == name
        assert torch.equal(carried(MOVES[name], x), MOVES[name](x))

    def test_padding_puts_in_constants(self):
        x = torch.arange(192).reshape(SHAPE)
        y = carried(lambda x: functional.pad(x, (0, 0, 1, 0, 2, -1)), x)
        assert torch.equal(y, functional.pad(x, (0, 0, 1, 0, 2, -1), value=PADDING))

    def test_concatenation_with_constants_in_any_place(self):
        x, y = torch.arange(6).reshape(2, 3), torch.arange(6, 10).reshape(2, 2)
        output = traced(lambda x, y: torch.cat([x, torch.zeros(2, 2), y], -1), x, y)
        (moved,) = carry(output.grad_fn, [x, None, y], [None] * 3, Labels())
        assert torch.equal(moved, torch.cat([x, torch.full((2, 2), FIXED), y], -1))
        assert torch.equal(carried(lambda x, y: torch.stack([x, y], 1), x, x + 6), torch.stack([x, x + 6], 1))


class TestJoins:
    @given(st.data())
    def test_units_are_what_chains_of_joins_connect(self, data):
        labels = Labels()
        labels.fresh(8)
        pairs = data.draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=10))
        expected = [{i} for i in range(8)]
        for a, b in pairs:
            labels.join(torch.tensor([a, FIXED]), torch.tensor([b, a]))
            merged = next(s for s in expected if a in s) | next(s for s in expected if b in s)
            expected = [s for s in expected if not s & merged] + [merged]
        assert partition(labels) == {frozenset(s) for s in expected}

    def test_sums_join_their_terms_with_broadcasting(self):
        labels = Labels()
        x, y = spread(labels.fresh(3), 1, (2, 3, 4)), labels.fresh(3)[:, None]
        assert torch.equal(carried(torch.add, x, y, labels=labels), y.expand(2, 3, 4))
        assert partition(labels) == {frozenset(p) for p in ((0, 3), (1, 4), (2, 5))}

    def test_gates_join_the_halves(self):
        labels = Labels()
        carried(functional.glu, labels.fresh(6).expand(2, 6), labels=labels)
        assert partition(labels) == {frozenset(p) for p in ((0, 3), (1, 4), (2, 5))}

    def test_values_of_fixed_number_hold_the_units_only_along_their_axis(self):
        labels = Labels()
        x = spread(labels.fresh(3), 1, (2, 3, 4))
        assert torch.equal(carried(torch.mul, x, torch.full((2, 1, 4), FIXED), labels=labels), x)
        assert stuck(labels) == {}
        assert (carried(torch.mul, x, torch.full((2, 3, 1), FIXED), labels=labels) == FIXED).all()
        assert stuck(labels) == dict.fromkeys(range(3), "Mul joins them with channels that stay")

    def test_a_view_that_splits_channels_takes_them_from_every_part(self):
        labels = Labels()
        carried(lambda x: x.view(2, 5, 3, 2), spread(labels.fresh(6), 2, (2, 5, 6)), labels=labels)
        assert partition(labels) == {frozenset({0, 2, 4}), frozenset({1, 3, 5})}

    def test_a_view_that_splits_other_axes_joins_nothing(self):
        labels = Labels()
        carried(lambda x: x.view(2, 5, 6), spread(labels.fresh(6), 1, (10, 6)), labels=labels)
        assert len(partition(labels)) == 6


class TestMixes:
    @pytest.mark.parametrize(
        ("function", "name"),
        [
            (lambda x: x.mean(1), "Mean"),
            (lambda x: x.sum(), "Sum"),
            (lambda x: x.amax((1, 2)), "Amax"),
            (lambda x: x.max(1)[0], "Max"),
            (lambda x: x.norm(dim=1), "LinalgVectorNorm"),
            (lambda x: x.softmax(1), "Softmax"),
            (lambda x: x.log_softmax(1), "LogSoftmax"),
            (lambda x: x.cumsum(1), "Cumsum"),
            (lambda x: functional.layer_norm(x, (3, 4, 4)), "NativeLayerNorm"),
        ],
    )
    def test_what_is_mixed_stays(self, function, name):
        labels = Labels()
        x = spread(labels.fresh(3), 1, (2, 3, 4, 4))
        output = traced(function, x)
        outputs = carry(output.grad_fn, [x], [None], labels)
        assert (outputs[0] < 0).all()
        assert stuck(labels) == dict.fromkeys(range(3), f"{operation_name(output.grad_fn)} mixes them")

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: x.mean((2, 3)),
            lambda x: x.amax(-1, keepdim=True),
            lambda x: x.softmax(-1),
            lambda x: functional.max_pool2d(x, 2),
            lambda x: functional.avg_pool2d(x, 3, 1),
            lambda x: functional.adaptive_max_pool2d(x, 1),
            lambda x: functional.interpolate(x, scale_factor=2),
            lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect"),
            torch.tanh,
        ],
    )
    def test_positions_may_be_mixed(self, function):
        labels = Labels()
        x = spread(labels.fresh(3), 1, (2, 3, 4, 4))
        output = carried(function, x, labels=labels)
        assert stuck(labels) == {}
        line = along(output, 1)
        assert line is not None
        assert line.tolist() == [0, 1, 2]

    def test_products_carry_what_they_do_not_sum_over(self):
        labels = Labels()
        x = spread(labels.fresh(3), 2, (2, 5, 3))
        fixed = torch.full((2, 4, 5), FIXED)
        assert torch.equal(carried(torch.bmm, fixed, x, labels=labels), x[:, :4])
        assert stuck(labels) == {}
        assert (carried(torch.bmm, x, torch.full((2, 3, 4), FIXED), labels=labels) == FIXED).all()
        assert stuck(labels) == dict.fromkeys(range(3), "Bmm, outside a layer, mixes them")

    def test_two_factors_with_units_hold_each_other(self):
        labels = Labels()
        x, y = spread(labels.fresh(3), 2, (2, 5, 3)), spread(labels.fresh(3), 1, (2, 3, 5))
        carried(torch.bmm, x, y, labels=labels)
        assert len(stuck(labels)) == 6

    def test_unknown_operations_hold_what_they_read(self):
        labels = Labels()
        carried(lambda x: functional.unfold(x, 2), spread(labels.fresh(3), 1, (2, 3, 4, 4)), labels=labels)
        assert stuck(labels) == dict.fromkeys(range(3), "Im2Col, outside a layer, reads them")

    def test_a_convolution_outside_a_layer_is_not_taken_for_a_product_of_entries(self):
        labels = Labels()
        x, weight = spread(labels.fresh(3), 1, (3, 3, 4, 4)), torch.full((3, 3, 1, 1), FIXED)
        output = traced(functional.conv2d, x, weight)
        carry(output.grad_fn, [x, weight, None], [None, "weight", None], labels)
        assert stuck(labels) == dict.fromkeys(range(3), "Convolution, outside a layer, reads them")
