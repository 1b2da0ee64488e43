"""Random chains to prune and attack bounds with, and small helpers the pruning tests share."""

from __future__ import annotations

import copy
import itertools
import warnings
from contextlib import contextmanager

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from ellq.pruning import apply, plan

ACTIVATIONS = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
    nn.LogSigmoid,
    nn.Hardtanh,
    lambda: nn.LeakyReLU(-1.5),
    lambda: nn.ELU(2.0),
    lambda: nn.CELU(0.5),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.Softplus(threshold=0.5),
)


def randomise_(net: nn.Module, rng: np.random.Generator, spread: float) -> None:
    """Draw weights whose sizes differ by factors of about e^spread; make some units dead and some equal."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(torch.from_numpy(rng.standard_normal(module.num_features)))
                module.running_var.copy_(torch.from_numpy(np.exp(spread * rng.standard_normal(module.num_features))))
            for parameter in module.parameters(recurse=False):
                values = rng.standard_normal(parameter.shape) * np.exp(spread * rng.standard_normal(parameter.shape))
                if parameter.ndim > 1 and len(values) > 2:
                    choice = rng.integers(4)
                    if choice == 0:
                        values[0] = 0.0
                    elif choice == 1:
                        values[0] = values[1]
                parameter.copy_(torch.from_numpy(values / np.sqrt(values[0].size)))


def linear_chain(draw, rng) -> tuple[list[nn.Module], tuple[int, ...]]:
    widths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    layers: list[nn.Module] = []
    for m, k in itertools.pairwise(widths):
        layers += [nn.Linear(m, k, bias=draw(st.booleans())), draw(st.sampled_from(ACTIVATIONS))()]
        if draw(st.booleans()):
            layers.append(nn.Dropout(0.5))
    layers.append(nn.Linear(widths[-1], draw(st.integers(1, 3))))
    positions = draw(st.sampled_from([(), (), (1,), (3,), (2, 2)]))
    if positions and draw(st.booleans()):
        layers += [nn.Flatten(), nn.Linear(int(np.prod(positions)) * layers[-1].out_features, 2)]
    return layers, (*positions, widths[0])


def conv_chain(draw, rng) -> tuple[list[nn.Module], tuple[int, ...]]:
    dims = draw(st.sampled_from([1, 2]))
    conv, norm = [(nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d)][dims - 1]
    average, maximum = [(nn.AvgPool1d, nn.MaxPool1d), (nn.AvgPool2d, nn.MaxPool2d)][dims - 1]
    adaptive = [nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d][dims - 1]
    groups = draw(st.sampled_from([1, 2]))
    channels, size = 2 * draw(st.integers(1, 2)), 8
    shape = (channels, *[size] * dims)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        out = 2 * draw(st.integers(1, 2))
        mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
        stride, dilation = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
        layers.append(conv(channels, out, 3, stride, padding=1, dilation=dilation, groups=groups, padding_mode=mode))
        if draw(st.booleans()):
            layers.append(norm(out, affine=draw(st.booleans())))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        channels = out
    pools = [nn.Identity(), average(2, ceil_mode=True), average(3, 1, 1), maximum(2), adaptive(2)]
    if dims == 2:
        pools += [nn.AvgPool2d(2, divisor_override=1), nn.MaxPool2d((2, 1), stride=1)]
    layers.append(draw(st.sampled_from(pools)))
    with torch.no_grad():
        features = nn.Sequential(*layers).eval()(torch.zeros(1, *shape))
    if draw(st.booleans()):  # a Linear along the last axis, not over channels
        layers.append(nn.Linear(features.shape[-1], 3))
        features = features[..., :1].expand(*features.shape[:-1], 3)
    layers += [nn.Flatten(), nn.Linear(features.numel(), 4), draw(st.sampled_from(ACTIVATIONS))(), nn.Linear(4, 2)]
    return layers, shape


@st.composite
def chains(draw) -> tuple[nn.Sequential, torch.Tensor]:
    """A dense chain in one of three float types, and inputs of one to twelve examples."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers, shape = draw(st.sampled_from([linear_chain, linear_chain, conv_chain]))(draw, rng)
    net = nn.Sequential(*layers)
    if draw(st.booleans()):
        net = nn.Sequential(nn.Sequential(*layers[:1]), nn.Sequential(*layers[1:]))
    randomise_(net, rng, draw(st.sampled_from([0.0, 1.0, 4.0])))
    net = net.to(draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])))
    inputs = rng.standard_normal((draw(st.integers(1, 12)), *shape)) * draw(st.sampled_from([1.0, 1e-6, 1e6]))
    inputs *= np.exp(draw(st.sampled_from([0.0, 3.0])) * rng.standard_normal(inputs.shape))
    return net, torch.from_numpy(inputs)


@st.composite
def prunings(draw):
    """A dense chain, its pruned version, inputs and the plan; every method and rule, counts edited by hand, refits."""
    net, inputs = draw(chains())
    how = draw(st.sampled_from(["ellq", "yang2022", "edited", "rescaled", "refitted", "id-ellq", "id-chee2021"]))
    amount = draw(st.sampled_from([{"sparsity": 0.3}, {"sparsity": 0.7}, {"tol": 0.1}, {"tol": 0.6}]))
    if how.startswith("id"):
        calibration = inputs if draw(st.booleans()) else inputs.flip(-1) + 1
        with quiet():
            decided = try_plan(net, calibration, method="id", rule=how[3:], **amount)
    else:
        rule = "yang2022" if how == "yang2022" else "ellq"
        refit = {"rescaled": "rescale", "refitted": "least_squares"}.get(how, "none")
        with quiet():
            decided = try_plan(net, inputs if how == "refitted" else None, rule=rule, refit=refit, **amount)
        if decided is not None and any(name.endswith(("running_mean", "running_var")) for name in decided.values):
            return None  # no bound is known where a norm changed
        if decided is not None and how == "edited":
            table = decided.to_frame()
            rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
            table["retained"] = rng.integers(0, table["size"].to_numpy() + 1)
            decided = decided.with_retained(table)
    return None if decided is None else (net, apply(net, decided), inputs, decided)


def try_plan(*args, **kwargs):
    """Return the plan, or None where there is nothing to prune or the budget is out of reach."""
    try:
        return plan(*args, **kwargs)
    except ValueError as error:
        if "each of which keeps" in str(error) or "no hidden layer" in str(error):
            return None
        raise


@contextmanager
def quiet():
    """Ignore the warning about few calibration samples, and no other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Calibration has")
        yield


def mlp(*widths: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """A ReLU net of the given widths with weights that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for m, k in itertools.pairwise(widths):
        layers += [nn.Linear(m, k, bias=bias), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return net


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def snapshot(model: nn.Module) -> dict:
    """Everything about a model that a call must not change."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "ids": {name: id(value) for name, value in model.named_parameters()},
        "grads": {name: value.requires_grad for name, value in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "random": torch.random.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    now = snapshot(model)
    assert now["state"].keys() == before["state"].keys()
    assert all(torch.equal(value, before["state"][name]) for name, value in now["state"].items())
    assert torch.equal(now["random"], before["random"])
    for key in ("ids", "grads", "training", "hooks", "attributes"):
        assert now[key] == before[key], key


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def duplicated(net: nn.Sequential, hidden: int, copies: int) -> nn.Sequential:
    """Repeat the hidden units of a one-hidden-layer net, split what reads them among the copies, append dead ones."""
    first, _, last = net
    big = copy.deepcopy(net)
    big[0] = nn.Linear(first.in_features, hidden * copies + 2)
    big[2] = nn.Linear(hidden * copies + 2, last.out_features)
    with torch.no_grad():
        big[0].weight.copy_(torch.cat([first.weight.repeat(copies, 1), torch.zeros(2, first.in_features)]))
        big[0].bias.copy_(torch.cat([first.bias.repeat(copies), torch.tensor([-1.0, -2.0])]))
        parts = torch.arange(1.0, copies + 1)
        parts /= parts.sum()
        big[2].weight.copy_(torch.cat([*(last.weight * part for part in parts), torch.ones(last.out_features, 2)], 1))
        big[2].bias.copy_(last.bias)
    return big
