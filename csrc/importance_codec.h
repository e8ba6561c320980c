// How importance and moments are kept in one byte per weight, or two: decoded and encoded in
// registers, on host and device. cl_optim/ops/importance_codec.py says what the codes mean and is
// the reference: both are the same arithmetic of whole numbers, to the last bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "float_types.h"

namespace cl_optim {

constexpr int64_t kBlock = 256;  // values that share a scale

struct PackedBlock {
  float scale;
  uint8_t codes[kBlock];
};
static_assert(sizeof(PackedBlock) == 260);

// --- levels --------------------------------------------------------------------------------------
//
// A level is a float32's bits without the last 20: its exponent and three bits of its fraction,
// eight levels to an octave. A block's scale is the float32 with its highest level's bits; the
// highest code is for that level, and lower codes count down from there. What does not change keeps
// its value when the scale changes.
//
// What codes stand for has 16 bits, as a bfloat16: vectors hold twice as many of these.

constexpr int kDropped = 20;
constexpr int kHighestLevel = 0x7f7;  // of finite numbers

CL_OPTIM_HD float level_value(int level) {
  return bits_float(static_cast<uint32_t>(level) << kDropped);
}
CL_OPTIM_HD int level_of(float value) { return static_cast<int>(float_bits(value) >> kDropped); }

// The level of a block's scale: not so low that the lowest code would be 0.
CL_OPTIM_HD int scale_level(int level, int top) {
  return level < top ? top : level > kHighestLevel ? kHighestLevel : level;
}

// The level of code 0, below all others.
CL_OPTIM_HD uint16_t level_of_code_0(float scale, int top) {
  return static_cast<uint16_t>(level_of(scale) - top);
}

// What makes NaN of a block's values where its scale is NaN: it held what was not finite.
CL_OPTIM_HD uint16_t lost_bits(float scale) { return scale == scale ? 0u : 0x7fc0u; }

// Magnitudes order like their bits, NaN above all.
CL_OPTIM_HD float largest_magnitude(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = float_bits(values[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return bits_float(largest);
}

// --- importance ----------------------------------------------------------------------------------
//
// Levels of an octave, 0 to 7, are 128, 140, 152, 166, 181, 198, 216, 236 of 128: 2^(k/8) within
// 0.7 %, in steps of 8.4 to 9.4 %. They are 16 k / 128, less 11 k (8 - k) / 16 of these.

constexpr int kTop = 254;  // the scale's code
constexpr int kFrozen = 255;

CL_OPTIM_HD uint16_t importance_bits(uint16_t level) {
  const uint16_t k = level & 7u;
  const uint16_t bend = static_cast<uint16_t>(k * static_cast<uint16_t>(88u - 11u * k)) >> 4;
  return static_cast<uint16_t>(level << 4) - bend;
}

// The same as a float32's bits.
CL_OPTIM_HD uint32_t importance_bits32(int level) {
  return uint32_t{importance_bits(static_cast<uint16_t>(level))} << 16;
}

// The highest level that is not above a value, 0 or more.
CL_OPTIM_HD int importance_level(float value) {
  const int level = level_of(value);
  return level + (float_bits(value) >= importance_bits32(level + 1));
}

CL_OPTIM_HD float importance_scale(float largest) {
  if (!(largest < INFINITY)) return NAN;
  const int level = importance_level(largest);
  const bool above = float_bits(largest) > importance_bits32(level);
  return level_value(scale_level(level + above, kTop));
}

// A frozen weight's importance is -0: the sign marks it, as in the wider formats.
CL_OPTIM_HD float decode_log8(uint8_t code, float scale) {
  const uint16_t level = level_of_code_0(scale, kTop) + code;
  const uint16_t next = code + 1u;  // 1 for an exact 0, 256 for what is frozen
  const uint16_t bits = (next & 0xfeu) == 0u ? 0u : importance_bits(level);
  const uint16_t sign = next >> 8 << 15;
  return load(BFloat16{static_cast<uint16_t>(bits | lost_bits(scale) | sign)});
}

// To the nearest code. A value above 0 stays above it.
CL_OPTIM_HD uint8_t encode_log8(float value, float scale) {
  const int level = importance_level(value);
  const uint32_t bits = float_bits(value);
  const bool up = bits - importance_bits32(level) > importance_bits32(level + 1) - bits;
  const int code = level + up - level_of(scale) + kTop;
  return static_cast<uint8_t>(value == 0.0f ? 0 : code < 1 ? 1 : code > kTop ? kTop : code);
}

// --- moments -------------------------------------------------------------------------------------
//
// A level's value is the float32 with these bits: codes are floats of eight bits with an exponent
// that the block shares. They are written in each step, so their arithmetic is the plainest.

constexpr int kMomentTop = 255;  // the scale's code, of second moments
constexpr int kSignedTop = 127;  // of first moments, which have the sign in bit 7
constexpr int kSign = 128;

CL_OPTIM_HD float moment_scale(float largest, int top) {
  if (!(largest < INFINITY)) return NAN;
  const int level = static_cast<int>((float_bits(largest) + (1u << kDropped) - 1) >> kDropped);
  return level_value(scale_level(level, top));
}

CL_OPTIM_HD float decode_moment(uint8_t code, float scale) {
  const uint16_t level = level_of_code_0(scale, kMomentTop) + code;
  const uint16_t bits = code == 0 ? 0u : static_cast<uint16_t>(level << 4);
  return load(BFloat16{static_cast<uint16_t>(bits | lost_bits(scale))});
}

CL_OPTIM_HD float decode_signed_moment(uint8_t code, float scale) {
  const uint16_t magnitude = code & (kSign - 1);
  const uint16_t level = level_of_code_0(scale, kSignedTop) + magnitude;
  const uint16_t bits = magnitude == 0 ? 0u : static_cast<uint16_t>(level << 4);
  const uint16_t sign = static_cast<uint16_t>((code & kSign) << 8);
  return load(BFloat16{static_cast<uint16_t>(bits | lost_bits(scale) | sign)});
}

// What the codes of a block stand for.
enum class Codes { importance, moment, signed_moment };

template <Codes codes>
CL_OPTIM_HD float decode(uint8_t code, float scale) {
  return codes == Codes::importance ? decode_log8(code, scale)
         : codes == Codes::moment   ? decode_moment(code, scale)
                                    : decode_signed_moment(code, scale);
}

// The code of one of the two levels about a magnitude, which is right on average with 16 random
// bits; 0 or less for what is below all codes.
CL_OPTIM_HD int round_to_level(uint32_t bits, float scale, int top, uint32_t random) {
  const int code = static_cast<int>((bits + (random << 4)) >> kDropped) - level_of(scale) + top;
  return code > top ? top : code;
}

// A value above 0 stays above it.
CL_OPTIM_HD uint8_t encode_moment(float value, float scale, uint32_t random) {
  const int code = round_to_level(float_bits(value), scale, kMomentTop, random);
  return static_cast<uint8_t>(value == 0.0f ? 0 : code < 1 ? 1 : code);
}

// What is below the lowest code's value takes that, or 0.
CL_OPTIM_HD uint8_t encode_signed_moment(float value, float scale, uint32_t random) {
  const uint32_t bits = float_bits(value), size = bits & 0x7fffffffu;
  const float lowest = level_value(level_of(scale) - kSignedTop + 1);
  const int lowest_or_0 = static_cast<float>(random) * lowest < bits_float(size) * 65536.0f;
  const int rounded = round_to_level(size, scale, kSignedTop, random);
  const int code = rounded > 1 ? rounded : lowest_or_0;
  return static_cast<uint8_t>(code | static_cast<int>(bits >> 24 & kSign));
}

// --- stochastic rounding -------------------------------------------------------------------------

// The finaliser of MurmurHash3.
CL_OPTIM_HD uint32_t mix(uint32_t bits) {
  bits ^= bits >> 16;
  bits *= 0x85ebca6bu;
  bits ^= bits >> 13;
  bits *= 0xc2b2ae35u;
  return bits ^ (bits >> 16);
}

// What needs random bits of its own: 16 each, two to a word.
enum DitherUse : uint32_t { kParam, kMaxExpAvgSq, kExpAvg, kExpAvgSq };

// Random bits of one element in one step. Not a generator's: all replicas of a model round alike,
// and a resumed run continues alike.
struct Dither {
  static constexpr uint32_t kNext = 0x9e3779b1u;  // from a place to the next

  uint32_t seed;

  CL_OPTIM_HD Dither(uint32_t at, float value) : seed(at ^ float_bits(value)) {}

  CL_OPTIM_HD static uint32_t at(int64_t place, float step) {
    return static_cast<uint32_t>(place) * kNext + static_cast<uint32_t>(step) * 0x85ebca77u;
  }

  CL_OPTIM_HD uint32_t word(uint32_t use) const { return mix(seed + use / 2 * 0x6a09e667u); }
  CL_OPTIM_HD uint32_t operator()(uint32_t use) const { return half(word(use), use); }

  CL_OPTIM_HD static uint32_t half(uint32_t word, uint32_t use) {
    return word >> (use % 2 * 16) & 0xffffu;
  }
};

// What is not finite stays as it is; NaN is a quiet one, as all that comes of arithmetic.
CL_OPTIM_HD void store_stochastic(BFloat16& to, float value, uint32_t random) {
  const uint32_t bits = float_bits(value);
  const bool is_finite = (bits & 0x7fffffffu) < 0x7f800000u;
  to.bits = static_cast<uint16_t>((bits + (is_finite ? random : 0u)) >> 16);
}

}  // namespace cl_optim
