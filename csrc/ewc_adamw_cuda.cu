// The fused step on the GPU: one launch for hundreds of tensors, whose addresses travel as kernel
// arguments. Includes no torch header.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ewc_adamw_launch.h"
#include "multi_tensor.h"

namespace cl_optim {
namespace {

constexpr int kThreads = 256;
// With their arguments below the 32 764 bytes that a kernel may take (CUDA 12.1, sm_70).
constexpr int kTensorsPerLaunch = 384;
// A block's work: enough to hide its start, little enough that the last blocks end together.
constexpr int64_t kMostUnitsPerBlock = 256;
constexpr int64_t kBlocksWanted = 1024;

struct Work {
  void* param[kTensorsPerLaunch];
  const void* grad[kTensorsPerLaunch];
  void* exp_avg[kTensorsPerLaunch];
  void* exp_avg_sq[kTensorsPerLaunch];
  void* max_exp_avg_sq[kTensorsPerLaunch];
  const void* importance[kTensorsPerLaunch];
  const void* anchor[kTensorsPerLaunch];
  int64_t numel[kTensorsPerLaunch];
  int64_t first_unit[kTensorsPerLaunch + 1];
  int64_t units_per_block;
  int count;
  bool aligned;
};
static_assert(sizeof(Work) <= 32764 - 64, "the arguments of a kernel");

struct Steps {
  float* step[kTensorsPerLaunch];
  int count;
};

// Advances the step counts and leaves each tensor's constants for the update that follows: the two
// powers are computed once per tensor, in double, and not by every block.
template <typename T>
__global__ void advance(const __grid_constant__ Steps steps,
                        const __grid_constant__ EWCAdamWOptions options,
                        EWCAdamWConstants<T>* constants) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= steps.count) return;
  const float step = *steps.step[i] + 1.0f;
  *steps.step[i] = step;
  constants[i] = EWCAdamWConstants<T>(options, step);
}

// Neighbouring elements that a thread loads at once: 16 bytes of the narrowest array.
template <typename T, int n>
struct alignas(sizeof(T) * n) Vector {
  T values[n];
};

template <typename Instance, int n, typename T>
__device__ void update(const Work& work, int tensor, int64_t i,
                       const EWCAdamWConstants<T>& constants) {
  using Param = typename Instance::Param;
  using Anchor = typename Instance::Anchor;
  using Params = Vector<Param, n>;
  using Anchors = Vector<Anchor, n>;
  using Moments = Vector<T, n>;
  // All loads first, so that they are in flight together.
  auto* param_at = reinterpret_cast<Params*>(static_cast<Param*>(work.param[tensor]) + i);
  auto* exp_avg_at = reinterpret_cast<Moments*>(static_cast<T*>(work.exp_avg[tensor]) + i);
  auto* exp_avg_sq_at = reinterpret_cast<Moments*>(static_cast<T*>(work.exp_avg_sq[tensor]) + i);
  Params param = *param_at;
  const Params grad =
      *reinterpret_cast<const Params*>(static_cast<const Param*>(work.grad[tensor]) + i);
  Moments exp_avg = *exp_avg_at;
  Moments exp_avg_sq = *exp_avg_sq_at;
  Moments max_exp_avg_sq{};
  Moments importance{};
  Anchors anchor{};
  if constexpr (Instance::amsgrad) {
    max_exp_avg_sq =
        *reinterpret_cast<const Moments*>(static_cast<T*>(work.max_exp_avg_sq[tensor]) + i);
  }
  if constexpr (Instance::penalty != Penalty::none) {
    importance =
        *reinterpret_cast<const Moments*>(static_cast<const T*>(work.importance[tensor]) + i);
    anchor = *reinterpret_cast<const Anchors*>(static_cast<const Anchor*>(work.anchor[tensor]) + i);
  }
#pragma unroll
  for (int j = 0; j < n; ++j) {
    EWCAdamWElement<T> x{load(param.values[j]), exp_avg.values[j], exp_avg_sq.values[j],
                         max_exp_avg_sq.values[j]};
    x = ewc_adamw_element<Instance::penalty, Instance::amsgrad, T>(
        x, load(grad.values[j]), importance.values[j], load(anchor.values[j]), constants);
    store(param.values[j], x.param);
    exp_avg.values[j] = x.exp_avg;
    exp_avg_sq.values[j] = x.exp_avg_sq;
    max_exp_avg_sq.values[j] = x.max_exp_avg_sq;
  }
  *param_at = param;
  *exp_avg_at = exp_avg;
  *exp_avg_sq_at = exp_avg_sq;
  if constexpr (Instance::amsgrad) {
    *reinterpret_cast<Moments*>(static_cast<T*>(work.max_exp_avg_sq[tensor]) + i) = max_exp_avg_sq;
  }
}

template <typename Instance, typename T>
__global__ void __launch_bounds__(kThreads)
    ewc_adamw(const __grid_constant__ Work work, const EWCAdamWConstants<T>* constants) {
  constexpr int n = 16 / sizeof(typename Instance::Param);
  const int64_t begin = blockIdx.x * work.units_per_block;
  const int64_t units = work.first_unit[work.count];
  const int64_t end = begin + work.units_per_block < units ? begin + work.units_per_block : units;
  for_each_piece(
      work.first_unit, work.count, [&](int i) { return work.numel[i]; }, begin, end,
      [&](const Piece& piece) {
        const EWCAdamWConstants<T> k = constants[piece.tensor];
        const int64_t vectors_end =
            work.aligned ? piece.begin + (piece.end - piece.begin) / n * n : piece.begin;
        for (int64_t i = piece.begin + threadIdx.x * n; i < vectors_end; i += kThreads * n) {
          update<Instance, n>(work, piece.tensor, i, k);
        }
        for (int64_t i = vectors_end + threadIdx.x; i < piece.end; i += kThreads) {
          update<Instance, 1>(work, piece.tensor, i, k);
        }
      });
}

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("ewc_adamw_: ") + cudaGetErrorString(error));
  }
}

// Whether all arrays allow the widest vectors: eight floats beside eight 16-bit numbers.
bool is_aligned(const EWCAdamWTensor& t) {
  const void* all[] = {t.param,          t.grad,       t.exp_avg, t.exp_avg_sq,
                       t.max_exp_avg_sq, t.importance, t.anchor};
  return std::all_of(std::begin(all), std::end(all), [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 32 == 0;
  });
}

using Launch = void (*)(Work& work, const Steps& steps, const EWCAdamWOptions& options,
                        void* workspace, cudaStream_t stream);

template <typename Instance>
void launch(Work& work, const Steps& steps, const EWCAdamWOptions& options, void* workspace,
            cudaStream_t stream) {
  using T = arithmetic_t<typename Instance::Param>;
  auto* constants = static_cast<EWCAdamWConstants<T>*>(workspace);
  advance<T><<<(steps.count + 127) / 128, 128, 0, stream>>>(steps, options, constants);
  check(cudaGetLastError());
  const int64_t units = work.first_unit[work.count];
  if (units == 0) return;
  const int64_t share = (units + kBlocksWanted - 1) / kBlocksWanted;
  work.units_per_block = std::min(share, kMostUnitsPerBlock);
  const int64_t blocks = (units + work.units_per_block - 1) / work.units_per_block;
  ewc_adamw<Instance, T><<<blocks, kThreads, 0, stream>>>(work, constants);
  check(cudaGetLastError());
}

}  // namespace

size_t ewc_adamw_cuda_workspace(size_t tensors) {
  return tensors * sizeof(EWCAdamWConstants<double>);
}

void ewc_adamw_cuda(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
                    void* workspace, void* stream) {
  // The tensors that one kernel takes, in order.
  std::map<std::pair<Launch, bool>, std::vector<size_t>> groups;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Launch kernel = dispatch(
        tensors[i], options, [](auto instance) -> Launch { return launch<decltype(instance)>; });
    groups[{kernel, is_aligned(tensors[i])}].push_back(i);
  }
  auto* free = static_cast<std::byte*>(workspace);
  for (const auto& [key, indices] : groups) {
    for (size_t first = 0; first < indices.size(); first += kTensorsPerLaunch) {
      const size_t last = std::min(indices.size(), first + kTensorsPerLaunch);
      Work work{};
      Steps steps{};
      work.aligned = key.second;
      work.count = steps.count = static_cast<int>(last - first);
      for (int i = 0; i < work.count; ++i) {
        const EWCAdamWTensor& t = tensors[indices[first + i]];
        steps.step[i] = t.step;
        work.param[i] = t.param;
        work.grad[i] = t.grad;
        work.exp_avg[i] = t.exp_avg;
        work.exp_avg_sq[i] = t.exp_avg_sq;
        work.max_exp_avg_sq[i] = t.max_exp_avg_sq;
        work.importance[i] = t.importance;
        work.anchor[i] = t.anchor;
        work.numel[i] = t.numel;
        work.first_unit[i + 1] = work.first_unit[i] + units_of(t.numel);
      }
      key.first(work, steps, options, free, static_cast<cudaStream_t>(stream));
      free += ewc_adamw_cuda_workspace(last - first);
    }
  }
}

}  // namespace cl_optim
