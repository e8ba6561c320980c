// The operator of the quadratic program for one device, given what launches on that device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "check.h"
#include "nnqp_launch.h"
#include "tensors.h"

namespace cl_optim {

using NNQPLauncher = void (*)(const NNQPBatch& batch, const NNQPOptions& options,
                              const torch::stable::Tensor& on_device);

template <NNQPLauncher launch>
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> nnqp(
    const torch::stable::Tensor& gram, const torch::stable::Tensor& linear,
    const std::optional<torch::stable::Tensor>& state, double lower, double tolerance,
    double threshold, bool only_violated, int64_t max_pivots) {
  using torch::headeronly::ScalarType;
  using torch::stable::Tensor;
  constexpr Check check{"nnqp"};
  const auto is = [&](const Tensor& tensor, std::initializer_list<int64_t> shape) {
    return tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() &&
           on_same_device(tensor, gram) && tensor.dim() == static_cast<int64_t>(shape.size()) &&
           std::equal(shape.begin(), shape.end(), tensor.sizes().begin());
  };
  check(gram.dim() == 3, "gram must be [B, t, t]");
  const int64_t count = gram.size(0), size = gram.size(1);
  check(size <= kMostNNQPRows, "gram has too many rows");
  check(is(gram, {count, size, size}), "gram must be contiguous float64 [B, t, t]");
  check(is(linear, {count, size}), "linear must be contiguous float64 [B, t], beside gram");
  check(!state || is(*state, {count, size, size + 1}),
        "state must be contiguous float64 [B, t, t + 1], beside gram");

  const auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type) {
    return torch::stable::empty(shape, type, std::nullopt, gram.device());
  };
  Tensor v = empty({count, size}, ScalarType::Double);
  Tensor status = empty({count}, ScalarType::Char);
  Tensor gap = empty({count}, ScalarType::Double);
  const NNQPBatch batch{
      static_cast<const double*>(gram.const_data_ptr()),
      static_cast<const double*>(linear.const_data_ptr()),
      state ? static_cast<double*>(state->mutable_data_ptr()) : nullptr,
      static_cast<double*>(v.mutable_data_ptr()),
      static_cast<int8_t*>(status.mutable_data_ptr()),
      static_cast<double*>(gap.mutable_data_ptr()),
      count,
      static_cast<int>(size),
  };
  const NNQPOptions options{lower, tolerance, threshold, only_violated,
                            static_cast<int>(max_pivots)};
  if (count > 0) launch(batch, options, gram);
  return {v, status, gap};
}

}  // namespace cl_optim
