"""Both sides of the theorems on skeletons and their risk in ball arithmetic, as ``balls`` collects them.

Singular values are roots of eigenvalues that FLINT encloses. A side that has no such oracle is None: of statements
about a quantile, the quantile; of those whose bound is rounded relative to the largest singular value, the bound.
"""

from itertools import combinations

import numpy as np
from flint import acb_mat, arb, arb_mat
from mpmath import mp, mpf

from ellq.theory.theorems_risk import _kurtosis, shares


def ball(value):
    return arb(float(value))


def matrix(A):
    A = np.atleast_2d(np.asarray(A, dtype=np.float64))
    return arb_mat(A.shape[0], A.shape[1], [ball(x) for x in A.ravel()])


def entries(M):
    return [M[i, j] for i in range(M.nrows()) for j in range(M.ncols())]


def frobenius(M):
    return sum((x * x for x in entries(M)), arb(0)).sqrt()


def singular_values(M):
    """Enclosures of the singular values, in falling order, as many as the smaller side."""
    if not M.nrows() or not M.ncols():
        return []
    G = M.transpose() * M if M.ncols() <= M.nrows() else M * M.transpose()
    trace = sum((G[i, i] for i in range(G.nrows())), arb(0))
    if not trace > 0:
        return [arb(0)] * G.nrows()
    G = G * (1 / trace).mid()
    try:
        values = [x.real for x in acb_mat(G).eig(multiple=True)]
    except ValueError:  # eigenvalues that cluster are not told apart: 120 digits instead of an enclosure
        with mp.workdps(120):
            roots = mp.eigsy(
                mp.matrix(
                    [[mpf(G[i, j].mid().str(130, radius=False)) for j in range(G.ncols())] for i in range(G.nrows())]
                ),
                eigvals_only=True,
            )
            values = [arb(mp.nstr(x, 115), 1e-110) for x in roots]
    return sorted((_root(x * trace) for x in values), key=lambda x: -float(x.mid()))


def _root(x):
    """The root of a number ≥ 0 whose ball may reach below."""
    return x.sqrt() if x > 0 else arb(0).union(abs(x).upper().sqrt())


def norm(M, kind):
    if kind == "frobenius":
        return frobenius(M)
    return next(iter(singular_values(M)), arb(0))


def floor(M, k, kind):
    rest = singular_values(M)[k:]
    return next(iter(rest), arb(0)) if kind == "spectral" else sum((x * x for x in rest), arb(0)).sqrt()


def rows(M, start):
    """The rows of M from one on."""
    return arb_mat(M.nrows() - start, M.ncols(), [M[i, j] for i in range(start, M.nrows()) for j in range(M.ncols())])


def qrcp(k, m, kind, f=1.0):
    """The factor of column-pivoted QR."""
    f, wide = ball(f), m - k if kind == "spectral" else 1
    squared = 1 + wide * f**4 * sum(((1 + f) ** (2 * j) for j in range(k)), arb(0))
    return (squared * (1 if kind == "spectral" else m - k)).sqrt()


def volume_mean(A, k):
    """The mean squared error of k columns drawn by squared volume, by enumerating them."""
    G, m = A.transpose() * A, A.ncols()

    def volume(J):
        return arb_mat(len(J), len(J), [G[i, j] for i in J for j in J]).det() if J else arb(1)

    total, weight = arb(0), arb(0)
    for J in combinations(range(m), k):
        weight += volume(J)
        total += sum((volume((*J, j)) for j in range(m) if j not in J), arb(0))
    return total / weight


def _eckart_young(features, indices, interpolation, norm):
    return floor(matrix(features), len(indices), norm), None


def _qrcp(R, retained, norm, threshold):
    return _rest(R, retained, norm), None


def _strong(R, retained, norm, limit):
    return _rest(R, retained, norm), None


def _rest(R, retained, kind):
    return norm(rows(matrix(R), retained), kind) if retained < len(R) else arb(0)


def _pivot_ratio(R, retained, side, threshold):
    M = matrix(R)
    share, ratio = norm(rows(M, retained), "spectral") / norm(M, "spectral"), abs(M[retained, retained] / M[0, 0])
    if side == "lower":
        return ratio / ball(threshold) / arb(R.shape[1]).sqrt(), share
    return share, (ratio * ball(threshold) * arb(R.shape[1] - retained).sqrt()).min(arb(1))


def _volume(features, retained):
    A = matrix(features)
    return volume_mean(A, retained), None


def _leverage(features, basis, indices, norm):
    return None, None


def _sampling(features, basis, draws):
    """The mean over all sets of columns that the draws may meet, their probabilities by inclusion and exclusion."""
    A, V = matrix(features), matrix(basis)
    G, m = A.transpose() * A, A.ncols()
    leverages = [sum((V[j, i] ** 2 for i in range(V.ncols())), arb(0)) for j in range(m)]
    within = {
        J: (sum((leverages[j] for j in J), arb(0)) / sum(leverages, arb(0))) ** draws
        for size in range(1, m + 1)
        for J in combinations(range(m), size)
    }

    def volume(J):
        return arb_mat(len(J), len(J), [G[i, j] for i in J for j in J]).det()

    mean = arb(0)
    for J in within:
        parts = [part for size in range(1, len(J) + 1) for part in combinations(J, size)]
        chance = sum(((-1) ** (len(J) - len(part)) * within[part] for part in parts), arb(0))
        kept = []
        for j in J:
            kept += [j] if volume([*kept, j]) > 0 else []
        base = volume(kept) if kept else arb(1)
        mean += chance * sum((volume([*kept, j]) for j in range(m) if j not in kept), arb(0)) / base
    return mean, None


def _mean_square(left, right):
    D = matrix(left) - matrix(right)
    return frobenius(D) ** 2 / D.nrows()


def _split(dense, pruned, labels):
    change, before = _mean_square(pruned, dense), _mean_square(dense, labels)
    return _mean_square(pruned, labels), (change.sqrt() + before.sqrt()) ** 2


def _pointwise(consumer, indices, interpolation, radius):
    U, T = matrix(consumer), matrix(interpolation) if len(indices) else None
    Q = -U
    if T is not None:
        W = U * T.transpose()
        for column, j in enumerate(indices):
            for i in range(Q.nrows()):
                Q[i, int(j)] += W[i, column]
    stretch = norm(T, "spectral").max(arb(1)) if T is not None else arb(1)
    B = ball(radius)
    return norm(Q, "spectral") ** 2 * B**2, norm(U, "spectral") ** 2 * stretch**2 * B**2


def _sizes(atoms, weights):
    """B² and ‖Σ‖."""
    A, p = matrix(atoms), shares(weights)
    lengths = [sum((A[i, j] ** 2 for j in range(A.ncols())), arb(0)) for i in range(A.nrows())]
    weighted = arb_mat(
        A.nrows(), A.ncols(), [A[i, j] * ball(p[i]).sqrt() for i in range(A.nrows()) for j in range(A.ncols())]
    )
    top = lengths[0]
    for length in lengths[1:]:
        top = top.max(length)
    return top, norm(weighted, "spectral") ** 2


def _share(features, samples, delta):
    return (arb(features) / ball(delta)).log() / samples


def _bernstein(atoms, weights, samples, delta):
    squared, largest = _sizes(atoms, weights)
    share = _share(np.shape(atoms)[1], samples, delta)
    return None, (2 * squared * largest * share).sqrt() + 2 * largest * share / 3


def _shortfall(atoms, weights, samples, delta):
    squared, largest = _sizes(atoms, weights)
    return None, (2 * squared * largest * _share(np.shape(atoms)[1], samples, delta)).sqrt()


def _relative(atoms, weights, samples, delta, stake):
    squared, _ = _sizes(atoms, weights)
    return None, squared * _share(np.shape(atoms)[1], samples, delta) / ball(stake)


def _moment(atoms, weights, samples, delta):
    features = np.shape(atoms)[1]
    return None, (2 * ball(_kurtosis(atoms, weights)) * features * _share(features, samples, delta)).sqrt()


def _pseudodim(atoms, weights, samples, delta, consumer, skeletons, dimension):
    squared, _ = _sizes(atoms, weights)
    p, n = ball(dimension), arb(samples)
    T = arb(0)
    for indices, interpolation in skeletons:
        T = T.max(norm(matrix(interpolation), "spectral")) if len(indices) else T
    bracket = (2 * p * (1 + (n / p).log()) / n).sqrt() + ((1 / ball(delta)).log() / (2 * n)).sqrt()
    return None, squared * frobenius(matrix(consumer)) ** 2 * (1 + T) ** 2 * bracket


def _held_out(losses, weights, samples, delta):
    return None, ball(delta)


SIDES = {
    "eckart-young": _eckart_young,
    "qrcp": _qrcp,
    "strong-rrqr": _strong,
    "pivot-ratio": _pivot_ratio,
    "volume-sampling": _volume,
    "leverage-columns": _leverage,
    "leverage-sampling": _sampling,
    "risk-split": _split,
    "risk-pointwise": _pointwise,
    "risk-bernstein": _bernstein,
    "risk-shortfall": _shortfall,
    "risk-relative": _relative,
    "risk-kurtosis": _moment,
    "risk-pseudodim": _pseudodim,
    "risk-held-out": _held_out,
}
