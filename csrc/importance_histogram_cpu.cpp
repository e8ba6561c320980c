// One pass over importance of any size, in pieces that stay in the first cache.
#include <algorithm>

#include "importance_histogram_operator.h"
#include "simd.h"

namespace cl_optim {
namespace {

constexpr int64_t kPiece = 16384;

// Sums in a fixed order, so that every processor finds the same.
CL_OPTIM_SIMD_CLONES void add_totals(const float* values, int64_t count, double* totals) {
  constexpr int64_t kLanes = 32;  // with 16, gcc 12 keeps them in memory
  float largest[kLanes] = {};
  double sums[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = values[i + lane];
      largest[lane] = value > largest[lane] ? value : largest[lane];
      sums[lane] += value;
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    largest[0] = std::max(largest[0], values[i]);
    sums[0] += values[i];
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    totals[0] = std::max(totals[0], static_cast<double>(largest[lane]));
    totals[1] += sums[lane];
  }
}

}  // namespace

void importance_histogram_cpu(const float* values, int64_t count, int64_t* counts, double* totals) {
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t size = std::min(kPiece, count - begin);
    add_totals(values + begin, size, totals);
    for (int64_t i = begin; i < begin + size; ++i) ++counts[histogram_bin(values[i])];
  }
}

}  // namespace cl_optim
