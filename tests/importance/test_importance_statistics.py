"""Arithmetic, ranks and summaries of importance, against numpy on the concatenated values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bad_input import each_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_optim.importance import Importance, statistics
from cl_optim.importance.statistics import RELATIVE_ERROR, SHARES, Histogram
from cl_optim.ops import importance_histogram as ops


def fisher_like(*shape: int, seed: int = 0) -> Tensor:
    """Twelve orders of magnitude, some zeros and some ties."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (-12 * torch.rand(shape, generator=generator))
    values[torch.rand(shape, generator=generator) < 0.1] = 0.0
    values[torch.rand(shape, generator=generator) < 0.1] = 0.125
    return values


VALUES = {
    "a.weight": fisher_like(30, 40),
    "a.bias": fisher_like(30, seed=1),
    "empty": torch.zeros(0, 3),
    "b.weight": fisher_like(5, 4, 3, seed=2).transpose(0, 2),
}
ALL = np.concatenate([value.reshape(-1).numpy() for value in VALUES.values()])


@pytest.fixture
def importance() -> Importance:
    return Importance({name: 8 * value for name, value in VALUES.items()}, samples=8)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.05, 0.3, 0.85, 0.97, 1.0])
def test_top_takes_the_largest_and_of_equal_ones_the_first(importance, fraction):
    masks = importance.top(fraction)
    order = np.argsort(-ALL, kind="stable")[: round(fraction * len(ALL))]
    expected = np.zeros(len(ALL), dtype=bool)
    expected[order] = True
    assert list(masks) == list(VALUES)
    assert all(masks[name].shape == VALUES[name].shape for name in VALUES)
    found = np.concatenate([mask.reshape(-1).numpy() for mask in masks.values()])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("q", [0.0, 0.05, 0.1, 0.5, 0.84, 0.999, 1.0])
def test_quantile(importance, q):
    assert importance.quantile(q) == np.quantile(ALL, q, method="inverted_cdf")


@given(
    values=st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=60),
    fraction=st.floats(0, 1),
    parts=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_ranks_of_any_values(values, fraction, parts):
    tensors = dict(enumerate(torch.tensor(values).tensor_split(parts)))
    masks = statistics.top_masks(tensors, fraction)
    found = torch.cat([masks[i] for i in range(parts)]).numpy()
    expected = np.zeros(len(values), dtype=bool)
    expected[np.argsort(-np.float32(values), kind="stable")[: round(fraction * len(values))]] = True
    np.testing.assert_array_equal(found, expected)
    low = statistics.quantile(tensors, fraction)
    assert np.mean(np.float32(values) <= np.float32(low)) >= fraction - 1e-12


def carriers(values: np.ndarray, share: float) -> float:
    masses = np.cumsum(np.sort(values.astype(np.float64))[::-1])
    return (1 + np.searchsorted(masses, share * masses[-1])) / len(values)


def test_per_layer(importance):
    layers = importance.per_layer()
    assert list(layers) == ["a", "empty", "b"]
    values = np.concatenate([VALUES["a.weight"].reshape(-1).numpy(), VALUES["a.bias"].numpy()])
    summary = layers["a"]
    assert summary.weights == len(values)
    assert summary.zeros == (values == 0).sum()
    assert summary.largest == values.max()
    assert summary.mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-6)
    for q, found in zip(statistics.QUANTILES, summary.quantiles, strict=True):
        expected = np.quantile(values, q, method="inverted_cdf")
        assert found == pytest.approx(expected, rel=RELATIVE_ERROR, abs=0)
    for share, found in zip(SHARES, summary.carriers, strict=True):
        # Values that are off by 0.4 % put a share off by twice as much.
        low, high = (
            carriers(values, min(1, share * (1 + s * 2 * RELATIVE_ERROR))) for s in (-1, 1)
        )
        assert low - 1 / len(values) <= found <= high + 1 / len(values)
    assert layers["empty"].weights == 0


def test_histograms_add_up():
    whole = Histogram.of([torch.from_numpy(ALL)])
    parts = Histogram()
    for value in VALUES.values():
        parts += Histogram.of([value])
    torch.testing.assert_close(parts.counts, whole.counts)
    assert parts.largest == whole.largest
    assert whole.total == len(ALL)


EDGES = [0.0, -0.0, 2.0**-149, 2.0**-126, 1.0, torch.finfo(torch.float32).max]


@pytest.mark.parametrize("add", [ops.add_histogram_, ops.add_histogram_reference_])
def test_histograms_of_lazy_negations(add):
    values = torch.rand(300)
    results = []
    for given_values in (values, torch._neg_view(-values)):
        counts = torch.zeros(ops.BINS, dtype=torch.int64)
        totals = torch.zeros(2, dtype=torch.float64)
        add(counts, totals, given_values)
        results.append((counts, totals))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("count", [0, 1, 31, 33, 16_384, 50_001])
@pytest.mark.parametrize("add", [ops.add_histogram_, ops.add_histogram_reference_])
def test_the_histogram_of_any_size(add, count):
    values = fisher_like(count)
    values[: len(EDGES)] = torch.tensor(EDGES)[:count]
    counts = torch.ones(ops.BINS, dtype=torch.int64)
    totals = torch.tensor([0.25, 1.0], dtype=torch.float64)  # of what was counted before
    add(counts, totals, values)
    upper = np.float32(values.numpy()).view(np.uint32) >> 16 & 0x7FFF
    np.testing.assert_array_equal(counts.numpy() - 1, np.bincount(upper, minlength=ops.BINS))
    assert totals[0] == max([0.25, *values.tolist()])
    assert totals[1].item() == pytest.approx(1.0 + math.fsum(values.tolist()), rel=1e-12)


OPERANDS = (torch.zeros(ops.BINS, dtype=torch.int64), torch.zeros(2).double(), fisher_like(99))
COUNTS, TOTALS, FEW = OPERANDS
BAD = [
    ("too few counts", (COUNTS[1:], TOTALS, FEW),
     RuntimeError, "counts must be contiguous int64"),
    ("float32 totals", (COUNTS, TOTALS.float(), FEW), RuntimeError, "totals float64"),
    ("float64 values", (COUNTS, TOTALS, FEW.double()),
     RuntimeError, "values must be contiguous float32"),
]  # fmt: skip


def test_operator():
    torch.library.opcheck(torch.ops.cl_optim.importance_histogram_.default, OPERANDS)


@each_of(BAD)
def test_the_operator_refuses(given, error, message):
    with pytest.raises(error, match=message):
        torch.ops.cl_optim.importance_histogram_(*given)


def test_a_parameter_without_a_module_is_a_layer():
    assert [statistics.layer_of(name) for name in ("scale", "a.b.weight")] == ["scale", "a.b"]


def test_overlap(importance):
    other = {name: fisher_like(*value.shape, seed=7) for name, value in VALUES.items()}
    del other["a.bias"]
    other["new"] = fisher_like(50, seed=8)
    names = list(dict.fromkeys([*VALUES, *other]))

    def whole(values: dict[str, Tensor], absent: float) -> np.ndarray:
        shapes = {**VALUES, **other}
        return np.concatenate(
            [
                values.get(n, torch.full(shapes[n].shape, absent)).reshape(-1).double().numpy()
                for n in names
            ]
        )

    one, two = whole(VALUES, 0.0), whole(other, 0.0)
    top = []
    for values in (VALUES, other):
        count = round(0.2 * sum(value.numel() for value in values.values()))
        top.append(set(np.argsort(-whole(values, -1.0), kind="stable")[:count]))
    found = importance.overlap(other, fraction=0.2)
    assert found["jaccard"] == pytest.approx(len(top[0] & top[1]) / len(top[0] | top[1]))
    assert found["cosine"] == pytest.approx(
        one @ two / np.linalg.norm(one) / np.linalg.norm(two), rel=1e-6
    )
    # Kirkpatrick's: 1 − d², d² = ½ tr(F̂₁ + F̂₂ − 2(F̂₁F̂₂)^½) with traces 1.
    one, two = one / one.sum(), two / two.sum()
    squared = 0.5 * (one + two - 2 * np.sqrt(one * two)).sum()
    assert found["fisher"] == pytest.approx(1 - squared, rel=1e-6)
    assert importance.overlap(importance) == {"jaccard": 1.0, "cosine": 1.0, "fisher": 1.0}


def test_overlap_of_what_has_nothing_in_common():
    one, two = {"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([0.0, 1.0])}
    found = statistics.overlap([one, two, {"a": torch.zeros(2)}], 0.5)
    assert [value[0, 1].item() for value in found] == [0.0, 0.0, 0.0]
    assert found.cosine[0, 2] == 0.0


def test_merge_is_the_decayed_sum_of_means(importance):
    other = Importance(
        {"a.weight": torch.full((30, 40), 6.0), "new": torch.ones(2, dtype=torch.float64)},
        samples=3,
        metadata={"labels": "exact"},
    )
    merged = importance.merge(other, decay=0.25)
    assert set(merged) == {*VALUES, "new"}
    torch.testing.assert_close(merged["a.weight"], 0.25 * VALUES["a.weight"] + 2.0)
    torch.testing.assert_close(merged["a.bias"], 0.25 * VALUES["a.bias"])
    torch.testing.assert_close(merged["new"], torch.full((2,), 1 / 3, dtype=torch.float64))
    assert merged.metadata == {
        "merged": [{"weight": 0.25, "samples": 8}, {"weight": 1.0, "samples": 3, "labels": "exact"}]
    }
    again = merged.merge(other, decay=0.5).metadata["merged"]
    assert [source["weight"] for source in again] == [0.125, 0.5, 1.0]


def test_normalize(importance):
    normal = importance.normalize()
    mean = ALL.astype(np.float64).mean()
    torch.testing.assert_close(normal["a.bias"], VALUES["a.bias"] / mean)
    assert normal.metadata["normalized_by"] == pytest.approx(mean, rel=1e-6)
    total = sum(value.sum(dtype=torch.float64).item() for value in normal.values())
    assert total / len(ALL) == pytest.approx(1.0, rel=1e-6)


def test_normalize_what_float32_can_hardly_hold():
    values = torch.zeros(1000)
    values[0] = 1e-44
    found = Importance({"a": values}, 1).normalize()["a"]
    assert found[0] == pytest.approx(1000)
    assert (found[1:] == 0).all()


def test_sums_beyond_float32():
    layers = Importance({"a.weight": torch.full((8,), 2.0**127)}, samples=1).per_layer()
    assert layers["a"].mean == 2.0**127
    assert layers["a"].carriers == (0.5, 1.0, 1.0)


@settings(deadline=None)
@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1), st.data())
def test_a_cut_is_where_sorting_finds_it(numbers: list[float], data: st.DataObject):
    count = data.draw(st.integers(1, len(numbers)))
    values = torch.tensor(numbers).abs()
    pieces = {str(number): piece for number, piece in enumerate(torch.split(values, 3))}
    threshold, ties = statistics.cut(pieces, count)
    ordered = values.sort(descending=True).values
    assert threshold == ordered[count - 1]
    assert ties == (ordered[:count] == threshold).sum()


@settings(deadline=None)
@given(st.lists(st.floats(0, allow_infinity=False), min_size=1), st.data())
def test_a_cut_of_float64_is_where_sorting_finds_it(numbers: list[float], data: st.DataObject):
    """Beside float32 tensors, too."""
    count = data.draw(st.integers(1, len(numbers)))
    values = torch.tensor(numbers, dtype=torch.float64).abs()
    pieces = {str(number): piece for number, piece in enumerate(torch.split(values, 3))}
    for name in list(pieces)[1::2]:
        pieces[name] = pieces[name].clamp(max=3e38).float()
    threshold, ties = statistics.cut(pieces, count)
    values = torch.cat([piece.double() for piece in pieces.values()])
    ordered = values.sort(descending=True, stable=True)
    assert threshold == ordered.values[count - 1]
    assert ties == (ordered.values[:count] == threshold).sum()
    masks = statistics.top_masks(pieces, count / len(numbers))
    found = torch.cat(list(masks.values())).nonzero()[:, 0]
    assert torch.equal(found, ordered.indices[:count].sort().values)


BEYOND = 2.0**700  # a power of two: what float32 holds is the same but for it


def test_ranks_and_overlap_beyond_float32(importance):
    doubles = {name: value.double() for name, value in importance.items()}
    huge = Importance({name: value * BEYOND for name, value in doubles.items()}, samples=1)
    expected = importance.top(0.2)
    for name, mask in huge.top(0.2).items():
        assert torch.equal(mask, expected[name])
    assert huge.quantile(0.7) == importance.quantile(0.7) * BEYOND
    other = {name: value.flip(0) for name, value in doubles.items()}
    expected = importance.overlap({name: value.float() for name, value in other.items()})
    for factor in (BEYOND, 1 / BEYOND):
        scaled = {name: value * factor for name, value in other.items()}
        assert huge.overlap(scaled) == pytest.approx(expected, rel=1e-9)


def test_normalize_brings_sums_beyond_float32_within_it(importance):
    huge = Importance({name: BEYOND * value.double() for name, value in importance.items()}, 1)
    found = huge.normalize().per_layer()
    for layer, summary in importance.normalize().per_layer().items():
        assert found[layer].mean == pytest.approx(summary.mean, rel=1e-6)
        assert found[layer].quantiles == pytest.approx(summary.quantiles, rel=0.01)


def test_normalize_near_the_limit_of_float64():
    values = torch.full((100,), 1e308, dtype=torch.float64)
    assert (Importance({"a": values}, 1).normalize()["a"] - 1).abs().max() < 1e-12


def test_large_float64_sums_of_many_samples_have_a_mean_in_float32():
    summaries = statistics.Summaries()
    summaries.add("a.weight", torch.full((4,), 1e40, dtype=torch.float64), divisor=1e4)
    assert summaries.whole().mean == pytest.approx(1e36, rel=1e-6)
