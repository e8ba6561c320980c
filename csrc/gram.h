// Products of memory rows with each other and with a gradient, over lists of tensors.
//
//   A memory row G_k is a gradient of the whole model, kept by parameter. With the gradient g as
//   one row more, the products are the entries of a Gram matrix: Q = G G^T, c = G g and |g|^2.
#pragma once

#include <cstdint>
#include <vector>

#include "float_types.h"

namespace cl_optim {

// One parameter: its part of every row, and of the gradient, in the same order in memory. Row k
// begins k * row_stride elements after the first.
struct GramTensor {
  const void* rows;
  int64_t row_stride;
  void* grad;
  int64_t numel;
  ScalarKind row_kind;
  ScalarKind grad_kind;
};

// The products of each tensor, with m = rows + 1: out is [tensors, m, m]. With `all` false only the
// last line of each matrix is computed, c and |g|^2, and out is [tensors, m]; the numbers are the
// same.
//
// Products and sums are in float64, in which a product of float32 numbers is exact. All entries are
// summed in one order, which depends on the tensor's size and on m alone: where two rows are equal
// or opposite, so are their products, and the number of threads changes nothing.
void gram_cpu(const std::vector<GramTensor>& tensors, int64_t rows, bool all, double* out);

// grad <- grad + sum_k v_k G_k with v = coefficients[block * rows + k], in float64, rounded once.
// Rows with v_k = 0 are not read; a gradient without others is not written.
void gram_combine_cpu(const std::vector<GramTensor>& tensors, int64_t rows,
                      const double* coefficients, const std::vector<int64_t>& blocks);

}  // namespace cl_optim
