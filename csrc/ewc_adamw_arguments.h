// From the operator's tensors to the arrays that a launcher takes: every check happens here, before
// anything is written. Shared by the operator's implementations for all devices.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "ewc_adamw_launch.h"
#include "tensors.h"

namespace cl_optim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

constexpr Check check{"ewc_adamw_"};

inline bool same(torch::headeronly::IntHeaderOnlyArrayRef a,
                 torch::headeronly::IntHeaderOnlyArrayRef b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

inline ScalarKind scalar_kind(ScalarType type, const char* name, size_t index) {
  const std::optional<ScalarKind> kind = scalar_kind(type);
  check(kind.has_value(), name, "[", index, "] must be float32, float64, bfloat16 or float16, not ",
        torch::headeronly::toString(type));
  return *kind;
}

// The tensors of a step except the gradients.
struct EWCAdamWLists {
  const TensorList& params;
  const TensorList& exp_avgs;
  const TensorList& exp_avg_sqs;
  const TensorList& max_exp_avg_sqs;  // empty without AMSGrad
  const TensorList& importances;      // empty without a penalty
  const TensorList& anchors;
  const TensorList& compensations;  // empty without Kahan summation; so is a tensor's without it
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

inline PenaltySums* penalty_sums(const std::optional<Tensor>& tensor, const Tensor& beside) {
  if (!tensor) return nullptr;
  check(tensor->numel() == 2 && tensor->scalar_type() == ScalarType::Double &&
            tensor->is_contiguous() && on_same_device(*tensor, beside),
        "sums must be two float64 numbers on the parameters' device");
  return static_cast<PenaltySums*>(tensor->mutable_data_ptr());
}

inline DeviceNumbers device_numbers(const std::optional<Tensor>& lr,
                                    const std::optional<Tensor>& grad_scale,
                                    const std::optional<Tensor>& found_inf,
                                    const std::optional<Tensor>& sums, const Tensor& beside) {
  return {one_float("lr_tensor", lr, beside), one_float("grad_scale", grad_scale, beside),
          one_float("found_inf", found_inf, beside), penalty_sums(sums, beside)};
}

// The tensors of a pull alone: see ewc_pull_element().
struct EWCPullLists {
  const TensorList& targets;
  const TensorList& beside;  // empty where the penalty is proximal
  const TensorList& importances;
  const TensorList& anchors;
  const TensorList& steps;  // empty unless rounding is stochastic
};

// The arrays of one call. A tensor whose strides differ from its parameter's takes part as a copy
// in the parameter's memory order, which write_back() copies to where it came from. Codes are in
// row-major order whatever the parameter's strides, so beside them all others are copied to it.
class EWCAdamWArguments {
 public:
  EWCAdamWArguments(const EWCAdamWLists& lists, const EWCAdamWGradients& gradients, bool amsgrad) {
    check_lengths(gradients, lists.params.size());
    check_length("max_exp_avg_sqs", lists.max_exp_avg_sqs, amsgrad ? lists.params.size() : 0);
    add_all(lists, gradients);
  }

  EWCAdamWArguments(const EWCPullLists& lists, Penalty penalty, bool stochastic) {
    const size_t n = lists.targets.size();
    check_length("beside", lists.beside, penalty == Penalty::proximal ? 0 : n);
    check_length("importances", lists.importances, n);
    check_length("anchors", lists.anchors, n);
    check_length("steps", lists.steps, stochastic ? n : 0);
    tensors_.reserve(n);
    for (size_t i = 0; i < n; ++i) add(lists, i);
  }

  const std::vector<EWCAdamWTensor>& tensors() const { return tensors_; }

  void write_back() {
    for (auto& [original, copy] : written_copies_) torch::stable::copy_(original, copy);
  }

 private:
  void add_all(const EWCAdamWLists& lists, const EWCAdamWGradients& gradients) {
    const size_t n = lists.params.size();
    check_length("exp_avgs", lists.exp_avgs, n);
    check_length("exp_avg_sqs", lists.exp_avg_sqs, n);
    check_length("importances", lists.importances, lists.importances.empty() ? 0 : n);
    check_length("anchors", lists.anchors, lists.importances.size());
    check_length("compensations", lists.compensations, lists.compensations.empty() ? 0 : n);
    check_length("steps", lists.steps, n);
    tensors_.reserve(n);
    for (size_t i = 0; i < n; ++i) add(lists, gradients, i);
  }

  void add(const EWCAdamWLists& lists, const EWCAdamWGradients& gradients, size_t i) {
    const Tensor& given = lists.params[i];
    const ScalarType type = given.scalar_type();
    const bool is_protected = !lists.importances.empty();
    const bool row_major =
        is_codes(lists.exp_avgs[i]) || (is_protected && is_codes(lists.importances[i]));
    const bool in_place = row_major ? given.is_contiguous() : is_dense(given);
    const Tensor param = in_place ? given : copy(given, given, true, row_major);

    EWCAdamWTensor t{};
    t.param_kind = scalar_kind(type, "params", i);
    t.numel = param.numel();
    t.param = param.mutable_data_ptr();
    t.grad = read("grads", gradients.grads[i], i, param, type);
    t.memory = memory(gradients, i, param, !in_place);
    t.moment_kind = state_kind("exp_avgs", lists.exp_avgs[i], i, t.param_kind);
    const ScalarType moments = lists.exp_avgs[i].scalar_type();
    t.exp_avg = write("exp_avgs", lists.exp_avgs[i], i, param, moments);
    t.exp_avg_sq = write("exp_avg_sqs", lists.exp_avg_sqs[i], i, param, moments);
    if (!lists.max_exp_avg_sqs.empty()) {
      t.max_exp_avg_sq = write("max_exp_avg_sqs", lists.max_exp_avg_sqs[i], i, param, moments);
    }
    if (is_protected) protect(t, lists.importances[i], lists.anchors[i], i, param);
    if (!lists.compensations.empty() && lists.compensations[i].numel() != 0) {
      check(type == ScalarType::BFloat16, "compensations[", i, "] must be empty: params[", i,
            "] is not bfloat16");
      t.compensation = static_cast<BFloat16*>(
          write("compensations", lists.compensations[i], i, param, ScalarType::BFloat16));
    }
    t.step = step_of(lists.steps[i], given, i);
    tensors_.push_back(t);
  }

  void add(const EWCPullLists& lists, size_t i) {
    const Tensor& given = lists.targets[i];
    const bool row_major = is_codes(lists.importances[i]);
    const bool in_place = row_major ? given.is_contiguous() : is_dense(given);
    const Tensor target = in_place ? given : copy(given, given, true, row_major);
    EWCAdamWTensor t{};
    t.pull_only = true;
    t.param_kind = scalar_kind(given.scalar_type(), "params", i);
    t.moment_kind = t.param_kind == ScalarKind::float64 ? ScalarKind::float64 : ScalarKind::float32;
    t.numel = target.numel();
    t.param = target.mutable_data_ptr();
    if (!lists.beside.empty()) {
      t.grad = read("beside", lists.beside[i], i, target, given.scalar_type());
    }
    protect(t, lists.importances[i], lists.anchors[i], i, target);
    if (!lists.steps.empty()) t.step = step_of(lists.steps[i], given, i);
    tensors_.push_back(t);
  }

  void protect(EWCAdamWTensor& t, const Tensor& importance, const Tensor& anchor, size_t i,
               const Tensor& param) {
    t.importance_kind = state_kind("importances", importance, i, t.param_kind);
    t.importance = read("importances", importance, i, param, importance.scalar_type());
    const std::optional<ScalarKind> anchor_kind = scalar_kind(anchor.scalar_type());
    const bool fits = anchor_kind && is_anchor_kind(*anchor_kind, t.param_kind);
    const ScalarType type = fits ? anchor.scalar_type() : param.scalar_type();
    t.anchor = read("anchors", anchor, i, param, type);
    t.anchor_kind = *anchor_kind;
  }

  static float* step_of(const Tensor& step, const Tensor& param, size_t i) {
    check(
        step.numel() == 1 && step.scalar_type() == ScalarType::Float && on_same_device(step, param),
        "steps[", i, "] must be one float32 number on the device of params[", i, "]");
    return static_cast<float*>(step.mutable_data_ptr());
  }

  static bool is_codes(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Byte; }

  // What moments or importance are made of.
  static ScalarKind state_kind(const char* name, const Tensor& tensor, size_t i, ScalarKind param) {
    const ScalarType type = tensor.scalar_type();
    const std::optional<ScalarKind> kind =
        is_codes(tensor) ? std::optional(ScalarKind::codes) : scalar_kind(type);
    check(kind && is_state_kind(*kind, param), name, "[", i, "] must be ",
          param == ScalarKind::float64 ? "Double" : "Float, BFloat16 or codes (Byte)", ", not ",
          torch::headeronly::toString(type));
    return *kind;
  }

  static void check_length(const char* name, const TensorList& list, size_t expected) {
    check(list.size() == expected, name, " must hold ", expected, " tensors, not ", list.size());
  }

  static void check_lengths(const EWCAdamWGradients& gradients, size_t expected) {
    check_length("grads", gradients.grads, expected);
    check_length("memories", gradients.memories, gradients.memories.empty() ? 0 : expected);
    check_length("coefficients", gradients.coefficients, gradients.memories.size());
  }

  MemoryRows memory(const EWCAdamWGradients& gradients, size_t i, const Tensor& param,
                    bool copied) {
    if (gradients.memories.empty()) return MemoryRows{};
    const Tensor& rows = gradients.memories[i];
    const Tensor& coefficients = gradients.coefficients[i];
    // Where the parameter takes part as a contiguous copy, so do its rows.
    if (copied && rows.dim() == param.dim() + 1 && same(rows.sizes().slice(1), param.sizes())) {
      Tensor copy = torch::stable::new_empty(rows, rows.sizes(), rows.scalar_type());
      torch::stable::copy_(copy, rows);
      read_copies_.push_back(copy);
      return memory_of(copy, coefficients, i, param);
    }
    return memory_of(rows, coefficients, i, param);
  }

  static MemoryRows memory_of(const Tensor& rows, const Tensor& coefficients, size_t i,
                              const Tensor& param) {
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
    if (type == ScalarType::Byte) {
      check(tensor.dim() == 2 && are_blocks(tensor.size(0), tensor.size(1), param.numel()) &&
                tensor.is_contiguous(),
            name, "[", i, "] must be ", sizeof(PackedBlock), " bytes for each ", kBlock,
            " elements of params[", i, "]");
    } else {
      check(same(tensor.sizes(), param.sizes()), name, "[", i, "] must have the shape of params[",
            i, "]");
    }
    check(tensor.scalar_type() == type, name, "[", i, "] must be ",
          torch::headeronly::toString(type), ", not ",
          torch::headeronly::toString(tensor.scalar_type()));
    check(on_same_device(tensor, param), name, "[", i, "] must be on the device of params[", i,
          "]");
  }

  const void* read(const char* name, const Tensor& tensor, size_t i, const Tensor& param,
                   ScalarType type) {
    check_like(name, tensor, i, param, type);
    if (is_codes(tensor) || same(tensor.strides(), param.strides())) return tensor.const_data_ptr();
    return copy(param, tensor, false).const_data_ptr();
  }

  void* write(const char* name, const Tensor& tensor, size_t i, const Tensor& param,
              ScalarType type) {
    check_like(name, tensor, i, param, type);
    if (is_codes(tensor) || same(tensor.strides(), param.strides())) {
      return tensor.mutable_data_ptr();
    }
    return copy(param, tensor, true).mutable_data_ptr();
  }

  // A copy in row-major order, or in the order of another tensor: empty_like keeps the strides of a
  // dense tensor and makes others contiguous.
  Tensor copy(const Tensor& order, const Tensor& tensor, bool written, bool row_major = false) {
    Tensor copy = row_major ? torch::stable::new_empty(tensor, tensor.sizes(), tensor.scalar_type())
                            : empty_like(order, tensor.scalar_type());
    torch::stable::copy_(copy, tensor);
    if (written) {
      written_copies_.emplace_back(tensor, copy);
    } else {
      read_copies_.push_back(copy);
    }
    return copy;
  }

  static Tensor empty_like(const Tensor& tensor, ScalarType type) {
    StableIValue stack[] = {
        torch::stable::detail::from(tensor),       torch::stable::detail::from(std::optional(type)),
        torch::stable::detail::from(std::nullopt), torch::stable::detail::from(std::nullopt),
        torch::stable::detail::from(std::nullopt), torch::stable::detail::from(std::nullopt)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }

  std::vector<EWCAdamWTensor> tensors_;
  std::vector<std::pair<Tensor, Tensor>> written_copies_;  // (original, copy)
  TensorList read_copies_;                                 // kept alive until the launch is over
};

}  // namespace cl_optim
