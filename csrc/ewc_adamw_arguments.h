// From the operator's tensors to the arrays that a launcher takes: every check happens here, before
// anything is written. Shared by the operator's implementations for all devices.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ewc_adamw.h"

namespace cl_optim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "ewc_adamw_: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline bool same(torch::headeronly::IntHeaderOnlyArrayRef a,
                 torch::headeronly::IntHeaderOnlyArrayRef b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// Whether the tensor fills its memory without gaps or overlap, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline ScalarKind scalar_kind(ScalarType type, const char* name, size_t index) {
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
      check(false, name, "[", index, "] must be float32, float64, bfloat16 or float16, not ",
            torch::headeronly::toString(type));
      throw std::logic_error("unreachable");
  }
}

inline Penalty parse_penalty(const std::string& name) {
  if (name == "gradient") return Penalty::gradient;
  if (name == "decoupled") return Penalty::decoupled;
  if (name == "proximal") return Penalty::proximal;
  check(false, "penalty must be 'gradient', 'decoupled' or 'proximal', not '", name, "'");
  throw std::logic_error("unreachable");
}

// The arrays of one call. A tensor whose strides differ from its parameter's takes part as a copy
// in the parameter's memory order, which write_back() copies to where it came from.
class EWCAdamWArguments {
 public:
  EWCAdamWArguments(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                    const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                    const TensorList& importances, const TensorList& anchors,
                    const TensorList& steps, bool amsgrad) {
    const size_t n = params.size();
    check_length("grads", grads, n);
    check_length("exp_avgs", exp_avgs, n);
    check_length("exp_avg_sqs", exp_avg_sqs, n);
    check_length("max_exp_avg_sqs", max_exp_avg_sqs, amsgrad ? n : 0);
    check_length("importances", importances, importances.empty() ? 0 : n);
    check_length("anchors", anchors, importances.size());
    check_length("steps", steps, n);
    tensors_.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      const ScalarType type = params[i].scalar_type();
      const ScalarType wide = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
      const bool dense = is_dense(params[i]);
      const Tensor param = dense ? params[i] : copy_in_order_of(params[i], params[i], true);

      EWCAdamWTensor t{};
      t.param_kind = t.anchor_kind = scalar_kind(type, "params", i);
      t.numel = param.numel();
      t.param = param.mutable_data_ptr();
      t.grad = read("grads", grads[i], i, param, type);
      t.exp_avg = write("exp_avgs", exp_avgs[i], i, param, wide);
      t.exp_avg_sq = write("exp_avg_sqs", exp_avg_sqs[i], i, param, wide);
      if (amsgrad) {
        t.max_exp_avg_sq = write("max_exp_avg_sqs", max_exp_avg_sqs[i], i, param, wide);
      }
      if (!importances.empty()) {
        const ScalarType anchor_type = anchors[i].scalar_type();
        t.importance = read("importances", importances[i], i, param, wide);
        t.anchor = read("anchors", anchors[i], i, param, anchor_type == wide ? wide : type);
        t.anchor_kind = scalar_kind(anchor_type, "anchors", i);
      }
      check(steps[i].numel() == 1 && steps[i].scalar_type() == ScalarType::Float, "steps[", i,
            "] must be one float32 number");
      t.step = static_cast<float*>(steps[i].mutable_data_ptr());
      tensors_.push_back(t);
    }
  }

  const std::vector<EWCAdamWTensor>& tensors() const { return tensors_; }

  void write_back() {
    for (auto& [original, copy] : written_copies_) torch::stable::copy_(original, copy);
  }

 private:
  static void check_length(const char* name, const TensorList& list, size_t expected) {
    check(list.size() == expected, name, " must hold ", expected, " tensors, not ", list.size());
  }

  static void check_like(const char* name, const Tensor& tensor, size_t i, const Tensor& param,
                         ScalarType type) {
    check(same(tensor.sizes(), param.sizes()), name, "[", i, "] must have the shape of params[", i,
          "]");
    check(tensor.scalar_type() == type, name, "[", i, "] must be ",
          torch::headeronly::toString(type), ", not ",
          torch::headeronly::toString(tensor.scalar_type()));
    check(
        tensor.is_cpu() == param.is_cpu() && tensor.get_device_index() == param.get_device_index(),
        name, "[", i, "] must be on the device of params[", i, "]");
  }

  const void* read(const char* name, const Tensor& tensor, size_t i, const Tensor& param,
                   ScalarType type) {
    check_like(name, tensor, i, param, type);
    if (same(tensor.strides(), param.strides())) return tensor.const_data_ptr();
    return copy_in_order_of(param, tensor, false).const_data_ptr();
  }

  void* write(const char* name, const Tensor& tensor, size_t i, const Tensor& param,
              ScalarType type) {
    check_like(name, tensor, i, param, type);
    if (same(tensor.strides(), param.strides())) return tensor.mutable_data_ptr();
    return copy_in_order_of(param, tensor, true).mutable_data_ptr();
  }

  // empty_like keeps the strides of a dense tensor and makes others contiguous.
  Tensor copy_in_order_of(const Tensor& order, const Tensor& tensor, bool written) {
    StableIValue stack[] = {torch::stable::detail::from(order),
                            torch::stable::detail::from(std::optional(tensor.scalar_type())),
                            torch::stable::detail::from(std::nullopt),
                            torch::stable::detail::from(std::nullopt),
                            torch::stable::detail::from(std::nullopt),
                            torch::stable::detail::from(std::nullopt)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
    Tensor copy = torch::stable::detail::to<Tensor>(stack[0]);
    torch::stable::copy_(copy, tensor);
    if (written) {
      written_copies_.emplace_back(tensor, copy);
    } else {
      read_copies_.push_back(copy);
    }
    return copy;
  }

  std::vector<EWCAdamWTensor> tensors_;
  std::vector<std::pair<Tensor, Tensor>> written_copies_;  // (original, copy)
  TensorList read_copies_;                                 // kept alive until the launch is over
};

}  // namespace cl_optim
