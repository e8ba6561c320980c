// How a tensor lies in memory, for whoever looks at it through torch or through DLPack.
#pragma once

#include <cstdint>

namespace cl_optim {

// Whether it fills its memory without gaps or overlap, in whatever order of dimensions. Strides are
// in elements; those of dimensions of size 1 mean nothing.
inline bool is_dense(int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int64_t expected = 1, left = 0;
  for (int64_t d = 0; d < dims; ++d) left += sizes[d] != 1;
  for (; left > 0; --left) {  // from the innermost dimension outwards
    int64_t d = 0;
    while (d < dims && (sizes[d] == 1 || strides[d] != expected)) ++d;
    if (d == dims) return false;
    expected *= sizes[d];
  }
  return true;
}

}  // namespace cl_optim
