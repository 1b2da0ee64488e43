from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from ellq.pruning import HiddenLayer, hidden_layers
from pruned_nets import assert_unchanged, mlp, snapshot


class Base(nn.Module):
    def __init__(self, first=None, second=None):
        super().__init__()
        self.first = first or nn.Linear(4, 6)
        self.second = second or nn.Linear(6, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Residual(Base):
    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.second(hidden).sum() + hidden.sum()


class ResidualBefore(Base):
    def forward(self, x):
        hidden = self.first(x)
        return self.second(torch.relu(hidden)), hidden


class Output(Base):
    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.second(hidden), hidden


class TwoReaders(Base):
    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.second(hidden) + functional.linear(hidden, self.first.weight.t())


class CalledTwice(Base):
    def forward(self, x):
        return self.second(torch.relu(self.first(self.second(torch.relu(self.first(x))))))


class ConsumerTwice(Base):
    def forward(self, x):
        return self.second(torch.relu(self.first(x))) + self.second(torch.ones(1, 6))


class Decodes(Base):
    """Reads the producer's weight in forward, as a tied autoencoder does."""

    def forward(self, x):
        code = self.second(torch.relu(self.first(x)))
        return functional.linear(torch.relu(functional.linear(code, self.first.weight)), self.first.weight.t())


class Rescales(Base):
    def forward(self, x):
        return self.second(torch.relu(self.first(x))) * self.second.weight.norm()


class Branches(Base):
    def forward(self, x):
        if x.sum() > 0:
            return self.second(torch.relu(self.first(x)))
        return x


class Auxiliary(Base):
    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return (self.second(hidden), hidden.sum()) if self.training else self.second(hidden)


class AuxiliaryInEval(Base):
    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.second(hidden) if self.training else (self.second(hidden), hidden.sum())


class Reshapes(Base):
    def forward(self, x):
        return self.second(torch.relu(self.first(x)).reshape(-1, 6))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Remembers(Base):
    def __init__(self):
        super().__init__()
        self.seen = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen = torch.relu(self.first(x))
        return self.second(input=self.seen)


class Tied(Base):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        self.second.weight = self.first.weight


class TiedElsewhere(Base):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.first.weight = self.embedding.weight

    def forward(self, x):
        return super().forward(self.embedding(x))


FOUND = [HiddenLayer("first", "second", 6)]


class TestFinds:
    def test_every_hidden_layer_of_a_sequential_in_order(self):
        assert hidden_layers(mlp(4, 5, 6, 2)) == [HiddenLayer("0", "2", 5), HiddenLayer("2", "4", 6)]

    def test_nested_sequentials_and_modules_in_modules(self):
        net = nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), nn.Sequential(nn.Linear(5, 4), Base()))
        assert hidden_layers(net) == [
            HiddenLayer("0.0", "1.0", 5),
            HiddenLayer("1.0", "1.1.first", 4),
            HiddenLayer("1.1.first", "1.1.second", 6),
        ]

    def test_two_linears_with_nothing_between(self):
        assert hidden_layers(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))) == [HiddenLayer("0", "1", 5)]

    @pytest.mark.parametrize(
        "function",
        [
            "relu",
            "relu6",
            "leaky_relu",
            "elu",
            "celu",
            "selu",
            "gelu",
            "silu",
            "mish",
            "sigmoid",
            "logsigmoid",
            "tanh",
            "softplus",
            "softsign",
            "hardtanh",
            "hardswish",
            "hardsigmoid",
            "dropout",
        ],
    )
    def test_functions_called_in_forward(self, function):
        class Functional(Base):
            def forward(self, x):
                return self.second(getattr(functional, function)(self.first(x)))

        assert hidden_layers(Functional()) == FOUND

    @pytest.mark.parametrize(
        "call",
        [torch.relu, torch.sigmoid, torch.tanh, lambda h: h.relu(), lambda h: h.tanh_(), lambda h: h.contiguous()],
    )
    def test_torch_functions_and_methods(self, call):
        class Method(Base):
            def forward(self, x):
                return self.second(call(self.first(x)))

        assert hidden_layers(Method()) == FOUND

    @pytest.mark.parametrize(("slopes", "count"), [(1, 1), (6, 0)])
    def test_prelu_only_with_one_slope_for_all(self, slopes, count):
        assert len(hidden_layers(nn.Sequential(nn.Linear(4, 6), nn.PReLU(slopes), nn.Linear(6, 2)))) == count

    def test_a_consumer_called_by_keyword(self):
        assert hidden_layers(Remembers()) == FOUND


class TestLeavesOut:
    @pytest.mark.parametrize(
        "kind",
        [
            Residual,
            ResidualBefore,
            Output,
            TwoReaders,
            CalledTwice,
            ConsumerTwice,
            Decodes,
            Rescales,
            Auxiliary,
            AuxiliaryInEval,
            Reshapes,
            Tied,
            TiedElsewhere,
        ],
    )
    def test_units_that_something_else_depends_on(self, kind):
        net = kind()
        assert hidden_layers(net.train()) == []
        assert hidden_layers(net.eval()) == []

    @pytest.mark.parametrize("layer", [0, 2])
    @pytest.mark.parametrize("change", [parametrizations.weight_norm, parametrizations.orthogonal])
    def test_parametrised_layers(self, layer, change):
        net = mlp(4, 6, 3)
        change(net[layer])
        assert hidden_layers(net) == []

    def test_subclasses(self):
        assert hidden_layers(Base(first=Doubling(4, 6))) == []
        assert hidden_layers(Base(second=Doubling(6, 4))) == []

    @pytest.mark.parametrize("between", [nn.LayerNorm(6), nn.BatchNorm1d(6), nn.Softmax(-1), nn.GLU(), nn.Flatten()])
    def test_what_mixes_units_or_belongs_to_them(self, between):
        assert hidden_layers(nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 2))) == []

    def test_one_layer_used_at_two_places(self):
        layer = nn.Linear(4, 4)
        assert hidden_layers(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2))) == []

    def test_the_only_layer(self):
        assert hidden_layers(nn.Linear(4, 4)) == []


def test_control_flow_that_depends_on_data_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"cannot be traced \(.*control flow.*\). Prune a submodule"):
        hidden_layers(Branches())


def test_only_looks():
    net = Remembers()
    before = snapshot(net)
    hidden_layers(net)
    assert_unchanged(net, before)
    assert net.seen is None
