// How a tensor lies in memory, for whoever looks at it through torch or through DLPack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace cl_optim {

// Whether it fills its memory without gaps or overlap, in whatever order of dimensions. Strides are
// in elements; those of dimensions of size 1 mean nothing.
inline bool is_dense(int64_t dims, const int64_t* sizes, const int64_t* strides) {
  std::vector<std::pair<int64_t, int64_t>> order;  // (stride, size)
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] != 1) order.emplace_back(strides[d], sizes[d]);
  }
  std::sort(order.begin(), order.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : order) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace cl_optim
