"""The activations a forward pass holds at once: which tensors live from when to when, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ellq.analysis.calibration import as_input, inspecting


@dataclass(frozen=True)
class Lifetimes:
    """The tensors of one forward pass, in the order they are made.

    Attributes:
        operations: the names of torch's operations, in running order.
        born: the operation that makes each tensor, shape (t,); 0 for what the model is called with.
        last: the last operation that reads or writes it, shape (t,); for outputs of the model the very last.
        bytes: how large it is, shape (t,).
    """

    operations: tuple[str, ...]
    born: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]

    def alive(self, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Add up, at every operation, the sizes of the tensors alive: shape (t, …) to (operations, …)."""
        change = np.zeros((len(self.operations) + 1, *sizes.shape[1:]), dtype=np.int64)
        np.add.at(change, self.born, sizes)
        np.add.at(change, self.last + 1, -sizes)
        return np.cumsum(change, axis=0)[:-1]


def peak_activation_bytes(model: nn.Module, example: Tensor) -> int:
    """Count the bytes of activations alive at once in a forward pass of one example, at the operation with the most.

    In eval mode, without autograd. An operation holds what it reads and what it makes; a tensor lives until the last
    operation that uses it, as if ``forward`` dropped it then; views and in-place results share the memory of what they
    view. Counted with its storage: the example, every result, constants that ``forward`` makes. Not counted:
    parameters and buffers, scratch space inside an operation, what an allocator holds in reserve.

    Args:
        model: any module; neither changed nor left in another mode.
        example: a batch of inputs, of which the first is used.

    Returns:
        The bytes.

    Raises:
        ValueError: an empty batch.
    """
    lives = lifetimes(model, example)
    return int(lives.alive(lives.bytes).max(initial=0))


def lifetimes(model: nn.Module, example: Tensor) -> Lifetimes:
    """Run the model on the first example and record which tensors are alive when, as ``peak_activation_bytes`` says.

    Attention and recurrence are taken apart into their products, as when the fused kernels cannot be used.
    """
    if example.ndim == 0 or example.shape[0] == 0:
        raise ValueError(f"example has shape {tuple(example.shape)}. Pass a batch with at least one input.")
    one = as_input(example[:1].clone(), model)  # a slice would hold the storage of the whole batch
    record = _Record(model, one)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with inspecting(model), sdpa_kernel(SDPBackend.MATH), record:
            output = model(one)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return record.lifetimes(output)


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation and keeps the storages it meets, so that none of them is reused."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.constant = {_address(t) for t in (*model.parameters(), *model.buffers())}
        self.operations: list[str] = []
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.spans: dict[int, tuple[int, int]] = {}
        self.meet(example, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        now = len(self.operations)
        self.operations.append(str(func))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor):
                self.meet(value, now)
        return result

    def meet(self, tensor: Tensor, now: int) -> None:
        address = _address(tensor)
        if address in self.constant:
            return
        self.storages.setdefault(address, tensor.untyped_storage())
        self.spans[address] = (self.spans.get(address, (now, now))[0], now)

    def lifetimes(self, output: Any) -> Lifetimes:
        end = max(len(self.operations) - 1, 0)
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self.meet(value, end)
        spans = np.array(list(self.spans.values()), dtype=np.int64).reshape(-1, 2)
        sizes = np.array([self.storages[address].nbytes() for address in self.spans], dtype=np.int64)
        return Lifetimes(tuple(self.operations) or ("none",), spans[:, 0], spans[:, 1], sizes)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
