// From torch's dtypes to the kernels' own.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "float_types.h"

namespace cl_optim {

// Nothing for a dtype that no kernel takes.
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

}  // namespace cl_optim
