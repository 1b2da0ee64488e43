"""Which weights a plan covers: chosen by name, by type of module, or by the module itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from ellq.pruning.masks import Maskable

Item = str | type[nn.Module] | nn.Module
Choice = Item | Iterable[Item] | None


def covered(
    model: nn.Module | Mapping[str, Tensor], weights: Sequence[Maskable], *, include: Choice, exclude: Choice
) -> list[Maskable]:
    """Return the weights that are included and not excluded.

    Args:
        model: what the weights belong to.
        weights: from ``maskable_weights(model)``.
        include: name globs (of a weight or of a module it lies in; ``*`` also matches dots), module types, modules, or
            a sequence of these; None for all weights.
        exclude: likewise; None for none. A weight shared by several modules counts as in all of them.

    Returns:
        The weights, in their order.

    Raises:
        TypeError: an item of another kind, or a type or module for a state dict.
        ValueError: an item that matches no weight, or nothing is left.
    """
    owners = _Owners(model, weights)
    inside = set(range(len(weights)))
    if include is not None:
        inside = set().union(*(owners.matched(item, "include") for item in _items(include, "include")))
    if exclude is not None:
        inside -= set().union(*(owners.matched(item, "exclude") for item in _items(exclude, "exclude")))
    if not inside:
        raise ValueError("include= and exclude= leave no weight to prune. Include more, or exclude less.")
    return [weight for number, weight in enumerate(weights) if number in inside]


def layer_sparsities(
    model: nn.Module | Mapping[str, Tensor], weights: Sequence[Maskable], wanted: Mapping[str, float]
) -> dict[int, float]:
    """Return the sparsity of each weight that a glob matches, by its number; the first glob that matches counts.

    Raises:
        TypeError: a glob that is not a string.
        ValueError: no globs, or one that matches no weight.
    """
    owners = _Owners(model, weights)
    if not wanted:
        raise ValueError("sparsity={} names no layer. Map name globs to sparsities.")
    found: dict[int, float] = {}
    for glob, sparsity in wanted.items():
        if not isinstance(glob, str):
            raise TypeError(f"sparsity maps name globs to fractions, got {glob!r} as a glob.")
        for number in owners.matched(glob, "sparsity"):
            found.setdefault(number, sparsity)
    return dict(sorted(found.items()))


class _Owners:
    """The modules and names each weight goes by."""

    def __init__(self, model: nn.Module | Mapping[str, Tensor], weights: Sequence[Maskable]) -> None:
        self.model = model
        self.names: list[set[str]] = [{weight.name} for weight in weights]
        self.modules: list[list[nn.Module]] = [[] for _ in weights]
        if isinstance(model, nn.Module):
            place = {id(weight.tensor): number for number, weight in enumerate(weights)}
            for path, module in model.named_modules(remove_duplicate=False):
                for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                    if id(parameter) in place:
                        number = place[id(parameter)]
                        self.names[number].add(f"{path}.{name}" if path else name)
                        self.modules[number].append(module)

    def matched(self, item: Item, argument: str) -> set[int]:
        if isinstance(item, str):
            found = {i for i, names in enumerate(self.names) if any(_matches(name, item) for name in names)}
        elif isinstance(item, nn.Module) or (isinstance(item, type) and issubclass(item, nn.Module)):
            if not isinstance(self.model, nn.Module):
                raise TypeError(f"{argument}= holds {item!r}, but a state dict has names only. Pass name globs.")
            found = self._inside(item)
        else:
            raise TypeError(f"{argument}= holds {item!r}. Pass name globs, module types or modules.")
        if not found:
            shown = repr(item) if isinstance(item, str) else getattr(item, "__name__", type(item).__name__)
            known = sorted(min(names) for names in self.names)
            listed = ", ".join(map(repr, known[:4])) + (", …" if len(known) > 4 else "")
            raise ValueError(f"{argument}= holds {shown}, which matches no weight. The weights are {listed}.")
        return found

    def _inside(self, item: nn.Module | type[nn.Module]) -> set[int]:
        assert isinstance(self.model, nn.Module)
        chosen = [item] if isinstance(item, nn.Module) else [m for m in self.model.modules() if isinstance(m, item)]
        within = {id(module) for top in chosen for module in top.modules()}
        return {i for i, modules in enumerate(self.modules) if any(id(module) in within for module in modules)}


def _matches(name: str, glob: str) -> bool:
    """Whether a glob matches a weight's name or the path of a module above it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), glob) for end in range(1, len(parts) + 1))


def _items(choice: Choice, argument: str) -> list[Item]:
    if isinstance(choice, str | type | nn.Module):
        return [choice]
    if not isinstance(choice, Iterable):
        raise TypeError(f"{argument}= is {choice!r}. Pass name globs, module types or modules.")
    items = list(choice)
    if not items:
        raise ValueError(f"{argument}= is empty. Leave it out, or name something.")
    return items
