// A unit of 256 elements in the hands of a warp: how its lanes read, decode, encode and write their
// eight of each array. For device code alone.
//
// A lane has two groups of four neighbours, 128 elements apart, and moves 16 bytes at once where
// numbers have 4 or 8.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "float_types.h"
#include "importance_codec.h"
#include "multi_tensor.h"

namespace cl_optim {

constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kUnit == kBlock && kUnit == 8 * 32, "a warp's unit is a block of codes");

// Which elements of a unit a lane has: element j of it is at offset(j).
struct Place {
  int64_t first;  // of the unit in its tensor
  int count;      // of the unit's elements
  int lane;
  bool aligned;  // all arrays are known to be, for the widest vectors

  __device__ int offset(int j) const { return (j / 4) * 128 + 4 * lane + j % 4; }
  __device__ bool has(int j) const { return offset(j) < count; }

  // Whether all of the unit is there, and may be read and written by vectors. All lanes alike.
  template <typename Vector>
  __device__ bool is_wide(const void* array) const {
    const bool fits = aligned || reinterpret_cast<uintptr_t>(array) % sizeof(Vector) == 0;
    return fits && count == kUnit;
  }
};

// nvcc takes an ordinary vector apart when it is stored. Written past the caches' order of age:
// what was stored is not read again in this step.
template <typename Vector, typename T>
__device__ void store_vector(T* array, const Vector& vector) {
  __stcs(reinterpret_cast<Vector*>(array), vector);
}

// The words that hold a lane's elements of an array of 4-byte numbers.
inline __device__ void load_words(const uint32_t* array, const Place& at, uint32_t (&words)[8]) {
  array += at.first;
  if (at.is_wide<uint4>(array)) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(array + at.offset(j));
      words[j] = four.x;
      words[j + 1] = four.y;
      words[j + 2] = four.z;
      words[j + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) words[j] = at.has(j) ? array[at.offset(j)] : 0u;
  }
}

inline __device__ void store_words(uint32_t* array, const Place& at, const uint32_t (&words)[8]) {
  array += at.first;
  if (at.is_wide<uint4>(array)) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      store_vector(array + at.offset(j),
                   make_uint4(words[j], words[j + 1], words[j + 2], words[j + 3]));
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (at.has(j)) array[at.offset(j)] = words[j];
    }
  }
}

// The same for 2-byte numbers, two to a word, in the first four words.
inline __device__ void load_words(const uint16_t* array, const Place& at, uint32_t (&words)[8]) {
  array += at.first;
  if (at.is_wide<uint2>(array)) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const uint2 four = *reinterpret_cast<const uint2*>(array + at.offset(j));
      words[j / 2] = four.x;
      words[j / 2 + 1] = four.y;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint32_t low = at.has(j) ? array[at.offset(j)] : 0u;
      const uint32_t high = at.has(j + 1) ? array[at.offset(j + 1)] : 0u;
      words[j / 2] = low | high << 16;
    }
  }
}

inline __device__ void store_words(uint16_t* array, const Place& at, const uint32_t (&words)[8]) {
  array += at.first;
  if (at.is_wide<uint2>(array)) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      store_vector(array + at.offset(j), make_uint2(words[j / 2], words[j / 2 + 1]));
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (at.has(j)) {
        array[at.offset(j)] = static_cast<uint16_t>(words[j / 2] >> (j % 2 ? 16 : 0));
      }
    }
  }
}

// The same for codes, four to a word, in the first two words; the scale in the third. A block of
// codes is always whole.
inline __device__ void load_words(const PackedBlock* blocks, const Place& at,
                                  uint32_t (&words)[8]) {
  const PackedBlock& block = blocks[at.first / kBlock];
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    words[j / 4] = *reinterpret_cast<const uint32_t*>(block.codes + at.offset(j));
  }
  words[2] = float_bits(block.scale);
}

inline __device__ void store_words(PackedBlock* blocks, const Place& at,
                                   const uint32_t (&words)[8]) {
  PackedBlock& block = blocks[at.first / kBlock];
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    *reinterpret_cast<uint32_t*>(block.codes + at.offset(j)) = words[j / 4];
  }
  if (at.lane == 0) block.scale = bits_float(words[2]);
}

// Numbers of 8 bytes, which are computed as they are.
inline __device__ void load_doubles(const void* all, const Place& at, double (&values)[8]) {
  const double* array = static_cast<const double*>(all) + at.first;
  if (at.is_wide<double2>(array)) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const double2 two = *reinterpret_cast<const double2*>(array + at.offset(j));
      values[j] = two.x;
      values[j + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = at.has(j) ? array[at.offset(j)] : 0.0;
  }
}

inline __device__ void store_doubles(void* all, const Place& at, const double (&values)[8]) {
  double* array = static_cast<double*>(all) + at.first;
  if (at.is_wide<double2>(array)) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      store_vector(array + at.offset(j), make_double2(values[j], values[j + 1]));
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (at.has(j)) array[at.offset(j)] = values[j];
    }
  }
}

// An array's elements before they are decoded.
struct Raw {
  uint32_t words[8];

  __device__ void load(const void* array, ScalarKind kind, const Place& at) {
    switch (kind) {
      case ScalarKind::float32:
        return load_words(static_cast<const uint32_t*>(array), at, words);
      case ScalarKind::codes:
        return load_words(static_cast<const PackedBlock*>(array), at, words);
      default:
        return load_words(static_cast<const uint16_t*>(array), at, words);
    }
  }

  __device__ uint16_t half_word(int j) const {
    return static_cast<uint16_t>(words[j / 2] >> (j % 2 ? 16 : 0));
  }
  __device__ uint8_t code(int j) const { return static_cast<uint8_t>(words[j / 4] >> 8 * (j % 4)); }

  template <Codes codes = Codes::importance>
  __device__ void decode(ScalarKind kind, float (&values)[8]) const {
    switch (kind) {
      case ScalarKind::bfloat16:
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = cl_optim::load(BFloat16{half_word(j)});
        return;
      case ScalarKind::float16:
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = cl_optim::load(Half{half_word(j)});
        return;
      case ScalarKind::codes: {
        const float scale = bits_float(words[2]);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          values[j] = cl_optim::decode<codes>(code(j), scale);
        }
        return;
      }
      default:
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = bits_float(words[j]);
    }
  }
};

// The random bits of a lane's elements.
struct Random {
  Dither dither[8];

  __device__ static Random of(const Place& at, float step, const float (&grad)[8]) {
    return {{{Dither::at(at.first + at.offset(0), step), grad[0]},
             {Dither::at(at.first + at.offset(1), step), grad[1]},
             {Dither::at(at.first + at.offset(2), step), grad[2]},
             {Dither::at(at.first + at.offset(3), step), grad[3]},
             {Dither::at(at.first + at.offset(4), step), grad[4]},
             {Dither::at(at.first + at.offset(5), step), grad[5]},
             {Dither::at(at.first + at.offset(6), step), grad[6]},
             {Dither::at(at.first + at.offset(7), step), grad[7]}}};
  }
};

template <typename Stored>
__device__ void pack(const Stored (&values)[8], uint32_t (&words)[8]) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    words[j / 2] = uint32_t{values[j].bits} | uint32_t{values[j + 1].bits} << 16;
  }
}

// The largest magnitude of a warp's elements. Not a comparison of numbers: NaN must stay.
inline __device__ float largest_of(const float (&values)[8], const Place& at) {
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t bits = at.has(j) ? float_bits(values[j]) & 0x7fffffffu : 0u;
    largest = bits > largest ? bits : largest;
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    const uint32_t bits = __shfl_xor_sync(kAllLanes, largest, other);
    largest = bits > largest ? bits : largest;
  }
  return bits_float(largest);
}

template <DitherUse use>
__device__ void store_moment(void* array, ScalarKind kind, const Place& at,
                             const float (&values)[8], const Random& random) {
  uint32_t words[8];
  if (kind == ScalarKind::float32) {
#pragma unroll
    for (int j = 0; j < 8; ++j) words[j] = float_bits(values[j]);
    store_words(static_cast<uint32_t*>(array), at, words);
  } else if (kind == ScalarKind::bfloat16) {
    BFloat16 rounded[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) store_stochastic(rounded[j], values[j], random.dither[j](use));
    pack(rounded, words);
    store_words(static_cast<uint16_t*>(array), at, words);
  } else {
    constexpr bool is_signed = use == kExpAvg;
    const float scale = moment_scale(largest_of(values, at), is_signed ? kSignedTop : kMomentTop);
    words[0] = words[1] = 0;
    words[2] = float_bits(scale);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t bits = random.dither[j](use);
      const uint32_t code = is_signed ? encode_signed_moment(values[j], scale, bits)
                                      : encode_moment(values[j], scale, bits);
      words[j / 4] |= (at.has(j) ? code : 0u) << 8 * (j % 4);
    }
    store_words(static_cast<PackedBlock*>(array), at, words);
  }
}

}  // namespace cl_optim
