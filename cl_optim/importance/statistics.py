"""Statistics of importance: histograms that add up, summaries of layers, the top weights.

Importance spans many orders of magnitude, and what users ask of it are ranks: which weights are at
the top, how few of them carry most of it. A histogram over the upper 16 bits of a float32, which
for numbers ≥ 0 are in the order of the numbers, answers that in one pass over tensors of any size
and scale, and histograms of parts add up to that of the whole. Its bins are 2⁻⁷ wide, so that
quantiles and shares read from it are within 0.4 %; for exact ranks, a second histogram divides one
of its bins by the lower 16 bits.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_optim.distributed import ALONE, Together, refuse_parts
from cl_optim.ops.checks import check_fraction
from cl_optim.ops.importance_histogram import BINS, add_histogram_, bins

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SHARES = (0.5, 0.9, 0.99)
RELATIVE_ERROR = 2**-8  # of what a histogram says about values

_CHUNK = 2**20  # as much as stays in a cache


def flat_float32(values: Tensor) -> Tensor:
    """Return the values as a float32 vector on the CPU; a view where they are that already."""
    return _flat(values).to(torch.float32)


def _flat(values: Tensor) -> Tensor:
    """Return the values as a vector on the CPU, in float64 where they are, else in float32."""
    refuse_parts([values])
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.detach().reshape(-1).to("cpu", dtype)


def sum_over(values: Tensor, divisor: float) -> float:
    """Return Σ values / divisor in float64, which the sum alone of large values would leave.

    0 where there are no values.
    """
    if values.numel() == 0:
        return 0.0
    if values.dtype == torch.float64:
        return (values / divisor).sum().item()
    return values.sum(dtype=torch.float64).item() / divisor


class Histogram:
    """How many values lie in each bin; values must be finite in float32 and ≥ 0.

    Attributes:
        counts: int64 [32768].
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device="cpu")
        self._totals = torch.zeros(2, dtype=torch.float64, device="cpu")

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Histogram:
        """Make the histogram of the values of some tensors."""
        histogram = cls()
        for values in tensors:
            histogram.add(values)
        return histogram

    def add(self, values: Tensor) -> None:
        """Count the values of a tensor of any shape, dtype and device.

        Raises:
            ValueError: A value is not finite in float32. The histogram must not be used then.
        """
        add_histogram_(self.counts, self._totals, flat_float32(values).contiguous())
        if math.isinf(self.largest):
            raise ValueError(
                "importance must be below 3.4e38 for a histogram, whose bins are those of float32: "
                "Importance.normalize() scales it."
            )

    def __iadd__(self, other: Histogram) -> Histogram:
        self.counts += other.counts
        largest = torch.maximum(self._totals[0], other._totals[0])
        self._totals += other._totals
        self._totals[0] = largest
        return self

    @property
    def largest(self) -> float:
        """The largest value."""
        return self._totals[0].item()

    @property
    def sum(self) -> float:
        """The sum of the values."""
        return self._totals[1].item()

    @property
    def total(self) -> int:
        """How many values there are."""
        return int(self.counts.sum())

    @property
    def zeros(self) -> int:
        """How many are 0, or below float32's normal numbers by 2⁷."""
        return int(self.counts[0])

    def quantiles(self, fractions: Sequence[float]) -> tuple[float, ...]:
        """Return for each fraction the smallest value that so many of the values do not exceed."""
        if not self.total:
            return (0.0,) * len(fractions)
        ranks = self.counts.new_tensor([max(1, math.ceil(q * self.total)) for q in fractions])
        middles = _middles()[torch.searchsorted(self.counts.cumsum(0), ranks)]
        return tuple(min(value, self.largest) for value in middles.tolist())

    def carriers(self, shares: Sequence[float]) -> tuple[float, ...]:
        """Return for each share the smallest fraction of the values that has so much of the sum."""
        counts, middles = self.counts.flip(0), _middles().flip(0)
        masses, numbers = (counts * middles).cumsum(0), counts.cumsum(0)
        if not float(masses[-1]) > 0:
            return (0.0,) * len(shares)
        targets = masses.new_tensor(shares) * masses[-1]
        places = torch.searchsorted(masses, targets)
        # Of the bin in which a share is reached, no more than are needed.
        missing = targets - (masses[places] - counts[places] * middles[places])
        inside = torch.minimum((missing / middles[places]).ceil().long(), counts[places])
        found = (numbers[places] - counts[places] + inside) / self.total
        return tuple(found.tolist())


@functools.lru_cache(1)
def _middles() -> Tensor:
    """Return the middle of each bin, float64; 0 for the lowest."""
    edges = (torch.arange(BINS, dtype=torch.int32, device="cpu") << 16).view(torch.float32).double()
    middles = edges.clone()
    middles[1:-1] = (edges[1:-1] + edges[2:]) / 2
    # The bins of infinity and NaN are empty: 0 keeps them out of sums.
    return torch.where(middles.isfinite(), middles, 0.0)


# --- summaries ------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """What a layer's importance looks like.

    Attributes:
        weights: How many weights it has.
        mean: Their mean importance.
        largest: The largest.
        zeros: How many have none.
        quantiles: At 5, 25, 50, 75, 95 and 99 %, within 0.4 %.
        carriers: The fraction of its weights that carries 50, 90 and 99 % of its importance.
    """

    weights: int
    mean: float
    largest: float
    zeros: int
    quantiles: tuple[float, ...]
    carriers: tuple[float, ...]

    @classmethod
    def of(cls, histogram: Histogram) -> Summary:
        """Make the summary of values with that histogram."""
        return cls(
            weights=histogram.total,
            mean=histogram.sum / max(histogram.total, 1),
            largest=histogram.largest,
            zeros=histogram.zeros,
            quantiles=histogram.quantiles(QUANTILES),
            carriers=histogram.carriers(SHARES),
        )


class Summaries:
    """Summaries of layers and of the whole model, from parameters that come one at a time."""

    def __init__(self) -> None:
        self._histograms: dict[str, Histogram] = defaultdict(Histogram)

    def add(self, name: str, values: Tensor, divisor: float = 1) -> None:
        """Add a parameter's importance, which is ``values / divisor``."""
        histogram = self._histograms[layer_of(name)]
        for chunk in torch.split(_flat(values), _CHUNK):
            histogram.add(chunk if divisor == 1 else chunk / divisor)

    def layers(self) -> dict[str, Summary]:
        """Return layer → summary, in the order in which the layers came."""
        return {layer: Summary.of(values) for layer, values in self._histograms.items()}

    def whole(self) -> Summary:
        """Return the summary of all weights."""
        total = Histogram()
        for histogram in self._histograms.values():
            total += histogram
        return Summary.of(total)


def layer_of(name: str) -> str:
    """Return the layer that a parameter belongs to.

    Example:
        >>> layer_of("blocks.0.attention.weight")
        'blocks.0.attention'
        >>> layer_of("scale")
        'scale'
    """
    return name.rpartition(".")[0] or name


# --- ranks ----------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """Where the ``count`` largest values end: all above ``value``, and the first ``ties`` equal."""

    value: float
    ties: int


def cut(values: Mapping[str, Tensor], count: int, together: Together = ALONE) -> Cut:
    """Find where the ``count`` largest of all values end.

    Ranks are those of float32; where a tensor is float64, those of float64.

    Args:
        values: Finite and ≥ 0.
        count: At most as many as there are values.
        together: The processes, whose values are counted together; each finds the same.
    """
    if count == 0:
        return Cut(math.inf, 0)
    histogram = Histogram()
    is_float64 = False
    for value in values.values():
        if is_float64 := value.dtype == torch.float64:
            break
        histogram.add(value)
    if any(together.gather(is_float64)):
        return _cut_float64(values, count, together)
    together.sum_([histogram.counts])
    upper, count = _place(histogram.counts, count)
    lower = torch.zeros(2**16, dtype=torch.int64, device="cpu")
    for piece in _pieces(values, torch.float32):
        lower += torch.bincount(_lower_bits(piece, upper), minlength=2**16)
    together.sum_([lower])
    place, ties = _place(lower, count)
    bits = torch.tensor(upper << 16 | place, dtype=torch.int32, device="cpu")
    return Cut(bits.view(torch.float32).item(), ties)


def _cut_float64(values: Mapping[str, Tensor], count: int, together: Together) -> Cut:
    """Find `cut` 16 bits after 16 bits of a float64, the upper ones first."""
    prefix = 0
    for shift in (48, 32, 16, 0):
        counts = torch.zeros(2**16, dtype=torch.int64, device="cpu")
        for piece in _pieces(values, torch.float64):
            bits = piece.view(torch.int64) & (2**63 - 1)  # without the sign that a zero may have
            if shift < 48:
                bits = bits[bits >> (shift + 16) == prefix]
            counts += torch.bincount(bits >> shift & 0xFFFF, minlength=2**16)
        together.sum_([counts])
        place, count = _place(counts, count)
        prefix = prefix << 16 | place
    bits = torch.tensor(prefix, dtype=torch.int64, device="cpu")
    return Cut(bits.view(torch.float64).item(), count)


def comparable(values: Tensor, threshold: float) -> Tensor:
    """Return the values in a dtype that has the threshold, which torch would round to theirs."""
    is_exact = torch.tensor(threshold, dtype=values.dtype, device="cpu").item() == threshold
    return values if is_exact else values.double()


def _place(counts: Tensor, count: int) -> tuple[int, int]:
    """Find the bin of the ``count``-th largest value, and which of those in it that is."""
    larger = counts.flip(0).cumsum(0).flip(0) - counts
    place = int(((larger < count) & (larger + counts >= count)).nonzero()[0])
    return place, count - int(larger[place])


def _pieces(values: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    for value in values.values():
        for piece in torch.split(_flat(value), _CHUNK):
            yield piece.to(dtype).contiguous()


def _lower_bits(values: Tensor, upper: int) -> Tensor:
    """Return the lower 16 bits of the values in a bin."""
    return values.view(torch.int32)[bins(values) == upper] & 0xFFFF


def top_masks(values: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Return masks of the most important weights of all; ties go to those that come first.

    Args:
        values: Parameter name → importance, finite and ≥ 0.
        fraction: Of all weights, in [0, 1]; rounded to a number of weights.

    Returns:
        Parameter name → bool tensor of its shape, on the CPU.
    """
    check_fraction("fraction", fraction)
    total = sum(value.numel() for value in values.values())
    threshold, ties = cut(values, round(fraction * total))
    masks = {}
    for name, value in values.items():
        flat = comparable(_flat(value), threshold)
        mask = flat > threshold
        if ties:
            equal = (flat == threshold).nonzero()[:ties, 0]
            mask[equal] = True
            ties -= len(equal)
        masks[name] = mask.view(value.shape)
    return masks


def quantile(values: Mapping[str, Tensor], q: float) -> float:
    """Return exactly the smallest value that at least a fraction ``q`` of all does not exceed."""
    check_fraction("q", q)
    total = sum(value.numel() for value in values.values())
    if not total:
        raise ValueError("a quantile needs at least one weight: this importance has none.")
    return cut(values, total - max(1, math.ceil(q * total)) + 1).value


# --- overlap --------------------------------------------------------------------------------------


class Overlap(NamedTuple):
    """How much the importances of tasks have in common; each [tasks, tasks] float64, 1 on itself.

    Attributes:
        jaccard: Of the sets of the most important weights: common ones by all in either.
        cosine: Of the importances as vectors.
        fisher: Σ √(F̂₁F̂₂), each F̂ scaled to sum 1: Kirkpatrick et al. 2017, §4.3.
    """

    jaccard: Tensor
    cosine: Tensor
    fisher: Tensor


def overlap(importances: Iterable[Mapping[str, Tensor]], fraction: float = 0.05) -> Overlap:
    """Compare tasks pair by pair; a parameter that a task does not know counts as 0 there.

    Args:
        importances: Finite and ≥ 0; the same name has the same shape in all.
        fraction: The top set's fraction of all of a task's weights.

    Raises:
        ValueError: A name has two shapes, or the fraction is not in (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be in (0, 1], not {fraction}.")
    importances = list(importances)
    cuts, scales = [], []
    for values in importances:
        total, largest = 0, 0.0
        for value in values.values():
            total += value.numel()
            largest = max(largest, value.max().item() if value.numel() else 0.0)
        cuts.append(cut(values, min(max(1, round(fraction * total)), total)))
        scales.append(largest or 1.0)
    # Of one size, so that no product of float64 values leaves float64's range.
    scale = torch.tensor(scales, dtype=torch.float64, device="cpu")[:, None]
    ties = [c.ties for c in cuts]
    tasks = len(importances)
    common, dots, roots = scale.new_zeros(3, tasks, tasks)
    for name in dict.fromkeys(name for values in importances for name in values):
        found = [values.get(name) for values in importances]
        shapes = {value.shape for value in found if value is not None}
        if len(shapes) > 1:
            raise ValueError(f"{name!r} has the shapes {sorted(map(tuple, shapes))}: not one.")
        numel = shapes.pop().numel()
        flat = [torch.zeros(numel, device="cpu") if v is None else _flat(v) for v in found]
        for start in range(0, numel, _CHUNK):
            rows = torch.stack([row[start : start + _CHUNK].double() for row in flat])
            scaled = rows / scale
            dots += scaled @ scaled.T
            roots += scaled.sqrt() @ scaled.sqrt().T
            tops = rows.new_zeros(rows.shape)
            for task, (threshold, _) in enumerate(cuts):
                tops[task] = rows[task] > threshold
                equal = (rows[task] == threshold).nonzero()[: ties[task], 0]
                # A parameter that the task does not know is no weight of it, also for a cut at 0.
                if found[task] is not None:
                    tops[task, equal] = 1.0
                    ties[task] -= len(equal)
            common += tops @ tops.T
    sizes = common.diagonal()
    return Overlap(
        jaccard=_ratio(common, sizes[:, None] + sizes - common),
        cosine=_ratio(dots, (dots.diagonal()[:, None] * dots.diagonal()).sqrt()),
        fisher=_ratio(roots, (roots.diagonal()[:, None] * roots.diagonal()).sqrt()),
    )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return ``part / whole`` with 1 on the diagonal, 0 where a task has no importance at all."""
    ratio = torch.where(whole > 0, part / whole, 0.0).clamp(0.0, 1.0)
    return ratio.fill_diagonal_(1.0)
