"""The 8-bit codes and stochastic rounding, against brute force and statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from cl_optim.ops import importance_codec as codec


def fisher(numel: int, seed: int = 0) -> Tensor:
    """Spread over decades, with exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (1.5 * torch.randn(numel, generator=generator) - 4)
    values[torch.rand(numel, generator=generator) < 0.1] = 0.0
    return values


def round_trip(values: Tensor, random: Tensor | None = None) -> Tensor:
    return codec.decode_log8(codec.encode_log8(values, random=random), values.shape)


def block_maxima(values: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % codec.BLOCK))
    maxima = padded.view(-1, codec.BLOCK).amax(1, keepdim=True).expand(-1, codec.BLOCK)
    return maxima.reshape(-1)[: values.numel()].view_as(values)


def log8_grid() -> Tensor:
    """All values that log8 has, in order, float64."""
    octaves = 2.0 ** torch.arange(-126, 128, dtype=torch.float64)
    levels = torch.tensor([128, 140, 152, 166, 181, 198, 216, 236]) / 128
    return (octaves[:, None] * levels).flatten()


def test_the_levels_of_an_octave_are_nearly_equal_steps():
    grid = log8_grid()
    steps = grid[1:] / grid[:-1]
    assert 1.084 < steps.min() < steps.max() < 1.094
    equal = 2.0 ** (torch.arange(len(grid)).double() / 8 - 126)
    assert (grid / equal - 1).abs().max() < 0.007
    assert torch.equal(grid.bfloat16().double(), grid)


def test_log8_is_close_down_to_two_to_the_minus_31_of_the_maximum():
    values = 10 ** (3 * torch.randn(400, 333) - 2)
    values[torch.rand(400, 333) < 0.1] = 0.0
    decoded = round_trip(values)
    in_range = values >= block_maxima(values) * 2.0**-31.5
    assert (~in_range & (values > 0)).any()
    error = (decoded - values).abs() / values
    assert error[in_range & (values > 0)].max() <= 0.045
    assert error[in_range & (values > 0)].max() > 0.04
    assert torch.equal(decoded == 0, values == 0)


def test_smaller_values_take_the_lowest_code_and_are_counted():
    values = torch.tensor([1.0, 2.0**-31.4, 2.0**-32, 1e-30, 0.0])
    decoded = round_trip(values)
    lowest = decoded[3]
    assert lowest == decoded[2] > 0
    assert codec.count_underflows(values) == 2
    assert codec.count_underflows(torch.zeros(3)) == 0


@settings(deadline=None)
@given(st.integers(-115, 126), st.integers(0, 2**32 - 1))
def test_log8_takes_the_nearest_value_of_the_grid(octave: int, seed: int):
    values = 2.0**octave * torch.rand(64, generator=torch.Generator().manual_seed(seed)) ** 9
    values = values.double().float().clamp(min=1e-37)
    grid = log8_grid()
    distance = (values.double()[:, None] - grid).abs()
    nearest = grid[distance.argmin(1)]
    in_range = values >= block_maxima(values) * 2.0**-31.5
    # Exactly between two, either is nearest.
    tie = distance.sort(1).values[:, :2].diff(dim=1).squeeze(1) == 0
    assert torch.equal(round_trip(values).double()[in_range & ~tie], nearest[in_range & ~tie])


def test_a_uniform_importance_is_exact():
    assert torch.equal(round_trip(torch.ones(300)), torch.ones(300))


def test_encoding_again_changes_nothing_even_in_another_block_scale():
    values = round_trip(fisher(5000))
    assert torch.equal(round_trip(values), values)
    merged = values.clone()
    merged[::256] = values.max() * 1.7  # every block gets a scale that is not its own
    kept = torch.ones(5000, dtype=torch.bool)
    kept[::256] = False
    kept &= values >= values.max() * 1.7 * 2.0**-31.5
    assert torch.equal(round_trip(merged)[kept], values[kept])


def test_ranks_and_the_penalty_survive_log8():
    importance, drift = fisher(200_000), torch.randn(200_000)
    decoded = round_trip(importance)
    assert spearmanr(importance, decoded).statistic >= 0.999
    exact = (importance.double() * drift.double() ** 2).sum()
    assert ((decoded.double() * drift.double() ** 2).sum() / exact - 1).abs() <= 0.01
    top = 10_000
    kept = set(decoded.topk(top).indices.tolist()) & set(importance.topk(top).indices.tolist())
    assert len(kept) >= 0.98 * top


def test_twenty_increments_of_three_per_cent_are_swallowed_by_the_nearest_code_only():
    start = torch.full((20_000,), 0.37)
    nearest, stochastic = round_trip(start), round_trip(start)
    for step in range(20):
        nearest = round_trip(nearest + 0.03 * start)
        increased = stochastic + 0.03 * start
        stochastic = round_trip(increased, codec.hashed(increased, step))
    assert torch.equal(nearest, round_trip(start))
    increase = (stochastic.mean() - round_trip(start).mean()) / start.mean()
    assert (increase - 0.6).abs() < 0.006


def test_stochastic_rounding_is_right_on_average():
    for value in (0.3, 1.05, 77.7):
        values = torch.full((100_000,), value)
        values[0] = value * 3  # in the first block, a scale above the others'
        decoded = round_trip(values, codec.hashed(values))[1:]
        assert len(decoded.unique()) == 2  # whatever the scale
        assert abs(decoded.double().mean().item() / value - 1) < 1e-3


def test_frozen_weights_have_a_code_of_their_own():
    values, frozen = fisher(1000), torch.rand(1000) < 0.3
    packed = codec.encode_log8(values, frozen)
    assert torch.equal(codec.frozen_log8(packed, values.shape), frozen)
    decoded = codec.decode_log8(packed, values.shape)
    assert (decoded[frozen] == 0).all()
    torch.testing.assert_close(decoded[~frozen], round_trip(values)[~frozen], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (255,), (256,), (257,), (3, 0), (5, 7, 11)])
def test_shapes(shape: tuple[int, ...]):
    values = torch.rand(shape) + 0.5
    packed = codec.encode_log8(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(values.numel() / 256), 260)
    decoded = codec.decode_log8(packed, values.shape)
    assert decoded.shape == values.shape
    torch.testing.assert_close(decoded, values, rtol=0.045, atol=0.0)


def test_extremes_keep_their_order():
    tiny = round_trip(torch.tensor([0.0, 1e-45, 2e-39, 1e-38]))
    assert tiny[0] == 0
    assert (tiny.diff() > 0).all()
    huge = round_trip(torch.tensor([1e38, 3e38]))
    assert huge.isfinite().all()


def test_a_block_with_a_value_that_is_not_finite_shows_it():
    for bad in (math.inf, math.nan):
        values = torch.ones(600)
        values[3] = bad
        decoded = round_trip(values)
        assert decoded[:256].isnan().all()
        assert torch.equal(decoded[256:], torch.ones(344))


def moments(numel: int, *, signed: bool) -> Tensor:
    values = fisher(numel)
    return values * torch.randn(numel).sign() if signed else values


def moment_round_trip(values: Tensor, random: Tensor | None = None, *, signed: bool) -> Tensor:
    packed = codec.encode_moment(values, random, signed=signed)
    return codec.decode_moment(packed, values.shape, signed=signed)


SIGNED = pytest.mark.parametrize("signed", [False, True])


@SIGNED
def test_moments_take_the_nearest_float_of_three_bits(signed: bool):
    values = moments(5000, signed=signed)
    mantissa, exponent = torch.frexp(values.double())
    nearest = torch.ldexp(torch.round(mantissa * 16), exponent - 4).float()
    octaves = 15 if signed else 31
    in_range = values.abs() >= block_maxima(values.abs()) * 2.0**-octaves
    decoded = moment_round_trip(values, signed=signed)
    tie = (mantissa * 16).frac().abs() == 0.5
    assert torch.equal(decoded[in_range & ~tie], nearest[in_range & ~tie])
    assert torch.equal(moment_round_trip(decoded, signed=signed)[in_range], decoded[in_range])
    assert torch.equal(decoded == 0, values == 0) or signed


@SIGNED
def test_moments_are_right_on_average(signed: bool):
    values = torch.randn(3000) if signed else torch.randn(3000).abs()
    values[0] = 5.0
    random = [codec.hashed(values, step, codec.Use.EXP_AVG) for step in range(400)]
    decoded = torch.stack([moment_round_trip(values, r, signed=signed) for r in random])
    in_range = values.abs() > 5.0 * 2.0**-14
    assert ((decoded - values).abs() / values.abs())[:, in_range].max() < 0.125
    assert torch.equal(decoded[0].sign()[in_range], values.sign()[in_range])
    deviation = (decoded.mean(0) - values).abs() / (0.07 * values.abs()).clamp(min=2e-6)
    assert deviation.max() < 0.3


def test_steps_of_moments_are_as_large_as_equal_ones_in_the_mean_square():
    fractions = 2.0 ** torch.arange(0, 1, 1 / 4096, dtype=torch.float64)
    steps = 0.125 / fractions
    equal = 2.0**0.125 - 1
    assert abs(steps.square().mean().sqrt() / equal - 1) < 0.02


def test_small_signed_values_vanish_or_take_the_lowest_code():
    values = torch.full((50_000,), 2.0**-18)
    values[::256] = 1.0
    decoded = moment_round_trip(values, codec.hashed(values), signed=True)
    small = decoded[values < 0.5]
    assert set(small.unique().tolist()) == {0.0, 1.25 * 2.0**-16}  # 126 levels below 1
    assert abs(small.mean().item() / 2.0**-18 - 1) < 0.05
    zeros = torch.zeros(10)
    assert (moment_round_trip(zeros, zeros, signed=True) == 0).all()


def test_small_second_moments_stay_above_zero():
    values = torch.full((512,), 1e-20)
    values[::256] = 1.0
    decoded = moment_round_trip(values, codec.hashed(values), signed=False)
    assert set(decoded[values < 0.5].tolist()) == {2.0**-32 * 1.25}  # 254 levels below 1


@SIGNED
def test_extreme_moments(signed: bool):
    huge = torch.tensor([torch.finfo(torch.float32).max, 1e38])
    assert moment_round_trip(huge, torch.full((2,), 0.99), signed=signed).isfinite().all()
    tiny = torch.tensor([0.0, 1e-45, 2e-38])
    decoded = moment_round_trip(tiny, signed=signed)
    assert decoded[0] == 0
    assert abs(decoded[2] / 2e-38 - 1) < 0.0625
    for bad in (math.inf, math.nan):
        values = torch.ones(600)
        values[3] = bad
        decoded = moment_round_trip(values, signed=signed)
        assert decoded[:256].isnan().all()
        assert torch.equal(decoded[256:], torch.ones(344))


def test_stochastic_bfloat16():
    for value in (1.001, -1.001, 3e-39, 65537.0):
        values = torch.full((100_000,), value)
        rounded = codec.stochastic_bfloat16(values, codec.hashed(values))
        assert len(rounded.unique()) == 2
        step = rounded.float().unique().diff().item()
        assert abs(rounded.double().mean().item() - value) < 0.01 * step
    kept = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1.5])
    rounded = codec.stochastic_bfloat16(kept, torch.full((5,), 0.99))
    torch.testing.assert_close(rounded.float(), kept, equal_nan=True, rtol=0.0, atol=0.0)


def test_the_hash_looks_uniform_and_independent():
    zeros = torch.zeros(200_000)
    first, later, other = (
        codec.hashed(zeros, *arguments).double()
        for arguments in ((1,), (2,), (1, codec.Use.MAX_EXP_AVG_SQ))
    )
    for numbers in (first, later, other):
        histogram = torch.histc(numbers.float(), 64, 0.0, 1.0)
        chi_squared = ((histogram - 3125.0) ** 2 / 3125.0).sum()
        assert chi_squared < 120  # 63 degrees of freedom: p = 2e-5
    for other_numbers in (later, other, first.roll(1)):
        correlation = torch.corrcoef(torch.stack([first, other_numbers]))[0, 1]
        assert correlation.abs() < 0.01


class TestCompiled:
    """Against the reference in plain PyTorch, which the tests above go round on a CPU."""

    @pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 100_000])
    def test_encoding(self, numel: int):
        values = fisher(numel)
        packed, expected = codec.encode_log8(values), codec.encode_log8_reference(values)
        assert torch.equal(packed, expected)

    def test_encoding_anything(self):
        bits = torch.randint(0, 0x7F800000, (20_000,), dtype=torch.int32)
        values = bits.view(torch.float32)
        assert torch.equal(codec.encode_log8(values), codec.encode_log8_reference(values))

    def test_decoding(self):
        values, frozen = fisher(3000), torch.rand(3000) < 0.1
        packed = codec.encode_log8(values, frozen)
        decoded = codec.decode_log8(packed, values.shape)
        expected = codec.decode_log8_reference(packed, values.shape)
        assert torch.equal(decoded, expected)
        assert not decoded.signbit().any()

    def test_the_reference_keeps_its_bound(self):
        values = fisher(50_000)
        decoded = codec.decode_log8_reference(codec.encode_log8_reference(values), values.shape)
        in_range = (values >= block_maxima(values) * 2.0**-31.5) & (values > 0)
        assert ((decoded - values).abs() / values)[in_range].max() <= 0.045

    def test_operators(self):
        values = fisher(700)
        packed = torch.zeros(codec.packed_shape(700), dtype=torch.uint8)
        torch.library.opcheck(torch.ops.cl_optim.log8_encode_.default, (packed, values))
        torch.library.opcheck(torch.ops.cl_optim.log8_decode_.default, (values, packed))
        with pytest.raises(RuntimeError, match=r"packed must be contiguous uint8 \[ceil"):
            torch.ops.cl_optim.log8_encode_(packed[:2], values)
        with pytest.raises(RuntimeError, match="values must be contiguous float32"):
            torch.ops.cl_optim.log8_decode_(values.double(), packed)


def test_lazy_negations():
    values = torch.rand(300)
    lazy = torch._neg_view(-values)
    random = torch.rand(300)
    packed = codec.encode_log8(values)
    assert torch.equal(codec.encode_log8(lazy), packed)
    assert torch.equal(codec.encode_log8_reference(lazy), packed)
    for signed in (False, True):
        found = codec.encode_moment(lazy, torch._neg_view(-random), signed=signed)
        assert torch.equal(found, codec.encode_moment(values, random, signed=signed))
    decoded = torch._neg_view(torch.zeros(300))
    try:
        torch.ops.cl_optim.log8_decode_(decoded, packed)
    except RuntimeError:  # torch's own words: what is written is not negated
        assert not decoded.any()
    else:  # older ones write back what is
        assert torch.equal(decoded, codec.decode_log8(packed, values.shape))
