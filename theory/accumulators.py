"""What selection and refit need to know of features and targets, fed in batches and mergeable.

Memory does not depend on the number of samples. Two kinds with one interface: ``Gram`` sums products, ``Tsqr`` keeps a
triangular factor. Both centre every block of rows on its own mean and join blocks by Chan's formula, which says that
the squares about the common mean are those of the two parts and of one more row:

    √(n₁·n₂ / (n₁ + n₂)) · (mean₂ − mean₁)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from ellq.theory.arguments import Array, count, finite_array, is_tensor
from ellq.theory.array_kinds import blas_threads, on_host
from ellq.theory.columns import Moments, Triangle

if TYPE_CHECKING:
    import torch

    Device: TypeAlias = str | torch.device | None

# Entries of one block of rows: large enough for the speed of one large product, small beside the data.
_BLOCK, _DEVICE_BLOCK = 2**21, 2**24
_PANEL = 32  # columns that LAPACK eliminates at once


class _Counted(ABC):
    """What both accumulators know of their samples: the layout, how many there were, and their means."""

    _centre: _Centre

    def __init__(self, features: int, targets: int = 0, *, device: Device = None) -> None:
        self.features = count(features, "features", low=1, high=2**20)
        self.targets = count(targets, "targets", low=0, high=2**20)
        self.batches = 0
        self._clear(device)

    @abstractmethod
    def _clear(self, device: Device) -> None:
        """Begin with arrays for no samples."""

    @property
    def samples(self) -> int:
        """Return n so far."""
        return self._centre.samples

    @property
    def x_mean(self) -> Array:
        """Return the means of the features, shape (m,)."""
        return self._centre.mean[: self.features]

    @property
    def y_mean(self) -> Array:
        """Return the means of the targets, shape (c,)."""
        return self._centre.mean[self.features :]

    @property
    def device(self) -> Device:
        """Return where the arrays are tensors, or None if they are NumPy's."""
        mean = self._centre.origin
        return mean.device if is_tensor(mean) else None

    def require_samples(self) -> None:
        """Raise ValueError if nothing was accumulated."""
        if self.samples == 0:
            raise ValueError("The accumulator is empty. Feed at least one sample first.")

    def _refuse_other_layout(self, other: _Counted) -> None:
        if type(other) is not type(self):
            raise TypeError(
                f"Cannot merge a {type(self).__name__} with a {type(other).__name__}. Use one kind of accumulator for"
                " all parts."
            )
        if (self.features, self.targets) != (other.features, other.targets):
            raise ValueError(
                f"Cannot merge accumulators of {self.features} features and {self.targets} targets with"
                f" {other.features} and {other.targets}. Accumulate the same layer in all parts."
            )


class Gram(_Counted):
    """Centred second moments of features X (n, m) and targets Y (n, c), accumulated in float64.

    One matrix product per block of rows. The squares lose half the digits: directions of X below 1e-8 of its largest,
    and columns below 1e-154 altogether, cannot be told from zero; ``Tsqr`` keeps them. Two accumulators merge by
    addition; the order of batches changes the last digits only.

    Attributes:
        features, targets: m and c.
        samples, batches: how many so far.
        x_mean, y_mean: column means, shapes (m,) and (c,).
        xx: Σ (x − x̄)(x − x̄)ᵀ, shape (m, m).
        xy: Σ (x − x̄)(y − ȳ)ᵀ, shape (m, c).
        yy: Σ (y − ȳ)² per target, shape (c,).

    Args:
        features: m ≥ 1.
        targets: c ≥ 0.
        device: a torch device to compute on, with tensors for arrays. By default a first batch on a GPU decides, and
            anything else is computed by NumPy. Later batches are moved to where the accumulator is.

    Raises:
        TypeError: counts that are not whole numbers.
        ValueError: counts out of range.

    Reference: Chan, Golub & LeVeque 1983.
    """

    def _clear(self, device: Device) -> None:
        m, c = self.features, self.targets
        self._centre = _Centre(0, _zeros((m + c,), device), _zeros((m + c,), device))
        self.xx, self.xy, self.yy = _zeros((m, m), device), _zeros((m, c), device), _zeros((c,), device)

    def update(self, x: npt.ArrayLike, y: npt.ArrayLike | None = None) -> None:
        """Add a batch: NumPy arrays or torch tensors of any real dtype.

        Args:
            x: features, shape (b, m).
            y: targets, shape (b, c); may be left out where c = 0.

        Raises:
            TypeError: values that are not real numbers.
            ValueError: a shape that does not fit, a NaN or infinite entry, or squares beyond float64; the message
                names the batch, and nothing is added.
        """
        batch = _Batch(f"batch {self.batches}", x, y, self.features, self.targets)
        if self.samples == 0 and self.device is None and batch.accelerator is not None:
            self._clear(batch.accelerator)
        m, centre, xx, xy, yy = self.features, self._centre, self.xx, self.xy, self.yy
        with np.errstate(over="ignore", invalid="ignore"):
            for block, Z in batch.centred(self.device):
                centre, Z[-1] = centre.joined(block)
                X, Y = Z[:, :m], Z[:, m:]
                xx, xy, yy = xx + X.T @ X, xy + X.T @ Y, yy + _squares(Y)
            batch.require_finite(xx.diagonal(), xy, yy, centre.mean)
        self._centre, self.xx, self.xy, self.yy = centre, xx, xy, yy
        self.batches += 1

    def merge(self, other: Gram) -> Gram:
        """Return the accumulator of both sets of samples; neither part changes.

        Raises:
            TypeError: ``other`` is not a Gram.
            ValueError: the two have different numbers of features or targets.
        """
        self._refuse_other_layout(other)
        device = (self if self.samples else other).device
        a, b = self.to(device), other.to(device)
        total = Gram(self.features, self.targets, device=device)
        total.batches = a.batches + b.batches
        with np.errstate(over="ignore", invalid="ignore"):
            total._centre, shift = a._centre.joined(b._centre)
            x_shift, y_shift = shift[: self.features], shift[self.features :]
            total.xx = a.xx + b.xx + x_shift[:, None] * x_shift
            total.xy = a.xy + b.xy + x_shift[:, None] * y_shift
            total.yy = a.yy + b.yy + y_shift**2
        _require_merged(total.xx, total.xy, total.yy)
        return total

    def moments(self, *, centred: bool) -> tuple[Array, Array, Array]:
        """Return (XᵀX, XᵀY, Σy²) of the samples so far, with the means removed or not.

        Raises:
            ValueError: nothing was accumulated.
        """
        columns = self.columns(centred=centred)
        return columns.G, columns.R, columns.yy

    def columns(self, *, centred: bool) -> Moments:
        """Return what selection rules and solvers take: the second moments, with the means removed or not.

        Raises:
            ValueError: nothing was accumulated.
        """
        self.require_samples()
        n, x, y = self.samples, self.x_mean, self.y_mean
        if centred:
            x, y = 0.0 * x, 0.0 * y
        with np.errstate(over="ignore"):
            # New arrays in either case: what is handed out is never ours.
            return Moments(self.xx + n * (x[:, None] * x), self.xy + n * (x[:, None] * y), self.yy + n * y**2)

    def to(self, device: Device) -> Gram:
        """Return the accumulator with tensors on ``device``, or with NumPy arrays for None."""
        moved = Gram(self.features, self.targets, device=device)
        moved.batches, moved._centre = self.batches, self._centre.to(device)
        moved.xx, moved.xy, moved.yy = _moved(self.xx, device), _moved(self.xy, device), _moved(self.yy, device)
        return moved


class Tsqr(_Counted):
    """Triangular factor of features X (n, m) and targets Y (n, c), accumulated in float64 without forming squares.

    With p = m + c, the factor R (p, p) has RᵀR = [X | Y]ᵀ[X | Y] about the means; together with the means it is the R
    factor of [1 | X | Y]:

        [ √n   √n·mean ]
        [ 0       R    ]

    About 2·n·p² operations, several times the cost of ``Gram``, but the condition number is not squared: every column
    is kept to 1e-16 of its norm. Two accumulators merge by factoring one R stacked on the other. Feed batches of at
    least p rows on a GPU, where each costs a factorisation of p more.

    Attributes:
        features, targets: m and c.
        samples, batches: how many so far.
        x_mean, y_mean: column means, shapes (m,) and (c,).
        factor: R, upper triangular, shape (p, p); signs of its rows are arbitrary.

    Args:
        features: m ≥ 1.
        targets: c ≥ 0.
        device: as for ``Gram``.

    Raises:
        TypeError: counts that are not whole numbers.
        ValueError: counts out of range.

    Reference: Demmel, Grigori, Hoemmen & Langou 2012; centring by Chan's row is ours.
    """

    def _clear(self, device: Device) -> None:
        p = self.features + self.targets
        self._centre = _Centre(0, _zeros((p,), device), _zeros((p,), device))
        self.factor = _zeros((p, p), device)

    def update(self, x: npt.ArrayLike, y: npt.ArrayLike | None = None) -> None:
        """Add a batch: NumPy arrays or torch tensors of any real dtype.

        Args:
            x: features, shape (b, m).
            y: targets, shape (b, c); may be left out where c = 0.

        Raises:
            TypeError: values that are not real numbers.
            ValueError: a shape that does not fit, a NaN or infinite entry, or norms beyond float64; the message names
                the batch, and nothing is added.
        """
        batch = _Batch(f"batch {self.batches}", x, y, self.features, self.targets)
        if self.samples == 0 and self.device is None and batch.accelerator is not None:
            self._clear(batch.accelerator)
        centre, factor = self._centre, self.factor
        with np.errstate(over="ignore", invalid="ignore"):
            for block, Z in batch.centred(self.device):
                centre, Z[-1] = centre.joined(block)
                factor = _absorbed(factor, Z)
            batch.require_finite(factor, _squares(factor[:, self.features :]), centre.mean)
        self._centre, self.factor = centre, factor
        self.batches += 1

    def merge(self, other: Tsqr) -> Tsqr:
        """Return the accumulator of both sets of samples; neither part changes.

        Raises:
            TypeError: ``other`` is not a Tsqr.
            ValueError: the two have different numbers of features or targets.
        """
        self._refuse_other_layout(other)
        device = (self if self.samples else other).device
        a, b = self.to(device), other.to(device)
        total = Tsqr(self.features, self.targets, device=device)
        total.batches = a.batches + b.batches
        with np.errstate(over="ignore", invalid="ignore"):
            total._centre, shift = a._centre.joined(b._centre)
            total.factor = _absorbed(_absorbed(a.factor, b.factor), shift[None])
            _require_merged(total.factor, _squares(total.factor[:, total.features :]))
        return total

    def moments(self, *, centred: bool) -> tuple[Array, Array, Array]:
        """Return (XᵀX, XᵀY, Σy²) of the samples so far, with the means removed or not.

        Forming them loses what ``columns`` keeps.

        Raises:
            ValueError: nothing was accumulated.
        """
        columns = self.columns(centred=centred).moments()
        return columns.G, columns.R, columns.yy

    def columns(self, *, centred: bool) -> Triangle:
        """Return what selection rules and solvers take: the triangle, with the means removed or not.

        Raises:
            ValueError: nothing was accumulated.
        """
        self.require_samples()
        factor, m = self.factor, self.features
        with np.errstate(over="ignore"):
            if not centred:
                factor = _absorbed(factor, math.sqrt(self.samples) * self._centre.mean[None])
            Y = factor[:, m:]
            # Copies: what is handed out is never ours. X has no rows below the first m.
            return Triangle(factor[:m, :m] + 0.0, Y[:m] + 0.0, _squares(Y))

    def to(self, device: Device) -> Tsqr:
        """Return the accumulator with tensors on ``device``, or with NumPy arrays for None."""
        moved = Tsqr(self.features, self.targets, device=device)
        moved.batches, moved._centre = self.batches, self._centre.to(device)
        moved.factor = _moved(self.factor, device)
        return moved


Accumulator: TypeAlias = Gram | Tsqr


@dataclass(frozen=True)
class _Centre:
    """How many samples there are, and their mean as one of them and the offset from it.

    The offset is of the size of the spread, so it has the digits that a large mean has not.
    """

    samples: int
    origin: Array
    offset: Array

    @property
    def mean(self) -> Array:
        return self.origin + self.offset

    def joined(self, other: _Centre) -> tuple[_Centre, Array]:
        """Return the centre of both, and the row whose squares make up for the centres being apart."""
        if not self.samples or not other.samples:
            return (self if self.samples else other), 0.0 * self.offset
        total = self.samples + other.samples
        apart = (other.origin - self.origin) + (other.offset - self.offset)
        offset = self.offset + apart * (other.samples / total)
        return _Centre(total, self.origin, offset), math.sqrt(self.samples * other.samples / total) * apart

    def to(self, device: Device) -> _Centre:
        return replace(self, origin=_moved(self.origin, device), offset=_moved(self.offset, device))


class _Batch:
    """A batch of rows [X | Y], checked, and read block by block."""

    def __init__(self, name: str, x: Any, y: Any, features: int, targets: int) -> None:
        if y is None and targets:
            raise ValueError(f"{name} has no targets, but the accumulator was made for {targets}. Pass y.")
        self.name = name
        X = _table(x, f"{name}, features,")
        Y = np.empty((len(X), 0)) if y is None and X.ndim else _table(y, f"{name}, targets,")
        if X.ndim != 2 or Y.ndim != 2 or X.shape[1] != features or Y.shape[1] != targets:
            raise ValueError(
                f"{name} has features of shape {tuple(X.shape)} and targets of shape {tuple(Y.shape)}; expected"
                f" (b, {features}) and (b, {targets})."
            )
        if len(X) != len(Y):
            raise ValueError(f"{name} has {len(X)} feature rows but {len(Y)} target rows.")
        self.parts = (X, Y)

    @property
    def accelerator(self) -> Device:
        """Return the device of the features, if torch computes in float64 there and NumPy cannot."""
        X = self.parts[0]
        return X.device if is_tensor(X) and X.device.type not in ("cpu", "mps") else None

    def centred(self, device: Device) -> Iterator[tuple[_Centre, Array]]:
        """Yield the centre of every block of rows, and the rows about it with a spare one at the end.

        The rows are valid until the next block.
        """
        samples, p = len(self.parts[0]), sum(part.shape[1] for part in self.parts)
        # Not below p rows, or adding up (p, p) results would cost more than computing them.
        length = min(samples, max((_BLOCK if device is None else _DEVICE_BLOCK) // p, p))
        rows = _zeros((length + 1, p), device)
        for start in range(0, samples, max(length, 1)):
            Z = rows[: min(length, samples - start) + 1]
            block = Z[:-1]
            X, Y = (part[start : start + length] for part in self.parts)
            _fill(block[:, : X.shape[1]], X)
            _fill(block[:, X.shape[1] :], Y)
            # About its first row, not zero: a large mean has no digits to spare for itself.
            origin = block[0] + 0.0
            block -= origin
            offset = block.mean(axis=0)
            block -= offset
            yield _Centre(len(block), origin, offset), Z

    def require_finite(self, *results: Array) -> None:
        """Refuse the batch for the entry that made a result NaN or infinite."""
        if _are_finite(*results):
            return
        for part, what in zip(self.parts, ("features", "targets"), strict=True):
            finite_array(part, f"{self.name}, {what},")
        raise ValueError(f"{self.name} holds values so large that sums of their squares overflow. Scale them down.")


def _table(values: Any, name: str) -> Any:
    """Return a NumPy array or a detached tensor, not copied; refuse what does not hold real numbers."""
    if is_tensor(values):
        if values.is_nested or values.is_meta:
            finite_array(values, name)  # refuses it
        table: Any = values.detach() if str(values.layout) == "torch.strided" else values.detach().to_dense()
    else:
        if np.ma.is_masked(values):
            finite_array(values, name)
        table = np.asarray(values)
    if table.ndim:
        finite_array(table[:0], name)
    return table


def _fill(rows: Any, values: Any) -> None:
    """Copy an array or a tensor into rows of either kind, as float64."""
    if is_tensor(rows):
        import torch

        rows.copy_(values if is_tensor(values) else torch.from_numpy(np.array(values, dtype=np.float64)))
    else:
        rows[:] = values.cpu().double().numpy() if is_tensor(values) else values


def _squares(Y: Array) -> Array:
    return cast("Array", (Y * Y).sum(axis=0))


def _absorbed(R: Array, Z: Array) -> Array:
    """Return the R factor of R stacked on the rows Z."""
    if is_tensor(R):
        import torch

        return cast("Array", torch.linalg.qr(torch.cat([R, cast("torch.Tensor", Z)]), mode="r").R)
    # One thread: the many short steps of a panel gain little from more, and wait long for each other on a busy machine.
    with blas_threads(1):
        factor, *_ = lapack.dtpqrt(0, min(_PANEL, len(R)), R, Z)
    return cast("Array", factor)


def _require_merged(*results: Array) -> None:
    if not _are_finite(*results):
        raise ValueError("The merged sums of squares overflow. Scale the values of both parts down.")


def _are_finite(*results: Array) -> bool:
    return all(math.isfinite(float(abs(result).max())) for result in results if 0 not in result.shape)


def _zeros(shape: tuple[int, ...], device: Device) -> Array:
    if device is None:
        return np.zeros(shape)
    import torch

    return cast("Array", torch.zeros(shape, dtype=torch.float64, device=device))


def _moved(array: Array, device: Device) -> Array:
    if device is None:
        return on_host(array)
    import torch

    return cast("Array", torch.as_tensor(array, device=device))
