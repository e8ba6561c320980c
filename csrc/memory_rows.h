// Memory rows as the kernels see them: what GEM adds to a gradient.
#pragma once

#include <cstdint>

#include "float_types.h"

namespace cl_optim {

// Gradients of other tasks that are added to a tensor's own, each times a number: what is left of
// the gradient when GEM has projected it.
struct MemoryRows {
  const void* rows;            // [count][stride], each laid out like the tensor; null for none
  const double* coefficients;  // [count]; a row whose number is 0 is not read
  int64_t stride;              // in elements
  int count;
  ScalarKind kind;
};

// sum[i] += sum over k of coefficients[k] * row k[first + i] for 0 <= i < count, in host memory. In
// float64: a coefficient may be far outside float32's range where the rows' scales differ.
void add_memory_rows_cpu(const MemoryRows& memory, int64_t first, int64_t count, double* sum);

// Whether some row takes part.
inline bool is_projected(const MemoryRows& memory) {
  for (int k = 0; k < memory.count; ++k) {
    if (memory.coefficients[k] != 0.0) return true;
  }
  return false;
}

}  // namespace cl_optim
