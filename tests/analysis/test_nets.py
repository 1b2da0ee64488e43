from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ellq.analysis import dataset_sources
from ellq.analysis.datasets import load
from ellq.analysis.evaluate import accuracy
from ellq.analysis.nets import (
    PRETRAINED_MEAN,
    PRETRAINED_STD,
    ZeroPadShortcut,
    cifar_resnet,
    mlp,
    pretrained,
    small_conv,
    vgg16_cifar10,
)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No data folder and an empty cache."""
    monkeypatch.delenv("ELLQ_DATA", raising=False)
    monkeypatch.setattr(dataset_sources, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path


def parameters(net: nn.Module) -> int:
    return sum(tensor.numel() for tensor in net.parameters())


class TestMlp:
    def test_has_the_layers_asked_for(self):
        net = mlp(64, 32, 16, outputs=10, activation="tanh")
        kinds = [type(layer) for layer in net]
        assert kinds == [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
        assert parameters(net) == 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
        assert net(torch.zeros(3, 1, 8, 8)).shape == (3, 10)

    def test_without_hidden_layers_is_linear(self):
        assert [type(layer) for layer in mlp(4, outputs=2)] == [nn.Flatten, nn.Linear]

    @pytest.mark.parametrize("name", ["relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid"])
    def test_knows_its_activations(self, name):
        assert mlp(4, 3, outputs=2, activation=name)(torch.zeros(1, 4)).isfinite().all()

    def test_refuses_what_it_cannot_build(self):
        with pytest.raises(ValueError, match="activation='swish' is unknown"):
            mlp(4, 3, outputs=2, activation="swish")
        with pytest.raises(ValueError, match="inputs=0 is below 1"):
            mlp(0, outputs=2)
        with pytest.raises(ValueError, match="hidden=0 is below 1"):
            mlp(4, 3, 0, outputs=2)


class TestSmallConv:
    def test_has_the_layers_asked_for(self):
        net = small_conv(1, 28, 10)
        kinds = [type(layer) for layer in net]
        pool, head = [nn.AvgPool2d, nn.Flatten], [nn.Linear, nn.ReLU, nn.Linear]
        assert kinds == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, *pool, *head]
        assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)

    @pytest.mark.parametrize(("size", "widths"), [(2, (4,)), (7, (3, 5)), (8, (2, 3, 4))])
    def test_fits_any_size_and_widths(self, size, widths):
        net = small_conv(3, size, 5, widths=widths, hidden=6)
        assert net(torch.zeros(2, 3, size, size)).shape == (2, 5)

    def test_refuses_what_it_cannot_build(self):
        with pytest.raises(ValueError, match="size=1 leaves nothing"):
            small_conv(1, 1, 10)
        with pytest.raises(ValueError, match="widths is empty"):
            small_conv(1, 8, 10, widths=())
        with pytest.raises(ValueError, match="widths=0 is below 1"):
            small_conv(1, 8, 10, widths=(4, 0))


class TestCifarResnet:
    # He et al. 2015, Table 6: 0.27 M, 0.46 M, 0.66 M parameters.
    @pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586)])
    def test_has_the_published_number_of_parameters(self, depth, count):
        assert parameters(cifar_resnet(depth)) == count

    def test_depth_counts_its_weight_layers(self):
        layers = [module for module in cifar_resnet(14).modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        assert len(layers) == 14

    def test_halves_the_image_twice(self):
        net = cifar_resnet(8, outputs=7).eval()
        sizes = {}
        for name in ("layer1", "layer2", "layer3"):
            layer = net.get_submodule(name)
            layer.register_forward_hook(lambda _, __, out, name=name: sizes.update({name: tuple(out.shape[1:])}))
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
        assert sizes == {"layer1": (16, 32, 32), "layer2": (32, 16, 16), "layer3": (64, 8, 8)}

    def test_shortcut_subsamples_and_pads_with_zeros(self):
        x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
        y = ZeroPadShortcut(1, 2)(x)
        assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
        assert not y[:, [0, 3, 4]].any()
        assert repr(ZeroPadShortcut(1, 2)) == "ZeroPadShortcut(before=1, after=2)"

    @pytest.mark.parametrize("depth", [2, 0, -4, 18, 21])
    def test_refuses_other_depths(self, depth):
        with pytest.raises(ValueError, match=rf"depth={depth} is not 6n \+ 2"):
            cifar_resnet(depth)


class TestVgg16:
    def test_has_the_published_number_of_parameters(self):
        assert parameters(vgg16_cifar10()) == 14_987_722  # counted in test_flops.py at other widths

    def test_has_the_widths_asked_for(self):
        widths = tuple(range(2, 16))
        net = vgg16_cifar10(widths, outputs=7)
        convs = [layer for layer in net.features if isinstance(layer, nn.Conv2d)]
        assert tuple(conv.out_channels for conv in convs) == widths[:13]
        assert [layer.bias for layer in convs] == [None] * 13
        assert net.classifier[0].weight.shape == (15, 14)
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)

    def test_refuses_other_numbers_of_widths(self):
        with pytest.raises(ValueError, match=r"widths has 13 entries\. Pass 14"):
            vgg16_cifar10([8] * 13)
        with pytest.raises(ValueError, match="widths=0 is below 1"):
            vgg16_cifar10([8] * 13 + [0])


class TestPretrained:
    def test_reads_the_file_in_eval_mode(self, alone):
        (alone / "cifar10-resnets").mkdir()
        net = cifar_resnet(20)
        # The published files hold no counter of batches.
        state = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}
        save_file(state, alone / "cifar10-resnets" / "resnet20.safetensors")
        read = pretrained("resnet20", alone)
        assert not any(module.training for module in read.modules())
        x = torch.ones(1, 3, 32, 32)
        assert torch.equal(read(x), net.eval()(x))

    def test_names_every_place_where_a_missing_file_was_sought(self, alone):
        with pytest.raises(FileNotFoundError, match=r"cache/cifar10-resnets/resnet32.safetensors.*Set ELLQ_DATA"):
            pretrained("resnet32")
        with pytest.raises(FileNotFoundError, match=f"{alone}/cifar10-resnets/resnet32.*cache"):
            pretrained("resnet32", alone)

    def test_refuses_unknown_names_and_wrong_files(self, alone):
        with pytest.raises(ValueError, match=r"'resnet50' is not a pretrained net. Choose resnet20"):
            pretrained("resnet50", alone)
        (alone / "cifar10-resnets").mkdir()
        path = alone / "cifar10-resnets" / "resnet20.safetensors"
        path.write_bytes(b"nonsense")
        with pytest.raises(ValueError, match=r"resnet20.safetensors' does not hold the weights of resnet20"):
            pretrained("resnet20", alone)
        save_file(cifar_resnet(8).state_dict(), path)
        with pytest.raises(ValueError, match=r"resnet20.safetensors' does not hold the weights of resnet20"):
            pretrained("resnet20", alone)

    # The reported accuracies are 91.7 % and 92.6 %: github.com/akamaster/pytorch_resnet_cifar10. A different
    # order of summation may flip a tie or two.
    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "expected"), [("resnet20", 0.9173), ("resnet32", 0.9263)])
    def test_has_the_reported_accuracy(self, name, expected):
        try:
            net, data = pretrained(name), load("cifar10", "test", download=False)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        inputs = data.inputs(mean=PRETRAINED_MEAN, std=PRETRAINED_STD)
        assert accuracy(net, inputs, data.labels) == pytest.approx(expected, abs=3e-4)
