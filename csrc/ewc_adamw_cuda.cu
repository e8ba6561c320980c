// The fused step on the GPU: one launch for hundreds of tensors, whose addresses travel as kernel
// arguments. Includes no torch header.
//
// A warp takes a unit of 256 elements (warp_unit.h). How each array is stored is the same for the
// whole unit, so it is looked up at run time: all loads are issued as raw words before the first of
// them is decoded. Tensors with everything in float32 have kernels of their own, with nothing to
// look up.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_check.h"
#include "ewc_adamw_launch.h"
#include "multi_tensor.h"
#include "warp_unit.h"

namespace cl_optim {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// A block's work: enough to hide its start, little enough that the last blocks end together.
constexpr int64_t kLeastUnitsPerBlock = kWarps, kMostUnitsPerBlock = 32;
constexpr int64_t kBlocksWanted = 1024;
// The block that adds what the others have summed waits for memory most of the time.
constexpr int kAddingThreads = 1024;

// How the tensors of a kernel are stored: each in its way, or with everything in float32 at
// addresses for vectors, without maxima (amsgrad) or compensation.
enum class Storage { any, float32 };

// With all their arguments below the 32 764 bytes that a kernel may take (CUDA 12.1, sm_70).
constexpr int kTensorsPerLaunch = 360;
constexpr int kProjectedPerLaunch = 256;

template <int tensors>
struct Work {
  void* param[tensors];
  const void* grad[tensors];
  void* exp_avg[tensors];
  void* exp_avg_sq[tensors];
  void* max_exp_avg_sq[tensors];
  const void* importance[tensors];
  const void* anchor[tensors];
  BFloat16* compensation[tensors];
  int64_t numel[tensors];
  int64_t first_unit[tensors + 1];
  uint8_t param_kind[tensors];
  uint8_t moment_kind[tensors];
  uint8_t importance_kind[tensors];
  uint8_t anchor_kind[tensors];
  int64_t units_per_block;
  int count;
  bool amsgrad;
  bool stochastic;
};

// The memory rows of the tensors of a launch, if it has some; then it takes fewer tensors.
template <bool projected>
struct Projection {
  static constexpr int kTensors = kTensorsPerLaunch;
};
template <>
struct Projection<true> {
  static constexpr int kTensors = kProjectedPerLaunch;
  const void* rows[kTensors];
  const double* coefficients[kTensors];
  int64_t stride[kTensors];
  int count[kTensors];
  uint8_t kind[kTensors];
};
static_assert(sizeof(Work<kTensorsPerLaunch>) <= 32764 - 128, "the arguments of a kernel");
static_assert(sizeof(Work<kProjectedPerLaunch>) + sizeof(Projection<true>) <= 32764 - 128,
              "the arguments of a kernel");

struct Steps {
  float* step[kTensorsPerLaunch];
  int count;
};

template <typename T>
struct TensorConstants {
  EWCAdamWConstants<T> update;
  float step;
};

// Advances the step counts and leaves each tensor's constants for the update that follows: the two
// powers are computed once per tensor, in double, and not by every block.
template <typename T>
__global__ void advance(const __grid_constant__ Steps steps,
                        const __grid_constant__ EWCAdamWOptions options,
                        const __grid_constant__ DeviceNumbers numbers,
                        TensorConstants<T>* constants) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= steps.count || numbers.overflowed()) return;
  const bool counted = steps.step[i] != nullptr;
  const float step = counted ? *steps.step[i] + 1.0f : 1.0f;
  if (counted) *steps.step[i] = step;
  const BiasCorrections bias(options, step);
  constants[i] = {EWCAdamWConstants<T>(options, numbers, bias), step};
}

__device__ void store_param(void* array, BFloat16* compensation, ScalarKind kind, const Place& at,
                            const float (&values)[8], const float (&importance)[8],
                            const Raw& old_param, const Raw& old_compensation, const Random& random,
                            bool stochastic) {
  uint32_t words[8];
  if (kind == ScalarKind::float32) {
#pragma unroll
    for (int j = 0; j < 8; ++j) words[j] = float_bits(values[j]);
    return store_words(static_cast<uint32_t*>(array), at, words);
  }
  if (kind == ScalarKind::float16) {
    Half rounded[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) store(rounded[j], values[j]);
    pack(rounded, words);
    return store_words(static_cast<uint16_t*>(array), at, words);
  }
  BFloat16 rounded[8];
  if (compensation != nullptr) {
    BFloat16 low[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      store(rounded[j], values[j]);
      store_stochastic(low[j], values[j] - load(rounded[j]), random.dither[j](kParam));
      if (is_frozen(importance[j])) {
        rounded[j].bits = old_param.half_word(j);
        low[j].bits = old_compensation.half_word(j);
      }
    }
    pack(low, words);
    store_words(reinterpret_cast<uint16_t*>(compensation), at, words);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (stochastic) {
        store_stochastic(rounded[j], values[j], random.dither[j](kParam));
      } else {
        store(rounded[j], values[j]);
      }
    }
  }
  pack(rounded, words);
  store_words(static_cast<uint16_t*>(array), at, words);
}

// --- what both arithmetics share -----------------------------------------------------------------

// A row's elements of the unit, and what they are multiplied by. Only beside gradients of float64
// there are rows of float64.
template <typename T>
struct Row {
  double coefficient;
  ScalarKind kind;
  Raw raw;
  double values[8];

  // A row that takes no part may hold anything, and is not read. All threads alike.
  __device__ void load(const Projection<true>& projection, int tensor, int k, const Place& at) {
    coefficient = k < projection.count[tensor] ? projection.coefficients[tensor][k] : 0.0;
    if (coefficient == 0.0) return;
    kind = static_cast<ScalarKind>(projection.kind[tensor]);
    const int64_t first = k * projection.stride[tensor];
    const auto* rows = static_cast<const std::byte*>(projection.rows[tensor]);
    if (is_double()) {
      load_doubles(rows + 8 * first, at, values);
    } else {
      raw.load(rows + (kind == ScalarKind::float32 ? 4 : 2) * first, kind, at);
    }
  }

  __device__ void add_to(double (&sum)[8]) const {
    if (coefficient == 0.0) return;
    if (is_double()) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] += coefficient * values[j];
    } else {
      float decoded[8];
      raw.decode(kind, decoded);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] += coefficient * decoded[j];
    }
  }

 private:
  __device__ bool is_double() const {
    return std::is_same_v<T, double> && kind == ScalarKind::float64;
  }
};

// The projected gradient, in the gradient's place, rounded as one that is stored. Summed in
// float64, as on the CPU.
template <typename T>
__device__ void project(const Projection<true>& projection, int tensor, ScalarKind param_kind,
                        const Place& at, T (&grad)[8]) {
  double sum[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) sum[j] = grad[j];
  for (int k = 0; k < projection.count[tensor]; k += 2) {
    Row<T> even, odd;  // both on their way before the first is added
    even.load(projection, tensor, k, at);
    odd.load(projection, tensor, k + 1, at);
    even.add_to(sum);
    odd.add_to(sum);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const T value = static_cast<T>(sum[j]);
    if (param_kind == ScalarKind::bfloat16) {
      BFloat16 rounded;
      store(rounded, static_cast<float>(value));
      grad[j] = load(rounded);
    } else if (param_kind == ScalarKind::float16) {
      Half rounded;
      store(rounded, static_cast<float>(value));
      grad[j] = load(rounded);
    } else {
      grad[j] = value;
    }
  }
}

// Adds a lane's elements.
template <typename T>
__device__ void add_penalty(const T (&param)[8], const T (&importance)[8], const T (&anchor)[8],
                            const Place& at, PenaltySums& sums) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (!at.has(j)) continue;
    const double d = static_cast<double>(param[j]) - static_cast<double>(anchor[j]);
    sums.penalty += is_frozen(importance[j]) ? 0.0 : importance[j] * d * d;
    sums.drift += d * d;
  }
}

// The sum over a block's threads, in an order that is always the same; the first thread has it.
template <int threads>
__device__ PenaltySums sum_of_block(PenaltySums sums) {
  __shared__ PenaltySums shared[threads / 32];
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    sums.penalty += __shfl_xor_sync(kAllLanes, sums.penalty, other);
    sums.drift += __shfl_xor_sync(kAllLanes, sums.drift, other);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < threads / 32; ++warp) {
      sums.penalty += shared[warp].penalty;
      sums.drift += shared[warp].drift;
    }
  }
  return sums;
}

template <Penalty penalty, typename T>
__device__ void update(T (&param)[8], const T (&grad)[8], T (&exp_avg)[8], T (&exp_avg_sq)[8],
                       T (&max_exp_avg_sq)[8], const T (&importance)[8], const T (&anchor)[8],
                       bool amsgrad, const EWCAdamWConstants<T>& k) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    EWCAdamWElement<T> x{param[j], exp_avg[j], exp_avg_sq[j], max_exp_avg_sq[j]};
    x = amsgrad ? ewc_adamw_element<penalty, true, T>(x, grad[j], importance[j], anchor[j], k)
                : ewc_adamw_element<penalty, false, T>(x, grad[j], importance[j], anchor[j], k);
    param[j] = x.param;
    exp_avg[j] = x.exp_avg;
    exp_avg_sq[j] = x.exp_avg_sq;
    max_exp_avg_sq[j] = x.max_exp_avg_sq;
  }
}

// --- one unit ------------------------------------------------------------------------------------

// What the arrays of a tensor are made of.
struct Kinds {
  ScalarKind param, moment, importance, anchor;
};

template <Storage storage, typename W>
__device__ Kinds kinds_of(const W& work, int tensor) {
  if constexpr (storage == Storage::float32) {
    constexpr auto kind = ScalarKind::float32;
    return {kind, kind, kind, kind};
  }
  return {static_cast<ScalarKind>(work.param_kind[tensor]),
          static_cast<ScalarKind>(work.moment_kind[tensor]),
          static_cast<ScalarKind>(work.importance_kind[tensor]),
          static_cast<ScalarKind>(work.anchor_kind[tensor])};
}

template <Storage storage, Penalty penalty, bool projected, typename W>
__device__ void update_unit(const W& work, const Projection<projected>& projection, int tensor,
                            const Place& at, const TensorConstants<float>& constants, bool tracked,
                            PenaltySums& sums) {
  const Kinds kind = kinds_of<storage>(work, tensor);
  BFloat16* compensation = storage == Storage::float32 ? nullptr : work.compensation[tensor];
  const bool amsgrad = storage == Storage::float32 ? false : work.amsgrad;
  // All loads first, so that they are in flight together.
  Raw raw_param, raw_grad, raw_avg, raw_avg_sq, raw_max{}, raw_importance{}, raw_anchor{},
      raw_low{};
  raw_param.load(work.param[tensor], kind.param, at);
  raw_grad.load(work.grad[tensor], kind.param, at);
  raw_avg.load(work.exp_avg[tensor], kind.moment, at);
  raw_avg_sq.load(work.exp_avg_sq[tensor], kind.moment, at);
  if (amsgrad) raw_max.load(work.max_exp_avg_sq[tensor], kind.moment, at);
  if constexpr (penalty != Penalty::none) {
    raw_importance.load(work.importance[tensor], kind.importance, at);
    raw_anchor.load(work.anchor[tensor], kind.anchor, at);
  }
  if (compensation != nullptr) raw_low.load(compensation, ScalarKind::bfloat16, at);

  float param[8], grad[8], exp_avg[8], exp_avg_sq[8], max_exp_avg_sq[8], importance[8]{},
      anchor[8]{};
  raw_param.decode(kind.param, param);
  raw_grad.decode(kind.param, grad);
  raw_avg.decode<Codes::signed_moment>(kind.moment, exp_avg);
  raw_avg_sq.decode<Codes::moment>(kind.moment, exp_avg_sq);
  raw_max.decode<Codes::moment>(kind.moment, max_exp_avg_sq);
  if constexpr (penalty != Penalty::none) {
    raw_importance.decode(kind.importance, importance);
    raw_anchor.decode(kind.anchor, anchor);
  }
  if (compensation != nullptr) {
#pragma unroll
    for (int j = 0; j < 8; ++j) param[j] += load(BFloat16{raw_low.half_word(j)});
  }
  if constexpr (projected) project(projection, tensor, kind.param, at, grad);
  if (tracked) add_penalty(param, importance, anchor, at, sums);

  update<penalty>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, importance, anchor, amsgrad,
                  constants.update);

  const Random random = Random::of(at, constants.step, grad);
  store_moment<kExpAvg>(work.exp_avg[tensor], kind.moment, at, exp_avg, random);
  store_moment<kExpAvgSq>(work.exp_avg_sq[tensor], kind.moment, at, exp_avg_sq, random);
  if (amsgrad) {
    store_moment<kMaxExpAvgSq>(work.max_exp_avg_sq[tensor], kind.moment, at, max_exp_avg_sq,
                               random);
  }
  store_param(work.param[tensor], compensation, kind.param, at, param, importance, raw_param,
              raw_low, random, work.stochastic);
}

// float64 keeps everything in float64.
template <Storage, Penalty penalty, bool projected, typename W>
__device__ void update_unit(const W& work, const Projection<projected>& projection, int tensor,
                            const Place& at, const TensorConstants<double>& constants, bool tracked,
                            PenaltySums& sums) {
  double param[8], grad[8], exp_avg[8], exp_avg_sq[8], max_exp_avg_sq[8]{}, importance[8]{},
      anchor[8]{};
  load_doubles(work.param[tensor], at, param);
  load_doubles(work.grad[tensor], at, grad);
  load_doubles(work.exp_avg[tensor], at, exp_avg);
  load_doubles(work.exp_avg_sq[tensor], at, exp_avg_sq);
  if (work.amsgrad) load_doubles(work.max_exp_avg_sq[tensor], at, max_exp_avg_sq);
  if constexpr (penalty != Penalty::none) {
    load_doubles(work.importance[tensor], at, importance);
    load_doubles(work.anchor[tensor], at, anchor);
  }
  if constexpr (projected) project(projection, tensor, ScalarKind::float64, at, grad);
  if (tracked) add_penalty(param, importance, anchor, at, sums);
  update<penalty>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, importance, anchor,
                  work.amsgrad, constants.update);
  store_doubles(work.param[tensor], at, param);
  store_doubles(work.exp_avg[tensor], at, exp_avg);
  store_doubles(work.exp_avg_sq[tensor], at, exp_avg_sq);
  if (work.amsgrad) store_doubles(work.max_exp_avg_sq[tensor], at, max_exp_avg_sq);
}

// The pull alone.
template <Storage storage, Penalty penalty, typename W>
__device__ void pull_unit(const W& work, int tensor, const Place& at,
                          const TensorConstants<float>& constants) {
  constexpr bool has_beside = penalty != Penalty::proximal;
  const Kinds kind = kinds_of<storage>(work, tensor);
  Raw raw_target, raw_beside{}, raw_importance, raw_anchor;
  raw_target.load(work.param[tensor], kind.param, at);
  if constexpr (has_beside) raw_beside.load(work.grad[tensor], kind.param, at);
  raw_importance.load(work.importance[tensor], kind.importance, at);
  raw_anchor.load(work.anchor[tensor], kind.anchor, at);

  float target[8], beside[8]{}, importance[8], anchor[8];
  raw_target.decode(kind.param, target);
  if constexpr (has_beside) raw_beside.decode(kind.param, beside);
  raw_importance.decode(kind.importance, importance);
  raw_anchor.decode(kind.anchor, anchor);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    target[j] = ewc_pull_element<penalty, float>(target[j], beside[j], importance[j], anchor[j],
                                                 constants.update);
  }
  const Random random = Random::of(at, constants.step, anchor);
  store_param(work.param[tensor], nullptr, kind.param, at, target, importance, raw_target, Raw{},
              random, work.stochastic);
}

template <Storage, Penalty penalty, typename W>
__device__ void pull_unit(const W& work, int tensor, const Place& at,
                          const TensorConstants<double>& constants) {
  double target[8], beside[8]{}, importance[8], anchor[8];
  load_doubles(work.param[tensor], at, target);
  if constexpr (penalty != Penalty::proximal) load_doubles(work.grad[tensor], at, beside);
  load_doubles(work.importance[tensor], at, importance);
  load_doubles(work.anchor[tensor], at, anchor);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    target[j] = ewc_pull_element<penalty, double>(target[j], beside[j], importance[j], anchor[j],
                                                  constants.update);
  }
  store_doubles(work.param[tensor], at, target);
}

// --- the kernels ---------------------------------------------------------------------------------

template <bool projected>
using WorkOf = Work<Projection<projected>::kTensors>;

// On a multiprocessor: enough that some load while others compute, where their registers fit.
template <typename T, Storage storage, bool projected>
constexpr int kBlocksAtOnce =
    std::is_same_v<T, float> && (storage == Storage::float32 || !projected) ? 2 : 1;

// A block has a range of units, which its warps take in turn. It leaves its part of the penalty in
// `sums`, unless that is null.
template <typename T, Storage storage, Penalty penalty, bool projected, bool pull_only>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, storage, projected>)
    ewc_adamw(const __grid_constant__ WorkOf<projected> work,
              const __grid_constant__ Projection<projected> projection,
              const __grid_constant__ DeviceNumbers numbers, const TensorConstants<T>* constants,
              PenaltySums* sums) {
  if (numbers.overflowed()) return;
  const int64_t begin = blockIdx.x * work.units_per_block;
  const int64_t units = work.first_unit[work.count];
  const int64_t end = begin + work.units_per_block < units ? begin + work.units_per_block : units;
  Place at{};
  at.lane = threadIdx.x % 32;
  at.aligned = storage == Storage::float32;
  const bool tracked = penalty != Penalty::none && sums != nullptr;
  PenaltySums of_lane{0.0, 0.0};
  int64_t unit = begin + threadIdx.x / 32;
  if (unit < end) {
    int tensor = tensor_of(work.first_unit, work.count, unit);
    TensorConstants<T> k = constants[tensor];
    for (; unit < end; unit += kWarps) {
      if (unit >= work.first_unit[tensor + 1]) {
        while (unit >= work.first_unit[tensor + 1]) ++tensor;
        k = constants[tensor];
      }
      at.first = (unit - work.first_unit[tensor]) * kUnit;
      const int64_t left = work.numel[tensor] - at.first;
      at.count = static_cast<int>(left < kUnit ? left : kUnit);
      if constexpr (pull_only) {
        pull_unit<storage, penalty>(work, tensor, at, k);
      } else {
        update_unit<storage, penalty, projected>(work, projection, tensor, at, k, tracked, of_lane);
      }
    }
  }
  if (tracked) {
    const PenaltySums of_block = sum_of_block<kThreads>(of_lane);
    if (threadIdx.x == 0) sums[blockIdx.x] = of_block;
  }
}

// Adds the blocks' sums.
__global__ void __launch_bounds__(kAddingThreads)
    add_sums(const PenaltySums* blocks, int64_t count, double ewc_lambda,
             const __grid_constant__ DeviceNumbers numbers) {
  if (numbers.overflowed()) return;
  PenaltySums sums{0.0, 0.0};
  for (int64_t i = threadIdx.x; i < count; i += kAddingThreads) {
    sums.penalty += blocks[i].penalty;
    sums.drift += blocks[i].drift;
  }
  sums = sum_of_block<kAddingThreads>(sums);
  if (threadIdx.x == 0) *numbers.sums = {ewc_lambda * sums.penalty, sums.drift};
}

// --- launching -----------------------------------------------------------------------------------

void check(cudaError_t error) { cl_optim::check(error, "ewc_adamw_"); }

Storage storage_of(const EWCAdamWTensor& t, const EWCAdamWOptions& options) {
  const ScalarKind kinds[] = {t.param_kind, t.moment_kind, t.importance_kind, t.anchor_kind};
  // Null is at an address for vectors, too.
  const void* arrays[] = {t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.importance, t.anchor};
  const bool simple = !options.amsgrad && t.compensation == nullptr &&
                      std::all_of(std::begin(kinds), std::end(kinds),
                                  [](ScalarKind kind) { return kind == ScalarKind::float32; }) &&
                      std::all_of(std::begin(arrays), std::end(arrays), [](const void* array) {
                        return reinterpret_cast<uintptr_t>(array) % sizeof(uint4) == 0;
                      });
  return simple ? Storage::float32 : Storage::any;
}

// What of the step is the same for all its launches.
struct Step {
  const EWCAdamWOptions& options;
  const DeviceNumbers& numbers;
  cudaStream_t stream;
  std::byte* constants;  // free memory for them
  PenaltySums* sums;     // free memory for the blocks' sums, or null
};

using Tensors = std::vector<const EWCAdamWTensor*>;
using Launch = void (*)(const Tensors& tensors, Step& step);

template <bool projected>
void fill(const EWCAdamWTensor& t, int i, WorkOf<projected>& work,
          Projection<projected>& projection) {
  work.param[i] = t.param;
  work.grad[i] = t.grad;
  work.exp_avg[i] = t.exp_avg;
  work.exp_avg_sq[i] = t.exp_avg_sq;
  work.max_exp_avg_sq[i] = t.max_exp_avg_sq;
  work.importance[i] = t.importance;
  work.anchor[i] = t.anchor;
  work.compensation[i] = t.compensation;
  work.numel[i] = t.numel;
  work.first_unit[i + 1] = work.first_unit[i] + units_of(t.numel);
  work.param_kind[i] = static_cast<uint8_t>(t.param_kind);
  work.moment_kind[i] = static_cast<uint8_t>(t.moment_kind);
  work.importance_kind[i] = static_cast<uint8_t>(t.importance_kind);
  work.anchor_kind[i] = static_cast<uint8_t>(t.anchor_kind);
  if constexpr (projected) {
    projection.rows[i] = t.memory.rows;
    projection.coefficients[i] = t.memory.coefficients;
    projection.stride[i] = t.memory.stride;
    projection.count[i] = t.memory.count;
    projection.kind[i] = static_cast<uint8_t>(t.memory.kind);
  }
}

template <typename T, Storage storage, Penalty penalty, bool projected, bool pull_only = false>
void launch(const Tensors& tensors, Step& step) {
  constexpr size_t most = Projection<projected>::kTensors;
  for (size_t first = 0; first < tensors.size(); first += most) {
    const size_t last = std::min(tensors.size(), first + most);
    WorkOf<projected> work{};
    Projection<projected> projection{};
    Steps steps{};
    work.count = steps.count = static_cast<int>(last - first);
    work.amsgrad = step.options.amsgrad;
    work.stochastic = step.options.stochastic;
    for (int i = 0; i < work.count; ++i) {
      fill<projected>(*tensors[first + i], i, work, projection);
      steps.step[i] = tensors[first + i]->step;
    }
    auto* constants = reinterpret_cast<TensorConstants<T>*>(step.constants);
    step.constants += work.count * sizeof(TensorConstants<double>);
    advance<T><<<(steps.count + 127) / 128, 128, 0, step.stream>>>(steps, step.options,
                                                                   step.numbers, constants);
    check(cudaGetLastError());
    const int64_t units = work.first_unit[work.count];
    if (units == 0) continue;
    const int64_t wanted = (units + kBlocksWanted - 1) / kBlocksWanted;
    work.units_per_block = std::clamp(wanted, kLeastUnitsPerBlock, kMostUnitsPerBlock);
    const int64_t blocks = (units + work.units_per_block - 1) / work.units_per_block;
    ewc_adamw<T, storage, penalty, projected, pull_only><<<blocks, kThreads, 0, step.stream>>>(
        work, projection, step.numbers, constants, penalty == Penalty::none ? nullptr : step.sums);
    check(cudaGetLastError());
    if (penalty != Penalty::none && step.sums) step.sums += blocks;
  }
}

// At most: of any tensors that a launch takes, the last block may have fewer units.
int64_t protected_blocks(const std::vector<EWCAdamWTensor>& tensors) {
  int64_t blocks = 0;
  for (const EWCAdamWTensor& t : tensors) {
    blocks += t.importance ? units_of(t.numel) / kLeastUnitsPerBlock + 1 : 0;
  }
  return blocks;
}

}  // namespace

size_t ewc_adamw_cuda_workspace(const std::vector<EWCAdamWTensor>& tensors, bool sums) {
  return tensors.size() * sizeof(TensorConstants<double>) +
         (sums ? protected_blocks(tensors) * sizeof(PenaltySums) : 0);
}

void ewc_adamw_cuda(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
                    const DeviceNumbers& numbers, void* workspace, void* stream) {
  // The tensors that one kernel takes, in order.
  std::vector<std::pair<Launch, Tensors>> groups;
  for (const EWCAdamWTensor& t : tensors) {
    const bool projected = t.memory.rows != nullptr && t.memory.count != 0;
    const Launch kernel = dispatch(t, options, [&](auto instance) -> Launch {
      using I = decltype(instance);
      using T = typename I::T;
      if constexpr (I::pull_only) {
        if constexpr (std::is_same_v<T, float>) {
          if (storage_of(t, options) == Storage::float32) {
            return launch<T, Storage::float32, I::penalty, false, true>;
          }
        }
        return launch<T, Storage::any, I::penalty, false, true>;
      }
      if constexpr (std::is_same_v<T, float> && !I::amsgrad) {
        if (storage_of(t, options) == Storage::float32) {
          return projected ? launch<T, Storage::float32, I::penalty, true>
                           : launch<T, Storage::float32, I::penalty, false>;
        }
      }
      return projected ? launch<T, Storage::any, I::penalty, true>
                       : launch<T, Storage::any, I::penalty, false>;
    });
    const auto group = std::find_if(groups.begin(), groups.end(),
                                    [&](const auto& g) { return g.first == kernel; });
    if (group == groups.end()) {
      groups.push_back({kernel, {&t}});
    } else {
      group->second.push_back(&t);
    }
  }
  auto* constants = static_cast<std::byte*>(workspace);
  auto* const sums =
      reinterpret_cast<PenaltySums*>(constants + tensors.size() * sizeof(TensorConstants<double>));
  Step step{options, numbers, static_cast<cudaStream_t>(stream), constants,
            numbers.sums ? sums : nullptr};
  for (const auto& [kernel, members] : groups) kernel(members, step);
  if (numbers.sums) {
    add_sums<<<1, kAddingThreads, 0, step.stream>>>(sums, step.sums - sums, options.ewc_lambda,
                                                    numbers);
    check(cudaGetLastError());
  }
}

}  // namespace cl_optim
