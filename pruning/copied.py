"""A copy of a model, of one too that torch cannot copy: whose layers hold computed tensors."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module) -> Module:
    """Return a deep copy; tensors that a forward pass left in a layer's attributes are detached.

    Such are features that a model keeps, and the weights that torch's pruning and norms by hooks compute.
    """
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})
