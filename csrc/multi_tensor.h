// Lays a list of tensors end to end and cuts the whole into equal ranges of work, so that one
// parallel region (CPU) or one launch (GPU) serves tensors of any sizes. The measure is a unit of
// 256 elements: a tensor begins with a unit of its own, so that every range begins at a multiple of
// 256 elements of some tensor, where vector accesses are aligned and blocks of codes begin.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "float_types.h"

namespace cl_optim {

constexpr int64_t kUnit = 256;

// The elements begin <= i < end of one tensor.
struct Piece {
  int tensor;
  int64_t begin;
  int64_t end;
};

// The tensor that holds a unit. first_unit[i] is the first unit of tensor i, first_unit[count] the
// number of all units.
CL_OPTIM_HD int tensor_of(const int64_t* first_unit, int count, int64_t unit) {
  // Bisect for the last tensor that begins at or before the unit: it is not empty.
  int tensor = 0;
  for (int above = count; above - tensor > 1;) {
    const int middle = tensor + (above - tensor) / 2;
    if (first_unit[middle] <= unit) {
      tensor = middle;
    } else {
      above = middle;
    }
  }
  return tensor;
}

inline int64_t units_of(int64_t numel) { return (numel + kUnit - 1) / kUnit; }

class MultiTensor {
 public:
  explicit MultiTensor(const std::vector<int64_t>& numels)
      : numels_(numels), first_unit_(numels.size() + 1, 0) {
    for (size_t i = 0; i < numels.size(); ++i) {
      first_unit_[i + 1] = first_unit_[i] + units_of(numels[i]);
    }
  }

  int64_t units() const { return first_unit_.back(); }

  // The unit in which a piece begins.
  int64_t unit(const Piece& piece) const { return first_unit_[piece.tensor] + piece.begin / kUnit; }

  // Calls f(Piece) for what the units begin <= unit < end hold, in order.
  template <typename F>
  void for_each(int64_t begin, int64_t end, F&& f) const {
    if (begin >= end) return;
    const int count = static_cast<int>(numels_.size());
    for (int tensor = tensor_of(first_unit_.data(), count, begin); begin < end; ++tensor) {
      const int64_t first = first_unit_[tensor];
      const int64_t last = std::min(end, first_unit_[tensor + 1]);
      if (begin == last) continue;  // an empty tensor
      f(Piece{tensor, (begin - first) * kUnit, std::min((last - first) * kUnit, numels_[tensor])});
      begin = last;
    }
  }

 private:
  std::vector<int64_t> numels_;
  std::vector<int64_t> first_unit_;
};

}  // namespace cl_optim
