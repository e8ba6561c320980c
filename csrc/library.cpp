// The operators' schemas and their CPU implementations, on LibTorch's stable ABI.
#include "ewc_adamw_arguments.h"
#include "ewc_adamw_launch.h"

namespace cl_optim {
namespace {

void ewc_adamw_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                const TensorList& importances, const TensorList& anchors, const TensorList& steps,
                double lr, double beta1, double beta2, double eps, double weight_decay,
                double ewc_lambda, const std::string& penalty, bool amsgrad, bool maximize) {
  const EWCAdamWOptions options{
      lr, beta1, beta2, eps, weight_decay, ewc_lambda, parse_penalty(penalty), amsgrad, maximize};
  EWCAdamWArguments arguments(
      {params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, importances, anchors, steps}, grads,
      amsgrad);
  ewc_adamw_cpu(arguments.tensors(), options);
  arguments.write_back();
}

Tensor ewc_adamw_plan(const TensorList& params, const TensorList& exp_avgs,
                      const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                      const TensorList& importances, const TensorList& anchors,
                      const TensorList& steps) {
  return EWCAdamWArguments::plan(
      {params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, importances, anchors, steps});
}

bool ewc_adamw_planned_(const TensorList& params, const TensorList& grads, const Tensor& plan,
                        double lr, double beta1, double beta2, double eps, double weight_decay,
                        double ewc_lambda, const std::string& penalty, bool amsgrad,
                        bool maximize) {
  const EWCAdamWOptions options{
      lr, beta1, beta2, eps, weight_decay, ewc_lambda, parse_penalty(penalty), amsgrad, maximize};
  const EWCAdamWArguments arguments(params, grads, plan, amsgrad);
  if (arguments.valid()) ewc_adamw_cpu(arguments.tensors(), options);
  return arguments.valid();
}

}  // namespace

// The step with everything given; then the same in two parts, for an optimizer whose state stays
// where it is: boxing a list costs more than updating a small tensor. A plan holds raw addresses.
STABLE_TORCH_LIBRARY(cl_optim, m) {
  m.def(
      "ewc_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor[] importances, "
      "Tensor[] anchors, Tensor(e!)[] steps, *, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, float ewc_lambda, str penalty, bool amsgrad, bool maximize) -> ()");
  m.def(
      "ewc_adamw_plan(Tensor[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, "
      "Tensor[] max_exp_avg_sqs, Tensor[] importances, Tensor[] anchors, Tensor[] steps) "
      "-> Tensor");
  m.def(
      "ewc_adamw_planned_(Tensor(a!)[] params, Tensor[] grads, Tensor plan, *, float lr, "
      "float beta1, float beta2, float eps, float weight_decay, float ewc_lambda, str penalty, "
      "bool amsgrad, bool maximize) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(cl_optim, CPU, m) {
  m.impl("ewc_adamw_", TORCH_BOX(&ewc_adamw_));
  m.impl("ewc_adamw_plan", TORCH_BOX(&ewc_adamw_plan));
  m.impl("ewc_adamw_planned_", TORCH_BOX(&ewc_adamw_planned_));
}

}  // namespace cl_optim
