// The fused step on the GPU: one launch for hundreds of tensors, whose addresses travel as kernel
// arguments. Includes no torch header.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda_check.h"
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
// The memory rows of the tensors of a launch, if it has some; then it takes fewer tensors.
template <bool projected>
struct Projection {
  static constexpr int kTensors = kTensorsPerLaunch;
};
template <>
struct Projection<true> {
  static constexpr int kTensors = 144;
  const void* rows[kTensors];
  const double* coefficients[kTensors];
  int64_t stride[kTensors];
  int count[kTensors];
  ScalarKind kind[kTensors];
};
static_assert(sizeof(Work) + sizeof(Projection<true>) <= 32764 - 64, "the arguments of a kernel");

struct Steps {
  float* step[kTensorsPerLaunch];
  int count;
};

// Advances the step counts and leaves each tensor's constants for the update that follows: the two
// powers are computed once per tensor, in double, and not by every block.
template <typename T>
__global__ void advance(const __grid_constant__ Steps steps,
                        const __grid_constant__ EWCAdamWOptions options,
                        const __grid_constant__ DeviceNumbers numbers,
                        EWCAdamWConstants<T>* constants) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= steps.count || numbers.overflowed()) return;
  const float step = *steps.step[i] + 1.0f;
  *steps.step[i] = step;
  constants[i] = EWCAdamWConstants<T>(options, numbers, step);
}

// Neighbouring elements that a thread loads at once: 16 bytes of the narrowest array.
template <typename T, int n>
struct alignas(sizeof(T) * n) Vector {
  T values[n];
};

template <typename Row, int n>
__device__ void add_rows(const Projection<true>& projection, int tensor, int64_t i,
                         double (&sum)[n]) {
  using Rows = Vector<Row, n>;
  const double* coefficients = projection.coefficients[tensor];
  const Row* row = static_cast<const Row*>(projection.rows[tensor]) + i;
  for (int k = 0; k < projection.count[tensor]; ++k, row += projection.stride[tensor]) {
    const double coefficient = coefficients[k];
    if (coefficient == 0.0) continue;  // all threads alike
    const Rows values = *reinterpret_cast<const Rows*>(row);
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] += coefficient * load(values.values[j]);
  }
}

// The projected gradient, in the gradient's place. Summed in float64, as on the CPU.
template <typename Param, int n>
__device__ void project(const Projection<true>& projection, int tensor, int64_t i,
                        Vector<Param, n>& grad) {
  double sum[n];
#pragma unroll
  for (int j = 0; j < n; ++j) sum[j] = load(grad.values[j]);
  switch (projection.kind[tensor]) {
    case ScalarKind::float64:
      add_rows<double>(projection, tensor, i, sum);
      break;
    case ScalarKind::bfloat16:
      add_rows<BFloat16>(projection, tensor, i, sum);
      break;
    case ScalarKind::float16:
      add_rows<Half>(projection, tensor, i, sum);
      break;
    default:
      add_rows<float>(projection, tensor, i, sum);
  }
#pragma unroll
  for (int j = 0; j < n; ++j) store(grad.values[j], static_cast<arithmetic_t<Param>>(sum[j]));
}

template <typename Instance, int n, bool projected, typename T>
__device__ void update(const Work& work, const Projection<projected>& projection, int tensor,
                       int64_t i, const EWCAdamWConstants<T>& constants) {
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
  Params grad = *reinterpret_cast<const Params*>(static_cast<const Param*>(work.grad[tensor]) + i);
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
  if constexpr (projected) project<Param, n>(projection, tensor, i, grad);
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

template <typename Instance, bool projected, typename T>
__global__ void __launch_bounds__(kThreads)
    ewc_adamw(const __grid_constant__ Work work,
              const __grid_constant__ Projection<projected> projection,
              const __grid_constant__ DeviceNumbers numbers,
              const EWCAdamWConstants<T>* constants) {
  if (numbers.overflowed()) return;
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
          update<Instance, n>(work, projection, piece.tensor, i, k);
        }
        for (int64_t i = vectors_end + threadIdx.x; i < piece.end; i += kThreads) {
          update<Instance, 1>(work, projection, piece.tensor, i, k);
        }
      });
}

void check(cudaError_t error) { cl_optim::check(error, "ewc_adamw_"); }

// Whether all arrays allow the widest vectors: eight floats beside eight 16-bit numbers.
bool is_aligned(const EWCAdamWTensor& t) {
  const void* all[] = {t.param,          t.grad,       t.exp_avg, t.exp_avg_sq,
                       t.max_exp_avg_sq, t.importance, t.anchor};
  const bool rows =
      t.memory.rows == nullptr ||
      (reinterpret_cast<uintptr_t>(t.memory.rows) % 32 == 0 && t.memory.stride % 16 == 0);
  return rows && std::all_of(std::begin(all), std::end(all), [](const void* pointer) {
           return reinterpret_cast<uintptr_t>(pointer) % 32 == 0;
         });
}

// What one launch takes.
struct Share {
  Work work{};
  Projection<true> projection{};
  Steps steps{};
};

using Launch = void (*)(Share& share, const EWCAdamWOptions& options, const DeviceNumbers& numbers,
                        void* workspace, cudaStream_t stream);

template <typename Instance, bool projected>
void launch(Share& share, const EWCAdamWOptions& options, const DeviceNumbers& numbers,
            void* workspace, cudaStream_t stream) {
  auto& [work, projection, steps] = share;
  using T = arithmetic_t<typename Instance::Param>;
  auto* constants = static_cast<EWCAdamWConstants<T>*>(workspace);
  advance<T><<<(steps.count + 127) / 128, 128, 0, stream>>>(steps, options, numbers, constants);
  check(cudaGetLastError());
  const int64_t units = work.first_unit[work.count];
  if (units == 0) return;
  const int64_t wanted = (units + kBlocksWanted - 1) / kBlocksWanted;
  work.units_per_block = std::min(wanted, kMostUnitsPerBlock);
  const int64_t blocks = (units + work.units_per_block - 1) / work.units_per_block;
  if constexpr (projected) {
    ewc_adamw<Instance, true, T>
        <<<blocks, kThreads, 0, stream>>>(work, projection, numbers, constants);
  } else {
    ewc_adamw<Instance, false, T>
        <<<blocks, kThreads, 0, stream>>>(work, Projection<false>{}, numbers, constants);
  }
  check(cudaGetLastError());
}

}  // namespace

size_t ewc_adamw_cuda_workspace(size_t tensors) {
  return tensors * sizeof(EWCAdamWConstants<double>);
}

void ewc_adamw_cuda(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
                    const DeviceNumbers& numbers, void* workspace, void* stream) {
  // The tensors that one kernel takes, in order.
  struct Group {
    Launch launch;
    bool projected, aligned;
    bool operator<(const Group& other) const {
      return std::tie(launch, aligned) < std::tie(other.launch, other.aligned);
    }
  };
  std::map<Group, std::vector<size_t>> groups;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const bool projected = tensors[i].memory.rows != nullptr;
    const Launch kernel = dispatch(tensors[i], options, [&](auto instance) -> Launch {
      using Instance = decltype(instance);
      return projected ? launch<Instance, true> : launch<Instance, false>;
    });
    groups[{kernel, projected, is_aligned(tensors[i])}].push_back(i);
  }
  auto* free = static_cast<std::byte*>(workspace);
  for (const auto& [group, indices] : groups) {
    const size_t most = group.projected ? Projection<true>::kTensors : Projection<false>::kTensors;
    for (size_t first = 0; first < indices.size(); first += most) {
      const size_t last = std::min(indices.size(), first + most);
      Share share;
      auto& [work, projection, steps] = share;
      work.aligned = group.aligned;
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
        if (!group.projected) continue;
        projection.rows[i] = t.memory.rows;
        projection.coefficients[i] = t.memory.coefficients;
        projection.stride[i] = t.memory.stride;
        projection.count[i] = t.memory.count;
        projection.kind[i] = t.memory.kind;
      }
      group.launch(share, options, numbers, free, static_cast<cudaStream_t>(stream));
      free += ewc_adamw_cuda_workspace(last - first);
    }
  }
}

}  // namespace cl_optim
