from __future__ import annotations

import copy
import json
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ellq.pruning import channel_groups, load, plan, prune, save
from ellq.pruning.surgery import cut_channels_
from pruned_nets import gaussian, mlp, same_bits


class Net(nn.Module):
    """Convolution, batch norm, a tied pair whose names sort the other way round, and a hidden layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.z = nn.Linear(4, 4, bias=False)
        self.a = nn.Linear(4, 4, bias=False)
        self.a.weight = self.z.weight
        self.first = nn.Linear(4, 9)
        self.second = nn.Linear(9, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).mean(-1)
        return self.second(torch.relu(self.first(self.a(torch.tanh(self.z(x))))))


class Text(nn.Module):
    """Embedding, attention, grouped and depthwise convolutions, every norm of one dimension, slopes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.read = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.after = nn.Linear(8, 5)
        self.conv = nn.Conv1d(5, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.slope = nn.PReLU(8)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.instance = nn.InstanceNorm1d(8, affine=True, track_running_stats=True)
        self.mix = nn.Conv1d(8, 12, 1)
        self.grouped = nn.GroupNorm(3, 12)
        self.part = nn.Conv1d(12, 6, 1, groups=3)
        self.end = nn.Conv1d(6, 4, 1)
        self.bare = nn.BatchNorm1d(4, affine=False)
        self.out = nn.Linear(4 * 7, 9)
        self.last = nn.Linear(9, 3)

    def forward(self, x):
        x = self.read(self.embedding(x)).relu()
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.after(x).transpose(1, 2)
        x = self.slope(self.norm(self.conv(x)))
        x = self.instance(self.depthwise(x)).relu()
        x = self.part(self.grouped(self.mix(x)).relu()).relu()
        x = self.bare(self.end(x)).relu()
        return self.last(self.out(x.flatten(1)).relu())


class Volumes(nn.Module):
    """Convolutions of three and two dimensions, and a residual stream."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv3d(1, 4, 3, padding=1)
        self.an = nn.BatchNorm3d(4)
        self.b = nn.Conv2d(4, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.c = nn.Conv2d(6, 6, 3, padding=1)
        self.cn = nn.GroupNorm(6, 6)
        self.d = nn.Conv2d(6, 4, 1)
        self.dn = nn.InstanceNorm2d(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = self.an(self.a(x)).relu().mean(2)
        x = self.bn(self.b(x)).relu()
        x = x + self.cn(self.c(x))
        return self.out(self.dn(self.d(x)).relu().mean((2, 3)))


INPUTS = {
    Text: torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(0)),
    Volumes: gaussian(4, 1, 4, 5, 5),
}
WIDTHS = {
    *("in_channels", "out_channels", "groups", "num_features", "num_channels", "num_groups", "num_parameters"),
    *("embedding_dim", "in_features", "out_features", "embed_dim", "num_heads"),
}


def trained(dtype=torch.float32) -> Net:
    net = Net()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(gaussian(*parameter.shape, seed=len(name)))
        net(gaussian(32, 2, 5))  # fills the running statistics
    return net.to(dtype).eval()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestSaveAndLoad:
    @pytest.mark.parametrize("method", ["lq", "id", None])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_give_the_same_bits(self, tmp_path, method, dtype):
        net = trained(dtype)
        pruned = net if method is None else prune(net, gaussian(64, 2, 5), method=method, sparsity=0.4)
        save(pruned, tmp_path / "model")
        again = load(tmp_path / "model", Net)
        assert same_bits(again, pruned)
        assert again.a.weight is again.z.weight
        assert not again.training
        inputs = gaussian(8, 2, 5, seed=3).to(dtype)
        with torch.no_grad():
            assert torch.equal(again(inputs), pruned(inputs))

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_give_the_same_bits_for_any_widths(self, data):
        make = data.draw(st.sampled_from(sorted(INPUTS, key=lambda kind: kind.__name__)))
        net, inputs = make().eval(), INPUTS[make]
        with torch.no_grad():
            for number, value in enumerate(net.state_dict().values()):
                if value.is_floating_point():
                    value.copy_(gaussian(*value.shape, seed=number).abs() + 0.1)
        found = channel_groups(net, inputs).groups
        cuts = []
        for group in found:
            kept = data.draw(st.sets(st.integers(0, group.units - 1), min_size=1))
            cuts.append((group, np.array(sorted(kept))))
        small = copy.deepcopy(net)
        cut_channels_(small, cuts)
        if data.draw(st.booleans()):
            small = small.to(torch.float64)
            inputs = inputs.double() if inputs.is_floating_point() else inputs
        with tempfile.TemporaryDirectory() as folder:
            save(small, f"{folder}/model")
            again = load(f"{folder}/model", make)
        assert same_bits(again, small)
        for (name, module), other in zip(small.named_modules(), again.modules(), strict=True):
            widths = {key: value for key, value in vars(module).items() if key in WIDTHS}
            assert widths == {key: value for key, value in vars(other).items() if key in WIDTHS}, name
        with torch.no_grad():
            assert torch.equal(again(inputs), small(inputs))
            torch.testing.assert_close(copy.deepcopy(again).train()(inputs).shape, small(inputs).shape)

    def test_keep_the_plan_that_prune_left(self, tmp_path):
        net = mlp(4, 6, 2)
        small = prune(net, gaussian(40, 4), method="id", sparsity=0.5)
        save(small, tmp_path / "model")
        written = json.loads((tmp_path / "model" / "plan.json").read_text())
        assert written["plan"] == json.loads(small.ellq_plan.to_json())
        other = plan(net, sparsity=0.5)
        save(small, tmp_path / "model", plan=other)
        written = json.loads((tmp_path / "model" / "plan.json").read_text())
        assert written["plan"] == json.loads(other.to_json())

    def test_write_two_files_and_the_plan(self, tmp_path):
        net = mlp(4, 6, 2)
        decided = plan(net, sparsity=0.5)
        save(net, tmp_path / "new" / "model", plan=decided)
        assert names(tmp_path / "new" / "model") == ["model.safetensors", "plan.json"]
        assert names(tmp_path / "new") == ["model"]
        written = json.loads((tmp_path / "new" / "model" / "plan.json").read_text())
        assert written["plan"] == json.loads(decided.to_json())
        assert written["linears"]["2"] == {"in_features": 6, "out_features": 2}

    def test_leave_the_model_alone(self, tmp_path):
        net = trained().train()
        net.z.requires_grad_(False)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        save(net, tmp_path / "model")
        assert net.training
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert net.a.weight is net.z.weight

    def test_take_state_dicts_and_arrays(self, tmp_path):
        net = mlp(4, 6, 2)
        pruned = prune(net.state_dict(), sparsity=0.5)
        save(pruned, tmp_path / "model")
        assert all(
            torch.equal(v, pruned[k]) for k, v in load(tmp_path / "model", lambda: mlp(4, 6, 2)).state_dict().items()
        )
        save({k: v.numpy() for k, v in pruned.items()}, tmp_path / "arrays")
        loaded = load(tmp_path / "arrays", lambda: mlp(4, 6, 2))
        assert all(torch.equal(v, pruned[k]) for k, v in loaded.state_dict().items())

    def test_replace_an_earlier_model_and_nothing_else(self, tmp_path):
        folder = tmp_path / "model"
        save(mlp(4, 6, 2), folder)
        save(mlp(4, 6, 2, seed=1), folder)
        assert same_bits(load(folder, lambda: mlp(4, 6, 2)), mlp(4, 6, 2, seed=1))
        (folder / "notes.txt").write_text("mine")
        before = (folder / "model.safetensors").read_bytes()
        with pytest.raises(FileExistsError, match=r"notes\.txt"):
            save(mlp(4, 6, 2), folder)
        assert (folder / "model.safetensors").read_bytes() == before
        assert names(tmp_path) == ["model"]


class TestFailingToSave:
    def test_leaves_nothing_behind(self, tmp_path):
        with pytest.raises((TypeError, RuntimeError, ValueError)):
            save({"w": torch.eye(2), "bad": "text"}, tmp_path / "model")
        assert names(tmp_path) == []

    def test_leaves_the_earlier_model(self, tmp_path):
        save(mlp(4, 6, 2), tmp_path / "model")
        with pytest.raises((TypeError, RuntimeError, ValueError)):
            save({"w": torch.eye(2), "bad": "text"}, tmp_path / "model")
        assert names(tmp_path) == ["model"]
        assert same_bits(load(tmp_path / "model", lambda: mlp(4, 6, 2)), mlp(4, 6, 2))

    def test_into_a_file_is_refused(self, tmp_path):
        (tmp_path / "model").write_text("mine")
        with pytest.raises(FileExistsError):
            save(mlp(4, 6, 2), tmp_path / "model")
        assert (tmp_path / "model").read_text() == "mine"


class TestFailingToLoad:
    @pytest.fixture
    def folder(self, tmp_path):
        save(prune(trained(), gaussian(64, 2, 5), method="id", sparsity=0.4), tmp_path / "model")
        return tmp_path / "model"

    @pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
    def test_names_the_missing_file(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load(folder, Net)

    @pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
    def test_names_the_truncated_file(self, folder, name, share):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=name):
            load(folder, Net)

    @pytest.mark.parametrize(
        "change",
        [
            {"format": "other"},
            {"version": 2},
            {"linears": 3},
            {"linears": {"first": 3}},
            {"linears": {"first": {"in_features": 4}}},
            {"linears": {"first": {"in_features": "x", "out_features": 5}}},
        ],
    )
    def test_refuses_a_description_it_cannot_read(self, folder, change):
        data = json.loads((folder / "plan.json").read_text()) | change
        (folder / "plan.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"plan\.json"):
            load(folder, Net)

    @pytest.mark.parametrize(
        ("factory", "match"),
        [
            (lambda: mlp(4, 9, 3), "has a Linear 'z'; .* class .*Net"),
            (lambda: nn.Sequential(), "does not"),
            (lambda: LongerFilters(), "conv"),
            (lambda: Extra(), "extra"),
        ],
    )
    def test_names_what_another_architecture_lacks(self, folder, factory, match):
        with pytest.raises(ValueError, match=match):
            load(folder, factory)

    def test_refuses_a_factory_that_makes_no_module(self, folder):
        with pytest.raises(TypeError, match=r"factory must make an nn.Module, got dict"):
            load(folder, dict)


class LongerFilters(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 5)


class Extra(Net):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.from_numpy(np.zeros(2)))
