// The operators of the Gram products on the CPU. ops/gram.py says what is wrong with an argument
// and brings rows and gradients into one order; here is only what memory safety needs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <vector>

#include "gram.h"
#include "tensors.h"

namespace cl_optim {

class GramArguments {
 public:
  using Tensor = torch::stable::Tensor;
  using TensorList = std::vector<Tensor>;
  using ScalarType = torch::headeronly::ScalarType;

  GramArguments(const TensorList& memory, const TensorList& grads, bool written) {
    check(memory.size() == grads.size(), "memory must hold ", grads.size(), " tensors, not ",
          memory.size());
    for (size_t i = 0; i < grads.size(); ++i) add(memory[i], grads[i], i, written);
  }

  const std::vector<GramTensor>& tensors() const { return tensors_; }
  int64_t rows() const { return rows_; }

  template <typename... Parts>
  static void check(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream message;
    message << "gram: ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

 private:
  void add(const Tensor& memory, const Tensor& grad, size_t i, bool written) {
    check(memory.is_cpu() && grad.is_cpu(), "tensors ", i, " must be in host memory");
    bool fits = memory.dim() == grad.dim() + 1;
    if (fits && i == 0) rows_ = memory.size(0);
    fits = fits && memory.size(0) == rows_;
    // Dense, and in the same order of dimensions: the strides alone say how far memory reaches.
    int64_t reach = 1;
    for (int64_t d = 0; fits && d < grad.dim(); ++d) {
      const int64_t size = grad.size(d);
      fits = memory.size(d + 1) == size;
      if (size < 2 || grad.numel() == 0) continue;
      fits = fits && memory.stride(d + 1) == grad.stride(d);
      reach += (size - 1) * grad.stride(d);
    }
    fits = fits && (grad.numel() == 0 || reach == grad.numel());
    check(fits, "memory[", i, "] must be [", rows_, ", *shape of grads[", i,
          "]], in dense rows of the gradient's order");
    // To ask for a pointer to write through may copy a tensor that shares its memory.
    void* data = written ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr());
    tensors_.push_back({memory.const_data_ptr(), rows_ > 0 ? memory.stride(0) : 0, data,
                        grad.numel(), kind("memory", memory, i), kind("grads", grad, i)});
  }

  static ScalarKind kind(const char* name, const Tensor& tensor, size_t i) {
    const std::optional<ScalarKind> kind = scalar_kind(tensor.scalar_type());
    check(kind.has_value(), name, "[", i, "] must be float32, float64, bfloat16 or float16");
    return *kind;
  }

  std::vector<GramTensor> tensors_;
  int64_t rows_ = 0;
};

template <bool all>
torch::stable::Tensor gram_products(const GramArguments::TensorList& memory,
                                    const GramArguments::TensorList& grads) {
  const GramArguments arguments(memory, grads, false);
  const auto n = static_cast<int64_t>(grads.size());
  const int64_t m = arguments.rows() + 1;
  const std::vector<int64_t> shape = all ? std::vector{n, m, m} : std::vector{n, m};
  torch::stable::Tensor out = torch::stable::empty(shape, GramArguments::ScalarType::Double);
  gram_cpu(arguments.tensors(), arguments.rows(), all,
           static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

inline void gram_combine_(const GramArguments::TensorList& grads,
                          const GramArguments::TensorList& memory,
                          const torch::stable::Tensor& coefficients,
                          const std::vector<int64_t>& blocks) {
  const GramArguments arguments(memory, grads, true);
  GramArguments::check(
      coefficients.is_cpu() && coefficients.is_contiguous() && coefficients.dim() == 2 &&
          coefficients.scalar_type() == GramArguments::ScalarType::Double &&
          (grads.empty() || coefficients.size(1) == arguments.rows()),
      "coefficients must be contiguous float64 [B, ", arguments.rows(), "] in host memory");
  bool fits = blocks.size() == grads.size();
  for (int64_t block : blocks) fits = fits && 0 <= block && block < coefficients.size(0);
  GramArguments::check(fits, "blocks must name a row of coefficients for each gradient");
  gram_combine_cpu(arguments.tensors(), arguments.rows(),
                   static_cast<const double*>(coefficients.const_data_ptr()), blocks);
}

inline void implement_gram(torch::stable::detail::StableLibrary& m) {
  m.impl("gram_per_tensor", TORCH_BOX(&gram_products<true>));
  m.impl("gram_dots_per_tensor", TORCH_BOX(&gram_products<false>));
  m.impl("gram_combine_", TORCH_BOX(&gram_combine_));
}

}  // namespace cl_optim
