"""Importance and moments in one byte per weight, and what is rounded stochastically.

A level is a float32's bits without the last 20: its exponent and three bits of its fraction, eight
levels to an octave. A block of 256 values in row-major order holds a scale, the float32 with the
bits of the lowest level that is not below any of them, and a code for each value, which counts
levels down from there. What a level stands for does not depend on the block, so that a value that
does not change keeps its code's value when the block's scale changes.

- ``log8``, of importance: 0 is an exact zero, 255 marks a frozen weight, 254 is the scale's; 1
  reaches down to 2⁻³¹ of the block's maximum at least, and smaller values take it. Levels of an
  octave are 128, 140, 152, 166, 181, 198, 216 and 236 of 128, bfloat16 numbers, and 2^(k/8) within
  0.7 %: steps of 8.4 to 9.4 %, so that the nearest is at most 4.5 % away.
- of second moments: 0 is an exact zero, 255 is the scale's. Levels are the float32 numbers with
  their bits, 1 + k / 8 in an octave: floats of eight bits whose exponent the block shares. They are
  written in each step, and this is the cheapest arithmetic; over an octave the mean square of the
  steps, 6.7 to 12.5 %, is that of equal ones.
- of first moments: the sign in bit 7, and the same levels over 16 octaves, of which 127 is the
  scale's.

A packed tensor is uint8 [blocks, 260]: four bytes of scale, 256 of codes.
``csrc/importance_codec.h`` decodes and encodes within the fused step by the same arithmetic of
whole numbers, to the last bit.

Small changes would be swallowed by rounding to the nearest code (at 8 bits those below 4 %), so
what is updated again and again is rounded stochastically, in proportion to the distance: right on
average. The random bits are a hash of place, time and value, not a generator's: all replicas of a
model round alike, and a resumed run continues alike.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from cl_optim.ops import library

BLOCK = 256
PACKED_BLOCK = 4 + BLOCK
FROZEN = 255


class Use(IntEnum):
    """What needs random numbers of its own in a step; a pull's begin after these."""

    PARAM, MAX_EXP_AVG_SQ, EXP_AVG, EXP_AVG_SQ, KRONECKER_PULL = range(5)


_DROPPED = 20  # bits of a float32 that a level is without
_LEVELS = 8  # to an octave
_HIGHEST_LEVEL = 0x7F7  # of finite numbers
_INFINITY = 0x7F800000
# The codes of the scale: of importance, of second moments, of first moments.
_TOP, _MOMENT_TOP, _SIGNED_TOP = 254, 255, 127
_SIGN = 128

library.define("log8_encode_(Tensor(a!) packed, Tensor values) -> ()", cpu="compiled")
library.define("log8_decode_(Tensor(a!) values, Tensor packed) -> ()", cpu="compiled")


def encode_log8(
    values: Tensor, frozen: Tensor | None = None, random: Tensor | None = None
) -> Tensor:
    """Encode values ≥ 0 as ``log8``; to the nearest codes on a CPU, by the compiled kernel.

    Args:
        values: Finite and at least 0, of any shape, device and real floating-point dtype.
        frozen: Bool, of the same shape: these weights take the code of frozen ones.
        random: Of the same shape, uniform in [0, 1): rounds stochastically. To the nearest code
            without.

    Returns:
        uint8 [ceil(n / 256), 260], on the device of ``values``.
    """
    if random is None and library.choose("log8_encode_", values.device) != "reference":
        shape = packed_shape(values.numel())
        packed = torch.empty(shape, dtype=torch.uint8, device="cpu")
        torch.ops.cl_optim.log8_encode_(packed, values.detach().float().contiguous())
        if frozen is not None:
            freeze_log8_(packed, frozen)
        return packed
    return encode_log8_reference(values, frozen, random)


def encode_log8_reference(
    values: Tensor, frozen: Tensor | None = None, random: Tensor | None = None
) -> Tensor:
    """Encode in plain PyTorch; as `encode_log8`."""
    bits = _bits(_blocks(values.float()))
    scale, codes = _importance_codes(bits, random)
    # A value above 0 stays above it.
    codes = torch.where(bits == 0, 0, codes.clamp(1, _TOP))
    if frozen is not None:
        codes = torch.where(_blocks(frozen), FROZEN, codes)
    return _packed(scale, codes)


def decode_log8(packed: Tensor, shape: torch.Size) -> Tensor:
    """Decode ``log8``: float32 of the given shape; 0 where a weight is frozen."""
    if library.choose("log8_decode_", packed.device) != "reference":
        values = torch.empty(shape, dtype=torch.float32, device="cpu")
        torch.ops.cl_optim.log8_decode_(values, packed.contiguous())
        return values
    return decode_log8_reference(packed, shape)


def decode_log8_reference(packed: Tensor, shape: torch.Size) -> Tensor:
    """Decode in plain PyTorch; as `decode_log8`."""
    scale, codes = _unpacked(packed)
    bits = _importance_bits(_level(scale) - _TOP + codes)
    bits = torch.where((codes == 0) | (codes == FROZEN), 0, bits)
    return _shaped(_lose(_floats(bits), scale), shape)


def frozen_log8(packed: Tensor, shape: torch.Size) -> Tensor:
    """Find the weights that have the code of frozen ones: bool of the given shape."""
    return _shaped(_unpacked(packed)[1] == FROZEN, shape)


def count_frozen_log8(packed: Tensor) -> int:
    """Count the codes of frozen weights, and those in a last block beyond the last weight."""
    return int((packed[:, 4:] == FROZEN).sum())


def freeze_log8_(packed: Tensor, frozen: Tensor) -> Tensor:
    """Give weights the code of frozen ones, in place.

    Returns:
        The codes that they had, uint8 [number of them], for :func:`thaw_log8`.
    """
    codes = packed[:, 4:]
    frozen = _blocks(frozen)
    kept = codes[frozen]
    codes[frozen] = FROZEN
    return kept


def thaw_log8(packed: Tensor, codes: Tensor) -> Tensor:
    """Make a copy in which frozen weights have the codes that they had before."""
    thawed = packed.clone()
    thawed[:, 4:].masked_scatter_(packed[:, 4:] == FROZEN, codes)
    return thawed


def count_underflows(values: Tensor) -> int:
    """Count the values above 0 that are too small for their block's scale in ``log8``."""
    bits = _bits(_blocks(values.float()))
    return int(((bits > 0) & (_importance_codes(bits, None)[1] < 1)).sum())


def encode_moment(values: Tensor, random: Tensor | None = None, *, signed: bool) -> Tensor:
    """Encode moments, of which second ones are ≥ 0: uint8 [ceil(n / 256), 260].

    Other arguments as of `encode_log8`.
    """
    blocks = _blocks(values.float())
    bits = _bits(blocks)
    top = _SIGNED_TOP if signed else _MOMENT_TOP
    up = (1 << _DROPPED) - 1
    scale = _scale(bits, (bits.amax(1, keepdim=True) + up) >> _DROPPED, top)
    share = torch.full_like(blocks, 0.5) if random is None else _blocks(random)
    codes = ((bits + (share * (1 << _DROPPED)).long()) >> _DROPPED) - _level(scale) + top
    codes = codes.clamp(max=top)
    if not signed:  # a value above 0 stays above it
        return _packed(scale, torch.where(bits == 0, 0, codes.clamp(min=1)))
    # Below the lowest code's value: that, or 0.
    lowest = _floats(_level_bits(_level(scale) - top + 1))
    is_lowest = share.double() * lowest < blocks.double().abs()
    codes = torch.where(blocks.abs() < lowest, is_lowest.long(), codes)
    return _packed(scale, codes + torch.where(blocks.signbit(), _SIGN, 0))


def decode_moment(packed: Tensor, shape: torch.Size, *, signed: bool) -> Tensor:
    """Decode what `encode_moment` encoded: float32 of the given shape."""
    scale, codes = _unpacked(packed)
    top = _SIGNED_TOP if signed else _MOMENT_TOP
    magnitudes = codes & (_SIGN - 1) if signed else codes
    bits = torch.where(magnitudes == 0, 0, _level_bits(_level(scale) - top + magnitudes))
    values = _lose(_floats(bits), scale)
    return _shaped(torch.where(codes >= _SIGN, -values, values) if signed else values, shape)


def has_levels(packed: Tensor) -> bool:
    """Say whether all scales are levels, as the scales of other codes are not."""
    return not (_bits(_unpacked(packed)[0]) & ((1 << _DROPPED) - 1)).any()


def packed_shape(numel: int) -> tuple[int, int]:
    """Return the shape of the packed tensor of so many values."""
    return -(-numel // BLOCK), PACKED_BLOCK


# --- rounding -------------------------------------------------------------------------------------


def stochastic_bfloat16(values: Tensor, random: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with the probability that is right on average.

    Args:
        values: float32; not finite ones are rounded to the nearest.
        random: Uniform in [0, 1), of the same shape.
    """
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    bits = (bits + (random * 65536).long()) >> 16
    bits = torch.where(bits >= 32768, bits - 65536, bits).to(torch.int16)
    return torch.where(values.isfinite(), bits.view(torch.bfloat16), values.to(torch.bfloat16))


def hashed(values: Tensor, time: Tensor | float = 0, use: Use = Use.PARAM) -> Tensor:
    """Make numbers in [0, 1) that look random: a hash of a value's place, the time, its bits.

    Args:
        values: float32. A place is where a value comes in memory, or in row-major order where the
            tensor has gaps.
        time: A step count.
        use: Tells apart the several numbers that one place needs at one time; two share a word.

    Returns:
        float32 multiples of 2⁻¹⁶, of the same shape.
    """
    place = torch.empty_like(values, dtype=torch.int64)
    count = place.numel()
    place.as_strided((count,), (1,)).copy_(torch.arange(count, device=values.device))
    time = time.long() if isinstance(time, Tensor) else int(time)
    mixed = (place * 0x9E3779B1 + time * 0x85EBCA77) ^ values.view(torch.int32).long()
    word = _mix((mixed + use // 2 * 0x6A09E667) & 0xFFFFFFFF)
    return (word >> use % 2 * 16 & 0xFFFF).float() / 65536


def _mix(bits: Tensor) -> Tensor:
    """Apply the finaliser of MurmurHash3, on 32 bits of an int64."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x85EBCA6B) & 0xFFFFFFFF
    bits = bits ^ (bits >> 13)
    bits = (bits * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


# --- levels ---------------------------------------------------------------------------------------


def _importance_bits(level: Tensor) -> Tensor:
    k = level % _LEVELS
    return (level << _DROPPED) - (11 * k * (8 - k) >> 4 << 16)


def _level_bits(level: Tensor) -> Tensor:
    return level << _DROPPED


def _importance_codes(bits: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the blocks' scales [blocks, 1] and codes, which may be too low or too high."""

    def below(bits: Tensor) -> Tensor:
        level = bits >> _DROPPED
        return level + (bits >= _importance_bits(level + 1))

    largest = bits.amax(1, keepdim=True)
    top = below(largest)
    top = top + (largest > _importance_bits(top))
    scale = _scale(bits, top, _TOP)
    level = below(bits)
    low, high = _importance_bits(level), _importance_bits(level + 1)
    # The share of the way from the value below to the one above.
    share = 0.5 if random is None else _blocks(random).double()
    up = share * (high - low).double() < (bits - low).double()
    return scale, level + up - _level(scale) + _TOP


def _scale(bits: Tensor, level: Tensor, top: int) -> Tensor:
    """Return the scale for a highest level, but none so low that the lowest code would be 0.

    NaN where a block has a value that is not finite, so that a lost block shows.
    """
    scale = _floats(_level_bits(level.clamp(top, _HIGHEST_LEVEL)))
    return scale.masked_fill(bits.amax(1, keepdim=True) >= _INFINITY, math.nan)


def _level(scale: Tensor) -> Tensor:
    return _bits(scale) >> _DROPPED


def _bits(values: Tensor) -> Tensor:
    """Return the bits of magnitudes, which order like them, int64."""
    return values.contiguous().view(torch.int32).long() & 0x7FFFFFFF


def _floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _lose(values: Tensor, scale: Tensor) -> Tensor:
    return values.masked_fill(scale.isnan(), math.nan)


def _blocks(values: Tensor) -> Tensor:
    padded = values.new_zeros(packed_shape(values.numel())[0] * BLOCK)
    padded[: values.numel()] = values.reshape(-1)
    return padded.view(-1, BLOCK)


def _shaped(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.reshape(-1)[: shape.numel()].view(shape)


def _packed(scale: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([scale.contiguous().view(torch.uint8), codes.to(torch.uint8)], dim=1)


def _unpacked(packed: Tensor) -> tuple[Tensor, Tensor]:
    return packed[:, :4].contiguous().view(torch.float32), packed[:, 4:].long()
