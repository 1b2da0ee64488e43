from __future__ import annotations

import pytest
from torch import nn

import ellq
from ellq.pruning.coverage import covered, layer_sparsities
from ellq.pruning.masks import maskable_weights


def make() -> nn.Module:
    net = nn.Module()
    net.stem = nn.Conv2d(3, 4, 3)
    net.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    net.layer10 = nn.Sequential(nn.Linear(4, 4))
    net.attention = nn.MultiheadAttention(4, 2)
    net.embedding = nn.Embedding(5, 4)
    net.head = nn.Linear(4, 5)
    net.head.weight = net.embedding.weight
    return net


NAMES = ["stem.weight", "layer1.0.weight", "layer1.1.weight", "layer10.0.weight", "attention.in_proj_weight"]
NAMES += ["attention.out_proj.weight", "head.weight"]
NET = make()


def chosen(include=None, exclude=None, net=NET):
    return [w.name for w in covered(net, maskable_weights(net), include=include, exclude=exclude)]


@pytest.mark.parametrize(
    ("item", "names"),
    [
        ("stem", ["stem.weight"]),
        ("stem.weight", ["stem.weight"]),
        ("layer1", ["layer1.0.weight", "layer1.1.weight"]),
        ("layer1.*", ["layer1.0.weight", "layer1.1.weight"]),
        ("layer1*", ["layer1.0.weight", "layer1.1.weight", "layer10.0.weight"]),
        ("*.weight", [name for name in NAMES if "in_proj" not in name]),
        ("embedding", ["head.weight"]),
        (nn.Conv2d, ["stem.weight", "layer1.0.weight"]),
        (nn.MultiheadAttention, ["attention.in_proj_weight", "attention.out_proj.weight"]),
        (nn.Embedding, ["head.weight"]),
        (NET.layer1, ["layer1.0.weight", "layer1.1.weight"]),
        (NET.head, ["head.weight"]),
        (["stem", nn.Embedding, NET.layer10], ["stem.weight", "layer10.0.weight", "head.weight"]),
    ],
    ids=str,
)
def test_items_match_names_types_and_modules(item, names):
    assert chosen(include=item) == names
    assert chosen(exclude=item) == [name for name in NAMES if name not in names]


def test_both_together_take_the_difference():
    assert chosen(include=nn.Linear, exclude=["head", NET.attention]) == ["layer1.1.weight", "layer10.0.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("item", "says"),
    [("norm", "'norm'"), (nn.LSTM, "LSTM"), (["stem", "conv7"], "'conv7'"), (nn.Linear(2, 2), "Linear")],
)
def test_an_item_that_matches_nothing_is_refused_by_name(argument, item, says):
    with pytest.raises(ValueError, match=f"{argument}= holds {says}, which matches no weight. The weights are"):
        chosen(**{argument: item})


def test_other_kinds_are_refused():
    with pytest.raises(TypeError, match="include= is 7"):
        chosen(include=7)
    with pytest.raises(TypeError, match="include= holds 7"):
        chosen(include=[7])
    with pytest.raises(ValueError, match="exclude= is empty"):
        chosen(exclude=[])
    with pytest.raises(ValueError, match="leave no weight"):
        chosen(exclude="*")
    state = nn.Linear(2, 3).state_dict()
    with pytest.raises(TypeError, match="a state dict has names only"):
        ellq.plan(state, sparsity=0.5, include=nn.Linear)


def test_a_plan_covers_what_is_chosen():
    decided = ellq.plan(NET, sparsity=0.5, include=[nn.Linear], exclude=["head", "attention"])
    assert decided.table["layer"].unique().tolist() == ["layer1.1.weight", "layer10.0.weight"]
    assert decided.sparsity == 0.5


def test_globs_of_sparsities_count_in_order():
    found = layer_sparsities(NET, maskable_weights(NET), {"layer1.0": 0.9, "layer1*": 0.5, "head": 0.0})
    assert found == {1: 0.9, 2: 0.5, 3: 0.5, 6: 0.0}
    with pytest.raises(ValueError, match="'fc'"):
        layer_sparsities(NET, maskable_weights(NET), {"fc": 0.9})
    with pytest.raises(ValueError, match="names no layer"):
        layer_sparsities(NET, maskable_weights(NET), {})
    with pytest.raises(TypeError, match="as a glob"):
        layer_sparsities(NET, maskable_weights(NET), {3: 0.5})
