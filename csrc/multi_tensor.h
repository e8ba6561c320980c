// Splits a list of tensors into chunks of at most `chunk_size` elements, so that one parallel
// region (CPU) or one launch (GPU) serves tensors of any sizes with equal pieces of work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cl_optim {

struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t size;
};

class ChunkTable {
 public:
  ChunkTable(const std::vector<int64_t>& numels, int64_t chunk_size)
      : numels_(numels), chunk_size_(chunk_size), first_(numels.size() + 1, 0) {
    for (size_t i = 0; i < numels.size(); ++i) {
      first_[i + 1] = first_[i] + (numels[i] + chunk_size - 1) / chunk_size;
    }
  }

  int64_t size() const { return first_.back(); }

  // Calls f(Chunk) for the chunks begin <= index < end, in order of tensor and position.
  template <typename F>
  void for_each(int64_t begin, int64_t end, F&& f) const {
    if (begin >= end) return;
    // The last tensor whose first chunk is at or before `begin`; it is not empty.
    int64_t tensor = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
    for (int64_t index = begin; index < end; ++index) {
      while (index >= first_[tensor + 1]) ++tensor;
      const int64_t offset = (index - first_[tensor]) * chunk_size_;
      f(Chunk{tensor, offset, std::min(chunk_size_, numels_[tensor] - offset)});
    }
  }

 private:
  std::vector<int64_t> numels_;
  int64_t chunk_size_;
  std::vector<int64_t> first_;  // index of each tensor's first chunk, then the number of chunks
};

}  // namespace cl_optim
