"""What a network costs: parameters, non-zero parameters, and floating-point operations of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from ellq.analysis.calibration import as_input, inspecting


@dataclass(frozen=True)
class Cost:
    """The size of a network.

    Attributes:
        parameters: how many numbers its parameters hold; a shared parameter counts once.
        nonzeros: how many of them are not 0, nor set to 0 by a mask (a parametrisation, or ``torch.nn.utils.prune``).
        flops: floating-point operations for one example, a multiply–add counted as two.
    """

    parameters: int
    nonzeros: int
    flops: int


def cost(model: nn.Module, example: Tensor) -> Cost:
    """Count parameters, non-zeros and FLOPs.

    FLOPs are those of matrix products and convolutions, 2 per multiply–add, as dense kernels execute them: a zero
    weight saves storage here, not time. Element-wise work is not counted. Counted by running the model once, in eval
    mode; the example is moved to its device and floating type.

    Args:
        model: any module; neither changed nor left in another mode.
        example: a batch of inputs; FLOPs are divided by its first dimension.

    Returns:
        The cost.

    Raises:
        ValueError: an empty batch.
    """
    if example.ndim == 0 or example.shape[0] == 0:
        raise ValueError(f"example has shape {tuple(example.shape)}. Pass a batch with at least one input.")
    with inspecting(model):  # in training, a spectral norm changes whenever it is computed
        nonzeros = _nonzeros(model)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        nonzeros=nonzeros,
        flops=_flops(model, example),
    )


def _nonzeros(model: nn.Module) -> int:
    """Count the parameters that are not 0, a shared one once, where it reaches furthest."""
    counts = {id(p): 0 for p in model.parameters()}

    def see(parameter: Tensor, used: Tensor | None = None) -> None:
        live = parameter.detach() != 0
        live = live if used is None else live & (used.detach() != 0)
        counts[id(parameter)] = max(counts[id(parameter)], int(live.count_nonzero()))

    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList) and module.is_tensor:
            computed = module()
            if isinstance(module.original, nn.Parameter):
                see(module.original, computed if computed.shape == module.original.shape else None)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            mask = getattr(module, f"{name.removesuffix('_orig')}_mask", None) if name.endswith("_orig") else None
            see(parameter, mask)
    return sum(counts.values())


def _flops(model: nn.Module, example: Tensor) -> int:
    fast, fused = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    # Fused attention and the fused LSTM are single opaque calls that would be counted as nothing.
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        counter = FlopCounterMode(display=False)
        with inspecting(model), sdpa_kernel(SDPBackend.MATH), counter:
            model(as_input(example, model))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(fused)
    return int(counter.get_total_flops()) // example.shape[0]
