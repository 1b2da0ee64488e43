"""Flows measured on models: against hooks and loops by hand, on branches, masks, modes and unfit models."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from ellq.analysis import (
    FlowMonitor,
    GradientMonitor,
    cifar_resnet,
    flow_sums,
    flows,
    gradient_distance_as_released,
    gradient_flow,
    gradient_flow_as_released,
    layer_graph,
    mlp,
    released_pairs,
    small_conv,
)
from ellq.analysis.flows import KINDS
from ellq.theory import (
    FewSamplesWarning,
    absolute_correlation,
    copula_information,
    gaussian_information,
    linear_cka,
    signed_correlation,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def states(model):
    return [(m.training, None if p.grad is None else p.grad.clone()) for m in model.modules() for p in m.parameters()]


class Residual(nn.Module):
    """conv1 → (conv2 + shortcut) → conv3, with a branch that depends on the data and in-place activations."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.downsample = nn.Conv2d(4, 4, 1)
        self.conv3 = nn.Conv2d(4, 5, 3, padding=1)
        self.fc = nn.Linear(5, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        y = self.conv2(x)
        y += self.downsample(x)
        y = self.relu(y)
        if float(y.detach().sum()) < 0:  # a branch no symbolic tracer can follow
            raise AssertionError
        return self.fc(self.relu(self.conv3(y)).amax((2, 3)))


# --- who reads whom -------------------------------------------------------------------------------------------------


def test_a_chain_has_each_layer_with_the_next():
    net = small_conv(1, 8, 10)
    assert layer_graph(net, torch.randn(2, 1, 8, 8)).pairs == (("0", "2"), ("2", "6"), ("6", "8"))
    assert released_pairs(net) == (("0", "2"), ("2", "6"), ("6", "8"))


def test_residual_paths_are_followed_and_by_the_released_pairs_are_not():
    net = Residual()
    graph = layer_graph(net, torch.randn(2, 1, 8, 8))
    assert graph.sources["conv3"] == ("conv2", "downsample")
    assert graph.sources["downsample"] == ("conv1",)
    assert graph.pairs == (
        ("conv1", "conv2"),
        ("conv1", "downsample"),
        ("conv2", "conv3"),
        ("downsample", "conv3"),
        ("conv3", "fc"),
    )
    assert released_pairs(net) == (("conv1", "conv2"), ("conv2", "conv3"), ("conv3", "fc"))
    assert hooks_of(net) == 0


def test_identity_shortcuts_carry_every_earlier_block_of_a_resnet():
    pairs = layer_graph(cifar_resnet(8), torch.randn(2, 3, 32, 32)).pairs
    reads = [source for source, layer in pairs if layer == "linear"]
    assert reads == ["conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"]
    assert len(pairs) == 3 + 1 + 2 + 3 + 4


def test_views_slices_and_concatenations_are_followed():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            buffer = torch.empty(len(x), 8)
            buffer[:, :4] = a
            buffer[:, 4:] = b
            return self.c(buffer[:, :4] * 1) + self.d(torch.cat([b, x], 1)[:, :4])

    assert layer_graph(Split(), torch.randn(3, 4)).sources == {"a": (), "b": (), "c": ("a", "b"), "d": ("b",)}


def test_a_layer_that_runs_twice_is_left_out_and_ends_the_paths():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.c(self.b(self.b(self.a(x))))

    graph = layer_graph(Twice(), torch.randn(3, 4))
    assert graph.layers == ("a", "c")
    assert graph.pairs == ()
    with pytest.raises(ValueError, match="'b' is no Linear or convolutional layer that runs exactly once"):
        flows(Twice(), torch.randn(9, 4), pairs=[("a", "b")])
    with pytest.raises(ValueError, match="no two consecutive layers"):
        flows(Twice(), torch.randn(9, 4))


# --- values ---------------------------------------------------------------------------------------------------------


def outputs_by_hand(net, inputs, name):
    found = []
    hook = net.get_submodule(name).register_forward_hook(lambda m, i, o: found.append(o.detach().double().clone()))
    with torch.no_grad():
        net(inputs)
    hook.remove()
    (values,) = found
    return (values if values.ndim == 2 else values.mean((2, 3))).numpy()


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_flows_are_those_of_what_layers_give_before_an_in_place_activation(batch_size):
    net, x = Residual().eval(), torch.randn(60, 1, 8, 8)
    table = flows(net, x, kinds=KINDS, batch_size=batch_size)
    assert table.samples == 60
    for kind, flow in (
        ("signed", signed_correlation),
        ("absolute", absolute_correlation),
        ("cka", linear_cka),
        ("gaussian", gaussian_information),
        ("copula", copula_information),
    ):
        expected = [flow(*(outputs_by_hand(net, x, name) for name in pair)) for pair in table.pairs]
        np.testing.assert_allclose(table.vector(kind), expected, rtol=1e-4, atol=1e-5)


def test_the_released_flow_is_the_mean_of_correlations_of_raw_outputs():
    net, x = mlp(6, 5, 4, outputs=3), torch.randn(50, 6)
    got = flows(net, x, kinds="signed", pairs="released").vector("signed")
    a, b = outputs_by_hand(net, x, "1"), outputs_by_hand(net, x, "3")
    za, zb = ((v - v.mean(0)) / np.maximum(v.std(0), 1e-6) for v in (a, b))
    assert got[0] == pytest.approx((za.T @ zb / len(x)).mean(), abs=1e-6)


def test_activations_are_what_the_next_layer_receives():
    net, x = small_conv(1, 8, 10).eval(), torch.randn(40, 1, 8, 8)
    got = flows(net, x, at="activation").vector("absolute")
    with torch.no_grad():
        first = net[:2](x)
        second = net[:5](x)
        third, fourth = net[:8](x), net(x)
    maps = [first.mean((2, 3)), second.mean((2, 3)), third, fourth]
    # The second conv is read through pooling and Flatten: its flattened maps are averaged filter by filter.
    expected = [absolute_correlation(a.double(), b.double()) for a, b in pairwise(maps)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_positions_of_a_sequence_are_averaged():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), torch.randn(30, 7, 3)
    with torch.no_grad():
        a, b = net[0](x), net(x)
    expected = absolute_correlation(a.mean(1).double(), b.mean(1).double())
    assert flows(net, x).vector("absolute")[0] == pytest.approx(expected, rel=1e-5)


def test_sums_of_parts_merge_to_those_of_the_whole():
    net, x = small_conv(1, 8, 10, widths=(4, 5), hidden=6), torch.randn(50, 1, 8, 8)
    whole = flows(net, x, kinds=KINDS)
    merged = flow_sums(net, x[:13], hold=True).merge(flow_sums(net, x[13:], hold=True)).flows(KINDS)
    assert merged.samples == 50
    for kind in KINDS:
        np.testing.assert_allclose(merged.vector(kind), whole.vector(kind), rtol=1e-5)
    with pytest.raises(ValueError, match="Cannot merge"):
        flow_sums(net, x).merge(flow_sums(net, x, hold=True))
    with pytest.raises(ValueError, match="needs rows"):
        flow_sums(net, x).flows(("copula",))


def test_batches_of_a_loader_are_taken_as_they_come():
    net, x = mlp(4, 3, outputs=2), torch.randn(20, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(20)), batch_size=6)
    np.testing.assert_allclose(flows(net, loader).vector("absolute"), flows(net, x).vector("absolute"), rtol=1e-6)


def test_a_masked_layer_is_measured_as_masked_and_dead_units_count_as_zero():
    class Mask(nn.Module):
        def forward(self, weight):
            return weight * (torch.arange(len(weight)) < 2)[:, None]

    net, x = mlp(4, 4, outputs=3), torch.randn(40, 4)
    parametrize.register_parametrization(net[1], "weight", Mask())
    a, b = outputs_by_hand(net, x, "1"), outputs_by_hand(net, x, "3")
    got = FlowMonitor(x)(net)[0]
    assert got == pytest.approx(absolute_correlation(a[:, :2], b) / 2, rel=1e-4)
    for kind in KINDS:
        assert np.isfinite(FlowMonitor(x, kind)(net)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_layer_has_zero_flow(kind):
    net, x = mlp(4, 4, 4, outputs=3), torch.randn(40, 4)
    nn.init.zeros_(net[1].weight)
    np.testing.assert_array_equal(FlowMonitor(x, kind)(net), [0.0, 0.0])


def test_low_precision_models_are_measured():
    net, x = mlp(4, 8, outputs=3), torch.randn(200, 4)
    expected = FlowMonitor(x)(net)
    np.testing.assert_allclose(FlowMonitor(x)(net.to(torch.bfloat16)), expected, atol=0.02)


# --- nothing is changed ---------------------------------------------------------------------------------------------


def test_modes_gradients_statistics_and_hooks_are_as_they_were():
    net = cifar_resnet(8).train()
    net.layer1.eval()
    x, y = torch.randn(12, 3, 32, 32), torch.arange(12) % 10
    cross_entropy(net(x), y).backward()
    before, buffers = states(net), {name: b.clone() for name, b in net.named_buffers()}
    random = torch.get_rng_state()
    FlowMonitor(x)(net)
    GradientMonitor(x, y)(net)
    for (mode, gradient), (was, old) in zip(states(net), before, strict=True):
        assert mode == was
        torch.testing.assert_close(gradient, old, rtol=0, atol=0)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0)
    assert hooks_of(net) == 0
    assert torch.equal(torch.get_rng_state(), random)


def test_an_error_leaves_no_hook_and_the_mode():
    net = mlp(4, 3, outputs=2).train()
    with pytest.raises(ValueError, match=r"does not run on inputs of shape \(6, 5\)"):
        FlowMonitor(torch.randn(6, 5))(net)
    nn.init.constant_(net[1].weight, math.nan)
    with pytest.raises(ValueError, match="Layer '1' gives NaN or infinite values on batch 0"):
        FlowMonitor(torch.randn(6, 4))(net)
    assert hooks_of(net) == 0
    assert net.training


# --- monitors -------------------------------------------------------------------------------------------------------


def test_monitor_gives_one_value_per_pair_and_says_which():
    monitor = FlowMonitor(torch.randn(30, 1, 8, 8), "rms")
    assert monitor.pairs == ()
    net = Residual()
    assert monitor(net).shape == (5,)
    assert monitor.pairs == layer_graph(net, torch.randn(2, 1, 8, 8)).pairs
    named = FlowMonitor(torch.randn(30, 1, 8, 8), pairs=[["conv1", "fc"]])
    assert named.pairs == (("conv1", "fc"),)
    assert named(net).shape == (1,)


def test_monitor_of_the_graph_keeps_the_pairs_of_its_first_model():
    monitor = FlowMonitor(torch.randn(30, 4))
    monitor(mlp(4, 3, outputs=2))
    with pytest.raises(ValueError, match="Layer '3' is no"):
        monitor(mlp(4, outputs=2))


def test_identity_is_json_and_tells_settings_and_inputs_apart():
    x, y = torch.randn(9, 4), torch.zeros(9, dtype=torch.long)
    identities = [
        FlowMonitor(x).identity(),
        FlowMonitor(x, "rms").identity(),
        FlowMonitor(x, pairs="released").identity(),
        FlowMonitor(x, pairs=[("1", "3")]).identity(),
        FlowMonitor(x, at="activation").identity(),
        FlowMonitor(x + 1).identity(),
        GradientMonitor(x, y).identity(),
        GradientMonitor(x, y + 1).identity(),
        GradientMonitor(x, y, statistic="mean").identity(),
        GradientMonitor(x, y, nn.functional.mse_loss).identity(),
    ]
    assert len({json.dumps(each, sort_keys=True) for each in identities}) == len(identities)
    assert json.loads(json.dumps(identities[3])) == identities[3]
    monitor = FlowMonitor(x)
    before = monitor.identity()
    monitor(mlp(4, 3, outputs=2))
    assert monitor.identity() == before


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: FlowMonitor([x]), TypeError, "inputs must be one tensor, got list"),
        (lambda x: FlowMonitor(x[:1]), ValueError, "at least two inputs"),
        (lambda x: FlowMonitor(x, "mean"), ValueError, "kind='mean' is unknown. Choose among signed"),
        (lambda x: FlowMonitor(x, at="input"), ValueError, "at='input' is unknown"),
        (lambda x: FlowMonitor(x, pairs="all")(mlp(4, 3, outputs=2)), ValueError, "pairs='all' is unknown"),
        (lambda x: FlowMonitor(x, pairs=[("1",)]), TypeError, "List pairs of names"),
        (lambda x: FlowMonitor(x, pairs=[("1", "3"), ("1", "3")]), ValueError, "holds a pair twice"),
        (lambda x: flows(mlp(4, 3, outputs=2), x, kinds=()), ValueError, "kinds is empty"),
        (lambda x: flows(mlp(4, 3, outputs=2), x[:1]), ValueError, "'absolute' from '1' to '3': 1 samples"),
        (lambda x: FlowMonitor(x, pairs=[]), ValueError, "pairs is empty"),
        (lambda x: FlowMonitor(x, pairs=[("1", "x")])(mlp(4, 3, outputs=2)), ValueError, "Layer 'x' is no"),
        (lambda x: flows(mlp(4, 3, outputs=2), x, kinds=("mean",)), ValueError, "kinds='mean' is unknown"),
        (lambda x: flows(mlp(4, 3, outputs=2), x[:0]), ValueError, "at least one input"),
        (lambda x: flows(mlp(4, 3, outputs=2), x).vector("cka"), KeyError, "There are: absolute"),
        (lambda x: flows(mlp(4, 3, outputs=2), x[:3], kinds="cka"), ValueError, "'cka' from '1' to '3': .*at least 4"),
        (lambda x: flows(mlp(4, 3, outputs=2), x, batch_size=0), ValueError, "batch_size=0 is outside"),
        (lambda x: FlowMonitor(x, batch_size=0), ValueError, "batch_size=0 is outside"),
        (lambda x: GradientMonitor(x, torch.zeros(3)), ValueError, "one label per example"),
        (lambda x: GradientMonitor(x, torch.zeros(9), statistic="max"), ValueError, "statistic='max' is unknown"),
        (lambda x: GradientMonitor(x, torch.zeros(9), batch_size=0), ValueError, "batch_size=0"),
    ],
)
def test_unfit_arguments_are_refused_in_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(torch.randn(9, 4))


def test_a_monitor_set_below_the_widths_warns_for_information_only():
    net, x = mlp(4, 40, outputs=3), torch.randn(20, 4)
    assert np.isfinite(FlowMonitor(x, "cka")(net)).all()
    monitor = FlowMonitor(x, "gaussian")
    with pytest.warns(FewSamplesWarning, match="20 samples for layers of 40 and 3 units"):
        first = monitor(net)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(monitor(net), first)  # and does not say so again


def test_the_table_shows_and_holds_every_flow(tmp_path):
    table = flows(small_conv(1, 8, 10), torch.randn(40, 1, 8, 8), kinds=("absolute", "cka"))
    assert list(table.frame) == ["from", "to", "kind", "value"]
    assert "0 → 2" in str(table)
    assert "(mean)" in str(table)
    table.to_csv(tmp_path / "flows.csv")
    assert len((tmp_path / "flows.csv").read_text().splitlines()) == 7


# --- gradient flow --------------------------------------------------------------------------------------------------


def test_gradient_flow_is_that_of_the_mean_loss_however_the_examples_are_cut():
    net, x, y = mlp(4, 5, outputs=3), torch.randn(23, 4), torch.arange(23) % 3
    cross_entropy(net(x), y).backward()
    expected = [net[1].weight.grad.double(), net[3].weight.grad.double()]
    for size in (23, 5):
        table = gradient_flow(net, list(zip(x.split(size), y.split(size), strict=True)))
        assert table.layers == ("1.weight", "3.weight")
        np.testing.assert_allclose(table.vector("mean"), [float(g.abs().mean()) for g in expected], rtol=1e-5)
        np.testing.assert_allclose(table.vector("norm"), [float(g.norm()) for g in expected], rtol=1e-5)
        monitor = GradientMonitor(x, y, batch_size=size)
        np.testing.assert_allclose(monitor(net), table.vector("norm"), rtol=1e-6)
        assert monitor.pairs == table.layers


def test_gradient_flow_counts_downsample_and_takes_no_vector_nor_frozen_weight():
    net = Residual()
    net.conv2.weight.requires_grad_(False)
    table = gradient_flow(net, [(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))])
    assert table.layers == ("conv1.weight", "downsample.weight", "conv3.weight", "fc.weight")
    assert "(mean)" in str(table)


def test_gradients_of_removed_weights_are_zero_and_names_are_plain():
    class Mask(nn.Module):
        def forward(self, weight):
            return weight * (torch.arange(len(weight)) < 2)[:, None]

    net, x, y = mlp(4, 4, outputs=3), torch.randn(20, 4), torch.arange(20) % 3
    with torch.no_grad():
        net[1].weight[2:], net[1].bias[2:] = 0, 1  # these units give 1 on every input
    plain = gradient_flow(net, [(x, y)])
    parametrize.register_parametrization(net[1], "weight", Mask())
    masked = gradient_flow(net, [(x, y)])  # of the same function
    assert masked.layers == plain.layers
    (gradient,) = torch.autograd.grad(cross_entropy(net(x), y), [net[1].parametrizations.weight.original])
    assert not gradient[2:].any()
    assert masked.vector("mean")[0] == pytest.approx(float(gradient[:2].abs().sum()) / 16, rel=1e-5)
    assert masked.vector("mean")[0] < plain.vector("mean")[0]


def test_the_released_gradient_flow_is_one_stale_mini_batch():
    last = {"a": np.array([[3.0, -4.0]]), "b": torch.tensor([[0.0, 2.0]])}
    table = gradient_flow_as_released(last, 5)
    np.testing.assert_allclose(table.vector("mean"), [3.5 * 1.25, 1.25])
    np.testing.assert_allclose(table.vector("norm"), [5 * 1.25, 2 * 1.25])
    with pytest.raises(ValueError, match="batches=1 is outside"):
        gradient_flow_as_released(last, 1)
    with pytest.raises(ValueError, match="gradient of 'a' holds NaN"):
        gradient_flow_as_released({"a": np.array([[math.nan]])}, 3)


def test_the_released_distance_sets_norms_against_means_so_the_reference_hardly_matters():
    net, x, y = mlp(20, 50, outputs=3), torch.randn(64, 20), torch.arange(64) % 3
    first = gradient_flow(net, [(x, y)])
    second = gradient_flow(mlp(20, 50, outputs=3), [(x, y)])
    assert gradient_distance_as_released(first, first) > 0  # a net is far from itself
    whole = float(np.linalg.norm(second.vector("norm")))
    assert gradient_distance_as_released(first, second) == pytest.approx(whole, rel=0.06)
    with pytest.raises(ValueError, match="other layers"):
        gradient_distance_as_released(first, gradient_flow(mlp(20, outputs=3), [(x, y)]))


@pytest.mark.parametrize(
    ("batches", "error", "sentence"),
    [
        ([], ValueError, "holds no examples"),
        ([torch.randn(3, 4)], TypeError, "Batch 0 is not"),
        ([(torch.full((3, 4), math.nan), torch.zeros(3, dtype=torch.long))], ValueError, "loss is nan on batch 0"),
    ],
)
def test_unfit_batches_are_refused(batches, error, sentence):
    with pytest.raises(error, match=sentence):
        gradient_flow(mlp(4, 3, outputs=2), batches)


def test_unfit_losses_and_models_are_refused():
    batch = [(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))]
    with pytest.raises(ValueError, match="does not give one number"):
        gradient_flow(mlp(4, 3, outputs=2), batch, lambda o, y: cross_entropy(o, y, reduction="none"))
    with pytest.raises(ValueError, match="no trained weight"):
        gradient_flow(mlp(4, 3, outputs=2).requires_grad_(False), batch)
    monitor = GradientMonitor(*batch[0])
    monitor(mlp(4, 3, outputs=2))
    with pytest.raises(ValueError, match="other trained weights"):
        monitor(mlp(4, 3, 3, outputs=2))
