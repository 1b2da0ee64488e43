"""The few things that are done differently to NumPy arrays and to torch tensors, which stay on their device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import scipy.linalg
from threadpoolctl import ThreadpoolController

from ellq.theory.arguments import Array, is_tensor


def namespace(values: Any) -> Any:
    """Return the module, NumPy or torch, whose functions take these values."""
    if is_tensor(values):
        import torch

        return torch
    return np


def zeros(like: Any, *shape: int) -> Array:
    """Return zeros of the kind, and on the device, of ``like``."""
    array: Array = namespace(like).zeros(shape, dtype=like.dtype, device=like.device)
    return array


def beside(like: Any, values: Any) -> Array:
    """Return values as floats of the kind, and on the device, of ``like``."""
    array: Array = namespace(like).asarray(values, dtype=like.dtype, device=like.device)
    return array


def on_host(values: Any) -> Array:
    """Return values as a NumPy array."""
    return np.asarray(values.cpu().numpy() if is_tensor(values) else values)


def solve_upper(upper: Any, b: Any, *, transposed: bool = False) -> Array:
    """Solve upper @ x = b, or upperᵀ @ x = b, for a vector or the columns of a matrix."""
    solution: Array
    if namespace(upper) is np:
        solution = scipy.linalg.solve_triangular(upper, b, trans=int(transposed), check_finite=False)
        return solution
    A, sides = upper.T if transposed else upper, b[:, None] if b.ndim == 1 else b
    solution = namespace(upper).linalg.solve_triangular(A, sides, upper=not transposed)
    return solution[:, 0] if b.ndim == 1 else solution


@contextmanager
def blas_threads(limit: int) -> Iterator[int]:
    """Let NumPy and SciPy use at most so many threads, and yield how many they could use before."""
    with _blas().limit(limits=limit, user_api="blas") as limited:
        yield limited.get_original_num_threads()["blas"] or 1


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
