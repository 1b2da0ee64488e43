"""Channels pruned by two processes, each with half of the inputs: the same bits in both, and what one would get."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn

import ellq
from ellq.pruning import Plan

WORLD, BATCHES = 2, 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 16, 4)),
    ).eval()


def inputs() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(50, 3, 4, 4, generator=draw) for _ in range(BATCHES)]


def process(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=wait)
    plan = ellq.plan(network(), inputs()[rank::WORLD], method="id", flops=0.5, recalibrate=True)
    (folder / f"{rank}.json").write_text(plan.to_json())
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_plan_what_one_would(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(tmp_path), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        printed = [one.communicate(timeout=120)[0] for one in started]
    finally:
        for one in started:
            one.kill()
    assert all(one.returncode == 0 for one in started), "\n".join(printed)
    texts = [(tmp_path / f"{rank}.json").read_text() for rank in range(WORLD)]
    assert texts[0] == texts[1]
    found, alone = Plan.from_json(texts[0]), ellq.plan(network(), inputs(), method="id", flops=0.5, recalibrate=True)
    assert found.table.equals(alone.table)
    for name, value in alone.values.items():
        np.testing.assert_allclose(found.values[name], value, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    process(Path(sys.argv[1]), int(sys.argv[2]))
