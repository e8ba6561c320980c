// Products of memory rows with each other and with a gradient, over lists of tensors, on the CPU.
//
//   A memory row G_k is a gradient of the whole model, kept by parameter. With the gradient g as
//   one row more, the products are the entries of a Gram matrix: Q = G G^T, c = G g and |g|^2.
//
// Each row is read from memory once: a chunk of every row is widened to float64 into the
// first-level cache, and tiles of products are summed from there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "check.h"
#include "memory_rows.h"
#include "multi_tensor.h"
#include "simd.h"
#include "tensors.h"

namespace cl_optim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

constexpr Check check{"gram"};

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

// Every sum is kept as eight, in one vector register or several, so that all processors sum alike.
constexpr int64_t kLanes = 8;
template <int width>
struct Vector {
  using type __attribute__((vector_size(width * sizeof(double)), may_alias)) = double;
};

// Elements of a row in the cache at once, and the distance of two rows there: chunks of 4 KiB one
// after the other would all fall into the same few places of the cache.
constexpr int64_t kChunk = 512;
constexpr int64_t kPitch = kChunk + kLanes;
// Rows of the matrix that one item of work fills: items for every thread, long memories or not.
constexpr int64_t kBand = 32;
// Elements whose products make one partial sum. Long memories get more of them, as a partial sum
// has a matrix of numbers.
constexpr int64_t kGroup = 65536;
// Fewer multiplications than these are not worth a second thread.
constexpr int64_t kProductsPerThread = 262144;

struct Free {
  void operator()(double* numbers) const { ::operator delete(numbers, std::align_val_t{64}); }
};
using Numbers = std::unique_ptr<double[], Free>;

Numbers make_numbers(int64_t count) {
  return Numbers(static_cast<double*>(
      ::operator new(static_cast<size_t>(count) * sizeof(double), std::align_val_t{64})));
}

// Asks for the next chunk of a row while this one is read: the processor does not foresee jumps
// from row to row.
constexpr int64_t kStretch = 64;
template <typename Storage>
CL_OPTIM_HD void prefetch_next(const Storage* from) {
  for (size_t i = 0; i < kStretch; i += 64 / sizeof(Storage)) {
    __builtin_prefetch(from + kChunk + i);
  }
}

template <typename Storage>
CL_OPTIM_SIMD_CLONES void widen(const void* array, int64_t begin, int64_t count, double* to) {
  const Storage* from = static_cast<const Storage*>(array) + begin;
  int64_t i = 0;
  for (; i + kStretch <= count; i += kStretch) {
    prefetch_next(from + i);
    for (int64_t j = i; j < i + kStretch; ++j) to[j] = load(from[j]);
  }
  for (; i < count; ++i) to[i] = load(from[i]);
}

CL_OPTIM_HD void narrow(float& to, double x) { to = static_cast<float>(x); }
CL_OPTIM_HD void narrow(double& to, double x) { to = x; }
CL_OPTIM_HD void narrow(BFloat16& to, double x) { store(to, static_cast<float>(x)); }
CL_OPTIM_HD void narrow(Half& to, double x) { store(to, static_cast<float>(x)); }

template <typename Storage>
CL_OPTIM_SIMD_CLONES void narrow_all(const double* from, void* array, int64_t begin,
                                     int64_t count) {
  Storage* to = static_cast<Storage*>(array) + begin;
  for (int64_t i = 0; i < count; ++i) narrow(to[i], from[i]);
}

template <typename Storage>
CL_OPTIM_SIMD_CLONES void add_multiple(const void* array, int64_t begin, int64_t count,
                                       double factor, double* sum) {
  const Storage* from = static_cast<const Storage*>(array) + begin;
  int64_t i = 0;
  for (; i + kStretch <= count; i += kStretch) {
    prefetch_next(from + i);
    CL_OPTIM_INDEPENDENT_ITERATIONS
    for (int64_t j = i; j < i + kStretch; ++j) sum[j] += factor * load(from[j]);
  }
  for (; i < count; ++i) sum[i] += factor * load(from[i]);
}

// Calls f with a number of the kind's storage type, and returns what f does.
template <typename F>
auto with_storage(ScalarKind kind, F&& f) {
  switch (kind) {
    case ScalarKind::float64:
      return f(double{});
    case ScalarKind::bfloat16:
      return f(BFloat16{});
    case ScalarKind::float16:
      return f(Half{});
    default:
      return f(float{});
  }
}

using Widen = void (*)(const void*, int64_t, int64_t, double*);

Widen widen_of(ScalarKind kind) {
  return with_storage(kind, [](auto x) -> Widen { return widen<decltype(x)>; });
}

// Adds the products of R rows at a with C rows at b, `count` elements long, to their sums: those of
// row r and row c are kLanes numbers at sums + r * stride + c * kLanes. On the diagonal, where a
// and b are the same rows, only those with c <= r.
template <int R, int C, bool diagonal, int width>
CL_OPTIM_SIMD_CLONES void add_products(const double* a, const double* b, int64_t count,
                                       double* sums, int64_t stride) {
  using Lanes = typename Vector<width>::type;
  constexpr int parts = kLanes / width;
  Lanes sum[R][C][parts];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < (diagonal ? r + 1 : C); ++c) {
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) {
        sum[r][c][p] = *reinterpret_cast<const Lanes*>(sums + r * stride + c * kLanes + p * width);
      }
    }
  }
  for (int64_t i = 0; i < count; i += kLanes) {
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      const int64_t at = i + p * width;
      Lanes y[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) y[c] = *reinterpret_cast<const Lanes*>(b + c * kPitch + at);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Lanes x = *reinterpret_cast<const Lanes*>(a + r * kPitch + at);
#pragma GCC unroll 4
        for (int c = 0; c < (diagonal ? r + 1 : C); ++c) sum[r][c][p] += x * y[c];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < (diagonal ? r + 1 : C); ++c) {
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) {
        *reinterpret_cast<Lanes*>(sums + r * stride + c * kLanes + p * width) = sum[r][c][p];
      }
    }
  }
}

using AddProducts = void (*)(const double*, const double*, int64_t, double*, int64_t);

// The largest tile whose sums stay in this processor's registers, and the functions for it and for
// what remains at the edges.
struct Tiles {
  int64_t size;
  AddProducts rectangles[4][4];
  AddProducts triangles[4];
};

template <int R, int width>
constexpr void set_row(Tiles& tiles) {
  tiles.triangles[R - 1] = add_products<R, R, true, width>;
  tiles.rectangles[R - 1][0] = add_products<R, 1, false, width>;
  tiles.rectangles[R - 1][1] = add_products<R, 2, false, width>;
  if constexpr (width == 8) {
    tiles.rectangles[R - 1][2] = add_products<R, 3, false, width>;
    tiles.rectangles[R - 1][3] = add_products<R, 4, false, width>;
  }
}

template <int width>
Tiles make_tiles() {
  Tiles tiles{width == 8 ? 4 : 2, {}, {}};
  set_row<1, width>(tiles);
  set_row<2, width>(tiles);
  if constexpr (width == 8) {
    set_row<3, width>(tiles);
    set_row<4, width>(tiles);
  }
  return tiles;
}

const Tiles& tiles_of_this_processor() {
  static const Tiles tiles = simd_level() == Simd::avx512 ? make_tiles<8>()
                             : simd_level() == Simd::avx2 ? make_tiles<4>()
                                                          : make_tiles<2>();
  return tiles;
}

// What one thread sums at a time: products of the rows first_row <= r < last_row with all rows
// c <= r, over the elements begin <= i < end of one tensor.
struct Item {
  int64_t tensor;
  int64_t first_row;
  int64_t last_row;
  int64_t begin;
  int64_t end;
  double* out;  // the products of first_row with row 0, 1, ..., then those of the next row
};

// Memory of one thread.
struct Workspace {
  double* chunk;  // [last_row, kPitch]
  double* sums;   // [kBand, last_row, kLanes]

  static int64_t size(int64_t m) { return m * kPitch + std::min(m, kBand) * m * kLanes; }
  Workspace(double* memory, int64_t m) : chunk(memory), sums(memory + m * kPitch) {}
};

void sum_products(const GramTensor& tensor, int64_t m, const Item& item, const Workspace& memory) {
  const Widen widen_row = widen_of(tensor.row_kind);
  const Widen widen_grad = widen_of(tensor.grad_kind);
  const char* rows = static_cast<const char*>(tensor.rows);
  const int64_t row_bytes = tensor.row_stride * with_storage(tensor.row_kind, [](auto x) {
                              return static_cast<int64_t>(sizeof(x));
                            });
  const Tiles& tiles = tiles_of_this_processor();
  const int64_t stride = item.last_row * kLanes;
  std::fill_n(memory.sums, (item.last_row - item.first_row) * stride, 0.0);
  for (int64_t begin = item.begin; begin < item.end; begin += kChunk) {
    const int64_t count = std::min(kChunk, item.end - begin);
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t k = 0; k < item.last_row; ++k) {
      double* to = memory.chunk + k * kPitch;
      if (k < m - 1) {
        widen_row(rows + k * row_bytes, begin, count, to);
      } else {
        widen_grad(tensor.grad, begin, count, to);
      }
      std::fill(to + count, to + padded, 0.0);
    }
    for (int64_t c = 0; c < item.last_row; c += tiles.size) {
      const int64_t width = std::min(tiles.size, item.last_row - c);
      for (int64_t r = std::max(item.first_row, c); r < item.last_row; r += tiles.size) {
        const int64_t height = std::min(tiles.size, item.last_row - r);
        const AddProducts add =
            r == c ? tiles.triangles[height - 1] : tiles.rectangles[height - 1][width - 1];
        add(memory.chunk + r * kPitch, memory.chunk + c * kPitch, padded,
            memory.sums + (r - item.first_row) * stride + c * kLanes, stride);
      }
    }
  }
  double* out = item.out;
  for (int64_t r = item.first_row; r < item.last_row; ++r) {
    for (int64_t c = 0; c <= r; ++c) {
      const double* s = memory.sums + (r - item.first_row) * stride + c * kLanes;
      *out++ = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    }
  }
}

// As many threads as there is work for take items as they get done; f(item, thread).
template <typename F>
void for_each_item(int64_t items, int64_t threads, F&& f) {
  std::atomic<int64_t> next_thread{0}, next_item{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const int64_t thread = next_thread++;
    for (int64_t item = next_item++; item < items; item = next_item++) f(item, thread);
  });
}

// The products of each tensor, with m = rows + 1: out is [tensors, m, m]. With `all` false only the
// last line of each matrix is computed, c and |g|^2, and out is [tensors, m]; the numbers are the
// same.
//
// Products and sums are in float64, in which a product of float32 numbers is exact. All entries are
// summed in one order, which depends on the tensor's size and on m alone: where two rows are equal
// or opposite, so are their products, and the number of threads changes nothing.
void gram_cpu(const std::vector<GramTensor>& tensors, int64_t rows, bool all, double* out) {
  const int64_t m = rows + 1;
  const int64_t entries = all ? m * (m + 1) / 2 : m;
  const int64_t group = kGroup * ((m + 63) / 64);
  std::vector<int64_t> first_group = {0};
  double work = 0;
  for (const GramTensor& tensor : tensors) {
    first_group.push_back(first_group.back() + (tensor.numel + group - 1) / group);
    work += static_cast<double>(tensor.numel) * static_cast<double>(entries);
  }
  const Numbers partial = make_numbers(first_group.back() * entries);
  std::vector<Item> items;
  for (size_t i = 0; i < tensors.size(); ++i) {
    for (int64_t g = first_group[i]; g < first_group[i + 1]; ++g) {
      const int64_t begin = (g - first_group[i]) * group;
      const int64_t end = std::min(begin + group, tensors[i].numel);
      double* to = partial.get() + g * entries;
      for (int64_t r = all ? 0 : m - 1; r < m; r += kBand) {
        const int64_t last = std::min(r + kBand, m);
        items.push_back({static_cast<int64_t>(i), r, last, begin, end, to});
        to += (r + 1 + last) * (last - r) / 2;
      }
    }
  }
  const auto count = static_cast<int64_t>(items.size());
  const int64_t most = std::min<int64_t>(torch::stable::get_num_threads(), count);
  const int64_t threads =
      std::min(most, static_cast<int64_t>(work / static_cast<double>(kProductsPerThread)) + 1);
  const int64_t size = Workspace::size(m);
  const Numbers memory = make_numbers(threads * size);
  for_each_item(count, threads, [&](int64_t item, int64_t thread) {
    sum_products(tensors[items[item].tensor], m, items[item],
                 Workspace(memory.get() + thread * size, m));
  });

  std::fill_n(out, static_cast<int64_t>(tensors.size()) * (all ? m * m : m), 0.0);
  for_each_item(static_cast<int64_t>(tensors.size()), threads, [&](int64_t i, int64_t) {
    for (int64_t g = first_group[i]; g < first_group[i + 1]; ++g) {
      const double* from = partial.get() + g * entries;
      if (!all) {
        for (int64_t c = 0; c < m; ++c) out[i * m + c] += from[c];
        continue;
      }
      double* to = out + i * m * m;
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t c = 0; c <= r; ++c) to[r * m + c] += *from++;
      }
    }
    if (!all) return;
    double* matrix = out + i * m * m;
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t c = 0; c < r; ++c) matrix[c * m + r] = matrix[r * m + c];
    }
  });
}

}  // namespace

void add_memory_rows_cpu(const MemoryRows& memory, int64_t first, int64_t count, double* sum) {
  with_storage(memory.kind, [&](auto x) {
    for (int k = 0; k < memory.count; ++k) {
      const double coefficient = memory.coefficients[k];
      if (coefficient == 0.0) continue;
      add_multiple<decltype(x)>(memory.rows, k * memory.stride + first, count, coefficient, sum);
    }
  });
}

namespace {

// grad <- grad + sum_k v_k G_k with v = coefficients[block * rows + k], in float64, rounded once.
// Rows with v_k = 0 are not read; a gradient without others is not written.
void gram_combine_cpu(const std::vector<GramTensor>& tensors, int64_t rows,
                      const double* coefficients, const std::vector<int64_t>& blocks) {
  std::vector<MemoryRows> memory;
  std::vector<int64_t> numels;
  for (size_t i = 0; i < tensors.size(); ++i) {
    memory.push_back({tensors[i].rows, coefficients + blocks[i] * rows, tensors[i].row_stride,
                      static_cast<int>(rows), tensors[i].row_kind});
    numels.push_back(is_projected(memory[i]) ? tensors[i].numel : 0);
  }
  const MultiTensor work(numels);
  const int64_t grain = kProductsPerThread / kUnit / std::max<int64_t>(rows, 1) + 1;
  torch::stable::parallel_for(0, work.units(), grain, [&](int64_t begin, int64_t end) {
    work.for_each(begin, end, [&](const Piece& piece) {
      const GramTensor& tensor = tensors[piece.tensor];
      std::array<double, kChunk> sum;
      for (int64_t first = piece.begin; first < piece.end; first += kChunk) {
        const int64_t count = std::min(kChunk, piece.end - first);
        widen_of(tensor.grad_kind)(tensor.grad, first, count, sum.data());
        add_memory_rows_cpu(memory[piece.tensor], first, count, sum.data());
        with_storage(tensor.grad_kind, [&](auto x) {
          narrow_all<decltype(x)>(sum.data(), tensor.grad, first, count);
        });
      }
    });
  });
}

ScalarKind kind_of(const char* name, const Tensor& tensor, size_t i) {
  const std::optional<ScalarKind> kind = scalar_kind(tensor.scalar_type());
  check(kind.has_value(), name, "[", i, "] must be float32, float64, bfloat16 or float16");
  return *kind;
}

// ops/gram.py says what is wrong with an argument and brings rows and gradients into one order;
// here is only what memory safety needs. `rows` is how many each memory must have.
GramTensor checked(const Tensor& memory, const Tensor& grad, size_t i, int64_t rows, bool written) {
  check(memory.is_cpu() && grad.is_cpu(), "tensors ", i, " must be in host memory");
  bool fits = memory.dim() == grad.dim() + 1 && memory.size(0) == rows;
  for (int64_t d = 0; fits && d < grad.dim(); ++d) {
    fits = memory.size(d + 1) == grad.size(d) &&
           (grad.size(d) < 2 || grad.numel() == 0 || memory.stride(d + 1) == grad.stride(d));
  }
  check(fits && is_dense(grad), "memory[", i, "] must be [", rows, ", *shape of grads[", i,
        "]], in dense rows of the gradient's order");
  // To ask for a pointer to write through may copy a tensor that shares its memory.
  void* data = written ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr());
  return {memory.const_data_ptr(),      rows > 0 ? memory.stride(0) : 0, data, grad.numel(),
          kind_of("memory", memory, i), kind_of("grads", grad, i)};
}

int64_t rows_of(const TensorList& memory) {
  return memory.empty() || memory[0].dim() == 0 ? 0 : memory[0].size(0);
}

std::vector<GramTensor> all_checked(const TensorList& memory, const TensorList& grads,
                                    bool written) {
  check(memory.size() == grads.size(), "memory must hold ", grads.size(), " tensors, not ",
        memory.size());
  const int64_t rows = rows_of(memory);
  std::vector<GramTensor> tensors;
  tensors.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    tensors.push_back(checked(memory[i], grads[i], i, rows, written));
  }
  return tensors;
}

template <bool all>
Tensor gram_products(const TensorList& memory, const TensorList& grads) {
  const std::vector<GramTensor> tensors = all_checked(memory, grads, false);
  const auto n = static_cast<int64_t>(grads.size());
  const int64_t m = rows_of(memory) + 1;
  const std::vector<int64_t> shape = all ? std::vector{n, m, m} : std::vector{n, m};
  Tensor out = torch::stable::empty(shape, ScalarType::Double);
  gram_cpu(tensors, m - 1, all, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

void gram_combine_(const TensorList& grads, const TensorList& memory, const Tensor& coefficients,
                   const std::vector<int64_t>& blocks) {
  const std::vector<GramTensor> tensors = all_checked(memory, grads, true);
  const int64_t rows = rows_of(memory);
  check(coefficients.is_cpu() && coefficients.is_contiguous() && coefficients.dim() == 2 &&
            coefficients.scalar_type() == ScalarType::Double &&
            (grads.empty() || coefficients.size(1) == rows),
        "coefficients must be contiguous float64 [B, ", rows, "] in host memory");
  bool fits = blocks.size() == grads.size();
  for (int64_t block : blocks) fits = fits && 0 <= block && block < coefficients.size(0);
  check(fits, "blocks must name a row of coefficients for each gradient");
  gram_combine_cpu(tensors, rows, static_cast<const double*>(coefficients.const_data_ptr()),
                   blocks);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cl_optim, CPU, m) {
  m.impl("gram_per_tensor", TORCH_BOX(&gram_products<true>));
  m.impl("gram_dots_per_tensor", TORCH_BOX(&gram_products<false>));
  m.impl("gram_combine_", TORCH_BOX(&gram_combine_));
}

}  // namespace cl_optim
