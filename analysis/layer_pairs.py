"""Which layer's output reaches which next layer, found by running the model once; or as the user lists them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ellq.analysis.calibration import as_input, inspecting

Pair = tuple[str, str]
Pairs = Literal["graph", "released"] | Iterable[Pair]

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
"""The modules whose outputs are units."""


@dataclass(frozen=True)
class LayerGraph:
    """Linear and convolutional layers that a model runs, and who reads whom.

    Attributes:
        layers: names in running order, of those that run once.
        sources: layer → the layers whose outputs reach its input without passing through another layer, in running
            order: one in a chain, several after a sum or a concatenation.
    """

    layers: tuple[str, ...]
    sources: dict[str, tuple[str, ...]]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every layer with each of its sources, in running order of the layer that reads."""
        return tuple((source, layer) for layer in self.layers for source in self.sources[layer])

    def reader(self, layer: str) -> str | None:
        """Return the first layer that reads this one's output, or None."""
        return next((other for other in self.layers if layer in self.sources[other]), None)


def layer_graph(model: nn.Module, example: Tensor) -> LayerGraph:
    """Follow what every Linear and convolutional layer gives to those that read it, through whatever lies between.

    The model is run once in eval mode and every operation is seen, so control flow is followed as the example takes it,
    in-place operations and views included; nothing is traced symbolically. Layers that run several times, such as
    shared ones, end the paths that reach them and are left out.

    Args:
        model: the model; not changed.
        example: a batch of inputs, of which the first two are used.

    Returns:
        The graph.

    Raises:
        ValueError: an empty batch, or the model does not run on it.
    """
    if example.ndim == 0 or len(example) == 0:
        raise ValueError(f"example has shape {tuple(example.shape)}. Pass a batch with at least one input.")
    reach = _Reach()
    hooks = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, LAYERS):
                hooks.append(module.register_forward_pre_hook(reach.arrives(name), with_kwargs=True))
                hooks.append(module.register_forward_hook(reach.leaves(name)))
        with inspecting(model), reach:
            model(as_input(example[:2].clone(), model))
    except (RuntimeError, TypeError) as error:
        raise does_not_run(example, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    layers = tuple(name for name in dict.fromkeys(reach.order) if reach.runs[name] == 1)
    place = {name: number for number, name in enumerate(layers)}
    sources = {
        name: tuple(sorted((source for source in reach.read[name] if source in place), key=lambda s: place[s]))
        for name in layers
    }
    return LayerGraph(layers, sources)


def released_pairs(model: nn.Module) -> tuple[Pair, ...]:
    """Return consecutive Conv2d and Linear layers in order of registration, without those named "downsample".

    As in the released code of Gharatappeh & Yasaei Sekeh 2025: residual paths are not followed, so in a branching net a
    pair may be of layers neither of which reads the other.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return tuple(pairwise(name for name in names if "downsample" not in name))


def chosen_pairs(model: nn.Module, pairs: Pairs, graph: LayerGraph) -> tuple[Pair, ...]:
    """Return the pairs of layers that are asked for.

    Args:
        model: whose layers.
        pairs: "graph" for every layer with its sources, "released" for ``released_pairs``, or (from, to) names.
        graph: of the model.

    Raises:
        TypeError: not pairs of names.
        ValueError: no pair at all; a name that is no layer, or of one that does not run exactly once.
    """
    if isinstance(pairs, str):
        if pairs not in ("graph", "released"):
            raise ValueError(f"pairs={pairs!r} is unknown. Choose 'graph' or 'released', or list (from, to) names.")
        found = graph.pairs if pairs == "graph" else released_pairs(model)
    else:
        found = listed_pairs(pairs)
    if not found:
        raise ValueError("The model has no two consecutive layers. List pairs= of Linear or convolutional layers.")
    for name in dict.fromkeys(name for pair in found for name in pair):
        if name not in graph.layers:
            known = ", ".join(graph.layers[:8]) + (", …" if len(graph.layers) > 8 else "")
            raise ValueError(
                f"Layer {name!r} is no Linear or convolutional layer that runs exactly once. Choose among {known}."
            )
    return found


def listed_pairs(pairs: Iterable[Any]) -> tuple[Pair, ...]:
    """Return pairs as tuples of two names; refuse anything else."""
    found = [tuple(pair) if isinstance(pair, tuple | list) else pair for pair in pairs]
    for pair in found:
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(name, str) for name in pair)):
            raise TypeError(f"pairs holds {pair!r}. List pairs of names, such as ('conv1', 'conv2').")
    if len(set(found)) < len(found):
        raise ValueError("pairs holds a pair twice. List each once.")
    if not found:
        raise ValueError("pairs is empty. List at least one pair of layers, or leave it to the graph.")
    return tuple(found)


def does_not_run(batch: Tensor, error: Exception) -> ValueError:
    """Return the error that says on what inputs a model does not run, and why."""
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ValueError(
        f"The model does not run on inputs of shape {tuple(batch.shape)} and type {batch.dtype}: {reason}. Pass inputs"
        " the model can be called on."
    )


class _Reach(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation and keeps for every storage the layers whose outputs it was made of.

    Storages are kept alive, so that no address is used twice.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.order: list[str] = []
        self.runs: Counter[str] = Counter()
        self.read: dict[str, frozenset[str]] = {}
        self._alive: dict[int, torch.UntypedStorage] = {}
        self._made_of: dict[int, frozenset[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made_of = self._of((args, kwargs))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._set(value, made_of)
        return result

    def arrives(self, name: str) -> Any:
        def before(_: nn.Module, inputs: Any, named: Any) -> None:
            self.runs[name] += 1
            self.order.append(name)
            self.read[name] = self._of((inputs, named))

        return before

    def leaves(self, name: str) -> Any:
        def after(_: nn.Module, inputs: Any, output: Any) -> None:
            for value in tree_leaves(output):
                if isinstance(value, Tensor):
                    self._set(value, frozenset([name]))

        return after

    def _of(self, values: Any) -> frozenset[str]:
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        return frozenset().union(*(self._made_of.get(_address(tensor), frozenset()) for tensor in tensors))

    def _set(self, tensor: Tensor, made_of: frozenset[str]) -> None:
        address = _address(tensor)
        self._alive.setdefault(address, tensor.untyped_storage())
        self._made_of[address] = made_of


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
