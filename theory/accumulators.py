"""Second moments of features and targets, fed in batches and mergeable, in memory independent of the samples."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import Array, refuse_nonfinite


class Gram:
    """Centred second moments of features X (n, m) and targets Y (n, c), accumulated in float64.

    Every batch is centred on its own mean and merged by Chan's formula, so a large mean does not swallow a small
    spread. Two accumulators merge by addition; the order of batches changes the last digits only.

    Attributes:
        samples: n so far.
        x_mean, y_mean: column means, shapes (m,) and (c,).
        xx: Σ (x − x̄)(x − x̄)ᵀ, shape (m, m).
        xy: Σ (x − x̄)(y − ȳ)ᵀ, shape (m, c).
        yy: Σ (y − ȳ)² per target, shape (c,).

    Reference: Chan, Golub & LeVeque 1983.
    """

    def __init__(self, features: int, targets: int) -> None:
        if features < 1 or targets < 0:
            raise ValueError(f"features={features}, targets={targets}: need features >= 1 and targets >= 0.")
        self.samples = 0
        self.batches = 0
        self.x_mean: Array = np.zeros(features)
        self.y_mean: Array = np.zeros(targets)
        self.xx: Array = np.zeros((features, features))
        self.xy: Array = np.zeros((features, targets))
        self.yy: Array = np.zeros(targets)

    def update(self, x: npt.ArrayLike, y: npt.ArrayLike) -> None:
        """Add a batch.

        Args:
            x: features, shape (b, m).
            y: targets, shape (b, c).

        Raises:
            ValueError: a shape that does not fit, or a NaN or infinite entry; the message names the batch, and
                nothing is added.
        """
        name = f"batch {self.batches}"
        X, Y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        if X.ndim != 2 or Y.ndim != 2 or X.shape[1] != self.x_mean.size or Y.shape[1] != self.y_mean.size:
            raise ValueError(
                f"{name} has features of shape {X.shape} and targets of shape {Y.shape}; expected"
                f" (b, {self.x_mean.size}) and (b, {self.y_mean.size})."
            )
        if X.shape[0] != Y.shape[0]:
            raise ValueError(f"{name} has {X.shape[0]} feature rows but {Y.shape[0]} target rows.")
        refuse_nonfinite(X, f"{name}, features,")
        refuse_nonfinite(Y, f"{name}, targets,")
        self.batches += 1
        if X.shape[0] == 0:
            return
        (X, x_mean), (Y, y_mean) = _centred(X), _centred(Y)
        self._add(X.shape[0], x_mean, y_mean, X.T @ X, X.T @ Y, (Y * Y).sum(axis=0))

    def merge(self, other: Gram) -> Gram:
        """Return the accumulator of both sets of samples.

        Raises:
            ValueError: the two have different numbers of features or targets.
        """
        if self.xy.shape != other.xy.shape:
            raise ValueError(f"Cannot merge accumulators of layouts {self.xy.shape} and {other.xy.shape}.")
        total = Gram(*self.xy.shape)
        for part in (self, other):
            total._add(part.samples, part.x_mean, part.y_mean, part.xx, part.xy, part.yy)
        total.batches = self.batches + other.batches
        return total

    def _add(self, samples: int, x_mean: Array, y_mean: Array, xx: Array, xy: Array, yy: Array) -> None:
        if samples == 0:
            return
        total = self.samples + samples
        x_shift, y_shift = x_mean - self.x_mean, y_mean - self.y_mean
        weight = self.samples * samples / total
        self.xx += xx + weight * np.outer(x_shift, x_shift)
        self.xy += xy + weight * np.outer(x_shift, y_shift)
        self.yy += yy + weight * y_shift**2
        self.x_mean = self.x_mean + x_shift * (samples / total)
        self.y_mean = self.y_mean + y_shift * (samples / total)
        self.samples = total

    def moments(self, *, centred: bool) -> tuple[Array, Array, Array]:
        """Return (XᵀX, XᵀY, Σy²) of the samples so far, with the means removed or not.

        Raises:
            ValueError: nothing was accumulated.
        """
        self.require_samples()
        if centred:
            return self.xx.copy(), self.xy.copy(), self.yy.copy()
        n = self.samples
        return (
            self.xx + n * np.outer(self.x_mean, self.x_mean),
            self.xy + n * np.outer(self.x_mean, self.y_mean),
            self.yy + n * self.y_mean**2,
        )

    def require_samples(self) -> None:
        """Raise ValueError if nothing was accumulated."""
        if self.samples == 0:
            raise ValueError("The accumulator is empty. Feed at least one sample first.")


def _centred(values: Array) -> tuple[Array, Array]:
    mean = values.mean(axis=0)
    values = values - mean
    # The mean of many large values is off in its last digits; what it missed is the mean of what is left.
    missed = values.mean(axis=0)
    return values - missed, mean + missed
