// What operators ask of torch's tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "float_types.h"
#include "strides.h"

namespace cl_optim {

// The kernels' own name for a dtype; nothing for one that no kernel takes.
inline std::optional<ScalarKind> scalar_kind(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return ScalarKind::float32;
    case ScalarType::Double:
      return ScalarKind::float64;
    case ScalarType::BFloat16:
      return ScalarKind::bfloat16;
    case ScalarType::Half:
      return ScalarKind::float16;
    default:
      return std::nullopt;
  }
}

inline bool is_dense(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ||
         is_dense(tensor.dim(), tensor.sizes().data(), tensor.strides().data());
}

inline bool on_same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

}  // namespace cl_optim
