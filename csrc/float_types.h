// bfloat16 and IEEE half as storage types: 16 bits in memory, float in registers.
// Branch-free integer arithmetic, so that loops over them vectorize; the same on host and device.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CL_OPTIM_HD __host__ __device__ __forceinline__
#else
#define CL_OPTIM_HD inline __attribute__((always_inline))
#endif

namespace cl_optim {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// The type of a tensor's elements, as a value. Codes are the 8-bit ones of importance_codec.h.
enum class ScalarKind : int { float32, float64, bfloat16, float16, codes };

// The type in which a storage type is computed.
template <typename Storage>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <typename Storage>
using arithmetic_t = typename Arithmetic<Storage>::type;

CL_OPTIM_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

CL_OPTIM_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

CL_OPTIM_HD float load(float x) { return x; }
CL_OPTIM_HD double load(double x) { return x; }
CL_OPTIM_HD float load(BFloat16 x) { return bits_float(uint32_t{x.bits} << 16); }

CL_OPTIM_HD float load(Half x) {
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t{x.bits} & 0x7fffu;
  // Move the fields and rebias the exponent, once more for infinity and NaN.
  const uint32_t rebias = (127u - 15u) << 23;
  const uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00u ? rebias : 0u);
  // The digits of a subnormal half are the last digits of a float in [0.5, 1). No intermediate is
  // a subnormal float, so the result does not depend on the process's flush-to-zero mode.
  const uint32_t subnormal = float_bits(bits_float(magnitude | 0x3f000000u) - 0.5f);
  return bits_float((magnitude < 0x0400u ? subnormal : normal) | sign);
}

CL_OPTIM_HD void store(float& to, float x) { to = x; }
CL_OPTIM_HD void store(double& to, double x) { to = x; }

// Both round to nearest, ties to even, as torch does.
CL_OPTIM_HD void store(BFloat16& to, float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

CL_OPTIM_HD void store(Half& to, float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // A carry out of the rounded fraction goes into the exponent, from 65504 into infinity.
  const uint32_t rebias = (127u - 15u) << 23;
  const uint32_t normal = (magnitude - rebias + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 lets the processor round at the last digit of a subnormal half.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  to.bits = static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | sign);
}

}  // namespace cl_optim
