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
                const TensorList& importances, const TensorList& anchors,
                const TensorList& compensations, const TensorList& steps,
                const TensorList& memories, const TensorList& coefficients,
                const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_scale,
                const std::optional<Tensor>& found_inf, const std::optional<Tensor>& sums,
                double lr, double beta1, double beta2, double eps, double weight_decay,
                double ewc_lambda, double damping, const std::string& penalty, bool amsgrad,
                bool maximize, bool stochastic) {
  const EWCAdamWOptions options{lr,           beta1,      beta2,     eps,
                                weight_decay, ewc_lambda, damping,   parse_penalty(penalty),
                                amsgrad,      maximize,   stochastic};
  EWCAdamWArguments arguments(
      {params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, importances, anchors, compensations, steps},
      {grads, memories, coefficients}, amsgrad);
  if (params.empty()) return;
  const DeviceNumbers numbers = device_numbers(lr_tensor, grad_scale, found_inf, sums, params[0]);
  launch(arguments.tensors(), options, numbers, params[0]);
  arguments.write_back();
}

}  // namespace cl_optim
