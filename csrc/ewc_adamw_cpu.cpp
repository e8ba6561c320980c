// The fused step on the CPU: one parallel region over the elements of all tensors.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "ewc_adamw_launch.h"
#include "multi_tensor.h"
#include "simd.h"

namespace cl_optim {
namespace {

// Fewer elements than these are not worth a second thread.
constexpr int64_t kElementsPerThread = 32768;

template <typename Param, typename Anchor, Penalty penalty, bool amsgrad>
CL_OPTIM_SIMD_CLONES void update(const EWCAdamWTensor& tensor, int64_t begin, int64_t end,
                                 const EWCAdamWOptions& options, const DeviceNumbers& numbers) {
  using T = arithmetic_t<Param>;
  const EWCAdamWConstants<T> constants(options, numbers, *tensor.step);
  Param* param = static_cast<Param*>(tensor.param);
  const Param* grad = static_cast<const Param*>(tensor.grad);
  T* exp_avg = static_cast<T*>(tensor.exp_avg);
  T* exp_avg_sq = static_cast<T*>(tensor.exp_avg_sq);
  T* max_exp_avg_sq = static_cast<T*>(tensor.max_exp_avg_sq);
  const T* importance = static_cast<const T*>(tensor.importance);
  const Anchor* anchor = static_cast<const Anchor*>(tensor.anchor);
  CL_OPTIM_INDEPENDENT_ITERATIONS
  for (int64_t i = begin; i < end; ++i) {
    EWCAdamWElement<T> x{load(param[i]), exp_avg[i], exp_avg_sq[i], T{0}};
    if constexpr (amsgrad) x.max_exp_avg_sq = max_exp_avg_sq[i];
    T element_importance{0}, element_anchor{0};
    if constexpr (penalty != Penalty::none) {
      element_importance = importance[i];
      element_anchor = load(anchor[i]);
    }
    x = ewc_adamw_element<penalty, amsgrad, T>(x, load(grad[i]), element_importance, element_anchor,
                                               constants);
    store(param[i], x.param);
    exp_avg[i] = x.exp_avg;
    exp_avg_sq[i] = x.exp_avg_sq;
    if constexpr (amsgrad) max_exp_avg_sq[i] = x.max_exp_avg_sq;
  }
}

using Update = void (*)(const EWCAdamWTensor&, int64_t, int64_t, const EWCAdamWOptions&,
                        const DeviceNumbers&);

constexpr int64_t kProjected = 1024;  // elements at a time: they stay in the first-level cache

// Updates with the projected gradient, a few elements at a time: it is written nowhere else.
template <typename Param>
void update_projected(Update update, const EWCAdamWTensor& tensor, int64_t begin, int64_t end,
                      const EWCAdamWOptions& options, const DeviceNumbers& numbers) {
  using T = arithmetic_t<Param>;
  const Param* grad = static_cast<const Param*>(tensor.grad);
  double sum[kProjected];
  Param projected[kProjected];
  EWCAdamWTensor here = tensor;
  for (; begin < end; begin += kProjected) {
    const int64_t count = std::min(kProjected, end - begin);
    for (int64_t i = 0; i < count; ++i) sum[i] = load(grad[begin + i]);
    add_memory_rows_cpu(tensor.memory, begin, count, sum);
    for (int64_t i = 0; i < count; ++i) store(projected[i], static_cast<T>(sum[i]));
    // The update finds element `begin` of the gradient where the others are.
    here.grad = projected - begin;
    update(here, begin, begin + count, options, numbers);
  }
}

void update_piece(Update update, const EWCAdamWTensor& tensor, const Piece& piece,
                  const EWCAdamWOptions& options, const DeviceNumbers& numbers) {
  if (!is_projected(tensor.memory)) {
    return update(tensor, piece.begin, piece.end, options, numbers);
  }
  switch (tensor.param_kind) {
    case ScalarKind::float64:
      return update_projected<double>(update, tensor, piece.begin, piece.end, options, numbers);
    case ScalarKind::bfloat16:
      return update_projected<BFloat16>(update, tensor, piece.begin, piece.end, options, numbers);
    case ScalarKind::float16:
      return update_projected<Half>(update, tensor, piece.begin, piece.end, options, numbers);
    default:
      return update_projected<float>(update, tensor, piece.begin, piece.end, options, numbers);
  }
}

}  // namespace

void ewc_adamw_cpu(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
                   const DeviceNumbers& numbers) {
  if (numbers.overflowed()) return;
  std::vector<int64_t> numels;
  std::vector<Update> updates;
  numels.reserve(tensors.size());
  updates.reserve(tensors.size());
  for (const EWCAdamWTensor& tensor : tensors) {
    *tensor.step += 1.0f;
    numels.push_back(tensor.numel);
    updates.push_back(dispatch(tensor, options, [](auto instance) -> Update {
      using I = decltype(instance);
      return update<typename I::Param, typename I::Anchor, I::penalty, I::amsgrad>;
    }));
  }
  const MultiTensor work(numels);
  const int64_t grain = kElementsPerThread / kUnit;
  torch::stable::parallel_for(0, work.units(), grain, [&](int64_t begin, int64_t end) {
    work.for_each(begin, end, [&](const Piece& piece) {
      update_piece(updates[piece.tensor], tensors[piece.tensor], piece, options, numbers);
    });
  });
}

}  // namespace cl_optim
