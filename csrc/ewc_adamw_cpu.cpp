// The fused step on the CPU: one parallel region over the elements of all tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

#include "denormals.h"
#include "ewc_adamw_operator.h"
#include "multi_tensor.h"
#include "simd.h"

namespace cl_optim {
namespace {

// Fewer elements than these are not worth a second thread.
constexpr int64_t kElementsPerThread = 32768;
static_assert(kUnit == kBlock, "a unit of work is a block of codes");

// Neighbouring elements of a tensor's arrays, in the type of the arithmetic.
template <typename T>
struct Arrays {
  T* param;
  const T* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;
  const T* importance;
  const T* anchor;
};

template <typename T, Penalty penalty>
CL_OPTIM_SIMD_CLONES void pull(const Arrays<T>& a, int64_t count,
                               const EWCAdamWConstants<T>& constants) {
  const EWCAdamWConstants<T> k = constants;
  T* target = a.param;
  const T* beside = penalty == Penalty::proximal ? a.anchor : a.grad;  // which is not used there
  const T* importance = a.importance;
  const T* anchor = a.anchor;
  CL_OPTIM_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    target[i] = ewc_pull_element<penalty, T>(target[i], beside[i], importance[i], anchor[i], k);
  }
}

template <typename T, Penalty penalty, bool amsgrad>
CL_OPTIM_SIMD_CLONES void adam(const Arrays<T>& a, int64_t count,
                               const EWCAdamWConstants<T>& constants) {
  const EWCAdamWConstants<T> k = constants;
  T* param = a.param;
  const T* grad = a.grad;
  T* exp_avg = a.exp_avg;
  T* exp_avg_sq = a.exp_avg_sq;
  T* max_exp_avg_sq = a.max_exp_avg_sq;
  const T* importance = a.importance;
  const T* anchor = a.anchor;
  CL_OPTIM_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    EWCAdamWElement<T> x{param[i], exp_avg[i], exp_avg_sq[i], T{0}};
    if constexpr (amsgrad) x.max_exp_avg_sq = max_exp_avg_sq[i];
    T element_importance{0}, element_anchor{0};
    if constexpr (penalty != Penalty::none) {
      element_importance = importance[i];
      element_anchor = anchor[i];
    }
    x = ewc_adamw_element<penalty, amsgrad, T>(x, grad[i], element_importance, element_anchor, k);
    param[i] = x.param;
    exp_avg[i] = x.exp_avg;
    exp_avg_sq[i] = x.exp_avg_sq;
    if constexpr (amsgrad) max_exp_avg_sq[i] = x.max_exp_avg_sq;
  }
}

template <typename I, typename T = typename I::T>
void update(const Arrays<T>& a, int64_t count, const EWCAdamWConstants<T>& k) {
  if constexpr (I::pull_only) {
    pull<T, I::penalty>(a, count, k);
  } else {
    adam<T, I::penalty, I::amsgrad>(a, count, k);
  }
}

// --- one unit of arrays of other types -----------------------------------------------------------

template <typename Stored>
CL_OPTIM_SIMD_CLONES void widen(const Stored* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}

template <typename Stored>
CL_OPTIM_SIMD_CLONES void narrow(const float* from, int64_t count, Stored* to) {
  for (int64_t i = 0; i < count; ++i) store(to[i], from[i]);
}

template <Codes codes>
CL_OPTIM_SIMD_CLONES void unpack(const PackedBlock& from, int64_t count, float* to) {
  const float scale = from.scale;
  CL_OPTIM_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) to[i] = decode<codes>(from.codes[i], scale);
}

CL_OPTIM_SIMD_CLONES void widen_sum(const BFloat16* from, const BFloat16* addends, int64_t count,
                                    float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]) + load(addends[i]);
}

// Random bits of a unit's elements for one of the two uses that share words.
struct Random {
  const uint32_t* words;
  DitherUse use;

  CL_OPTIM_HD uint32_t operator()(int64_t i) const { return Dither::half(words[i], use); }
};

CL_OPTIM_SIMD_CLONES void draw(uint32_t* words, DitherUse use, int64_t first, int64_t count,
                               float step, const float* values) {
  uint32_t at = Dither::at(first, step);
  for (int64_t i = 0; i < count; ++i) {
    words[i] = Dither(at, values[i]).word(use);
    at += Dither::kNext;
  }
}

CL_OPTIM_SIMD_CLONES void narrow_stochastic(const float* from, int64_t count, Random random,
                                            BFloat16* to) {
  for (int64_t i = 0; i < count; ++i) store_stochastic(to[i], from[i], random(i));
}

// The parameter and what it lacks of the weight, rounded stochastically: steps far smaller than a
// unit of the parameter's last place would come to the same error each time. A frozen weight keeps
// both.
CL_OPTIM_SIMD_CLONES void split(const float* weight, const float* importance, int64_t count,
                                Random random, BFloat16* param, BFloat16* compensation) {
  for (int64_t i = 0; i < count; ++i) {
    BFloat16 high, low;
    store(high, weight[i]);
    store_stochastic(low, weight[i] - load(high), random(i));
    // All ones where it is frozen: a condition would not vectorize for AVX2.
    const int32_t frozen = static_cast<int32_t>(float_bits(importance[i])) >> 31;
    const int32_t old_high = param[i].bits, old_low = compensation[i].bits;
    param[i].bits = static_cast<uint16_t>((old_high & frozen) | (high.bits & ~frozen));
    compensation[i].bits = static_cast<uint16_t>((old_low & frozen) | (low.bits & ~frozen));
  }
}

CL_OPTIM_SIMD_CLONES void pack_moment(const float* from, int64_t count, Random random,
                                      PackedBlock& to) {
  const float scale = to.scale = moment_scale(largest_magnitude(from, count), kMomentTop);
  CL_OPTIM_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) to.codes[i] = encode_moment(from[i], scale, random(i));
}

CL_OPTIM_SIMD_CLONES void pack_signed_moment(const float* from, int64_t count, Random random,
                                             PackedBlock& to) {
  const float scale = to.scale = moment_scale(largest_magnitude(from, count), kSignedTop);
  CL_OPTIM_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) to.codes[i] = encode_signed_moment(from[i], scale, random(i));
}

// The elements of an array from `first` on: where they are if they have the type of the arithmetic,
// else in the buffer.
template <Codes codes = Codes::importance>
float* read(const void* array, ScalarKind kind, int64_t first, int64_t count, float* buffer) {
  switch (kind) {
    case ScalarKind::bfloat16:
      widen(static_cast<const BFloat16*>(array) + first, count, buffer);
      return buffer;
    case ScalarKind::float16:
      widen(static_cast<const Half*>(array) + first, count, buffer);
      return buffer;
    case ScalarKind::codes:
      unpack<codes>(static_cast<const PackedBlock*>(array)[first / kBlock], count, buffer);
      return buffer;
    default:
      return const_cast<float*>(static_cast<const float*>(array)) + first;
  }
}

// Only anchors, gradients and parameters of float64 have all of this type.
template <Codes = Codes::importance>
double* read(const void* array, ScalarKind, int64_t first, int64_t, double*) {
  return const_cast<double*>(static_cast<const double*>(array)) + first;
}

BFloat16* bfloats(void* array, int64_t first) { return static_cast<BFloat16*>(array) + first; }

void write_moment(void* array, ScalarKind kind, int64_t first, int64_t count, const float* values,
                  Random random) {
  if (kind == ScalarKind::bfloat16) {
    return narrow_stochastic(values, count, random, bfloats(array, first));
  }
  PackedBlock& block = static_cast<PackedBlock*>(array)[first / kBlock];
  random.use == kExpAvg ? pack_signed_moment(values, count, random, block)
                        : pack_moment(values, count, random, block);
}

void write_param(const EWCAdamWTensor& t, int64_t first, int64_t count, const float* weight,
                 const float* importance, Random random, bool stochastic) {
  if (t.param_kind == ScalarKind::float16) {
    narrow(weight, count, static_cast<Half*>(t.param) + first);
  } else if (t.param_kind == ScalarKind::bfloat16) {
    BFloat16* to = bfloats(t.param, first);
    if (t.compensation) {
      split(weight, importance, count, random, to, t.compensation + first);
    } else if (stochastic) {
      narrow_stochastic(weight, count, random, to);
    } else {
      narrow(weight, count, to);
    }
  }
}

// The gradient with its memory rows, rounded as one that is stored.
template <typename Param, typename T>
void project(const EWCAdamWTensor& t, int64_t first, int64_t count, T* grad) {
  double sum[kUnit];
  for (int64_t i = 0; i < count; ++i) sum[i] = grad[i];
  add_memory_rows_cpu(t.memory, first, count, sum);
  for (int64_t i = 0; i < count; ++i) {
    Param rounded;
    store(rounded, static_cast<T>(sum[i]));
    grad[i] = load(rounded);
  }
}

void project(const EWCAdamWTensor& t, int64_t first, int64_t count, double* grad) {
  project<double>(t, first, count, grad);
}

void project(const EWCAdamWTensor& t, int64_t first, int64_t count, float* grad) {
  switch (t.param_kind) {
    case ScalarKind::bfloat16:
      return project<BFloat16>(t, first, count, grad);
    case ScalarKind::float16:
      return project<Half>(t, first, count, grad);
    default:
      return project<float>(t, first, count, grad);
  }
}

// Neighbouring numbers as one value: GCC does not vectorize by itself what widens and sums.
constexpr int kLanes = 4;
template <typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T>
using lanes_t = typename Lanes<T>::type;

// In an order that is the same on all processors.
struct LaneSums {
  lanes_t<double> penalty = {}, drift = {};

  template <typename T>
  CL_OPTIM_HD void add(const T* param, const T* importance, const T* anchor) {
    using Bits = lanes_t<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;
    lanes_t<T> p, a;
    Bits f;
    memcpy(&p, param, sizeof(p));
    memcpy(&a, anchor, sizeof(a));
    memcpy(&f, importance, sizeof(f));
    f &= ~(f >> (8 * sizeof(T) - 1));  // what is frozen does not count
    const lanes_t<double> d =
        __builtin_convertvector(p, lanes_t<double>) - __builtin_convertvector(a, lanes_t<double>);
    drift += d * d;
    penalty += __builtin_convertvector(reinterpret_cast<lanes_t<T>>(f), lanes_t<double>) * (d * d);
  }
};

template <typename T>
CL_OPTIM_SIMD_CLONES PenaltySums sums_of(const Arrays<T>& a, int64_t count) {
  LaneSums sums[2];
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    sums[0].add(a.param + i, a.importance + i, a.anchor + i);
    sums[1].add(a.param + i + kLanes, a.importance + i + kLanes, a.anchor + i + kLanes);
  }
  for (; i < count; i += kLanes) {
    T param[kLanes] = {}, importance[kLanes] = {}, anchor[kLanes] = {};
    for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, count - i); ++lane) {
      param[lane] = a.param[i + lane];
      importance[lane] = a.importance[i + lane];
      anchor[lane] = a.anchor[i + lane];
    }
    sums[0].add(param, importance, anchor);
  }
  PenaltySums sum{0.0, 0.0};
  for (int lane = 0; lane < kLanes; ++lane) {
    sum.penalty += sums[0].penalty[lane] + sums[1].penalty[lane];
    sum.drift += sums[0].drift[lane] + sums[1].drift[lane];
  }
  return sum;
}

// --- one piece of a tensor -----------------------------------------------------------------------

template <typename T>
constexpr ScalarKind kArithmetic =
    std::is_same_v<T, double> ? ScalarKind::float64 : ScalarKind::float32;

// Whether the update can read and write all arrays where they are.
template <typename T>
bool is_plain(const EWCAdamWTensor& t) {
  const ScalarKind wide = kArithmetic<T>;
  const bool protection =
      t.importance == nullptr || (t.importance_kind == wide && t.anchor_kind == wide);
  return t.param_kind == wide && t.moment_kind == wide && protection && !is_projected(t.memory);
}

template <typename I, typename T = typename I::T>
void update_unit(const EWCAdamWTensor& t, int64_t first, int64_t count,
                 const EWCAdamWConstants<T>& k, bool stochastic, PenaltySums* sums) {
  constexpr Penalty penalty = I::penalty;
  alignas(64) T param[kUnit], grad[kUnit], exp_avg[kUnit], exp_avg_sq[kUnit], max_exp_avg_sq[kUnit],
      importance[kUnit], anchor[kUnit];
  Arrays<T> a{};
  if constexpr (std::is_same_v<T, float>) {
    if (t.compensation) {
      widen_sum(bfloats(t.param, first), t.compensation + first, count, param);
      a.param = param;
    }
  }
  if (!a.param) a.param = read(t.param, t.param_kind, first, count, param);
  if (t.grad) a.grad = read(t.grad, t.param_kind, first, count, grad);
  if constexpr (!I::pull_only) {
    a.exp_avg = read<Codes::signed_moment>(t.exp_avg, t.moment_kind, first, count, exp_avg);
    a.exp_avg_sq = read<Codes::moment>(t.exp_avg_sq, t.moment_kind, first, count, exp_avg_sq);
  }
  if constexpr (I::amsgrad) {
    a.max_exp_avg_sq =
        read<Codes::moment>(t.max_exp_avg_sq, t.moment_kind, first, count, max_exp_avg_sq);
  }
  if constexpr (penalty != Penalty::none) {
    a.importance = read(t.importance, t.importance_kind, first, count, importance);
    a.anchor = read(t.anchor, t.anchor_kind, first, count, anchor);
  }
  if (is_projected(t.memory)) {
    if (a.grad != grad) std::copy(a.grad, a.grad + count, grad);
    project(t, first, count, grad);
    a.grad = grad;
  }
  if (penalty != Penalty::none && sums) *sums = sums_of(a, count);

  update<I>(a, count, k);

  if constexpr (std::is_same_v<T, float>) {
    alignas(64) uint32_t words[kUnit];
    const auto draw_for = [&](DitherUse use) {
      draw(words, use, first, count, *t.step, I::pull_only ? a.anchor : a.grad);
    };
    const bool narrow_moments = !I::pull_only && t.moment_kind != ScalarKind::float32;
    const bool rounds = t.compensation || (stochastic && t.param_kind == ScalarKind::bfloat16);
    if (narrow_moments) {
      draw_for(kExpAvg);
      write_moment(t.exp_avg, t.moment_kind, first, count, a.exp_avg, {words, kExpAvg});
      write_moment(t.exp_avg_sq, t.moment_kind, first, count, a.exp_avg_sq, {words, kExpAvgSq});
    }
    const bool narrow_maximum = I::amsgrad && narrow_moments;
    if (rounds || narrow_maximum) draw_for(kParam);
    if (narrow_maximum) {
      const Random random{words, kMaxExpAvgSq};
      write_moment(t.max_exp_avg_sq, t.moment_kind, first, count, a.max_exp_avg_sq, random);
    }
    const float* marks = a.importance;
    if constexpr (penalty == Penalty::none) {
      if (t.compensation) std::fill(importance, importance + count, T{0});
      marks = importance;
    }
    write_param(t, first, count, a.param, marks, {words, kParam}, stochastic);
  }
}

// `sums`, if they are wanted, has one for each unit of the piece.
template <typename I, typename T = typename I::T>
void update_piece(const EWCAdamWTensor& t, const Piece& piece, const EWCAdamWOptions& options,
                  const DeviceNumbers& numbers, const BiasCorrections& bias, PenaltySums* sums) {
  const EWCAdamWConstants<T> k(options, numbers, bias);
  if (is_plain<T>(t) && !sums) {
    const auto at = [&](const void* array) {
      return array ? read(array, kArithmetic<T>, piece.begin, 0, static_cast<T*>(nullptr))
                   : nullptr;
    };
    const Arrays<T> a{at(t.param),          at(t.grad),       at(t.exp_avg), at(t.exp_avg_sq),
                      at(t.max_exp_avg_sq), at(t.importance), at(t.anchor)};
    return update<I>(a, piece.end - piece.begin, k);
  }
  for (int64_t first = piece.begin; first < piece.end; first += kUnit) {
    const int64_t count = std::min(kUnit, piece.end - first);
    PenaltySums* unit_sums = sums ? sums + (first - piece.begin) / kUnit : nullptr;
    update_unit<I>(t, first, count, k, options.stochastic, unit_sums);
  }
}

using UpdatePiece = void (*)(const EWCAdamWTensor&, const Piece&, const EWCAdamWOptions&,
                             const DeviceNumbers&, const BiasCorrections&, PenaltySums*);

// What all pieces of a tensor share.
struct TensorWork {
  UpdatePiece update;
  BiasCorrections bias;
};

}  // namespace

void ewc_adamw_cpu(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
                   const DeviceNumbers& numbers) {
  if (numbers.overflowed()) return;
  std::vector<int64_t> numels;
  std::vector<TensorWork> work;
  numels.reserve(tensors.size());
  work.reserve(tensors.size());
  float last_step = 0.0f;
  for (const EWCAdamWTensor& tensor : tensors) {
    const float step = tensor.step ? * tensor.step += 1.0f : 1.0f;
    numels.push_back(tensor.numel);
    const UpdatePiece update = dispatch(tensor, options, [](auto instance) -> UpdatePiece {
      return update_piece<decltype(instance)>;
    });
    // Two powers would take longer than a small tensor's update.
    const bool again = !work.empty() && step == last_step;
    work.push_back({update, again ? work.back().bias : BiasCorrections(options, step)});
    last_step = step;
  }
  const MultiTensor units(numels);
  std::vector<PenaltySums> sums(numbers.sums ? units.units() : 0);
  const int64_t grain = kElementsPerThread / kUnit;
  torch::stable::parallel_for(0, units.units(), grain, [&](int64_t begin, int64_t end) {
    const DenormalsAsZeros zeros;
    units.for_each(begin, end, [&](const Piece& piece) {
      const TensorWork& w = work[piece.tensor];
      PenaltySums* piece_sums = sums.empty() ? nullptr : &sums[units.unit(piece)];
      w.update(tensors[piece.tensor], piece, options, numbers, w.bias, piece_sums);
    });
  });
  if (!numbers.sums) return;
  PenaltySums total{0.0, 0.0};
  for (const PenaltySums& unit : sums) {
    total.penalty += unit.penalty;
    total.drift += unit.drift;
  }
  *numbers.sums = {options.ewc_lambda * total.penalty, total.drift};
}

namespace {

void launch(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
            const DeviceNumbers& numbers, const Tensor&) {
  ewc_adamw_cpu(tensors, options, numbers);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cl_optim, CPU, m) {
  m.impl("ewc_adamw_", &ewc_adamw_<launch>);
  m.impl("ewc_pull_", &ewc_pull_<launch>);
}

}  // namespace cl_optim
