"""Estimating batch norms' statistics anew, on the inputs that a changed network gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ellq.pruning.walk import keeps_statistics


def recalibrate_(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Replace the running means and variances of every batch norm by those of calibration inputs, in place.

    Each is the mean over batches, all norms in one pass, as in training; nothing else changes, modes included.

    Args:
        model: the network; changed.
        batches: calibration inputs, each of more than one example.
    """
    norms: list[Any] = [module for module in model.modules() if keeps_statistics(module)]
    before = [(norm.training, norm.momentum) for norm in norms]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            for batch in batches:
                model(batch.clone())
    finally:
        for norm, (_, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
