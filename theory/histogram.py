"""A mergeable histogram of magnitudes: one pass over the weights, and every order, count and threshold enclosed.

Magnitudes are binned by the leading bits of their floating-point pattern, which rises with the value. A float16 or
bfloat16 value is its bin, so nothing is lost. A float32 bin is a 1024th of a binade (8 + 10 leading bits) and a
float64 bin a 128th (11 + 7 bits); beside the count a bin holds the integer sum of the next 13 bits, which gives the
mean magnitude in the bin exactly for float32 and to 2⁻¹³ of the bin's width for float64. Everything stored is an
integer, so histograms of parts add up to the same bits in any order and grouping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import Array, count, order_below_one, positive_order, rising_orders
from ellq.theory.rounding import log_error

if TYPE_CHECKING:
    import torch

Counts = npt.NDArray[np.int64]

_OFFSET_BITS = 13
_CHUNK = 2**20  # entries counted at once
# With offsets, a count and a sum of offsets share one float64: 2³² bounds the latter for 2¹⁹ entries, 2⁵¹ the whole.
_CHUNK_WITH_OFFSETS, _COUNT_UNIT = 2**19, 2**32
_POWER = 8.0  # relative error of pow, exp and log, in units of u, as in ``rounding``
_LEAST = 2.0**-1074
_NONE = np.zeros(0, dtype=np.int64)


class Enclosure(NamedTuple):
    """Two floats between which the exact value lies, both included."""

    low: float
    high: float


class Threshold(NamedTuple):
    """Where the k-th largest magnitude lies, and how many entries are certainly or possibly retained there.

    Keep the ``above`` entries with |w| > high, and any k − above of the ``within`` that lie in [low, high]. With
    float16 and bfloat16 weights low = high, and ``within`` are ties.

    Attributes:
        low: lower end of the k-th largest magnitude.
        high: its upper end; both ∞ for k = 0.
        above: entries certainly larger than ``high``; fewer than k unless k = 0.
        within: entries in bins that meet [low, high]; ``above + within`` ≥ k.
    """

    low: float
    high: float
    above: int
    within: int


@dataclass(frozen=True)
class Part:
    """The non-zero magnitudes of one float format, by bin.

    Attributes:
        bins: leading bits of the pattern, rising, shape (n,), n ≥ 1.
        counts: entries in each bin, all ≥ 1, shape (n,).
        offsets: sum over the bin's entries of the 13 bits after the leading ones; zeros for exact formats.
    """

    bins: Counts
    counts: Counts
    offsets: Counts


@dataclass(frozen=True, eq=False, repr=False)
class MagnitudeHistogram:
    """The magnitudes of a vector by bin: enough for enclosures of every measure, and small whatever the length.

    Make one with ``MagnitudeHistogram.of(w)``; add several with ``MagnitudeHistogram.total``. Every method returns an
    ``Enclosure`` that holds the exact value in spite of binning and rounding. For float16 and bfloat16 only rounding
    is left: a few units in the last place of a power sum, 1/q times as many of a quasi-norm. For float32 and float64
    the exact means of the bins leave a relative width near q·|1 − q|·w²/8 of a power sum, where w is the width of a
    bin relative to its magnitude: 2⁻¹⁰ or 2⁻⁷, which makes 3e-8 or 2e-6 at q = ½. At q = 1 only rounding is left
    for float32. A float32 below 2⁻¹³⁶ or a float64 below 2⁻¹⁰²⁹ shares its bin with all smaller ones; sums over such
    alone are enclosed more widely.

    Attributes:
        zeros: entries equal to 0.
        parts: name of the float format → its non-zero magnitudes.
    """

    zeros: int = 0
    parts: Mapping[str, Part] = field(default_factory=dict)

    __hash__ = None  # type: ignore[assignment]

    @staticmethod
    def of(w: Any, name: str = "w") -> MagnitudeHistogram:
        """Count the magnitudes of an array or tensor of any shape, in chunks.

        Args:
            w: torch tensor or array; float16, bfloat16, float32 and float64 are binned as they are, other floating
                formats, integers and lists are widened first. May be empty.
            name: what errors call it.

        Returns:
            The histogram.

        Raises:
            TypeError: ``w`` is not real and numeric.
            ValueError: a NaN or infinite entry.
        """
        tensor = _as_floats(w, name)
        flat, shape = tensor.reshape(-1), tuple(tensor.shape)
        return MagnitudeHistogram.of_chunks([flat] if flat.numel() else [], name, shape=shape)

    @staticmethod
    def of_chunks(
        chunks: Iterable[torch.Tensor], name: str = "w", *, shape: Sequence[int] | None = None, start: int = 0
    ) -> MagnitudeHistogram:
        """Count the magnitudes of a vector that arrives in pieces, none of which is kept.

        Args:
            chunks: flat tensors on the CPU, all of one dtype that holds floats.
            name: what errors call the vector.
            shape: of the tensor the pieces belong to, in which errors give the index.
            start: how many entries of that tensor come before the first piece.

        Raises:
            TypeError: a piece is not floating.
            ValueError: a NaN or infinite entry, named with its index.
        """
        tally: _Tally | None = None
        for chunk in chunks:
            widened = _as_floats(chunk, name)
            if tally is None:
                tally = _Tally.empty(_layout_of(widened))
            for begin in range(0, widened.numel(), tally.layout.chunk):
                piece = widened[begin : begin + tally.layout.chunk]
                bad = tally.add(piece)
                if bad is not None:
                    place = np.unravel_index(start + bad, shape) if shape else (start + bad,)
                    raise ValueError(
                        f"{name} holds {float(piece[bad])} at index {[int(i) for i in place]}."
                        " Only finite values can be measured."
                    )
                start += piece.numel()
        return MagnitudeHistogram() if tally is None else tally.histogram()

    @staticmethod
    def total(histograms: Iterable[MagnitudeHistogram]) -> MagnitudeHistogram:
        """Return the histogram of all entries together; the same bits for every order and grouping."""
        every = list(histograms)
        names = sorted({name for histogram in every for name in histogram.parts})
        parts = {name: _joined([h.parts[name] for h in every if name in h.parts]) for name in names}
        return MagnitudeHistogram(sum(h.zeros for h in every), parts)

    def merge(self, other: MagnitudeHistogram) -> MagnitudeHistogram:
        """Return the histogram of the entries of both."""
        return MagnitudeHistogram.total([self, other])

    @property
    def nonzeros(self) -> int:
        """How many entries are not 0."""
        return sum(int(part.counts.sum()) for part in self.parts.values())

    @property
    def size(self) -> int:
        """How many entries were counted."""
        return self.zeros + self.nonzeros

    @property
    def is_exact(self) -> bool:
        """Whether every bin holds a single magnitude, as with float16 and bfloat16."""
        return all(_LAYOUTS[name].shift == 0 for name in self.parts)

    @property
    def largest(self) -> Enclosure:
        """The largest magnitude, ‖w‖_∞."""
        bins = _bins_of(self)
        return Enclosure(float(bins.low.max(initial=0.0)), float(bins.high.max(initial=0.0)))

    def power_sum(self, q: float) -> Enclosure:
        """Enclose Σ|w_i|^q.

        Args:
            q: order, 0 < q < ∞.

        Raises:
            ValueError: ``q`` ≤ 0.
            OverflowError: the sum exceeds float64.
        """
        q = positive_order(q)
        scaled, top = self._scaled_sum(q)
        if not self.nonzeros:
            return Enclosure(0.0, 0.0)
        # 2^(q·top): the product of a float and a whole number, exact as a fraction, so that only pow rounds.
        power = Fraction(q) * top
        whole = round(power)
        low, high = _widened(*(end * 2.0 ** float(power - whole) for end in scaled), units=_POWER + 3)
        try:
            return Enclosure(max(_below(math.ldexp(low, whole)), 0.0), _above(math.ldexp(high, whole)))
        except OverflowError:
            raise OverflowError(
                f"Σ|w|^q exceeds float64 for q={q:g}. Use log_quasinorm, or scale the weights down."
            ) from None

    def log_quasinorm(self, q: float) -> Enclosure:
        """Enclose log ‖w‖_q, which is finite whatever the order; −∞ for the zero vector.

        Args:
            q: order, 0 < q < ∞.

        Raises:
            ValueError: ``q`` ≤ 0.
        """
        q = positive_order(q)
        scaled, top = self._scaled_sum(q)
        if not self.nonzeros:
            return Enclosure(-math.inf, -math.inf)
        shift = _widened(top * math.log(2.0), top * math.log(2.0), units=_POWER)
        return _plus(_over(_log(scaled), q), shift)

    def quasinorm(self, q: float) -> Enclosure:
        """Enclose ‖w‖_q = (Σ|w_i|^q)^(1/q).

        Args:
            q: order, 0 < q < ∞.

        Raises:
            ValueError: ``q`` ≤ 0.
            OverflowError: ‖w‖_q exceeds float64 (very small q); ``log_quasinorm`` still holds it.
        """
        q = positive_order(q)
        if self.nonzeros < 2:  # a single non-zero entry is its own norm; 1/q would magnify its rounding
            return self.largest
        scaled, top = self._scaled_sum(q)
        try:
            norm = _root(scaled, q, top)
        except OverflowError:
            raise OverflowError(
                f"‖w‖_q exceeds float64 for q={q:g} (its natural log is {self.log_quasinorm(q).high:.6g})."
                " Choose a larger q, or scale w down."
            ) from None
        return Enclosure(max(norm.low, self.largest.low), norm.high)

    def sparsity_index(self, q: float) -> Enclosure:
        """Enclose SI_q = ‖w‖_1/‖w‖_q, in [d^(1−1/q), 1] and larger for sparser vectors; NaN for the zero vector.

        Args:
            q: order, 0 < q < 1.

        Raises:
            ValueError: ``q`` outside (0, 1).

        Reference: Yang et al. 2022 (arXiv 2206.05604).
        """
        q = order_below_one(q)
        if self.nonzeros < 2:
            return Enclosure(1.0, 1.0) if self.nonzeros else _UNDEFINED
        ratio = _minus(_log(self._scaled_sum(1.0)[0]), _over(_log(self._scaled_sum(q)[0]), q))
        low, high = _exp(ratio)
        return Enclosure(max(low, 0.0), min(high, 1.0))

    def pq_index(self, p: float, q: float) -> Enclosure:
        """Enclose the PQ index 1 − d^(1/q − 1/p) ‖w‖_p/‖w‖_q, larger for sparser vectors; NaN for the zero vector.

        Args:
            p: the lower order, 0 < p < q.
            q: the upper order, finite.

        Raises:
            ValueError: not 0 < p < q.

        Reference: Diao et al. 2023 (arXiv 2302.05601), Definition of the PQ index.
        """
        p, q = rising_orders(p, q, ("p", "q"))
        if not self.nonzeros:
            return _UNDEFINED
        size = _log(_widened(float(self.size), float(self.size), units=1))
        means = (_over(_minus(_log(self._scaled_sum(order)[0]), size), order) for order in (p, q))
        low, high = _minus(*means)
        low, high = _widened(-math.expm1(min(high, 0.0)), -math.expm1(min(low, 0.0)), units=_POWER)
        return Enclosure(max(low, 0.0), min(high, 1.0))

    def effective_count(self, p: float, q: float) -> Enclosure:
        """Enclose N_{p,q} = (‖w‖_p/‖w‖_q)^(pq/(q−p)), how many equal magnitudes would be as spread out.

        Args:
            p: the lower order, 0 < p < q.
            q: the upper order, finite.

        Raises:
            ValueError: not 0 < p < q.

        Reference: ours, from the bound of Diao et al. 2023 (arXiv 2302.05601, Theorem 2) at η = 0.
        """
        p, q = rising_orders(p, q, ("p", "q"))
        if self.nonzeros < 2:
            return Enclosure(float(self.nonzeros), float(self.nonzeros))
        logs = [_log(self._scaled_sum(order)[0]) for order in (p, q)]
        low, high = _exp(_over(_minus(_times(logs[0], q), _times(logs[1], p)), q - p, units=2))
        return Enclosure(max(low, 1.0), min(high, _above(float(self.nonzeros))))

    def best_term_error(self, k: int, p: float = 2.0) -> Enclosure:
        """Enclose σ_k(w)_p, the error of keeping the k largest entries.

            σ_k(w)_p = (Σ_{i>k} |w|_(i)^p)^(1/p)        |w|_(1) ≥ |w|_(2) ≥ …

        Bins below the cut count with their exact means; only the bin that is cut counts by its ends.

        Args:
            k: how many are kept, 0 ≤ k ≤ size.
            p: order of the error, 0 < p < ∞.

        Raises:
            TypeError: ``k`` is not a whole number.
            ValueError: ``k`` outside [0, size], or ``p`` ≤ 0.
            OverflowError: the error exceeds float64 (very small p).
        """
        k, p = count(k, "k", low=0, high=self.size), positive_order(p, "p")
        removed = self.size - k - self.zeros
        if removed <= 0:
            return Enclosure(0.0, 0.0)
        bins = _bins_of(self)
        if removed == bins.count.sum():
            certain = np.ones(len(bins.low), dtype=bool)
        else:
            # Whatever lies below the m-th smallest lower end is removed in every case.
            certain = bins.high < _ranked(bins.low, bins.count, removed)
        rest = removed - int(bins.count[certain].sum())
        taken = np.where(certain, bins.count, 0)
        least, most = _lower_terms(bins, taken, p), _upper_terms(bins, taken, p)
        if rest:
            # The bin that is cut; several, where bins of different formats overlap.
            cut = _taken_from_below(bins.low, np.where(certain, 0, bins.count), rest)
            least.append((bins.low, cut.astype(np.float64)))
            # The m smallest of n entries sum to at most m/n of their total.
            most += _upper_terms(bins, cut, p)
        reach = max(float(points[weights > 0].max(initial=0.0)) for points, weights in most)
        top = math.frexp(reach)[1]
        scaled = Enclosure(_weighted_sum(least, p, top).low, _weighted_sum(most, p, top).high)
        try:
            return _root(scaled, p, top)
        except OverflowError:
            raise OverflowError(f"σ_k exceeds float64 for p={p:g}. Choose a larger p, or scale w down.") from None

    def threshold(self, k: int) -> Threshold:
        """Find the magnitude at which the k largest entries part from the others.

        Args:
            k: how many are kept, 0 ≤ k ≤ size.

        Raises:
            TypeError: ``k`` is not a whole number.
            ValueError: ``k`` outside [0, size].
        """
        k = count(k, "k", low=0, high=self.size)
        if k == 0:
            return Threshold(math.inf, math.inf, 0, 0)
        if k > (nonzeros := self.nonzeros):
            return Threshold(0.0, 0.0, nonzeros, self.zeros)
        bins = _bins_of(self)
        rank = nonzeros - k + 1  # from below, among the non-zero entries
        lows = np.maximum(bins.low, _LEAST)  # zeros are counted apart, so the lowest bin holds none
        low, high = _ranked(lows, bins.count, rank), _ranked(bins.high, bins.count, rank)
        above = lows > high
        within = (bins.high >= low) & ~above
        return Threshold(low, high, int(bins.count[above].sum()), int(bins.count[within].sum()))

    def _scaled_sum(self, q: float) -> tuple[Enclosure, int]:
        """Return Σ(|w_i|/2^e)^q and e, where 2^e is just above the largest magnitude."""
        bins = _bins_of(self)
        top = math.frexp(float(bins.high.max(initial=0.0)))[1]
        if bins.is_exact:
            return _weighted_sum([(bins.low, bins.count.astype(np.float64))], q, top), top
        least = _weighted_sum(_lower_terms(bins, bins.count, q), q, top)
        return Enclosure(least.low, _weighted_sum(_upper_terms(bins, bins.count, q), q, top).high), top

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MagnitudeHistogram):
            return NotImplemented
        return (self.zeros, *self.parts) == (other.zeros, *other.parts) and all(
            np.array_equal(getattr(part, name), getattr(other.parts[key], name))
            for key, part in self.parts.items()
            for name in ("bins", "counts", "offsets")
        )

    def __repr__(self) -> str:
        formats = ", ".join(f"{len(part.bins)} bins of {name}" for name, part in self.parts.items())
        return f"MagnitudeHistogram({self.size} entries, {self.zeros} zero{'; ' if formats else ''}{formats})"


_UNDEFINED = Enclosure(math.nan, math.nan)


@dataclass(frozen=True)
class _Layout:
    """How a float format is binned: pattern = bin · 2^shift + offset · 2^dropped + what is dropped."""

    unsigned: str  # NumPy's name of the pattern's type
    signed: str  # torch's name of it; it shifts signed types only
    decoded: str  # NumPy's name of the float
    lifted: int  # bits to add below the pattern before decoding; 16 turn bfloat16 into float32
    shift: int
    infinity: int  # the bin of ∞; larger ones are NaN

    @property
    def dropped(self) -> int:
        return max(self.shift - _OFFSET_BITS, 0)

    @property
    def chunk(self) -> int:
        return _CHUNK_WITH_OFFSETS if self.shift else _CHUNK

    def decode(self, pattern: Counts) -> Array:
        return (pattern << self.lifted).astype(self.unsigned).view(self.decoded).astype(np.float64)


_LAYOUTS = {
    "bfloat16": _Layout("uint32", "int16", "float32", lifted=16, shift=0, infinity=0x7F80),
    "float16": _Layout("uint16", "int16", "float16", lifted=0, shift=0, infinity=0x7C00),
    "float32": _Layout("uint32", "int32", "float32", lifted=0, shift=13, infinity=0xFF << 10),
    "float64": _Layout("uint64", "int64", "float64", lifted=0, shift=45, infinity=0x7FF << 7),
}


def _as_floats(values: Any, name: str) -> torch.Tensor:
    """Return a tensor on the CPU in one of the formats above, which holds every value exactly."""
    # Here and below: torch takes seconds to load, and most of the theory needs none of it.
    import torch

    if not isinstance(values, torch.Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}.")
        # torch refuses read-only arrays and foreign byte orders by a warning or an error.
        array = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
        values = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    if values.is_complex() or values.is_quantized or values.is_meta:
        what = "no data" if values.is_meta else f"dtype {values.dtype}"
        raise TypeError(f"{name} must be a tensor of real numbers, got {what}.")
    tensor: torch.Tensor = values.detach().cpu().resolve_neg()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if _layout_of(tensor) in _LAYOUTS:
        return tensor
    if not tensor.is_floating_point():
        return tensor.to(torch.float64)
    if _layout_of(tensor).startswith("float8"):
        # float16 holds all eight-bit floats but the one that is a bare exponent, as wide as bfloat16's.
        return tensor.to(torch.bfloat16 if _layout_of(tensor) == "float8_e8m0fnu" else torch.float16)
    raise TypeError(f"{name} has dtype {tensor.dtype}, which cannot be binned. Convert it to float32 first.")


def _layout_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass
class _Tally:
    """Dense counts that grow chunk by chunk inside one call."""

    name: str
    zeros: int
    counts: Counts
    offsets: Counts
    scratch: torch.Tensor | None = None  # for patterns; fresh memory for every piece would cost a sixth of the time

    @staticmethod
    def empty(name: str) -> _Tally:
        layout = _LAYOUTS[name]
        bins = np.iinfo(layout.signed).max + 1 >> layout.shift
        return _Tally(name, 0, np.zeros(bins, dtype=np.int64), np.zeros(bins if layout.shift else 0, dtype=np.int64))

    @property
    def layout(self) -> _Layout:
        return _LAYOUTS[self.name]

    def add(self, piece: torch.Tensor) -> int | None:
        """Count a flat piece; return the place of its first entry that is not finite, if there is one."""
        import torch

        layout = self.layout
        signed: torch.dtype = getattr(torch, layout.signed)
        if self.scratch is None:
            self.scratch = torch.empty(min(piece.numel(), layout.chunk), dtype=signed)
        room = self.scratch[: piece.numel()] if piece.numel() <= self.scratch.numel() else None
        pattern = torch.bitwise_and(piece.contiguous().view(signed), torch.iinfo(signed).max, out=room)  # no sign
        if layout.shift == 0:
            counts = torch.bincount(pattern, minlength=len(self.counts)).numpy()
        else:
            offset = ((pattern >> layout.dropped) & (2**_OFFSET_BITS - 1)).to(torch.float64)
            both = torch.bincount(pattern >> layout.shift, weights=offset.add_(_COUNT_UNIT), minlength=len(self.counts))
            packed = both.to(torch.int64).numpy()
            counts = packed // _COUNT_UNIT
            self.offsets += packed % _COUNT_UNIT
        if counts[layout.infinity :].any():
            return int(torch.nonzero(~torch.isfinite(piece))[0])
        self.counts += counts
        self.zeros += piece.numel() - int(torch.count_nonzero(pattern)) if layout.shift else int(counts[0])
        return None

    def histogram(self) -> MagnitudeHistogram:
        counts = self.counts.copy()
        counts[0] -= self.zeros
        bins = np.flatnonzero(counts).astype(np.int64)
        offsets = self.offsets[bins] if self.layout.shift else np.zeros(len(bins), dtype=np.int64)
        parts = {self.name: Part(bins, counts[bins], offsets)} if len(bins) else {}
        return MagnitudeHistogram(self.zeros, parts)


def _joined(parts: Sequence[Part]) -> Part:
    width = max(int(part.bins[-1]) for part in parts) + 1
    counts, offsets = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int64)
    for part in parts:
        counts[part.bins] += part.counts
        offsets[part.bins] += part.offsets
    bins = np.flatnonzero(counts).astype(np.int64)
    return Part(bins, counts[bins], offsets[bins])


@dataclass(frozen=True)
class _Bins:
    """Bins of all formats side by side, with what is known of the mean magnitude in each.

    The mean is low + share·(high − low) with the share between ``least_share`` and ``most_share``, each off by at
    most 2u relatively.
    """

    low: Array
    high: Array
    count: Counts
    least_share: Array
    most_share: Array

    @property
    def is_exact(self) -> bool:
        return bool(np.array_equal(self.low, self.high))

    def mean(self, share: Array) -> Array:
        """Return the mean for a share, off by at most 5u relatively."""
        return np.minimum(self.low + (self.high - self.low) * share, self.high)


def _bins_of(histogram: MagnitudeHistogram) -> _Bins:
    columns: list[tuple[Array, Array, Counts, Array, Array]] = []
    for name, part in histogram.parts.items():
        layout = _LAYOUTS[name]
        low = layout.decode(part.bins << layout.shift)
        high = layout.decode((part.bins + 1 << layout.shift) - 1)
        if layout.shift == 0:
            share = most = np.zeros(len(low))
        elif layout.dropped == 0:
            share = most = part.offsets / (part.counts * (2**_OFFSET_BITS - 1))
        else:  # what was dropped adds less than one unit of offset to each entry
            units = part.counts * 2**_OFFSET_BITS
            share, most = part.offsets / units, (part.offsets + part.counts) / units
        columns.append((low, high, part.counts, share, most))
    if not columns:
        return _Bins(np.zeros(0), np.zeros(0), _NONE, np.zeros(0), np.zeros(0))
    low, high, counts, share, most = (np.concatenate(column) for column in zip(*columns, strict=True))
    return _Bins(low, high, counts, share, most)


_Terms = list[tuple[Array, Array]]  # (points, weights), which stand for Σ weights·points^q


def _lower_terms(bins: _Bins, taken: Counts, q: float) -> _Terms:
    """Return terms whose sum is at most Σ|w|^q over ``taken`` entries of each bin, all or none of them."""
    if q > 1:  # x^q is convex: least when all entries equal the mean
        return [(bins.mean(bins.least_share), taken.astype(np.float64))]
    # concave: least when all entries lie at the ends of the bin
    return [(bins.low, taken * (1 - bins.least_share)), (bins.high, taken * bins.least_share)]


def _upper_terms(bins: _Bins, taken: Counts, q: float) -> _Terms:
    """Return terms whose sum is at least Σ|w|^q over all entries of each bin, times the share taken of them."""
    if q <= 1:
        return [(bins.mean(bins.most_share), taken.astype(np.float64))]
    return [(bins.low, taken * (1 - bins.most_share)), (bins.high, taken * bins.most_share)]


def _weighted_sum(terms: _Terms, q: float, top: int) -> Enclosure:
    """Enclose Σ weights·(points/2^top)^q, for points < 2^top and weights off by at most 6u of the larger of a pair."""
    points, weights = (np.concatenate(column) for column in zip(*terms, strict=True))
    present = (weights > 0) & (points > 0)
    points, weights = points[present], weights[present]
    fractions, exponents = np.frexp(points)
    exponents = exponents.astype(np.int64) - top
    tiny = exponents < -1000
    # Dividing a tiny point by 2^top would underflow, so powers of its fraction and of half its exponent are taken.
    powers = np.ldexp(fractions, np.where(tiny, 0, exponents)) ** q
    if tiny.any():
        half = exponents[tiny] // 2
        powers[tiny] *= np.ldexp(1.0, half) ** q * np.ldexp(1.0, exponents[tiny] - half) ** q
    if not len(points):
        return Enclosure(0.0, 0.0)
    products = powers * weights
    total = math.fsum(products.tolist())
    # Roundings: the means' 5u to the power q; pow, three times for a tiny point; weight, product, sum.
    units = 5 * max(q, 1.0) + (3 * _POWER + 3 if tiny.any() else _POWER) + 10
    underflow = _LEAST * (math.fsum(weights.tolist()) + len(products)) * 2 if q > 0.5 or tiny.any() else 0.0
    low, high = _widened(total, total, units=units)
    return Enclosure(max(_below(low - underflow), 0.0), _above(high + underflow))


def _root(scaled: Enclosure, q: float, top: int) -> Enclosure:
    """Enclose scaled^(1/q)·2^top; OverflowError where it leaves float64."""
    ends = []
    for total, outwards in zip(scaled, (_below, _above), strict=True):
        if total == 0:
            ends.append(0.0)
            continue
        # The fourth root stays in range where the whole would leave it before 2^top brings it back.
        part, exponent = math.frexp(total ** (0.25 / q))
        units = 5 * _POWER + 4 + 2 * abs(math.log(total)) / q
        ends.append(outwards(math.ldexp(outwards(part**4, units), 4 * exponent + top)))
    if math.isinf(ends[1]):
        raise OverflowError
    return Enclosure(*ends)


def _ranked(values: Array, counts: Counts, rank: int) -> float:
    """Return the rank-th smallest of values that occur ``counts`` times each."""
    order = np.argsort(values, kind="stable")
    return float(values[order][np.searchsorted(np.cumsum(counts[order]), rank)])


def _taken_from_below(values: Array, counts: Counts, total: int) -> Counts:
    """Return how many of each value are among the ``total`` smallest."""
    order = np.argsort(values, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    taken = np.zeros_like(counts)
    taken[order] = np.clip(total - before, 0, counts[order])
    return taken


def _below(value: float, units: float = 0.0) -> float:
    """Return a float below every value that this one approximates to a relative error of ``units``·u and one ulp."""
    return math.nextafter(value - abs(value) * log_error(units), -math.inf) if math.isfinite(value) else value


def _above(value: float, units: float = 0.0) -> float:
    return math.nextafter(value + abs(value) * log_error(units), math.inf) if math.isfinite(value) else value


def _widened(low: float, high: float, *, units: float) -> Enclosure:
    return Enclosure(_below(low, units), _above(high, units))


def _log(x: Enclosure) -> Enclosure:
    return _widened(*(math.log(end) if end else -math.inf for end in x), units=_POWER)


def _exp(x: Enclosure) -> Enclosure:
    # The lower end may be cut off at any height, the upper one only at infinity.
    return _widened(math.exp(min(x.low, 709.0)), math.exp(x.high) if x.high < 709 else math.inf, units=_POWER)


def _plus(x: Enclosure, y: Enclosure) -> Enclosure:
    return _widened(x.low + y.low, x.high + y.high, units=0)


def _minus(x: Enclosure, y: Enclosure) -> Enclosure:
    return _widened(x.low - y.high, x.high - y.low, units=0)


def _times(x: Enclosure, factor: float) -> Enclosure:
    return _widened(x.low * factor, x.high * factor, units=0)


def _over(x: Enclosure, divisor: float, units: float = 0) -> Enclosure:
    return _widened(x.low / divisor, x.high / divisor, units=units)
