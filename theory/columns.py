"""What selection rules and solvers see of the data: second moments, or a triangle that has the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy.typing as npt

from ellq.theory.arguments import Array, finite_array, is_tensor


@dataclass(frozen=True)
class Moments:
    """Second moments of features X (n, m) and targets Y (n, c).

    Values are checked once, here, and not copied. Tensors stay float64 tensors on their device, all three alike.

    Attributes:
        G: XᵀX, shape (m, m), symmetric, finite.
        R: XᵀY, shape (m, c); c = 0 if not given.
        yy: Σ y² of each target, shape (c,); 0 if not given.

    Raises:
        TypeError: values that are not real numbers.
        ValueError: NaN or infinite values, shapes that do not fit, or G not symmetric with a diagonal ≥ 0.
    """

    G: Array
    R: Array
    yy: Array

    def __init__(self, G: npt.ArrayLike, R: npt.ArrayLike | None = None, yy: npt.ArrayLike | None = None) -> None:
        G = _finite(G, "G", ndim=2)
        m = G.shape[0]
        if G.shape != (m, m) or m == 0:
            raise ValueError(f"G has shape {tuple(G.shape)}. Pass a square matrix XᵀX of at least one feature.")
        R = G[:, :0] if R is None else _finite(R, "R", ndim=2)
        if len(R) != m:
            raise ValueError(f"R has {len(R)} rows but G has {m}. Pass XᵀY with one row per feature.")
        diagonal = G.diagonal()
        if not bool((diagonal >= 0).all()):
            raise ValueError(f"G has {float(diagonal.min()):g} on its diagonal. Pass XᵀX, whose diagonal is >= 0.")
        # Far coarser than rounding, to catch the wrong matrix only.
        if bool(abs(G - G.T).max() > 1e-6 * abs(G).max()):
            raise ValueError("G is not symmetric. Pass XᵀX.")
        _set(self, G=G, R=R, yy=_squares(yy, R[0] * 0, R.shape[1]))

    @property
    def features(self) -> int:
        """Return m."""
        return int(self.G.shape[0])

    @property
    def targets(self) -> int:
        """Return c."""
        return int(self.R.shape[1])

    def moments(self) -> Moments:
        """Return these moments."""
        return self

    def cpu(self) -> Moments:
        """Return the same with NumPy arrays."""
        return Moments(finite_array(self.G, "G"), finite_array(self.R, "R"), finite_array(self.yy, "yy"))


@dataclass(frozen=True)
class Triangle:
    """A short X and Y that an orthogonal reduction left of the data: the same XᵀX and XᵀY, without forming them.

    Any rows do, so a matrix that fits in memory is one too; an accumulator gives an upper triangular X. Working on X
    instead of XᵀX does not square the condition number. Values are checked once, here, and not copied. Tensors stay
    float64 tensors on their device, all three alike.

    Attributes:
        X: shape (r, m), finite.
        Y: shape (r, c); c = 0 if not given.
        yy: Σ y² of each target over all samples, shape (c,); at least Σ Y² but for rounding, and Σ Y² if not given.

    Raises:
        TypeError: values that are not real numbers.
        ValueError: NaN or infinite values, or shapes that do not fit.
    """

    X: Array
    Y: Array
    yy: Array

    def __init__(self, X: npt.ArrayLike, Y: npt.ArrayLike | None = None, yy: npt.ArrayLike | None = None) -> None:
        X = _finite(X, "X", ndim=2)
        if X.shape[1] == 0:
            raise ValueError(f"X has shape {tuple(X.shape)}. Pass at least one feature.")
        Y = X[:, :0] if Y is None else _finite(Y, "Y", ndim=2)
        if len(Y) != len(X):
            raise ValueError(f"Y has {len(Y)} rows but X has {len(X)}. Pass one row of targets per row of features.")
        _set(self, X=X, Y=Y, yy=_squares(yy, (Y * Y).sum(axis=0), Y.shape[1]))

    @property
    def features(self) -> int:
        """Return m."""
        return int(self.X.shape[1])

    @property
    def targets(self) -> int:
        """Return c."""
        return int(self.Y.shape[1])

    def moments(self) -> Moments:
        """Return XᵀX, XᵀY and Σ y², which hold half the digits only."""
        return Moments(self.X.T @ self.X, self.X.T @ self.Y, self.yy)

    def cpu(self) -> Triangle:
        """Return the same with NumPy arrays."""
        return Triangle(finite_array(self.X, "X"), finite_array(self.Y, "Y"), finite_array(self.yy, "yy"))


Columns: TypeAlias = Moments | Triangle


def _set(columns: Columns, **values: Array) -> None:
    for name, value in values.items():
        object.__setattr__(columns, name, value)  # the dataclass is frozen


def _squares(yy: npt.ArrayLike | None, default: Array, targets: int) -> Array:
    values = default if yy is None else _finite(yy, "yy", ndim=1)
    if tuple(values.shape) != (targets,):
        raise ValueError(f"yy has shape {tuple(values.shape)}, expected ({targets},): one sum of squares per target.")
    if not bool((values >= 0).all()):
        raise ValueError(f"yy holds {float(values.min()):g}. Pass sums of squares, which are >= 0.")
    return values


def _finite(values: npt.ArrayLike, name: str, *, ndim: int) -> Array:
    """Check as ``finite_array`` does, but leave a tensor a tensor, on its device."""
    if not is_tensor(values):
        return finite_array(values, name, ndim=ndim)
    finite_array(values[:0], name, ndim=ndim)  # the kind of numbers and the dimensions
    tensor = values.detach().double()
    if not bool(tensor.isfinite().all()):
        finite_array(tensor, name)
    return cast("Array", tensor)
