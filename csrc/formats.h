// How a parameter's state is stored: what its moments, importance and anchor may be made of, and
// which weights are frozen. cl_optim/ops/formats.py says the same.
#pragma once

#include <cstdint>
#include <cstring>

#include "float_types.h"
#include "importance_codec.h"

namespace cl_optim {

// Whether moments and importance of a parameter may be of a kind.
constexpr bool is_state_kind(ScalarKind kind, ScalarKind param) {
  if (param == ScalarKind::float64) return kind == ScalarKind::float64;
  return kind == ScalarKind::float32 || kind == ScalarKind::bfloat16 || kind == ScalarKind::codes;
}

// Whether a parameter's anchor may be of a kind.
constexpr bool is_anchor_kind(ScalarKind kind, ScalarKind param) {
  if (param == ScalarKind::float64) return kind == ScalarKind::float64;
  return kind == ScalarKind::float32 || kind == ScalarKind::bfloat16 || kind == param;
}

// Whether that many rows of bytes are the blocks of codes of so many values.
constexpr bool are_blocks(int64_t rows, int64_t bytes, int64_t values) {
  return rows == (values + kBlock - 1) / kBlock && bytes == sizeof(PackedBlock);
}

// A weight is frozen where the sign bit of its importance is set; the code of frozen ones is read
// as -0.
CL_OPTIM_HD bool is_frozen(float importance) { return float_bits(importance) >> 31; }
CL_OPTIM_HD bool is_frozen(double importance) {
  uint64_t bits;
  memcpy(&bits, &importance, sizeof(bits));
  return bits >> 63;
}

}  // namespace cl_optim
