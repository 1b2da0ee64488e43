"""ellq (ℓq): how compressible a trained network is, what is provably lost, and the smaller network itself.

Every name is loaded on first use, so ``import ellq`` is quick and imports neither NumPy nor PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ellq.analysis import Profile as Profile
    from ellq.analysis import compare as compare
    from ellq.analysis import measure as measure
    from ellq.analysis import read_checkpoint as read_checkpoint
    from ellq.analysis import trajectory as trajectory
    from ellq.pruning import Plan as Plan
    from ellq.pruning import apply as apply
    from ellq.pruning import compact as compact
    from ellq.pruning import finalize as finalize
    from ellq.pruning import gradual as gradual
    from ellq.pruning import iterate as iterate
    from ellq.pruning import load as load
    from ellq.pruning import plan as plan
    from ellq.pruning import prune as prune
    from ellq.pruning import report as report
    from ellq.pruning import save as save

__version__ = "0.1.0"

_HOME = {
    "measure": "ellq.analysis",
    "compare": "ellq.analysis",
    "trajectory": "ellq.analysis",
    "Profile": "ellq.analysis",
    "read_checkpoint": "ellq.analysis",
    "plan": "ellq.pruning",
    "Plan": "ellq.pruning",
    "apply": "ellq.pruning",
    "finalize": "ellq.pruning",
    "compact": "ellq.pruning",
    "gradual": "ellq.pruning",
    "iterate": "ellq.pruning",
    "prune": "ellq.pruning",
    "save": "ellq.pruning",
    "load": "ellq.pruning",
    "report": "ellq.pruning",
}
_PARTS = ("theory", "analysis", "pruning", "paper_figures")

__all__ = [  # noqa: RUF022 -- in the order a user meets them
    "measure",
    "compare",
    "trajectory",
    "plan",
    "apply",
    "finalize",
    "compact",
    "prune",
    "gradual",
    "iterate",
    "save",
    "load",
    "report",
    "read_checkpoint",
    "Profile",
    "Plan",
    "theory",
    "analysis",
    "pruning",
    "paper_figures",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _PARTS:
        return importlib.import_module(f"ellq.{name}")
    raise AttributeError(f"module 'ellq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
