"""What the theorems share: assumptions about weights, counts and orders, and the symbols of their formulas."""

from __future__ import annotations

import numpy as np
import sympy

from ellq.theory.arguments import GREATEST_ORDER, LEAST_ORDER
from ellq.theory.statements import Assumption

_ORDERS = f"{LEAST_ORDER:g} to {GREATEST_ORDER:g}, which float64 can tell apart from 0 and ∞"


def _rise(low: float, high: float) -> bool:
    return LEAST_ORDER <= low < high <= GREATEST_ORDER


finite_weights = Assumption("finite", "all weights are finite.", lambda case: bool(np.isfinite(case["w"]).all()))
some_weight = Assumption("non-zero", "some weight is not zero.", lambda case: bool(np.any(case["w"])))
orders_rise_to_p = Assumption("q < p", f"0 < q < p, both from {_ORDERS}.", lambda case: _rise(case["q"], case["p"]))
orders_rise_to_q = Assumption("p < q", f"0 < p < q, both from {_ORDERS}.", lambda case: _rise(case["p"], case["q"]))
quasi_order = Assumption("q < 1", f"0 < q < 1, from {_ORDERS}.", lambda case: _rise(case["q"], 1.0))
keeps_some = Assumption(
    "1 ≤ k ≤ d", "between 1 and d entries are kept.", lambda case: 1 <= case["retained"] <= np.size(case["w"])
)
tolerance_is_share = Assumption("0 < tol < 1", "the tolerance is a share.", lambda case: 0 < case["tol"] < 1)


class NamedQuantity(sympy.Symbol):  # type: ignore[misc]
    """A positive quantity with a name for text and one for LaTeX, such as a norm.

    Not called Quantity: sympy prints classes of that name as physical units.
    """

    def __new__(cls, text: str, latex: str) -> NamedQuantity:  # noqa: D102
        made: NamedQuantity = super().__new__(cls, text, positive=True)
        made.tex = latex
        return made

    def _latex(self, printer: object) -> str:
        return str(self.tex)


p, q, k, N, eta, tol = sympy.symbols("p q k N eta tol", positive=True)
best_error, tail_q = NamedQuantity("σ_k(w)_p", r"\sigma_k(w)_p"), NamedQuantity("σ_k(w)_q", r"\sigma_k(w)_q")
norm_q = NamedQuantity("‖w‖_q", r"\|w\|_q")
