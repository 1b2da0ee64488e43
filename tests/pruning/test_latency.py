from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ellq.pruning import latency
from ellq.pruning.coupling import ChannelGroup, Coupling, Member
from ellq.pruning.latency import LatencyTable, Timings, latency_model, measure_latencies


def rows(*shape: int) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape)


class Net(nn.Module):
    """A convolution, a grouped one, then the same Linear twice on tokens, and a last one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 16, 3, groups=4)
        self.token = nn.Linear(16, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        x = self.grouped(self.conv(x)).flatten(2).mT
        return self.last(self.token(self.token(x))).sum(1)


GROUPS = Coupling(
    (ChannelGroup("conv", 4, (Member("conv", "out", rows(4, 2)), Member("grouped", "both", rows(4, 4), rows(4, 2)))),),
    {},
)
EXAMPLE = torch.zeros(2, 2, 5, 5)


@pytest.fixture
def by_formula(monkeypatch):
    """Latency is what one says it is: bilinear in the widths, so that interpolation is exact."""
    timed = []

    def seconds(self, inputs, outputs, batch_size, threads):
        timed.append((self.name, inputs, outputs))
        return 1.0 + 2 * inputs + 3 * outputs + inputs * outputs

    monkeypatch.setattr(latency._Layer, "seconds", seconds)
    return timed


class TestTable:
    def test_holds_every_layer_at_its_grid(self, by_formula):
        table = measure_latencies(Net(), GROUPS, EXAMPLE, points=3)
        grids = [(t.inputs, t.outputs) for t in table.layers.values()]
        # Outputs by even shares; whole groups; the others dense.
        assert grids == [((2,), (1, 4, 8)), ((8,), (4, 8, 16)), ((16,), (16,)), ((16,), (3,))]

    def test_equal_layers_are_timed_once(self, by_formula):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        table = measure_latencies(net, Coupling((), {}), torch.zeros(1, 4))
        assert len(table.layers) == len(by_formula) == 2
        assert latency_model(net, Coupling((), {}), torch.zeros(1, 4), table=table).dense == 3 * (1 + 8 + 12 + 16)

    def test_comes_back_from_json_bit_for_bit(self):
        table = measure_latencies(nn.Linear(3, 2), Coupling((), {}), torch.zeros(1, 3), batch_size=4)
        assert LatencyTable.from_json(table.to_json()) == table
        assert json.loads(table.to_json())["batch_size"] == 4

    def test_what_is_known_is_not_timed_again(self, by_formula):
        table = measure_latencies(Net(), GROUPS, EXAMPLE)
        by_formula.clear()
        assert measure_latencies(Net(), GROUPS, EXAMPLE, known=table) == table
        assert not by_formula

    def test_times_real_layers_at_any_width(self):
        table = measure_latencies(Net(), GROUPS, EXAMPLE, batch_size=3, points=2)
        seconds = [s for t in table.layers.values() for row in t.seconds for s in row]
        assert all(0 < s < 1 for s in seconds)

    def test_a_larger_layer_takes_longer(self):
        net = nn.Linear(1024, 1024)
        group = ChannelGroup("", 1024, (Member("", "in", rows(1024, 1)),))
        (timing,) = measure_latencies(
            net, Coupling((group,), {}), torch.zeros(1, 1024), batch_size=64, points=2
        ).layers.values()
        assert timing.inputs == (1, 1024)
        assert timing.seconds[0][0] < timing.seconds[1][0]


class TestModel:
    def test_is_exact_where_latency_is_bilinear(self, by_formula):
        net = nn.Sequential(nn.Linear(3, 10), nn.Linear(10, 7), nn.Linear(7, 2))
        first = ChannelGroup("0", 10, (Member("0", "out", rows(10, 1)), Member("1", "in", rows(10, 1))))
        second = ChannelGroup("1", 7, (Member("1", "out", rows(7, 1)), Member("2", "in", rows(7, 1))))
        model = latency_model(net, Coupling((first, second), {}), torch.zeros(1, 3))

        def cost(*widths):
            return sum(1 + 2 * a + 3 * b + a * b for a, b in zip((3, *widths), (*widths, 2), strict=True))

        for widths in [(10, 7), (1, 1), (4, 6), (9, 2), (10, 1)]:
            assert model.cost(dict(zip("01", widths, strict=True))) == pytest.approx(cost(*widths), rel=1e-12)
        assert model.quantity == "seconds"

    def test_calls_add_up_and_grouped_convolutions_follow_their_outputs(self, by_formula):
        model = latency_model(Net(), GROUPS, EXAMPLE)
        dense = (1 + 4 + 24 + 16) + (1 + 16 + 48 + 128) + 2 * (1 + 32 + 48 + 256) + (1 + 32 + 9 + 48)
        assert model.dense == dense
        fewer = (1 + 4 + 12 + 8) + (1 + 16 + 24 + 64)
        assert model.cost({"conv": 2}) == dense - 45 - 193 + fewer

    def test_a_cut_layer_that_is_called_twice_counts_twice(self, by_formula):
        class Twice(nn.Sequential):
            def forward(self, x):
                return self[2](self[1](self[1](self[0](x))))

        net = Twice(nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2))
        sides = (("0", "out"), ("1", "in"), ("1", "out"), ("2", "in"))
        group = ChannelGroup("0", 6, tuple(Member(name, side, rows(6, 1)) for name, side in sides))
        model = latency_model(net, Coupling((group,), {}), torch.zeros(1, 3))
        assert model.cost({"0": 3}) == (1 + 6 + 9 + 9) + 2 * (1 + 6 + 9 + 9) + (1 + 6 + 6 + 6)

    def test_takes_what_the_table_says(self):
        group = ChannelGroup("0", 8, (Member("0", "out", rows(8, 1)), Member("1", "in", rows(8, 1))))
        net, example = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2)), torch.zeros(1, 2)
        coupling = Coupling((group,), {})
        measured = measure_latencies(net, coupling, example, points=3)
        first, second = measured.layers
        table = replace(
            measured,
            layers={
                first: Timings((2,), (1, 4, 8), ((1.0, 2.0, 10.0),)),
                second: Timings((1, 4, 8), (2,), ((0.0,), (1.0,), (1.0,))),
            },
        )
        model = latency_model(net, coupling, example, table=LatencyTable.from_json(table.to_json()))
        assert [model.cost({"0": width}) for width in (8, 6, 4, 1)] == [11.0, 7.0, 3.0, 1.0]
        assert model.cost({"0": 3}) == pytest.approx(1 + 2 / 3 + 2 / 3, rel=1e-15)


class TestRefuses:
    def test_tables_of_other_models_and_settings(self):
        table = LatencyTable(1, 1, {})
        with pytest.raises(ValueError, match="table has no latencies of 'conv'"):
            latency_model(Net(), GROUPS, EXAMPLE, table=table)
        with pytest.raises(ValueError, match="known was timed with batch_size=1 and threads=1, not 2 and"):
            measure_latencies(Net(), GROUPS, EXAMPLE, batch_size=2, known=table)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"format": "ellq.plan", "version": 1}', '{"format": "ellq.latency", "version": 9}']
    )
    def test_other_texts(self, text):
        with pytest.raises(ValueError, match="no latency table of version 1"):
            LatencyTable.from_json(text)

    @pytest.mark.parametrize("setting", [{"batch_size": 0}, {"threads": 0}, {"points": 1}])
    def test_numbers_out_of_range(self, setting):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}="):
            measure_latencies(Net(), GROUPS, EXAMPLE, **setting)


def test_timing_leaves_model_threads_and_random_state_alone():
    net = Net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    measure_latencies(net, GROUPS, EXAMPLE, threads=2, points=2)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert torch.is_grad_enabled()
