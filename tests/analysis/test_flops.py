from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ellq.analysis import cost
from ellq.analysis.flops import layer_flops, total_flops
from ellq.analysis.nets import cifar_resnet, vgg16_cifar10


class Functions(nn.Module):
    """Computes products in its own forward, calls a layer twice and a ReLU as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.unused = nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        x = torch.relu(self.layer(self.layer(x))) * self.scale
        return x @ x.mT


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(4, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)

    def forward(self, x):
        x = self.cells(x)[0]
        return self.attention(x, x, x)[0]


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net


ZOO = {
    "functions": (Functions, (3, 5, 6)),
    "recurrent": (Recurrent, (3, 5, 4)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (3, 5, 8)),
    "resnet": (lambda: cifar_resnet(8), (2, 3, 8, 8)),
    "tied": (tied, (3, 4)),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(4, 6)), (3, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (3, 4, 5, 5)),
}


# The widths are those the authors' notebook logs when the budget is first met; the FLOPs and parameters of the full
# net are logged to the last digit, those of the others as 48.8 % and 3.70 M, 24.6 % and 1.84 M.
FULL = 627_880_970
LOGGED = {
    "first at most 50 %": (
        (25, 57, 92, 115, 230, 230, 207, 372, 196, 176, 196, 158, 81, 372),
        ("48.8", "3.70"),
        (306_320_638, 3_701_870),
    ),
    "first at most 25 %": (
        (19, 45, 65, 82, 167, 150, 150, 243, 142, 127, 127, 127, 72, 372),
        ("24.6", "1.84"),
        (154_580_298, 1_841_889),
    ),
}


class TestPublishedCounts:
    def test_at_full_width(self):
        table = layer_flops(vgg16_cifar10(), torch.zeros(1, 3, 32, 32), convention="chee2021")
        assert (table["flops"].sum(), table["parameters"].sum()) == (FULL, 14_987_722)

    @pytest.mark.parametrize(("widths", "published", "exact"), LOGGED.values(), ids=LOGGED)
    def test_at_the_logged_widths(self, widths, published, exact):
        table = layer_flops(vgg16_cifar10(widths), torch.zeros(1, 3, 32, 32), convention="chee2021")
        flops, parameters = int(table["flops"].sum()), int(table["parameters"].sum())
        assert (f"{100 * flops / FULL:.1f}", f"{parameters / 1e6:.2f}") == published
        assert (flops, parameters) == exact

    def test_12_percent_are_reached_at_the_last_logged_widths(self):
        widths = (17, 32, 52, 58, 121, 87, 121, 114, 102, 102, 81, 102, 57, 334)
        flops = total_flops(vgg16_cifar10(widths), torch.zeros(1, 3, 32, 32), convention="chee2021")
        assert 0.12 < flops / FULL <= 0.125


@pytest.mark.parametrize(("build", "shape"), ZOO.values(), ids=ZOO)
class TestTheWholeZoo:
    def test_rows_add_up_to_the_cost_of_the_model(self, build, shape):
        net, example = build(), torch.ones(shape)
        table = layer_flops(net, example)
        whole = cost(net, example)
        assert (table["flops"].sum(), table["parameters"].sum()) == (whole.flops, whole.parameters)
        assert total_flops(net, example) == whole.flops
        assert table["layer"].is_unique
        assert (table["flops"] >= 0).all()

    @pytest.mark.parametrize("convention", ["2mac", "chee2021"])
    def test_does_not_depend_on_the_batch(self, build, shape, convention):
        net, example = build(), torch.ones(shape)
        once, twice = (layer_flops(net, x, convention=convention) for x in (example, torch.cat([example, example])))
        assert once.equals(twice)

    def test_leaves_the_model_alone(self, build, shape):
        net = build().train()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        layer_flops(net, torch.ones(shape))
        with pytest.raises((RuntimeError, AssertionError)):
            layer_flops(net, torch.ones(2, 1))
        assert all(module.training for module in net.modules())
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_rows_are_the_layers_in_running_order():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    table = layer_flops(net, torch.zeros(5, 3, 4, 4))
    assert table.to_numpy().tolist() == [
        ["0", "Conv2d", 1, (3, 4, 4), (4, 4, 4), 2 * 27 * 4 * 16, 27 * 4 + 4],
        ["1", "ReLU", 1, (4, 4, 4), (4, 4, 4), 0, 0],
        ["2", "Flatten", 1, (4, 4, 4), (64,), 0, 0],
        ["3", "Linear", 1, (64,), (2,), 2 * 64 * 2, 64 * 2 + 2],
    ]


def test_what_forward_computes_itself_is_in_the_row_of_its_module():
    table = layer_flops(Functions(), torch.ones(3, 5, 6)).set_index("layer")
    assert list(table.index) == ["", "layer", "unused"]
    assert table["flops"].tolist() == [2 * 5 * 6 * 5, 2 * (2 * 5 * 6 * 6), 0]
    assert table["calls"].tolist() == [1, 2, 0]
    assert table["parameters"].tolist() == [6, 42, 9]


# By hand, for one example of shape (4, 8, 8) or (4,).
@pytest.mark.parametrize(
    ("layer", "flops"),
    [
        (nn.Conv2d(4, 6, 3), 2 * 36 * 6 * 36 + 6 * 36),
        (nn.Conv2d(4, 6, 3, bias=False, groups=2), 2 * 18 * 6 * 36),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), 2 * 4 * 64 * 6 * 4 + 6 * 256),
        (nn.BatchNorm2d(4), 2 * 256),
        (nn.GroupNorm(2, 4), 0),
        (nn.ReLU(), 256),
        (nn.ReLU6(), 0),
        (nn.MaxPool2d(2), 4 * 4 * 16),
        (nn.AvgPool2d((4, 2)), 8 * 4 * 8),
        (nn.AdaptiveAvgPool2d(1), 256),
        (nn.Sequential(nn.Flatten(), nn.MaxPool1d(4)), 4 * 64),
        (nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), 2 * 256 * 3 + 3),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256)), 0),
        (nn.Sequential(nn.Flatten(1, 2), nn.ReLU()), 256),
    ],
    ids=str,
)
def test_the_authors_count_modules(layer, flops):
    assert total_flops(layer, torch.zeros(3, 4, 8, 8), convention="chee2021") == flops


def test_the_authors_do_not_count_functions():
    # Two calls of a Linear with bias; neither the ReLU nor the product.
    assert total_flops(Functions(), torch.ones(3, 5, 6), convention="chee2021") == 2 * (2 * 5 * 36 + 5 * 6)


def test_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match=r"convention='mac' is unknown\. Choose one of 2mac, chee2021"):
        layer_flops(nn.Linear(2, 2), torch.zeros(1, 2), convention="mac")
    with pytest.raises(ValueError, match="at least one input"):
        layer_flops(nn.Linear(2, 2), torch.zeros(0, 2))
