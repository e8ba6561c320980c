// The operators' schemas and their CPU implementations, on LibTorch's stable ABI.
#include "ewc_adamw_launch.h"
#include "ewc_adamw_operator.h"
#include "gram_operator.h"
#include "importance_codec_operator.h"
#include "importance_histogram_operator.h"
#include "nnqp_operator.h"

namespace cl_optim {
namespace {

void launch(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
            const DeviceNumbers& numbers, const Tensor&) {
  ewc_adamw_cpu(tensors, options, numbers);
}

void launch_nnqp(const NNQPBatch& batch, const NNQPOptions& options, const Tensor&) {
  nnqp_cpu(batch, options);
}

}  // namespace

STABLE_TORCH_LIBRARY(cl_optim, m) {
  m.def(
      "ewc_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor[] importances, "
      "Tensor[] anchors, Tensor(e!)[] compensations, Tensor(f!)[] steps, Tensor[] memories, "
      "Tensor[] coefficients, Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf, "
      "Tensor(g!)? sums, *, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "float ewc_lambda, float damping, str penalty, bool amsgrad, bool maximize, "
      "bool stochastic) -> ()");
  m.def("log8_encode_(Tensor(a!) packed, Tensor values) -> ()");
  m.def("log8_decode_(Tensor(a!) values, Tensor packed) -> ()");
  m.def("importance_histogram_(Tensor(a!) counts, Tensor(b!) totals, Tensor values) -> ()");
  m.def("gram_per_tensor(Tensor[] memory, Tensor[] grads) -> Tensor");
  m.def("gram_dots_per_tensor(Tensor[] memory, Tensor[] grads) -> Tensor");
  m.def(
      "gram_combine_(Tensor(a!)[] grads, Tensor[] memory, Tensor coefficients, int[] blocks) "
      "-> ()");
  m.def(
      "nnqp(Tensor gram, Tensor linear, Tensor(a!)? state, *, float lower, float tolerance, "
      "float threshold, bool only_violated, int max_pivots) -> (Tensor v, Tensor status, "
      "Tensor gap)");
}

STABLE_TORCH_LIBRARY_IMPL(cl_optim, CPU, m) {
  m.impl("ewc_adamw_", TORCH_BOX(&ewc_adamw_<launch>));
  implement_gram(m);
  implement_log8(m);
  m.impl("importance_histogram_", TORCH_BOX(&importance_histogram_));
  m.impl("nnqp", TORCH_BOX(&nnqp<launch_nnqp>));
}

}  // namespace cl_optim
