"""Accumulators fed by several processes: as if by one, the same bits in all of them, and no process left waiting."""

import datetime
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ellq.analysis.distributed import gather
from ellq.theory.accumulators import Gram, Tsqr

ROWS, FEATURES, TARGETS = 60, 5, 2
KINDS = (Gram, Tsqr)


def rows(rank=0, world=1):
    X = np.random.default_rng(3).normal(size=(ROWS, FEATURES)) + 100
    return X[rank::world], X[rank::world, :TARGETS] ** 2


def accumulated(kind, X, Y, device=None):
    accumulator = kind(X.shape[1], TARGETS, device=device)
    for x, y in zip(np.array_split(X, 2), np.array_split(Y, 2), strict=True):
        if len(x):
            accumulator.update(x, y)
    return accumulator


def part(case, kind, rank, world):
    """What one process accumulates of the case."""
    X, Y = rows(rank, world)
    if case == "others only":  # processes of odd rank have all the samples
        X, Y = rows(rank // 2, world // 2) if rank % 2 else (X[:0], Y[:0])
    if case == "another width" and rank == world - 1:
        X = X[:, 1:]
    if case == "another kind" and rank == world - 1:
        kind = KINDS[1 - KINDS.index(kind)]
    return accumulated(kind, X, Y, device="cpu" if case == "tensors" else None)


CASES = ("usual", "others only", "tensors", "another width", "another kind", "pairs")


def process(folder: Path, rank: int, world: int) -> None:
    """Gather every case as one of several processes, and leave the results or errors in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    pairs = [dist.new_group([2 * i, 2 * i + 1]) for i in range(world // 2)]
    results = {}
    for case in CASES:
        for kind in KINDS:
            try:
                mine = part(case, kind, rank, world)
                total = gather(mine, group=pairs[rank // 2]) if case == "pairs" else gather(mine)
                assert total.device == mine.device
                results[case, kind] = total.to(None)
            except (TypeError, ValueError) as error:
                results[case, kind] = error
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    """What every process got in every case."""
    folder, world = tmp_path_factory.mktemp("processes"), request.param
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(folder), str(rank), str(world)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        printed = [one.communicate(timeout=120)[0] for one in processes]
    finally:
        for one in processes:
            one.kill()
    assert all(one.returncode == 0 for one in processes), "\n".join(printed)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def assert_is_whole(total, X, Y):
    assert (total.samples, total.features, total.targets) == (len(X), FEATURES, TARGETS)
    whole = accumulated(type(total), X, Y)
    np.testing.assert_allclose(total.x_mean, whole.x_mean, rtol=1e-14)
    for ours, theirs in zip(total.moments(centred=True), whole.moments(centred=True), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max())


def bits(total):
    return b"".join(array.tobytes() for centred in (True, False) for array in total.moments(centred=centred))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["usual", "others only", "tensors"])
def test_processes_gather_what_one_process_would_accumulate(results, case, kind):
    totals = [result[case, kind] for result in results]
    assert_is_whole(totals[0], *rows())
    assert totals[0].batches == (len(results) if case == "others only" else 2 * len(results))
    assert {bits(total) for total in totals} == {bits(totals[0])}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("another width", ValueError, "accumulated 4 features and 2 targets, but rank 0 5 and 2"),
        ("another kind", TypeError, "Use one kind in all processes"),
    ],
)
def test_every_process_refuses_what_does_not_fit(results, kind, case, error, words):
    for result in results:
        assert isinstance(result[case, kind], error)
        assert str(result[case, kind]).startswith(f"Rank {len(results) - 1} ")
        assert words in str(result[case, kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_gathers_its_own_processes_only(results, kind):
    world = len(results)
    for rank, result in enumerate(results):
        members = rank // 2 * 2, rank // 2 * 2 + 1
        shares = [rows(member, world) for member in members]
        assert_is_whole(result["pairs", kind], *map(np.concatenate, zip(*shares, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_without_processes_an_accumulator_stays_as_it_is(kind):
    accumulator = kind(3)
    accumulator.update(np.ones((4, 3)))
    assert gather(accumulator) is accumulator


if __name__ == "__main__":
    process(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
