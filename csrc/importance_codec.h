// How importance and moments are kept in one byte per weight, or two: decoded and encoded in
// registers, on host and device. cl_optim/ops/importance_codec.py says what the codes mean and is
// the reference.
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

constexpr int kTop = 254;  // the code of the scale itself
constexpr int kFrozen = 255;
constexpr int kSignedTop = 127;
constexpr int kSign = 128;
constexpr int kLowestScale = -992;  // in steps of the grid: normal float32
constexpr int kHighestScale = 1000;
constexpr float kStepsPerOctave = 63.0f / 8.0f;

// 2^-t for 0 <= t < 1, exactly 1 at 0.
CL_OPTIM_HD float exp2_minus(float t) {
  return 1.0f + t * (-0.6931437207f +
                     t * (0.2401801395f +
                          t * (-0.0552973493f + t * (0.0092057884f + t * -0.0009448999f))));
}

// 2^(-steps * 8/63) for 0 <= steps < 256.
CL_OPTIM_HD float grid(int steps) {
  const int octaves = (steps * 8323) >> 16;  // steps * 8 / 63
  const float rest = static_cast<float>(8 * steps - 63 * octaves) * (1.0f / 63.0f);
  return bits_float(static_cast<uint32_t>(127 - octaves) << 23) * exp2_minus(rest);
}

// log2 of a normal number above 0, within 4e-7 of its exponent.
CL_OPTIM_HD float log2_of(float x) {
  const uint32_t bits = float_bits(x);
  const float exponent = static_cast<float>(static_cast<int>(bits >> 23) - 127);
  const float m = bits_float((bits & 0x7fffffu) | 0x3f800000u) - 1.0f;
  return exponent +
         m * (1.4426678211f +
              m * (-0.7205853162f +
                   m * (0.4735524323f +
                        m * (-0.3258990702f +
                             m * (0.1942899562f + m * (-0.0795544971f + m * 0.0155289803f))))));
}

// The scale of a block whose largest magnitude this is; NaN where it is not finite, so that a lost
// block shows.
CL_OPTIM_HD float block_scale(float largest) {
  if (!(largest < INFINITY)) return NAN;
  // A maximum on the grid may have been rounded to just above it.
  const float steps = std::ceil(log2_of(largest) * kStepsPerOctave - 0x1p-10f);
  int j = static_cast<int>(steps);
  j = j < kLowestScale ? kLowestScale : j > kHighestScale ? kHighestScale : j;
  const int octaves = j > 0 ? (8 * j + 62) / 63 : 8 * j / 63;  // rounded up
  const float rest = static_cast<float>(63 * octaves - 8 * j) * (1.0f / 63.0f);
  return bits_float(static_cast<uint32_t>(127 + octaves) << 23) * exp2_minus(rest);
}

// A frozen weight's importance is -0: the sign marks it, as in the wider formats.
CL_OPTIM_HD float decode_log8(uint8_t code, float scale) {
  const float value = scale * grid(code == kFrozen ? 0 : kTop - code);
  return code == 0 ? 0.0f : code == kFrozen ? -0.0f : value;
}

CL_OPTIM_HD float decode_signed(uint8_t code, float scale) {
  const int magnitude = code & (kSign - 1);
  const float value = magnitude == 0 ? 0.0f : scale * grid(kSignedTop - magnitude);
  return code & kSign ? -value : value;
}

// Magnitudes order like their bits, NaN above all.
CL_OPTIM_HD float largest_magnitude(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = float_bits(values[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return bits_float(largest);
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

// Random bits of one element in one step. Not a generator's: all replicas of a model round alike,
// and a resumed run continues alike.
struct Dither {
  uint32_t bits;

  CL_OPTIM_HD Dither(int64_t place, float step, float grad)
      : bits(mix((static_cast<uint32_t>(place) * 0x9e3779b1u +
                  static_cast<uint32_t>(step) * 0x85ebca77u) ^
                 float_bits(grad))) {}

  // 16 bits for each use.
  CL_OPTIM_HD uint32_t operator()(uint32_t use) const { return mix(bits + use) >> 16; }
};

// What needs random bits of its own.
enum DitherUse : uint32_t { kParam, kExpAvg, kExpAvgSq, kMaxExpAvgSq };

CL_OPTIM_HD void store_stochastic(BFloat16& to, float value, uint32_t random) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return store(to, value);
  to.bits = static_cast<uint16_t>((bits + random) >> 16);
}

// The steps below the scale, rounded up or down so that the value is right on average.
CL_OPTIM_HD int round_on_grid(float value, float scale, uint32_t random) {
  const float position = log2_of(value / scale) * kStepsPerOctave;
  const float below = std::floor(position);
  // The share of the way from the value below to the one above: (2^x - 1) / (2^(8/63) - 1).
  const float x = (position - below) * (0.6931472f / kStepsPerOctave);
  const float share = x * (1.0f + x * (0.5f + x * 0.16666667f)) * (1.0f / 0.09200853f);
  const int steps = static_cast<int>(below) + (static_cast<float>(random) < share * 65536.0f);
  return steps > 0 ? 0 : -steps;
}

// To the nearest code. A value above 0 stays above it.
CL_OPTIM_HD uint8_t encode_log8(float value, float scale) {
  const float position = log2_of(value / scale) * kStepsPerOctave;
  const int code = kTop + static_cast<int>(std::floor(position + 0.5f));
  return static_cast<uint8_t>(value == 0.0f ? 0 : code < 1 ? 1 : code > kTop ? kTop : code);
}

CL_OPTIM_HD uint8_t encode_log8(float value, float scale, uint32_t random) {
  if (value == 0.0f) return 0;
  const int code = kTop - round_on_grid(value, scale, random);
  return static_cast<uint8_t>(code < 1 ? 1 : code);  // a value above 0 stays above it
}

CL_OPTIM_HD uint8_t encode_signed(float value, float scale, uint32_t random) {
  const float size = value < 0.0f ? -value : value;
  if (size == 0.0f) return 0;
  const float lowest = scale * grid(kSignedTop - 1);
  int code = kSignedTop - round_on_grid(size, scale, random);
  if (size < lowest) code = static_cast<float>(random) * lowest < size * 65536.0f;
  return static_cast<uint8_t>(code == 0 ? 0 : code + (value < 0.0f ? kSign : 0));
}

}  // namespace cl_optim
