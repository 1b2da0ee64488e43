"""Estimating batch norms' statistics anew, on the inputs that a changed network gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ellq.analysis.distributed import mean_of
from ellq.pruning.walk import does_not_run, keeps_statistics


def recalibrate_(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Replace the running means and variances of every batch norm by those of calibration inputs, in place.

    Each is the mean over batches, all norms in one pass, as in training; nothing else changes, modes included. Batches
    of one example, which may have no variance, are left out where there are others. Where ``torch.distributed`` is
    initialised, over the batches of all processes.

    Args:
        model: the network; changed.
        batches: calibration inputs.

    Raises:
        ValueError: a norm sees a single value per channel.
    """
    batches = [batch for batch in batches if len(batch) > 1] or batches
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
            for number, batch in enumerate(batches):
                try:
                    model(batch.clone())
                except Exception as error:  # torch's, or the model's own
                    raise does_not_run(number, batch, error) from error
            statistics = [part for norm in norms for part in (norm.running_mean, norm.running_var)]
            for part, mean in zip(statistics, mean_of(statistics, len(batches)), strict=True):
                part.copy_(mean)
    finally:
        for norm, (_, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
