// One EWC-AdamW update of one element: the arithmetic that the CPU and the GPU share.
//
//   AdamW (Loshchilov & Hutter 2019) on L(theta) + lambda * sum_i F_i (theta_i - theta*_i)^2
//   (Kirkpatrick et al. 2017, without their 1/2). With D = theta - theta*:
//
//   gradient    g <- g + 2 lambda F D, then AdamW
//   decoupled   AdamW on g; theta <- theta - lr 2 lambda F D, D from before the step
//   proximal    AdamW on g gives theta'; theta <- theta* + (theta' - theta*) / (1 + c),
//               c = 2 lr lambda F
//
// Adam's own step may be damped where a weight is important, by 1 / (1 + damping F). A frozen
// weight keeps its bits.
//
// The pull may also come alone, beside the step of another optimizer.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "float_types.h"
#include "formats.h"
#include "memory_rows.h"

namespace cl_optim {

enum class Penalty : int { none, gradient, decoupled, proximal };

// One call's hyperparameters, as the user gave them: whoever hands them over lists them by
// for_each(), and nowhere else.
struct EWCAdamWOptions {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double ewc_lambda;
  double damping;  // kappa / mean importance
  Penalty penalty;
  bool amsgrad;
  bool maximize;
  bool stochastic;  // bfloat16 parameters are rounded stochastically

  // Calls f(name, option) for each, in the order of the operator's arguments.
  template <typename F>
  void for_each(F&& f) {
    f("lr", lr);
    f("beta1", beta1);
    f("beta2", beta2);
    f("eps", eps);
    f("weight_decay", weight_decay);
    f("ewc_lambda", ewc_lambda);
    f("damping", damping);
    f("penalty", penalty);
    f("amsgrad", amsgrad);
    f("maximize", maximize);
    f("stochastic", stochastic);
  }
};

// What is summed over the weights as they are before a step.
struct PenaltySums {
  double penalty;  // lambda sum F D^2 over weights that are not frozen
  double drift;    // sum D^2
};

// What the host does not know, in the memory of the tensors' device; null where there is no such
// number.
struct DeviceNumbers {
  const float* lr;          // in place of the options'
  const float* grad_scale;  // the gradients are this times too large (torch.amp.GradScaler)
  const float* found_inf;   // not 0: they have overflowed, and nothing is to change
  PenaltySums* sums;        // written, unless nothing is to change

  CL_OPTIM_HD bool overflowed() const { return found_inf != nullptr && *found_inf != 0.0f; }
};

// What Adam's moments lack in the first steps, which begin with 0.
struct BiasCorrections {
  double first;            // 1 - beta1^step
  double inv_sqrt_second;  // 1 / sqrt(1 - beta2^step)

  CL_OPTIM_HD BiasCorrections(const EWCAdamWOptions& o, double step)
      : first(1.0 - std::pow(o.beta1, step)),
        inv_sqrt_second(1.0 / std::sqrt(1.0 - std::pow(o.beta2, step))) {}
};

// What the elements of one tensor share, rounded once to the type of the arithmetic.
template <typename T>
struct EWCAdamWConstants {
  T one_minus_beta1;
  T beta2;
  T one_minus_beta2;
  T eps;
  T weight_decay;    // lr * weight_decay
  T step_size;       // lr / (1 - beta1^step)
  T inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^step)
  T pull;            // 2 lambda, times lr unless the penalty goes into the gradient
  T damping;
  T grad_factor;  // 1 / GradScaler's scale, negative to maximize

  CL_OPTIM_HD EWCAdamWConstants(const EWCAdamWOptions& o, const DeviceNumbers& numbers,
                                const BiasCorrections& bias)
      : EWCAdamWConstants(o, bias, numbers.lr == nullptr ? o.lr : double{*numbers.lr},
                          numbers.grad_scale == nullptr ? 1.0 : double{*numbers.grad_scale}) {}

 private:
  CL_OPTIM_HD EWCAdamWConstants(const EWCAdamWOptions& o, const BiasCorrections& bias, double lr,
                                double grad_scale)
      : one_minus_beta1(static_cast<T>(1.0 - o.beta1)),
        beta2(static_cast<T>(o.beta2)),
        one_minus_beta2(static_cast<T>(1.0 - o.beta2)),
        eps(static_cast<T>(o.eps)),
        weight_decay(static_cast<T>(lr * o.weight_decay)),
        step_size(static_cast<T>(lr / bias.first)),
        inv_sqrt_bias2(static_cast<T>(bias.inv_sqrt_second)),
        pull(finite(2.0 * o.ewc_lambda * (o.penalty == Penalty::gradient ? 1.0 : lr))),
        damping(finite(o.damping)),
        grad_factor(static_cast<T>((o.maximize ? -1.0 : 1.0) / grad_scale)) {}

  // An infinite factor would turn F = 0 into NaN, so one beyond the type's range saturates.
  CL_OPTIM_HD static T finite(double factor) {
    const double largest = sizeof(T) == sizeof(float) ? double{FLT_MAX} : DBL_MAX;
    return static_cast<T>(factor < largest ? factor : largest);
  }
};

template <typename T>
struct EWCAdamWElement {
  T param;
  T exp_avg;
  T exp_avg_sq;
  T max_exp_avg_sq;
};

// theta* + (theta - theta*) / (1 + c), c = pull * F.
template <typename T>
CL_OPTIM_HD T proximal(T param, T importance, T anchor, T pull) {
  const T c = pull * importance;
  const T shrink = T{1} / (T{1} + c);
  // Both forms are the same number. The first leaves the weight as it is where F = 0; the second
  // is finite where c overflows.
  const T toward = param + c * shrink * (anchor - param);
  const T from_anchor = anchor + (param - anchor) * shrink;
  return c < T{1} ? toward : from_anchor;
}

// The pull alone: what becomes of the gradient, beside the weight (gradient); of the weight after
// another optimizer's step, beside the one from before (decoupled); of the weight (proximal). What
// is frozen stays, and it is not for this to undo that step.
template <Penalty penalty, typename T>
CL_OPTIM_HD T ewc_pull_element(T target, T beside, T importance, T anchor,
                               const EWCAdamWConstants<T>& k) {
  const bool frozen = is_frozen(importance);
  importance = std::fabs(importance);
  T pulled = target;
  if constexpr (penalty == Penalty::gradient) {
    pulled += k.pull * (importance * (beside - anchor)) / k.grad_factor;
  } else if constexpr (penalty == Penalty::decoupled) {
    pulled -= k.pull * (importance * (beside - anchor));
  } else {
    pulled = proximal(target, importance, anchor, k.pull);
  }
  return frozen ? target : pulled;
}

template <Penalty penalty, bool amsgrad, typename T>
CL_OPTIM_HD EWCAdamWElement<T> ewc_adamw_element(EWCAdamWElement<T> x, T grad, T importance,
                                                 T anchor, const EWCAdamWConstants<T>& k) {
  const T before = x.param;
  const bool frozen = is_frozen(importance);
  importance = std::fabs(importance);
  const T drift = x.param - anchor;
  T g = k.grad_factor * grad;
  if constexpr (penalty == Penalty::gradient) g += k.pull * (importance * drift);

  x.exp_avg += k.one_minus_beta1 * (g - x.exp_avg);
  x.exp_avg_sq = k.beta2 * x.exp_avg_sq + k.one_minus_beta2 * g * g;
  T second_moment = x.exp_avg_sq;
  if constexpr (amsgrad) {
    // Not fmax: a NaN must stay visible, as in torch.maximum.
    x.max_exp_avg_sq = x.max_exp_avg_sq > second_moment ? x.max_exp_avg_sq : second_moment;
    second_moment = x.max_exp_avg_sq;
  }
  T denominator = std::sqrt(second_moment) * k.inv_sqrt_bias2 + k.eps;
  if constexpr (penalty != Penalty::none) denominator *= T{1} + k.damping * importance;

  x.param -= k.weight_decay * x.param;
  if constexpr (penalty == Penalty::decoupled) x.param -= k.pull * (importance * drift);
  x.param -= k.step_size * x.exp_avg / denominator;
  if constexpr (penalty == Penalty::proximal) {
    x.param = proximal(x.param, importance, anchor, k.pull);
  }
  if constexpr (penalty != Penalty::none) x.param = frozen ? before : x.param;
  return x;
}

// One tensor as the kernels see it: `numel` elements of each array, in the same order in memory.
// The gradient has the parameter's type; what types the others may have is in formats.h. Null
// where the update does not use it. Where only the pull is taken, the arrays are named after what
// it writes and what is beside: see ewc_pull_element().
struct EWCAdamWTensor {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
  const void* importance;
  const void* anchor;
  BFloat16* compensation;  // what the bfloat16 parameter lacks of the weight (Kahan summation)
  float* step;
  int64_t numel;
  ScalarKind param_kind;
  ScalarKind moment_kind;
  ScalarKind importance_kind;
  ScalarKind anchor_kind;
  MemoryRows memory;
  bool pull_only;
};

// The template arguments of an update, as a value.
template <typename T_, Penalty penalty_, bool amsgrad_, bool pull_only_ = false>
struct EWCAdamWInstance {
  using T = T_;
  static constexpr Penalty penalty = penalty_;
  static constexpr bool amsgrad = amsgrad_;
  static constexpr bool pull_only = pull_only_;
};

// Calls f(EWCAdamWInstance<...>{}) with the instance that a tensor needs, and returns what f does.
template <typename F>
auto dispatch(const EWCAdamWTensor& tensor, const EWCAdamWOptions& options, F&& f) {
  const auto by_penalty = [&](auto zero, auto amsgrad, auto pull_only) {
    using T = decltype(zero);
    constexpr bool a = decltype(amsgrad)::value, p = decltype(pull_only)::value;
    if constexpr (!p) {
      if (tensor.importance == nullptr) return f(EWCAdamWInstance<T, Penalty::none, a>{});
    }
    switch (options.penalty) {
      case Penalty::decoupled:
        return f(EWCAdamWInstance<T, Penalty::decoupled, a, p>{});
      case Penalty::proximal:
        return f(EWCAdamWInstance<T, Penalty::proximal, a, p>{});
      default:
        return f(EWCAdamWInstance<T, Penalty::gradient, a, p>{});
    }
  };
  const std::true_type yes;
  const std::false_type no;
  const auto by_step = [&](auto zero) {
    if (tensor.pull_only) return by_penalty(zero, no, yes);
    return options.amsgrad ? by_penalty(zero, yes, no) : by_penalty(zero, no, no);
  };
  return tensor.param_kind == ScalarKind::float64 ? by_step(double{}) : by_step(float{});
}

}  // namespace cl_optim
