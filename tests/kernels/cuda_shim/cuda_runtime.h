// What of CUDA a kernel needs, for a host compiler: the threads of a block are fibers that take turns
// and meet at shuffles and barriers. Blocks run one after another.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
struct Index {
  int x;
};
inline Index threadIdx, blockIdx, blockDim;

namespace shim {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
  int barriers;
  unsigned char exchanged[8];
};

constexpr size_t kStack = 256 * 1024;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s\n", what);
  std::abort();
}

inline void yield() {
  const int me = threadIdx.x;
  swapcontext(&fibers[me].context, &scheduler);
}

inline void main_of_fiber() {
  body();
  fibers[threadIdx.x].done = true;
  // Leaves by uc_link.
}

inline void run_block(int threads) {
  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.done = false;
    fiber.barriers = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, main_of_fiber, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (int i = 0; i < threads; ++i) {
      if (fibers[i].done) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
      running = true;
    }
  }
}

// What kernel<<<blocks, threads, shared, stream>>> becomes.
template <typename... Parameters>
auto launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t, cudaStream_t) {
  return [=](Parameters... arguments) {
    blockDim.x = threads;
    body = [&] { kernel(arguments...); };
    for (int64_t block = 0; block < blocks; ++block) {
      blockIdx.x = static_cast<int>(block);
      run_block(threads);
    }
  };
}

}  // namespace shim

// A GPU refuses a vector at an address that is no multiple of its size.
template <typename Vector>
void __stcs(Vector* to, Vector vector) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Vector) != 0) shim::fail("a store off its alignment");
  std::memcpy(to, &vector, sizeof(Vector));
}

// All lanes of a warp must come here together: a mask of all of them is promised.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) shim::fail("a shuffle of a part of a warp");
  const int me = threadIdx.x;
  std::memcpy(shim::fibers[me].exchanged, &value, sizeof(T));
  shim::yield();
  if (shim::fibers[me ^ other].done) shim::fail("a lane has left before a shuffle");
  T result;
  std::memcpy(&result, shim::fibers[me ^ other].exchanged, sizeof(T));
  shim::yield();  // nobody writes before all have read
  return result;
}

inline void __syncthreads() {
  const int reached = ++shim::fibers[threadIdx.x].barriers;
  for (bool all = false; !all;) {
    shim::yield();
    all = true;
    for (int i = 0; i < blockDim.x; ++i) {
      const shim::Fiber& other = shim::fibers[i];
      if (other.done && other.barriers < reached) shim::fail("a thread has left before a barrier");
      all = all && other.barriers >= reached;
    }
  }
}
