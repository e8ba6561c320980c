// The quadratic programs on the CPU: each is solved by one thread, many at a time.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "nnqp_operator.h"
#include "simd.h"

namespace cl_optim {
namespace {

// Flattened, so that the solver itself is compiled for each kind of processor.
CL_OPTIM_SIMD_CLONES __attribute__((flatten)) void solve(const NNQPBatch& batch,
                                                         const NNQPOptions& options, int64_t begin,
                                                         int64_t end, const NNQPMemory& memory) {
  for (int64_t i = begin; i < end; ++i) batch.solve(i, SingleLane{}, options, memory);
}

void solve_all(const NNQPBatch& batch, const NNQPOptions& options, const torch::stable::Tensor&) {
  // About as many problems as are worth a second thread.
  const int64_t work = int64_t{batch.size} * batch.size * batch.size;
  const int64_t grain = std::max<int64_t>(1, 100'000 / (work + 100));
  torch::stable::parallel_for(0, batch.count, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> tableau(static_cast<size_t>(batch.size) * batch.size);
    std::vector<double> vectors(NNQPMemory::vector_bytes(batch.size) / sizeof(double) + 1);
    solve(batch, options, begin, end, NNQPMemory{tableau.data(), batch.size, vectors.data()});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cl_optim, CPU, m) { m.impl("nnqp", TORCH_BOX(&nnqp<solve_all>)); }

}  // namespace cl_optim
