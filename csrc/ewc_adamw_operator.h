// The operators of the EWC-AdamW step for one device, given what launches on that device.
#pragma once

#include "ewc_adamw_arguments.h"

namespace cl_optim {

using EWCAdamWLauncher = void (*)(const std::vector<EWCAdamWTensor>& tensors,
                                  const EWCAdamWOptions& options, const DeviceNumbers& numbers,
                                  const Tensor& on_device);

template <EWCAdamWLauncher launch>
void ewc_adamw_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                const TensorList& importances, const TensorList& anchors, const TensorList& steps,
                const TensorList& memories, const TensorList& coefficients,
                const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_scale,
                const std::optional<Tensor>& found_inf, double lr, double beta1, double beta2,
                double eps, double weight_decay, double ewc_lambda, const std::string& penalty,
                bool amsgrad, bool maximize) {
  const EWCAdamWOptions options{
      lr, beta1, beta2, eps, weight_decay, ewc_lambda, parse_penalty(penalty), amsgrad, maximize};
  EWCAdamWArguments arguments(
      {params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, importances, anchors, steps},
      {grads, memories, coefficients}, amsgrad);
  if (params.empty()) return;
  const DeviceNumbers numbers = device_numbers(lr_tensor, grad_scale, found_inf, params[0]);
  launch(arguments.tensors(), options, numbers, params[0]);
  arguments.write_back();
}

inline Tensor ewc_adamw_plan(const TensorList& params, const TensorList& exp_avgs,
                             const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                             const TensorList& importances, const TensorList& anchors,
                             const TensorList& steps) {
  return EWCAdamWArguments::plan(
      {params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, importances, anchors, steps});
}

template <EWCAdamWLauncher launch>
bool ewc_adamw_planned_(const TensorList& params, const TensorList& grads, const Tensor& plan,
                        const TensorList& memories, const TensorList& coefficients,
                        const std::optional<Tensor>& lr_tensor,
                        const std::optional<Tensor>& grad_scale,
                        const std::optional<Tensor>& found_inf, double lr, double beta1,
                        double beta2, double eps, double weight_decay, double ewc_lambda,
                        const std::string& penalty, bool amsgrad, bool maximize) {
  const EWCAdamWOptions options{
      lr, beta1, beta2, eps, weight_decay, ewc_lambda, parse_penalty(penalty), amsgrad, maximize};
  const EWCAdamWArguments arguments(params, {grads, memories, coefficients}, plan, amsgrad);
  if (!arguments.valid()) return false;
  if (params.empty()) return true;
  const DeviceNumbers numbers = device_numbers(lr_tensor, grad_scale, found_inf, params[0]);
  launch(arguments.tensors(), options, numbers, params[0]);
  return true;
}

template <EWCAdamWLauncher launch>
void implement_ewc_adamw(torch::stable::detail::StableLibrary& m) {
  m.impl("ewc_adamw_", TORCH_BOX(&ewc_adamw_<launch>));
  m.impl("ewc_adamw_plan", TORCH_BOX(&ewc_adamw_plan));
  m.impl("ewc_adamw_planned_", TORCH_BOX(&ewc_adamw_planned_<launch>));
}

}  // namespace cl_optim
