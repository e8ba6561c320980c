// The pull of small matrices that cl_optim/ops/kronecker_shrink.py describes, one matrix after
// another in the caches of a core: as some fifty operators, to call them would take longer than to
// compute.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "simd.h"

namespace cl_optim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kNumbers = 4096;  // that stay in the first cache

struct Sizes {
  int64_t outputs, inputs;
  int64_t p, q;  // kept directions of each
};

// W̃ and W̃*, [rows, columns], as they lie in parameters: a bias is the last row or column, or null.
struct Matrix {
  float* weight;
  const float* anchor;
  float* bias;
  const float* bias_anchor;
  bool bias_is_row;
  int64_t rows, columns;

  // Calls f(index of a row, number in it, what it is, what it was) for all of some rows.
  template <typename F>
  inline __attribute__((always_inline)) void for_each(int64_t begin, int64_t end, F&& f) const {
    const int64_t width = bias != nullptr && !bias_is_row ? columns - 1 : columns;
    for (int64_t row = begin; row < end; ++row) {
      const bool is_bias = bias != nullptr && bias_is_row && row == rows - 1;
      float* const of_weight = is_bias ? bias : weight + row * width;
      const float* const of_anchor = is_bias ? bias_anchor : anchor + row * width;
      CL_OPTIM_INDEPENDENT_ITERATIONS
      for (int64_t i = 0; i < width; ++i) f(row, i, of_weight[i], of_anchor[i]);
      if (width < columns) f(row, width, bias[row], bias_anchor[row]);
    }
  }
};

// S of one matrix, as it lies.
struct Scale {
  const float* data;
  int64_t row_stride, column_stride;
  float pull;

  // c/(1 + c) with c = pull·S; 1 where c overflows, too.
  float share(int64_t row, int64_t column) const {
    const float c = pull * data[row * row_stride + column * column_stride];
    return c > std::numeric_limits<float>::max() ? 1.0f : c / (1.0f + c);
  }
};

// Numbers that are computed at once; rows are padded to whole ones.
constexpr int64_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

inline __attribute__((always_inline)) void load(Lanes& lanes, const float* from) {
  std::memcpy(&lanes, from, sizeof(Lanes));
}

// The left factor of a product, as it lies.
struct Left {
  const float* data;
  int64_t row_stride, column_stride;
};

// to [R, V lanes] += left [R, size] · right [size, V lanes], of rows of so many columns.
template <int R, int V>
inline __attribute__((always_inline)) void add_tile(float* to, const Left& left, const float* right,
                                                    int64_t size, int64_t columns) {
  Lanes sums[R][V], lanes[V];
  const float* factors[R];
  for (int r = 0; r < R; ++r) {
    factors[r] = left.data + r * left.row_stride;
    for (int v = 0; v < V; ++v) load(sums[r][v], to + r * columns + v * kLanes);
  }
  for (int64_t k = 0; k < size; ++k) {
    for (int v = 0; v < V; ++v) load(lanes[v], right + k * columns + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const float factor = factors[r][k * left.column_stride];
      for (int v = 0; v < V; ++v) sums[r][v] += factor * lanes[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      std::memcpy(to + r * columns + v * kLanes, &sums[r][v], sizeof(Lanes));
    }
  }
}

// to [R, columns] += left [R, size] · right [size, columns], with columns padded.
template <int R>
inline __attribute__((always_inline)) void add_rows(float* to, const Left& left, const float* right,
                                                    int64_t size, int64_t columns) {
  int64_t begin = 0;
  for (; begin + 2 * kLanes <= columns; begin += 2 * kLanes) {
    add_tile<R, 2>(to + begin, left, right + begin, size, columns);
  }
  if (begin < columns) add_tile<R, 1>(to + begin, left, right + begin, size, columns);
}

// The same of any number of rows.
inline __attribute__((always_inline)) void add_product(float* to, Left left, const float* right,
                                                       int64_t rows, int64_t size,
                                                       int64_t columns) {
  int64_t row = 0;
  const auto next = [&](int64_t count) {
    to += count * columns;
    left.data += count * left.row_stride;
    row += count;
  };
  for (; row + 6 <= rows; next(6)) add_rows<6>(to, left, right, size, columns);
  for (; row + 2 <= rows; next(2)) add_rows<2>(to, left, right, size, columns);
  for (; row < rows; next(1)) add_rows<1>(to, left, right, size, columns);
}

// What one matrix needs beside its arguments; zeros fill up rows.
struct Workspace {
  explicit Workspace(const Sizes& n)
      : inputs(padded(n.inputs)),
        q(padded(n.q)),
        rows(std::min(n.outputs, std::max<int64_t>(kNumbers / inputs, 8))),
        delta(rows * inputs),
        basis(n.inputs * q),
        transposed(n.q * inputs),
        output(n.p * inputs),
        both(n.p * q),
        input(rows * q),
        beside(n.q) {}

  int64_t inputs, q;              // padded
  int64_t rows;                   // of Δ that are computed at once
  std::vector<float> delta;       // Δ [rows, in]
  std::vector<float> basis;       // A [in, q]
  std::vector<float> transposed;  // Aᵀ [q, in]
  std::vector<float> output;      // UᵀΔ [p, in], then what U is multiplied with
  std::vector<float> both;        // UᵀΔA [p, q]
  std::vector<float> input;       // ΔA [rows, q]
  std::vector<float> beside;      // the shares of A's directions beside the outputs' rest
};

// Subtracts from W̃ what a proximal step takes of Δ = W̃ − W̃*: c·Δ + U[(r − c)∘(UᵀΔ) +
// (s − r − t + c)∘(UᵀΔA)Aᵀ] + (t − c)∘(ΔA)Aᵀ, where s are the shares of kept pairs, r and t those
// beside the other side's rest, and c that of both rests.
CL_OPTIM_SIMD_CLONES void shrink(const Matrix& matrix, const float* u, const float* a,
                                 const Scale& scale, const Sizes& n, Workspace& work) {
  for (int64_t i = 0; i < n.inputs; ++i) {
    std::copy_n(a + i * n.q, n.q, work.basis.data() + i * work.q);
  }
  for (int64_t k = 0; k < n.q; ++k) {
    float* const row = work.transposed.data() + k * work.inputs;
    for (int64_t i = 0; i < n.inputs; ++i) row[i] = a[i * n.q + k];
  }
  const float corner = scale.share(n.p, n.q);
  bool has_rest = corner != 0.0f;
  for (int64_t k = 0; k < n.q; ++k) {
    const float share = scale.share(n.p, k);
    has_rest = has_rest || share != 0.0f;
    work.beside[k] = share - corner;
  }
  float* const delta = work.delta.data();
  const auto read = [&](int64_t begin, int64_t end) {
    matrix.for_each(begin, end, [&](int64_t row, int64_t i, const float& is, const float& was) {
      delta[(row - begin) * work.inputs + i] = is - was;
    });
  };

  float* const output = work.output.data();
  std::fill(work.output.begin(), work.output.end(), 0.0f);
  for (int64_t begin = 0; begin < n.outputs; begin += work.rows) {
    const int64_t end = std::min(begin + work.rows, n.outputs);
    read(begin, end);
    add_product(output, {u + begin * n.p, 1, n.p}, delta, n.p, end - begin, work.inputs);
  }

  float* const both = work.both.data();
  std::fill(work.both.begin(), work.both.end(), 0.0f);
  add_product(both, {output, work.inputs, 1}, work.basis.data(), n.p, n.inputs, work.q);
  for (int64_t j = 0; j < n.p; ++j) {
    const float beside = scale.share(j, n.q);
    for (int64_t k = 0; k < n.q; ++k) {
      both[j * work.q + k] *= scale.share(j, k) - beside - work.beside[k];
    }
    for (int64_t i = 0; i < n.inputs; ++i) output[j * work.inputs + i] *= beside - corner;
  }
  add_product(output, {both, work.q, 1}, work.transposed.data(), n.p, n.q, work.inputs);

  float* const input = work.input.data();
  for (int64_t begin = 0; begin < n.outputs; begin += work.rows) {
    const int64_t end = std::min(begin + work.rows, n.outputs), rows = end - begin;
    read(begin, end);
    if (has_rest) {
      std::fill(work.input.begin(), work.input.end(), 0.0f);
      add_product(input, {delta, work.inputs, 1}, work.basis.data(), rows, n.inputs, work.q);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < n.q; ++k) input[i * work.q + k] *= work.beside[k];
      }
    }
    for (int64_t i = 0; i < rows * work.inputs; ++i) delta[i] *= corner;
    add_product(delta, {u + begin * n.p, n.p, 1}, output, rows, n.p, work.inputs);
    if (has_rest) {
      add_product(delta, {input, work.q, 1}, work.transposed.data(), rows, n.q, work.inputs);
    }
    matrix.for_each(begin, end, [&](int64_t row, int64_t i, float& is, const float&) {
      is -= delta[(row - begin) * work.inputs + i] + 0.0f;  // −0 would change −0
    });
  }
}

using TensorList = std::vector<Tensor>;

// The bias is a row of W̃ where weights are transposed, [in, out]: then U and A have changed places.
void kronecker_shrink_(const TensorList& weights, const TensorList& anchors,
                       const TensorList& biases, const TensorList& bias_anchors,
                       const Tensor& output_basis, const Tensor& input_basis, const Tensor& scale,
                       const Tensor& pulls, bool transposed) {
  constexpr Check check{"kronecker_shrink_"};
  const auto check_floats = [&](const Tensor& tensor) {
    check(tensor.scalar_type() == ScalarType::Float && tensor.is_cpu(),
          "all tensors must be float32 on the CPU");
  };
  for (const Tensor* tensor : {&output_basis, &input_basis, &scale, &pulls}) check_floats(*tensor);
  const auto matrices = static_cast<int64_t>(weights.size());
  check(anchors.size() == weights.size() && biases.size() == bias_anchors.size() &&
            (biases.empty() || biases.size() == weights.size()),
        "there must be an anchor for each weight, and biases with anchors for all of them or none");
  for (const Tensor* basis : {&output_basis, &input_basis}) {
    check(basis->dim() == 4 && basis->is_contiguous() && basis->size(0) == matrices &&
              basis->size(1) == 1,
          "bases must be contiguous, [L, 1, out, p] and [L, 1, in, q]");
  }
  const Tensor& of_rows = transposed ? input_basis : output_basis;
  const Tensor& of_columns = transposed ? output_basis : input_basis;
  const Sizes n{of_rows.size(2), of_columns.size(2), of_rows.size(3), of_columns.size(3)};
  check(scale.dim() == 3 && scale.size(0) == matrices &&
            scale.size(1) == output_basis.size(3) + 1 && scale.size(2) == input_basis.size(3) + 1,
        "scale must be [L, p + 1, q + 1]");
  check(pulls.dim() == 1 && pulls.size(0) == matrices && pulls.is_contiguous(),
        "pulls must be contiguous, [L]");
  const int64_t biases_of_one = biases.empty() ? 0 : transposed ? n.inputs : n.outputs;
  const int64_t weights_of_one = n.outputs * n.inputs - biases_of_one;
  std::vector<Matrix> parts;
  const auto floats = [&](const Tensor& tensor, int64_t count) {
    check_floats(tensor);
    check(tensor.numel() == count && tensor.is_contiguous(),
          "weights, biases and anchors must be contiguous, and of the bases' sizes");
    return static_cast<float*>(tensor.mutable_data_ptr());
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    parts.push_back({floats(weights[i], weights_of_one), floats(anchors[i], weights_of_one),
                     biases.empty() ? nullptr : floats(biases[i], biases_of_one),
                     biases.empty() ? nullptr : floats(bias_anchors[i], biases_of_one), transposed,
                     n.outputs, n.inputs});
  }

  const auto* const us = static_cast<const float*>(of_rows.const_data_ptr());
  const auto* const as = static_cast<const float*>(of_columns.const_data_ptr());
  const auto* const scales = static_cast<const float*>(scale.const_data_ptr());
  const auto* const of_matrices = static_cast<const float*>(pulls.const_data_ptr());
  const int64_t row_stride = scale.stride(transposed ? 2 : 1);
  const int64_t column_stride = scale.stride(transposed ? 1 : 2);
  torch::stable::parallel_for(0, matrices, 1, [&](int64_t begin, int64_t end) {
    Workspace work(n);
    for (int64_t i = begin; i < end; ++i) {
      const Scale of_matrix{scales + i * scale.stride(0), row_stride, column_stride,
                            of_matrices[i]};
      shrink(parts[i], us + i * n.outputs * n.p, as + i * n.inputs * n.q, of_matrix, n, work);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cl_optim, CPU, m) {
  m.impl("kronecker_shrink_", TORCH_BOX(&kronecker_shrink_));
}

}  // namespace cl_optim
