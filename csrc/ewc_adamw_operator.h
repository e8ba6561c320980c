// The operators of the EWC-AdamW step for one device, given what launches on that device.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

#include "ewc_adamw_arguments.h"

namespace cl_optim {

// An operator's arguments, one after another.
struct Arguments {
  StableIValue* values;
  uint64_t count;
  uint64_t used = 0;

  template <typename T>
  T next() {
    check(used < count, "its schema has fewer arguments than it takes");
    return torch::stable::detail::to<T>(values[used++]);
  }
};

using EWCAdamWLauncher = void (*)(const std::vector<EWCAdamWTensor>& tensors,
                                  const EWCAdamWOptions& options, const DeviceNumbers& numbers,
                                  const Tensor& on_device);

// Takes its arguments itself, so that EWCAdamWOptions alone lists the options.
template <EWCAdamWLauncher launch>
void ewc_adamw_(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments given{stack, count};
  const auto list = [&] { return given.next<TensorList>(); };
  const auto maybe = [&] { return given.next<std::optional<Tensor>>(); };
  const TensorList params = list(), grads = list(), exp_avgs = list(), exp_avg_sqs = list(),
                   max_exp_avg_sqs = list(), importances = list(), anchors = list(),
                   compensations = list(), steps = list(), memories = list(), coefficients = list();
  const std::optional<Tensor> lr = maybe(), grad_scale = maybe(), found_inf = maybe(),
                              sums = maybe();
  EWCAdamWOptions options{};
  options.for_each([&](const char*, auto& option) {
    using T = std::decay_t<decltype(option)>;
    if constexpr (std::is_same_v<T, Penalty>) {
      option = parse_penalty(given.next<std::string>());
    } else {
      option = given.next<T>();
    }
  });
  check(given.used == count, "its schema has more arguments than it takes");

  EWCAdamWArguments arguments(
      {params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, importances, anchors, compensations, steps},
      {grads, memories, coefficients}, options.amsgrad);
  if (params.empty()) return;
  const DeviceNumbers numbers = device_numbers(lr, grad_scale, found_inf, sums, params[0]);
  launch(arguments.tensors(), options, numbers, params[0]);
  arguments.write_back();
}

// The pull alone, of all tensors.
template <EWCAdamWLauncher launch>
void ewc_pull_(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments given{stack, count};
  const auto list = [&] { return given.next<TensorList>(); };
  const auto maybe = [&] { return given.next<std::optional<Tensor>>(); };
  const TensorList targets = list(), beside = list(), importances = list(), anchors = list(),
                   steps = list();
  const std::optional<Tensor> lr = maybe(), grad_scale = maybe(), found_inf = maybe();
  EWCAdamWOptions options{};
  options.lr = given.next<double>();
  options.ewc_lambda = given.next<double>();
  options.penalty = parse_penalty(given.next<std::string>());
  options.maximize = given.next<bool>();
  options.stochastic = given.next<bool>();
  check(given.used == count, "its schema has more arguments than it takes");

  EWCAdamWArguments arguments({targets, beside, importances, anchors, steps}, options.penalty,
                              options.stochastic);
  if (targets.empty()) return;
  const DeviceNumbers numbers = device_numbers(lr, grad_scale, found_inf, std::nullopt, targets[0]);
  launch(arguments.tensors(), options, numbers, targets[0]);
  arguments.write_back();
}

}  // namespace cl_optim
