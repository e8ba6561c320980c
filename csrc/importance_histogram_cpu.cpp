// The histogram of importance that cl_optim/ops/importance_histogram.py describes: one pass over
// values of any number, in pieces that stay in the first cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "check.h"
#include "float_types.h"
#include "simd.h"

namespace cl_optim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBins = 1 << 15;
constexpr int64_t kPiece = 16384;

// Never out of range, whatever the value.
uint32_t bin_of(float value) { return (float_bits(value) >> 16) & 0x7fffu; }

// Sums in a fixed order, so that every processor finds the same.
CL_OPTIM_SIMD_CLONES void add_totals(const float* values, int64_t count, double* totals) {
  constexpr int64_t kLanes = 32;  // with 16, gcc 12 keeps them in memory
  float largest[kLanes] = {};
  double sums[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = values[i + lane];
      largest[lane] = value > largest[lane] ? value : largest[lane];
      sums[lane] += value;
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    largest[0] = std::max(largest[0], values[i]);
    sums[0] += values[i];
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    totals[0] = std::max(totals[0], static_cast<double>(largest[lane]));
    totals[1] += sums[lane];
  }
}

// Adds to counts [kBins] and to totals: the largest value, the sum.
void add_histogram(const float* values, int64_t count, int64_t* counts, double* totals) {
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t size = std::min(kPiece, count - begin);
    add_totals(values + begin, size, totals);
    for (int64_t i = begin; i < begin + size; ++i) ++counts[bin_of(values[i])];
  }
}

void importance_histogram_(const Tensor& counts, const Tensor& totals, const Tensor& values) {
  constexpr Check check{"importance_histogram_"};
  check(counts.scalar_type() == ScalarType::Long && counts.numel() == kBins &&
            counts.is_contiguous() && totals.scalar_type() == ScalarType::Double &&
            totals.numel() == 2 && totals.is_contiguous(),
        "counts must be contiguous int64 [32768], totals float64 [2]");
  check(values.scalar_type() == ScalarType::Float && values.is_contiguous(),
        "values must be contiguous float32");
  add_histogram(static_cast<const float*>(values.const_data_ptr()), values.numel(),
                static_cast<int64_t*>(counts.mutable_data_ptr()),
                static_cast<double*>(totals.mutable_data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cl_optim, CPU, m) {
  m.impl("importance_histogram_", TORCH_BOX(&importance_histogram_));
}

}  // namespace cl_optim
