"""What is known of every feature of a network without data: its constant, and which units must be cut together.

A feature is what one unit makes, followed along one axis of every tensor: the channels of a convolution, the last axis
of a Linear. Two features belong to one group where something needs them to have the same index: the two sides of a
residual sum, a filter and its batch norm, a channel and its block of columns after a flatten.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ellq.theory import Array

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Feature:
    """The units along one axis of a tensor.

    Attributes:
        axis: which axis of the tensor.
        constants: what each unit equals at every example and position; NaN where it varies, or may.
        groups: the group each unit belongs to; compare them through ``Groups.roots``.
        needed: whether a change of a unit's values could change an output; filled in by ``follow``.
    """

    axis: int
    constants: Array
    groups: Indices
    needed: Mask

    @property
    def is_constant(self) -> Mask:
        """Which units are constant."""
        return ~np.isnan(self.constants)


@dataclass(frozen=True, eq=False)
class Link:
    """Units passed on one by one: ``output[i]`` is made of ``source[origin[i]]``, or of nothing where that is −1."""

    source: Feature
    output: Feature
    origin: Indices


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear or convolutional layer.

    Attributes:
        name: of the layer.
        source: what it reads; None where that is not followed.
        output: what it makes.
        touches: which inputs each output has a non-zero weight for, shape (out, in).
        is_uniform: whether a constant input adds the same to every position, which zero padding prevents.
        norm: the only thing that reads it, where that is a norm with a running mean.
    """

    name: str
    source: Feature | None
    output: Feature
    touches: Mask
    is_uniform: bool
    norm: str | None


class Groups:
    """Which features are cut together, and which of these groups must stay, with the reason."""

    def __init__(self) -> None:
        self.pinned: dict[int, str] = {}
        self._parents: list[int] = []

    def new(self, count: int) -> Indices:
        """Return ``count`` new groups."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def join(self, first: Indices, second: Indices) -> None:
        """Make one group of each pair."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self._parents[self._root(a)] = self._root(b)

    def pin(self, groups: Indices, reason: str) -> None:
        """Make groups stay."""
        for group in groups.tolist():
            self.pinned.setdefault(group, reason)

    def roots(self, groups: Indices) -> Indices:
        """Return one number for all members of a group."""
        return np.array([self._root(group) for group in groups.tolist()], dtype=np.int64)

    def _root(self, group: int) -> int:
        while self._parents[group] != group:
            self._parents[group] = self._parents[self._parents[group]]
            group = self._parents[group]
        return group


@dataclass(frozen=True)
class Network:
    """What is known of all features of a network.

    Attributes:
        groups: who is cut together.
        readers: the linear and convolutional layers that are understood, by name.
        channelwise: what each norm and PReLU acts on, by name.
        shortcuts: what each zero-padded shortcut makes, by name.
        steps: links and readers, in the order they run, in one list per graph.
        unknown: what is not understood, with the reason.
    """

    groups: Groups = field(default_factory=Groups)
    readers: dict[str, Reader] = field(default_factory=dict)
    channelwise: dict[str, Feature] = field(default_factory=dict)
    shortcuts: dict[str, Feature] = field(default_factory=dict)
    steps: list[list[Link | Reader]] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
