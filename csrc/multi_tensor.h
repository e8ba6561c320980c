// Lays a list of tensors end to end and cuts the whole into equal ranges of work, so that one
// parallel region (CPU) or one launch (GPU) serves tensors of any sizes. The measure is a unit of
// 64 elements: a tensor begins with a unit of its own, so that every range begins at a multiple of
// 64 elements of some tensor, where vector accesses are aligned.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cl_optim {

constexpr int64_t kUnit = 64;

// The elements begin <= i < end of one tensor.
struct Piece {
  int64_t tensor;
  int64_t begin;
  int64_t end;
};

class MultiTensor {
 public:
  explicit MultiTensor(const std::vector<int64_t>& numels)
      : numels_(numels), first_unit_(numels.size() + 1, 0) {
    for (size_t i = 0; i < numels.size(); ++i) {
      first_unit_[i + 1] = first_unit_[i] + (numels[i] + kUnit - 1) / kUnit;
    }
  }

  int64_t units() const { return first_unit_.back(); }

  // Calls f(Piece) for what the units begin <= unit < end hold, in order.
  template <typename F>
  void for_each(int64_t begin, int64_t end, F&& f) const {
    if (begin >= end) return;
    // The last tensor that begins at or before `begin`.
    int64_t tensor =
        std::upper_bound(first_unit_.begin(), first_unit_.end(), begin) - first_unit_.begin() - 1;
    for (; begin < end; ++tensor) {
      const int64_t first = first_unit_[tensor];
      const int64_t last = std::min(end, first_unit_[tensor + 1]);
      if (begin == last) continue;  // an empty tensor
      f(Piece{tensor, (begin - first) * kUnit, std::min((last - first) * kUnit, numels_[tensor])});
      begin = last;
    }
  }

 private:
  std::vector<int64_t> numels_;
  std::vector<int64_t> first_unit_;  // of each tensor, then the number of units
};

}  // namespace cl_optim
