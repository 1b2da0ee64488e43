"""Both sides of the theorems on flows between layers in ball arithmetic, as ``balls`` collects them.

A bound below 1e-6 is None: rounding of a determinant is absolute, and not small beside it.
"""

import numpy as np
from flint import arb, arb_mat

from ellq.theory.gaussian_layers import hidden_information
from ellq.theory.pair_moments import centred
from ellq.theory.theorems_flows import LINKS


def ball(value):
    return arb(float(value))


def matrix(A):
    A = np.atleast_2d(np.asarray(A, dtype=np.float64))
    return arb_mat(A.shape[0], A.shape[1], [ball(x) for x in A.ravel()])


def block(M, rows, columns):
    return arb_mat(len(rows), len(columns), [M[i, j] for i in rows for j in columns])


def entries(M):
    return [M[i, j] for i in range(M.nrows()) for j in range(M.ncols())]


def total(balls):
    return sum(balls, arb(0))


def largest(balls):
    result = arb(0)
    for one in balls:
        result = result.max(one)
    return result


def information(r):
    """−½ log(1 − r²)."""
    return -(1 - r * r).log() / 2


def between(C, n):
    """Information of Gaussian layers of covariance C, the first n units those of the one."""
    x, y = range(n), range(n, C.nrows())
    return (block(C, x, x).det().log() + block(C, y, y).det().log() - C.det().log()) / 2


def of_layer(W, S, N):
    """Information of y = Wx + ε."""
    return ((W * S * W.transpose() + N).det().log() - N.det().log()) / 2


def resolved(bound):
    return bound if bound > 1e-6 else None


def _probe(X, Y, side):
    # Of the standardised activations as computed, from which both sides start.
    Z, V = matrix(centred(X, "X")), matrix(centred(Y, "Y"))
    flow = total(entries(Z.transpose() * V)) / (len(X) * Z.ncols() * V.ncols())
    return 2 + flow, 2 + flow


def _statistic(C, n, name):
    x, y = range(n), range(n, C.nrows())
    R = entries(block(C, x, y))
    if name in ("signed", "signed-probe"):
        return abs(total(R)) / len(R)
    if name == "probe":
        squares = total(entries(block(C, x, x))) * total(entries(block(C, y, y)))
        return abs(total(R)) / squares.sqrt()
    return {
        "absolute": lambda: total(abs(r) for r in R) / len(R),
        "rms": lambda: (total(r * r for r in R) / len(R)).sqrt(),
        "largest": lambda: largest(abs(r) for r in R),
    }[name]()


def _chain(correlation, units, link):
    C = matrix(correlation)
    low = information(_statistic(C, units, link))
    other = LINKS[link]
    high = between(C, units) if other == "information" else information(_statistic(C, units, other))
    return low, resolved(high)


def _hidden(information, flow, kind, claim):
    C, n = hidden_information(information, flow)
    if claim == "flow":
        return _statistic(matrix(C), n, kind), ball(flow)
    met = [0, n, n + 1]  # all other units are independent
    return ball(information), between(block(matrix(C), met, met), 1)


def _whole_flow(X, Y, kind):
    n, Z = np.shape(X)[1], [[int(x) for x in row] for row in np.hstack([X, Y])]
    N, p = len(Z), len(Z[0])
    sums = [sum(row[i] for row in Z) for i in range(p)]
    C = arb_mat(
        p, p, [arb(N * sum(row[i] * row[j] for row in Z) - sums[i] * sums[j]) for i in range(p) for j in range(p)]
    )
    x, y = range(n), range(n, p)
    if kind == "gaussian":
        return between(C, n)
    if kind == "cka":
        xx, xy, yy = (total(c * c for c in entries(block(C, *part))) for part in ((x, x), (x, y), (y, y)))
        return xy / (xx * yy).sqrt() if xx > 0 and yy > 0 else arb(0)
    R = [C[i, j] / (C[i, i] * C[j, j]).sqrt() if C[i, i] > 0 and C[j, j] > 0 else arb(0) for i in x for j in y]
    if kind == "rms":
        return (total(r * r for r in R) / len(R)).sqrt()
    return total(R if kind == "signed" else [abs(r) for r in R]) / len(R)


def _invariance(X, Y, A, B, a, b, kind):
    return 2 + _whole_flow(X @ A + a, Y @ B + b, kind), 2 + _whole_flow(X, Y, kind)


def _markov(A, B, noise_y, noise_z, side):
    first, second = matrix(A), matrix(B)
    m, k = len(A), len(B)
    ends = of_layer(second * first, matrix(np.eye(A.shape[1])), matrix(noise_y * (B @ B.T) + noise_z * np.eye(k)))
    if side == "above":
        return ends, resolved(of_layer(first, matrix(np.eye(A.shape[1])), matrix(noise_y * np.eye(m))))
    return ends, resolved(of_layer(second, matrix(A @ A.T + noise_y * np.eye(m)), matrix(noise_z * np.eye(k))))


def _pruned(W, covariance, noise, rows, columns):
    kept = W * np.asarray(rows)[:, None] * np.asarray(columns)
    S, N = matrix(covariance), matrix(noise * np.eye(len(W)))
    return of_layer(matrix(kept), S, N), resolved(of_layer(matrix(W), S, N))


def _magnitude(w, kept, scale, noise):
    def unit(values):
        return (ball(scale) ** 2 * total(ball(v) ** 2 for v in values) / ball(noise) ** 2).log1p() / 2

    best = np.sort(np.abs(w))[::-1][: int(np.count_nonzero(kept))]
    return unit(np.asarray(w)[np.asarray(kept)]), unit(best)


def _threshold(first, second, signed):
    distance = total((ball(a) - ball(b)) ** 2 for a, b in zip(first, second, strict=True)).sqrt()
    return distance, (2 if signed else 1) * arb(len(first)).sqrt()


SIDES = {
    "flow-probe": _probe,
    "flow-gaussian-chain": _chain,
    "flow-no-upper": _hidden,
    "flow-invariances": _invariance,
    "flow-markov-chain": _markov,
    "pruning-mi": _pruned,
    "pruning-mi-magnitude": _magnitude,
    "flow-trivial-threshold": _threshold,
}
