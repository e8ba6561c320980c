// The histogram of importance that cl_optim/ops/importance_histogram.py describes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "float_types.h"

namespace cl_optim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kHistogramBins = 1 << 15;

// Never out of range, whatever the value.
inline uint32_t histogram_bin(float value) { return (float_bits(value) >> 16) & 0x7fffu; }

// Adds to counts [kHistogramBins] and to totals: the largest value, the sum.
void importance_histogram_cpu(const float* values, int64_t count, int64_t* counts, double* totals);

inline void importance_histogram_(const Tensor& counts, const Tensor& totals,
                                  const Tensor& values) {
  if (counts.scalar_type() != ScalarType::Long || counts.numel() != kHistogramBins ||
      !counts.is_contiguous() || totals.scalar_type() != ScalarType::Double ||
      totals.numel() != 2 || !totals.is_contiguous()) {
    throw std::runtime_error(
        "importance_histogram_: counts must be contiguous int64 [32768], totals float64 [2]");
  }
  if (values.scalar_type() != ScalarType::Float || !values.is_contiguous()) {
    throw std::runtime_error("importance_histogram_: values must be contiguous float32");
  }
  importance_histogram_cpu(static_cast<const float*>(values.const_data_ptr()), values.numel(),
                           static_cast<int64_t*>(counts.mutable_data_ptr()),
                           static_cast<double*>(totals.mutable_data_ptr()));
}

}  // namespace cl_optim
