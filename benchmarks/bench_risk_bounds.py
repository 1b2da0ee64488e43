"""How far every bound of the one-hidden-layer risk is above the risk, on trained nets, side by side.

The population is a whole data set, training and test images together, so that the risk is known exactly; the net is
trained on a part of it, and the calibration samples are drawn from all of it with replacement, as the theorems ask.
Prints one table a net: bound ÷ R_ID for a few widths k of the skeleton.

    python benchmarks/bench_risk_bounds.py [--nets digits fashion-mnist] [--width 128] [--samples 60000] [--seed 0]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ellq.analysis import datasets, mlp
from ellq.pruning.training import train_classifier
from ellq.theory import Gram, gram_scale, interpolate, pivoted_qr
from ellq.theory.concentration import leverages, moments_limit, ridged
from ellq.theory.id_bounds import frobenius_norm, spectral_norm
from ellq.theory.risk_bounds import (
    empirical_risk,
    feature_moments,
    output_change,
    pseudodim_quadratic,
    risk_bernstein,
    risk_held_out,
    risk_kurtosis,
    risk_pointwise,
    risk_pointwise_published,
    risk_pseudodim,
    risk_relative,
    risk_shortfall,
    risk_whole,
)

Array = npt.NDArray[np.float64]

DELTA, KURTOSIS, RIDGE = 0.05, 10.0, 1e-2
KEPT = (0.125, 0.25, 0.5, 0.75)


def main() -> None:
    """Train the nets and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["digits", "fashion-mnist"], help="data sets to train on")
    parser.add_argument("--width", type=int, default=128, help="hidden units")
    parser.add_argument("--activation", default="relu", help="of the hidden units")
    parser.add_argument("--samples", type=int, default=60_000, help="calibration samples")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the samples")
    options = parser.parse_args()
    for name in options.nets:
        features, consumer = hidden_layer(name, options.width, options.activation, options.epochs, options.seed)
        print(f"\n{name}, {options.width} {options.activation} units, n = {options.samples}, δ = {DELTA}\n")
        rows = list(slack(features, consumer, options.samples, np.random.default_rng(options.seed)))
        print("| bound ÷ R_ID | " + " | ".join(f"k = {row['k']:.0f}" for row in rows) + " |")
        print("|---|" + "---|" * len(rows))
        for label in list(rows[0])[1:]:
            print(f"| {label} | " + " | ".join(f"{row[label]:.3g}" for row in rows) + " |")


def hidden_layer(name: str, width: int, activation: str, epochs: int, seed: int) -> tuple[Array, Array]:
    """Return the features of all images with a constant 1 appended, and the weights that read them, without bias."""
    parts = [datasets.load(name, part) for part in ("train", "test")]
    images = np.concatenate([part.images.reshape(len(part.images), -1) for part in parts]).astype(np.float32)
    images /= parts[0].maximum
    net = train_classifier(
        lambda: mlp(images.shape[1], width, outputs=len(parts[0].classes), activation=activation),
        torch.from_numpy(images[: len(parts[0].images)]),
        parts[0].labels,
        epochs=epochs,
        seed=seed,
    )
    with torch.no_grad():
        hidden = net[:-1](torch.from_numpy(images)).double().numpy()
        consumer = net[-1].weight.double().numpy()
    return np.hstack([hidden, np.ones((len(hidden), 1))]), consumer


def slack(Z: Array, U: Array, samples: int, rng: np.random.Generator) -> Iterator[dict[str, float]]:
    """Yield one row a width: every bound divided by the true risk of the skeleton found on the samples."""
    m, truth, B = U.shape[1], Z.T @ Z / len(Z), float(np.linalg.norm(Z, axis=1).max())
    V = np.hstack([U, np.zeros((len(U), 1))])  # what reads the features and the constant
    drawn = Z[rng.integers(len(Z), size=samples)]
    halves = drawn[: samples // 2], drawn[samples // 2 :]
    metric = ridged(halves[0].T @ halves[0] / len(halves[0]), RIDGE)
    reach = float(leverages(halves[0], metric).max())
    limit = moments_limit([halves[1]], metric, reach=reach, delta=DELTA)
    every, first = accumulated(drawn), accumulated(halves[0])
    case = {"radius": B, "samples": samples, "delta": DELTA}
    measured = feature_moments(every, constant=True)
    largest = gram_scale(measured) ** 2
    for k in (round(share * m) for share in KEPT):
        Q, T, error = pruned(every, U, k)
        risk, emp = float(np.trace(Q @ truth @ Q.T)), empirical_risk(Q, measured)
        M, accuracy = B**2 * frobenius_norm(U) ** 2, error / samples / B**2
        within = limit.risk(Q)
        bounds = {
            "any input: M(1 + ‖T‖)²": risk_pointwise_published(V, T, B),
            "any input: B²‖U‖²‖T‖²": risk_pointwise(V, T, B),
            "all: published form, p = m(m + 1)/2": published_form(V, T, M * accuracy, case),
            "all: Bernstein, M{ε² + ‖T‖²[…]}": risk_bernstein(
                np.ones((1, m + 1)) * spectral_norm(T) * frobenius_norm(U) / (m + 1) ** 0.5, M * accuracy, **case
            ),
            "all: Bernstein": risk_bernstein(Q, emp, **case),
            "all: shortfall": risk_shortfall(Q, emp, **case, measured=largest),
            "all: relative": risk_relative(Q, emp, **case),
            f"all: kurtosis at most {KURTOSIS:g}": risk_kurtosis(
                emp, features=m + 1, samples=samples, delta=DELTA, kurtosis=KURTOSIS
            ),
            f"all, {1 - limit.share_outside:.2%} of inputs: leverage": within,
            "— the rest by B": risk_whole(within, limit.share_outside, largest=spectral_norm(Q) ** 2 * B**2),
            f"— the rest by kurtosis {KURTOSIS:g}": risk_whole(within, limit.share_outside, kurtosis=KURTOSIS),
        }
        row = {"k": float(k)} | {label: bound / risk for label, bound in bounds.items()}
        Q, _, _ = pruned(first, U, k)
        risk = float(np.trace(Q @ truth @ Q.T))
        found = risk_held_out(Q, halves[1], radius=reach**0.5, metric=metric, delta=DELTA)
        ball = risk_held_out(Q, halves[1], radius=B, delta=DELTA)
        rest = risk_whole(found.risk, found.share_outside, kurtosis=KURTOSIS)
        yield row | {
            f"one, {1 - found.share_outside:.2%} of inputs: held-out half": found.risk / risk,
            f"— the rest by kurtosis {KURTOSIS:g} ": rest / risk,
            "one: held-out half, ‖z‖ ≤ B": ball.risk / risk,
        }


def published_form(U: Array, T: Array, empirical: float, case: dict[str, Any]) -> float:
    """Return the published form with the pseudo-dimension that is proved; infinite for fewer samples than that."""
    dimension = pseudodim_quadratic(U.shape[1])
    return risk_pseudodim(U, T, empirical, **case, dimension=dimension) if dimension <= case["samples"] else math.inf


def accumulated(Z: Array) -> Gram:
    """Return the moments of features that end with a constant, which is left to the accumulator's mean."""
    gram = Gram(Z.shape[1] - 1)
    gram.update(Z[:, :-1])
    return gram


def pruned(gram: Gram, U: Array, k: int) -> tuple[Array, Array, float]:
    """Return the change of the outputs, the interpolation matrix with the constant, and ‖A − A_J T‖_2²."""
    selection = pivoted_qr(gram.columns(centred=True), k)
    skeleton = interpolate(gram, selection, intercept=True)
    T = skeleton.interpolation
    constant = np.append(skeleton.offset, 1.0)
    Q = output_change(U, skeleton.indices, U @ T.T, shift=U @ skeleton.offset)
    unit = output_change(np.eye(U.shape[1]), skeleton.indices, T.T, shift=skeleton.offset)
    residual = unit @ feature_moments(gram, constant=True) @ unit.T * gram.samples
    T = np.vstack([np.hstack([T, np.zeros((k, 1))]), constant])
    return Q, T, float(np.linalg.eigvalsh(residual)[-1])


if __name__ == "__main__":
    main()
