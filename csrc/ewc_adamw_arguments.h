// From the operator's tensors to the arrays that a launcher takes: every check happens here, before
// anything is written. Shared by the operator's implementations for all devices.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ewc_adamw.h"
#include "tensor_types.h"

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

inline bool on_same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline ScalarKind scalar_kind(ScalarType type, const char* name, size_t index) {
  const std::optional<ScalarKind> kind = scalar_kind(type);
  check(kind.has_value(), name, "[", index, "] must be float32, float64, bfloat16 or float16, not ",
        torch::headeronly::toString(type));
  return *kind;
}

inline Penalty parse_penalty(const std::string& name) {
  if (name == "gradient") return Penalty::gradient;
  if (name == "decoupled") return Penalty::decoupled;
  if (name == "proximal") return Penalty::proximal;
  check(false, "penalty must be 'gradient', 'decoupled' or 'proximal', not '", name, "'");
  throw std::logic_error("unreachable");
}

// The tensors of a step except the gradients.
struct EWCAdamWLists {
  const TensorList& params;
  const TensorList& exp_avgs;
  const TensorList& exp_avg_sqs;
  const TensorList& max_exp_avg_sqs;  // empty without AMSGrad
  const TensorList& importances;      // empty without a penalty
  const TensorList& anchors;
  const TensorList& steps;
};

// What changes from step to step.
struct EWCAdamWGradients {
  const TensorList& grads;
  const TensorList& memories;      // [t, ...] for each gradient, or empty
  const TensorList& coefficients;  // [t] for each of them
};

inline const float* one_float(const char* name, const std::optional<Tensor>& tensor,
                              const Tensor& beside) {
  if (!tensor) return nullptr;
  check(tensor->numel() == 1 && tensor->scalar_type() == ScalarType::Float &&
            on_same_device(*tensor, beside),
        name, " must be one float32 number on the parameters' device");
  return static_cast<const float*>(tensor->const_data_ptr());
}

inline DeviceNumbers device_numbers(const std::optional<Tensor>& lr,
                                    const std::optional<Tensor>& grad_scale,
                                    const std::optional<Tensor>& found_inf, const Tensor& beside) {
  return {one_float("lr_tensor", lr, beside), one_float("grad_scale", grad_scale, beside),
          one_float("found_inf", found_inf, beside)};
}

// One parameter of a launch plan: what a step needs besides the parameter and its gradient, and
// the dtype and layout that the parameter had.
struct PlanRow {
  EWCAdamWTensor tensor;
  uint64_t layout;
};
constexpr int64_t kPlanWords = sizeof(PlanRow) / sizeof(int64_t);
static_assert(sizeof(PlanRow) % sizeof(int64_t) == 0);

// FNV-1a of sizes and strides.
inline uint64_t layout_of(const Tensor& tensor) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto add = [&](int64_t value) {
    hash = (hash ^ static_cast<uint64_t>(value)) * 0x100000001b3u;
  };
  for (int64_t size : tensor.sizes()) add(size);
  for (int64_t stride : tensor.strides()) add(stride);
  return hash;
}

inline ScalarType arithmetic_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The arrays of one call. A tensor whose strides differ from its parameter's takes part as a copy
// in the parameter's memory order, which write_back() copies to where it came from.
class EWCAdamWArguments {
 public:
  EWCAdamWArguments(const EWCAdamWLists& lists, const EWCAdamWGradients& gradients, bool amsgrad) {
    check_lengths(gradients, lists.params.size());
    check_length("max_exp_avg_sqs", lists.max_exp_avg_sqs, amsgrad ? lists.params.size() : 0);
    add_all(lists, &gradients);
  }

  // A plan for steps on these tensors, int64 [n, kPlanWords], or [0, ...] where a tensor is
  // not laid out like its parameter, which a plan does not support. Whoever keeps the plan keeps
  // the tensors.
  static Tensor plan(const EWCAdamWLists& lists) {
    EWCAdamWArguments arguments;
    arguments.add_all(lists, nullptr);
    const bool possible = arguments.read_copies_.empty() && arguments.written_copies_.empty();
    const int64_t rows = possible ? static_cast<int64_t>(lists.params.size()) : 0;
    Tensor table = torch::stable::empty({rows, kPlanWords}, ScalarType::Long);
    auto* row = static_cast<PlanRow*>(table.mutable_data_ptr());
    for (int64_t i = 0; i < rows; ++i) {
      row[i] = PlanRow{arguments.tensors_[i], layout_of(lists.params[i])};
    }
    return table;
  }

  // The arrays of a planned step; not valid() where a parameter is no longer as planned.
  EWCAdamWArguments(const TensorList& params, const EWCAdamWGradients& gradients,
                    const Tensor& table, bool amsgrad) {
    check_lengths(gradients, params.size());
    check(table.dim() == 2 && table.size(0) == static_cast<int64_t>(params.size()) &&
              table.size(1) == kPlanWords && table.scalar_type() == ScalarType::Long,
          "plan must be what ewc_adamw_plan made of these parameters");
    const auto* row = static_cast<const PlanRow*>(table.const_data_ptr());
    tensors_.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      const Tensor& param = params[i];
      const ScalarType type = param.scalar_type();
      EWCAdamWTensor t = row[i].tensor;
      valid_ = valid_ && scalar_kind(type, "params", i) == t.param_kind &&
               layout_of(param) == row[i].layout;
      if (!valid_) return;
      check(!amsgrad || t.numel == 0 || t.max_exp_avg_sq, "the plan is one without AMSGrad");
      t.param = param.mutable_data_ptr();
      t.grad = read("grads", gradients.grads[i], i, param, type);
      t.memory = memory(gradients, i, param);
      tensors_.push_back(t);
    }
  }

  bool valid() const { return valid_; }

  const std::vector<EWCAdamWTensor>& tensors() const { return tensors_; }

  void write_back() {
    for (auto& [original, copy] : written_copies_) torch::stable::copy_(original, copy);
  }

 private:
  EWCAdamWArguments() = default;

  void add_all(const EWCAdamWLists& lists, const EWCAdamWGradients* gradients) {
    const size_t n = lists.params.size();
    const bool amsgrad = !lists.max_exp_avg_sqs.empty();
    check_length("exp_avgs", lists.exp_avgs, n);
    check_length("exp_avg_sqs", lists.exp_avg_sqs, n);
    check_length("max_exp_avg_sqs", lists.max_exp_avg_sqs, amsgrad ? n : 0);
    check_length("importances", lists.importances, lists.importances.empty() ? 0 : n);
    check_length("anchors", lists.anchors, lists.importances.size());
    check_length("steps", lists.steps, n);
    tensors_.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      const Tensor& given = lists.params[i];
      const ScalarType type = given.scalar_type();
      const ScalarType wide = arithmetic_type(type);
      const Tensor param = is_dense(given) ? given : copy_in_order_of(given, given, true);

      EWCAdamWTensor t{};
      t.param_kind = t.anchor_kind = scalar_kind(type, "params", i);
      t.numel = param.numel();
      t.param = param.mutable_data_ptr();
      if (gradients) {
        t.grad = read("grads", gradients->grads[i], i, param, type);
        t.memory = memory(*gradients, i, param);
      }
      t.exp_avg = write("exp_avgs", lists.exp_avgs[i], i, param, wide);
      t.exp_avg_sq = write("exp_avg_sqs", lists.exp_avg_sqs[i], i, param, wide);
      if (amsgrad) {
        t.max_exp_avg_sq = write("max_exp_avg_sqs", lists.max_exp_avg_sqs[i], i, param, wide);
      }
      if (!lists.importances.empty()) {
        const Tensor& anchor = lists.anchors[i];
        t.importance = read("importances", lists.importances[i], i, param, wide);
        t.anchor = read("anchors", anchor, i, param, anchor.scalar_type() == wide ? wide : type);
        t.anchor_kind = scalar_kind(anchor.scalar_type(), "anchors", i);
      }
      const Tensor& step = lists.steps[i];
      check(step.numel() == 1 && step.scalar_type() == ScalarType::Float &&
                on_same_device(step, given),
            "steps[", i, "] must be one float32 number on the device of params[", i, "]");
      t.step = static_cast<float*>(step.mutable_data_ptr());
      tensors_.push_back(t);
    }
  }

  static void check_length(const char* name, const TensorList& list, size_t expected) {
    check(list.size() == expected, name, " must hold ", expected, " tensors, not ", list.size());
  }

  static void check_lengths(const EWCAdamWGradients& gradients, size_t expected) {
    check_length("grads", gradients.grads, expected);
    check_length("memories", gradients.memories, gradients.memories.empty() ? 0 : expected);
    check_length("coefficients", gradients.coefficients, gradients.memories.size());
  }

  static MemoryRows memory(const EWCAdamWGradients& gradients, size_t i, const Tensor& param) {
    if (gradients.memories.empty()) return MemoryRows{};
    const Tensor& rows = gradients.memories[i];
    const Tensor& coefficients = gradients.coefficients[i];
    const auto sizes = rows.sizes(), strides = rows.strides();
    check(rows.dim() == param.dim() + 1 && same(sizes.slice(1), param.sizes()) &&
              same(strides.slice(1), param.strides()),
          "memories[", i, "] must be rows of the shape and strides of params[", i, "]");
    check(on_same_device(rows, param) && on_same_device(coefficients, param), "memories[", i,
          "] and coefficients[", i, "] must be on the device of params[", i, "]");
    check(coefficients.dim() == 1 && coefficients.size(0) == rows.size(0) &&
              coefficients.scalar_type() == ScalarType::Double && coefficients.is_contiguous(),
          "coefficients[", i, "] must be contiguous float64, one for each row of memories[", i,
          "]");
    check(rows.scalar_type() != ScalarType::Double || param.scalar_type() == ScalarType::Double,
          "memories[", i, "] may be float64 only where params[", i, "] is");
    return {rows.const_data_ptr(), static_cast<const double*>(coefficients.const_data_ptr()),
            rows.stride(0), static_cast<int>(rows.size(0)),
            scalar_kind(rows.scalar_type(), "memories", i)};
  }

  static void check_like(const char* name, const Tensor& tensor, size_t i, const Tensor& param,
                         ScalarType type) {
    check(same(tensor.sizes(), param.sizes()), name, "[", i, "] must have the shape of params[", i,
          "]");
    check(tensor.scalar_type() == type, name, "[", i, "] must be ",
          torch::headeronly::toString(type), ", not ",
          torch::headeronly::toString(tensor.scalar_type()));
    check(on_same_device(tensor, param), name, "[", i, "] must be on the device of params[", i,
          "]");
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

  bool valid_ = true;
  std::vector<EWCAdamWTensor> tensors_;
  std::vector<std::pair<Tensor, Tensor>> written_copies_;  // (original, copy)
  TensorList read_copies_;                                 // kept alive until the launch is over
};

}  // namespace cl_optim
