"""Climbing from a case towards one in which a ratio is larger: by gradient, through counts, at random.

A climb is a generator: it yields a case to try and is sent that case's ratio, or None where it has none.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

Case = dict[str, Any]
Climb = Generator[Case, float | None, None]
_Stage = Generator[Case, float | None, tuple[Case, float]]
_Place = tuple[tuple[Any, ...], int | None]  # keys that lead to a float or an array, and the entry in the array

_COORDINATES = 24  # magnitudes a gradient is taken over; chosen at random where there are more
_DIFFERENCE = 1e-5  # of a logarithm, in a finite difference
_STRIDES = (3.0, 1.0, 0.3, 0.1, 0.01, 0.001)  # the most that the logarithm of a magnitude moves in a gradient step
_LEVELS = 10
_NUDGES = 30


def climb(case: Case, ratio: float, rng: np.random.Generator) -> Climb:
    """Yield cases to try, for ever, moving on to whichever has the largest ratio so far.

    Args:
        case: where to start: named floats, arrays of floats, whole numbers, and lists of these; all else is left.
        ratio: of the start.
        rng: of the random choices.
    """
    while True:
        for stage in (_ascend, _count_up_and_down, _level, _nudge):
            case, ratio = yield from stage(case, ratio, rng)


def _ascend(case: Case, ratio: float, rng: np.random.Generator) -> _Stage:
    """Climb along the gradient in the logarithms of the magnitudes, by finite differences."""
    places = list(_magnitudes(case))
    if len(places) > _COORDINATES:
        places = [places[i] for i in rng.choice(len(places), _COORDINATES, replace=False)]
    slopes = []
    for place in places:
        got = yield _scaled(case, [place], [math.exp(_DIFFERENCE)])
        slopes.append(0.0 if got is None else got - ratio)
    steepest = max((abs(slope) for slope in slopes), default=0.0)
    if not 0 < steepest < math.inf:
        return case, ratio
    for stride in _STRIDES:
        moved = _scaled(case, places, [math.exp(stride * slope / steepest) for slope in slopes])
        got = yield moved
        if got is not None and got > ratio:
            return moved, got
    return case, ratio


def _count_up_and_down(case: Case, ratio: float, rng: np.random.Generator) -> _Stage:
    """Try the whole numbers near each count, and twice and half of it; move while that helps."""
    for name, value in list(case.items()):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            continue
        while True:
            here = int(case[name])
            best, reached = case, ratio
            for other in sorted({here - 2, here - 1, here + 1, here + 2, 2 * here, here // 2} - {here}):
                tried = case | {name: other}
                got = yield tried
                if got is not None and got > reached:
                    best, reached = tried, got
            if best is case:
                break
            case, ratio = best, reached
    return case, ratio


def _nudge(case: Case, ratio: float, rng: np.random.Generator) -> _Stage:
    """Change a third of the magnitudes at random, by little or much."""
    for _ in range(_NUDGES):
        places = [place for place in _magnitudes(case) if rng.random() < 0.3]
        width = 10.0 ** rng.uniform(-6, 0.5)
        moved = _scaled(case, places, [math.exp(x) for x in width * rng.standard_normal(len(places))])
        for name, value in case.items():
            if isinstance(value, int | np.integer) and not isinstance(value, bool):
                moved[name] = int(value) + int(rng.integers(-1, 2))
        got = yield moved
        if got is not None and got > ratio:
            case, ratio = moved, got
    return case, ratio


def _level(case: Case, ratio: float, rng: np.random.Generator) -> _Stage:
    """Make magnitudes that are near each other equal, or drop the smallest: bounds are often attained there."""
    for _ in range(_LEVELS):
        places = [place for place in _magnitudes(case) if place[1] is not None]
        if not places:
            break
        keys, entry = places[rng.integers(len(places))]
        array = _at(case, keys)
        size, factor = abs(array.flat[entry]), 2.0 ** rng.uniform(0, 4)
        near = np.abs(np.log2(np.abs(array), where=array != 0, out=np.full(array.shape, np.inf)) - np.log2(size))
        changed = np.where(near <= np.log2(factor), np.copysign(size, array), array)
        if rng.random() < 0.5:
            changed[np.abs(array) < size / factor] = 0.0
        moved = _with(case, keys, changed)
        got = yield moved
        if got is not None and got > ratio:
            case, ratio = moved, got
    return case, ratio


def _magnitudes(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[_Place]:
    """Yield the place of every float but 0, in arrays and lists at any depth."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _magnitudes(part, (*keys, name))
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _magnitudes(part, (*keys, i))
    elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
        yield from ((keys, int(i)) for i in np.flatnonzero(value))
    elif isinstance(value, float) and value:
        yield keys, None


def _scaled(case: Case, places: Sequence[_Place], factors: Sequence[float]) -> Case:
    """Return the case with the floats at the given places multiplied; a product that is not finite stays out."""
    changed: dict[tuple[Any, ...], Any] = {}
    for (keys, entry), factor in zip(places, factors, strict=True):
        if entry is None:
            new = _at(case, keys) * factor
            changed[keys] = new if math.isfinite(new) else _at(case, keys)
        else:
            array = changed.setdefault(keys, _at(case, keys).copy())
            new = float(array.flat[entry]) * factor
            array.flat[entry] = new if math.isfinite(new) else array.flat[entry]
    for keys, value in changed.items():
        case = _with(case, keys, value)
    return dict(case)


def _at(value: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        value = value[key]
    return value


def _with(value: Any, keys: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of nested dicts, lists and tuples with the value that the keys lead to replaced."""
    if not keys:
        return new
    part = _with(value[keys[0]], keys[1:], new)
    if isinstance(value, dict):
        return value | {keys[0]: part}
    return type(value)(part if i == keys[0] else old for i, old in enumerate(value))
