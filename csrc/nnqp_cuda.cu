// The quadratic programs on the GPU: a warp or a block solves each. Includes no torch header.
#include <cuda_runtime.h>

#include "cuda_check.h"
#include "nnqp_launch.h"

namespace cl_optim {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpsPerBlock = 4;    // each with a problem of its own, up to 32 rows
constexpr int kSharedThreads = 256;  // for a tableau in shared memory
constexpr int kGlobalThreads = 512;  // for one in global memory

// The candidate with the larger value; of equal ones, that with the lower index.
__device__ __forceinline__ void keep_larger(double& value, int& index, double other_value,
                                            int other_index) {
  const bool better = other_index >= 0 && (index < 0 || other_value > value ||
                                           (other_value == value && other_index < index));
  value = better ? other_value : value;
  index = better ? other_index : index;
}

__device__ __forceinline__ void warp_argmax(double& value, int& index) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double other_value = __shfl_xor_sync(kAllLanes, value, step);
    const int other_index = __shfl_xor_sync(kAllLanes, index, step);
    keep_larger(value, index, other_value, other_index);
  }
}

__device__ __forceinline__ double warp_sum(double value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

struct WarpTeam {
  __device__ int rank() const { return threadIdx.x % kWarp; }
  __device__ int size() const { return kWarp; }
  __device__ int row() const { return 0; }
  __device__ int rows() const { return 1; }
  __device__ int lane() const { return rank(); }
  __device__ int lanes() const { return kWarp; }
  __device__ void sync() const { __syncwarp(); }
  __device__ int argmax(double value, int index) const {
    warp_argmax(value, index);
    __syncwarp();
    return index;
  }
  __device__ bool any(bool value) const { return __any_sync(kAllLanes, value); }
  __device__ double sum(double value) const { return warp_sum(value); }
};

struct BlockTeam {
  double* values;  // one per warp, in shared memory
  int* indices;

  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ int row() const { return threadIdx.x / kWarp; }
  __device__ int rows() const { return blockDim.x / kWarp; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
  __device__ int lanes() const { return kWarp; }
  __device__ void sync() const { __syncthreads(); }
  __device__ bool any(bool value) const { return __syncthreads_or(value); }

  __device__ int argmax(double value, int index) const {
    warp_argmax(value, index);
    if (lane() == 0) {
      values[row()] = value;
      indices[row()] = index;
    }
    __syncthreads();
    value = lane() < rows() ? values[lane()] : 0.0;
    index = lane() < rows() ? indices[lane()] : -1;
    warp_argmax(value, index);
    __syncthreads();  // before the next use of the shared numbers
    return index;
  }

  __device__ double sum(double value) const {
    value = warp_sum(value);
    if (lane() == 0) values[row()] = value;
    __syncthreads();
    value = warp_sum(lane() < rows() ? values[lane()] : 0.0);
    __syncthreads();
    return value;
  }
};

// An odd stride: the lanes of a warp that read a column meet different banks.
CL_OPTIM_HD constexpr int odd(int size) { return size | 1; }

CL_OPTIM_HD constexpr size_t vector_doubles(int size) {
  return (NNQPMemory::vector_bytes(size) + sizeof(double) - 1) / sizeof(double);
}

CL_OPTIM_HD constexpr size_t tableau_doubles(int size) {
  return static_cast<size_t>(size) * odd(size);
}

constexpr size_t shared_bytes(int size, bool tableau) {
  return (vector_doubles(size) + (tableau ? tableau_doubles(size) : 0)) * sizeof(double);
}

__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    solve_by_warp(const __grid_constant__ NNQPBatch batch,
                  const __grid_constant__ NNQPOptions options) {
  extern __shared__ double shared[];
  const int warp = threadIdx.x / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
  if (i >= batch.count) return;
  double* mine = shared + warp * (vector_doubles(batch.size) + tableau_doubles(batch.size));
  const NNQPMemory memory{mine, odd(batch.size), mine + tableau_doubles(batch.size)};
  batch.solve(i, WarpTeam{}, options, memory);
}

// With the tableaus in the workspace, or in shared memory where that is null.
__global__ void __launch_bounds__(kGlobalThreads)
    solve_by_block(const __grid_constant__ NNQPBatch batch,
                   const __grid_constant__ NNQPOptions options, double* workspace) {
  extern __shared__ double shared[];
  __shared__ double values[kWarp];
  __shared__ int indices[kWarp];
  const int64_t i = blockIdx.x;
  double* tableau = workspace == nullptr ? shared + vector_doubles(batch.size)
                                         : workspace + i * tableau_doubles(batch.size);
  const NNQPMemory memory{tableau, odd(batch.size), shared};
  batch.solve(i, BlockTeam{values, indices}, options, memory);
}

void check(cudaError_t error) { cl_optim::check(error, "nnqp"); }

bool fits_shared(int size) {
  int device = 0, most = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return shared_bytes(size, true) + 1024 <= static_cast<size_t>(most);
}

template <typename Kernel>
void allow(Kernel kernel, size_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)));
}

}  // namespace

size_t nnqp_cuda_workspace(int64_t count, int size) {
  if (size <= kWarp || fits_shared(size)) return 0;
  return count * tableau_doubles(size) * sizeof(double);
}

void nnqp_cuda(const NNQPBatch& batch, const NNQPOptions& options, void* workspace, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (batch.size <= kWarp) {
    const size_t bytes = kWarpsPerBlock * shared_bytes(batch.size, true);
    const int64_t blocks = (batch.count + kWarpsPerBlock - 1) / kWarpsPerBlock;
    allow(solve_by_warp, bytes);
    solve_by_warp<<<blocks, kWarpsPerBlock * kWarp, bytes, on>>>(batch, options);
  } else {
    const bool in_shared = fits_shared(batch.size);
    const size_t bytes = shared_bytes(batch.size, in_shared);
    allow(solve_by_block, bytes);
    solve_by_block<<<batch.count, in_shared ? kSharedThreads : kGlobalThreads, bytes, on>>>(
        batch, options, in_shared ? nullptr : static_cast<double*>(workspace));
  }
  check(cudaGetLastError());
}

}  // namespace cl_optim
