"""Importance and moments in one byte per weight, and what is rounded stochastically.

The 8-bit codes are logarithmic. All values lie on one grid, 2^(j·8/63) for whole j: steps of
9.2 %, so that the nearest is at most 4.5 % away. A block of 256 values in row-major order holds the
largest grid value that it needs as a float32 scale, and a code for each value, counted in steps
below it:

- ``log8``, of importance and of second moments: 0 is an exact zero, 1 … 254 reach down to at least
  2⁻³² of the block's maximum (smaller ones take code 1), 255 marks a frozen weight;
- signed, of first moments: the sign in bit 7, magnitudes 0 … 127 over 16 octaves.

Since the grid is the same everywhere, a value that does not change keeps its code's value when the
block's scale changes. A packed tensor is uint8 [blocks, 260]: four bytes of scale, 256 of codes.
``csrc/importance_codec.h`` decodes and encodes the same within the fused step.

Small changes would be swallowed by rounding to the nearest code (at 8 bits those below 4.5 %), so
what is updated again and again is rounded stochastically, in proportion to the distance: right on
average. The random bits are a hash of place, time and value, not a generator's: all replicas of a
model round alike, and a resumed run continues alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_optim.ops import library

BLOCK = 256
PACKED_BLOCK = 4 + BLOCK
STEP = 8 / 63  # of the grid, in octaves
FROZEN = 255

_TOP = 254
_SIGNED_TOP = 127
_SIGN = 128
# The scale is a normal float32: what is smaller takes lower codes.
_LOWEST_SCALE = math.ceil(-126 / STEP)
_HIGHEST_SCALE = math.floor(127 / STEP)

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
    blocks = _blocks(values.float())
    scale, position = _on_grid(blocks)
    codes = _TOP + _rounded(position, random)
    # A value above 0 stays above it.
    codes = torch.where(blocks == 0, 0, codes.clamp(1, _TOP))
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
    values = scale * _grid(_TOP - codes)
    return _shaped(torch.where((codes == 0) | (codes == FROZEN), 0.0, values), shape)


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
    blocks = _blocks(values.float())
    _, position = _on_grid(blocks)
    return int(((blocks > 0) & (position < 1 - _TOP - 0.5)).sum())


def encode_signed(values: Tensor, random: Tensor | None = None) -> Tensor:
    """Encode values of either sign: uint8 [ceil(n / 256), 260]. Arguments as of `encode_log8`."""
    blocks = _blocks(values.float())
    scale, position = _on_grid(blocks.abs())
    codes = (_SIGNED_TOP + _rounded(position, random)).clamp(0, _SIGNED_TOP)
    # Below the lowest code's value: that, or 0.
    lowest = scale * _grid(codes.new_tensor(_SIGNED_TOP - 1))
    bound = lowest / 2 if random is None else lowest * _blocks(random)
    codes = torch.where(blocks.abs() < lowest, (bound < blocks.abs()).long(), codes)
    codes = torch.where(blocks == 0, 0, codes)
    return _packed(scale, codes + torch.where((blocks < 0) & (codes > 0), _SIGN, 0))


def decode_signed(packed: Tensor, shape: torch.Size) -> Tensor:
    """Decode what `encode_signed` encoded: float32 of the given shape."""
    scale, codes = _unpacked(packed)
    magnitudes = codes & (_SIGN - 1)
    values = torch.where(magnitudes == 0, 0.0, scale * _grid(_SIGNED_TOP - magnitudes))
    return _shaped(torch.where(codes >= _SIGN, -values, values), shape)


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


def hashed(values: Tensor, time: Tensor | float = 0, use: int = 0) -> Tensor:
    """Make numbers in [0, 1) that look random: a hash of a value's place, the time, its bits.

    Args:
        values: float32. A place is where a value comes in memory, or in row-major order where the
            tensor has gaps.
        time: A step count.
        use: Tells apart the several numbers that one place needs at one time.

    Returns:
        float32 multiples of 2⁻¹⁶, of the same shape.
    """
    place = torch.empty_like(values, dtype=torch.int64)
    count = place.numel()
    place.as_strided((count,), (1,)).copy_(torch.arange(count, device=values.device))
    time = time.long() if isinstance(time, Tensor) else int(time)
    mixed = (place * 0x9E3779B1 + time * 0x85EBCA77) ^ values.view(torch.int32).long()
    bits = _mix((_mix(mixed & 0xFFFFFFFF) + use) & 0xFFFFFFFF)
    return (bits >> 16).float() / 65536


def _mix(bits: Tensor) -> Tensor:
    """Apply the finaliser of MurmurHash3, on 32 bits of an int64."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x85EBCA6B) & 0xFFFFFFFF
    bits = bits ^ (bits >> 13)
    bits = (bits * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


# --- the grid -------------------------------------------------------------------------------------


def _on_grid(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the blocks' scales [blocks, 1] and each value's position below them, ≤ 0, in steps."""
    largest = blocks.amax(1, keepdim=True)
    # A maximum on the grid may have been rounded to just above it.
    top = (largest.double().log2() / STEP - 2**-10).ceil().clamp(_LOWEST_SCALE, _HIGHEST_SCALE)
    # NaN where the maximum is not finite, so that a lost block shows.
    scale = (top * STEP).exp2().float().masked_fill(~largest.isfinite(), math.nan)
    position = (blocks / scale).log2() / STEP
    return scale, position.nan_to_num(0.0).clamp(-1000.0, 0.0)


def _rounded(position: Tensor, random: Tensor | None) -> Tensor:
    if random is None:
        return position.round().long()
    below = position.floor()
    # The share of the way from the value below to the one above.
    share = torch.expm1((position - below) * (STEP * math.log(2))) / (2**STEP - 1)
    return (below + (_blocks(random) < share)).long()


def _grid(steps_down: Tensor) -> Tensor:
    return (steps_down.double() * -STEP).exp2().float()


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
