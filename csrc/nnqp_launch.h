// What the solver is launched on, and the launcher for a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "nnqp.h"

namespace cl_optim {

// A batch of problems of one size, in order in memory.
struct NNQPBatch {
  const double* gram;    // [count, size, size]
  const double* linear;  // [count, size]
  double* state;         // [count, size, size + 1] from an earlier call, or zeros; or null
  double* v;             // [count, size]
  int8_t* status;        // [count]
  double* gap;           // [count]
  int64_t count;
  int size;

  CL_OPTIM_TEAM NNQPProblem problem(int64_t i) const {
    return {gram + i * size * size, linear + i * size, size};
  }

  template <typename Team>
  CL_OPTIM_TEAM void solve(int64_t i, const Team& team, const NNQPOptions& options,
                           const NNQPMemory& memory) const {
    NNQPSolver<Team> solver(team, problem(i), options, memory);
    solver.solve(v + i * size, status + i, gap + i,
                 state == nullptr ? nullptr : state + i * size * (size + 1));
  }
};

// All arrays are in the memory of the current CUDA device; on a cudaStream_t, without waiting. The
// workspace has as many bytes as the function below says and stays until the work is done.
void nnqp_cuda(const NNQPBatch& batch, const NNQPOptions& options, void* workspace, void* stream);
size_t nnqp_cuda_workspace(int64_t count, int size);

}  // namespace cl_optim
