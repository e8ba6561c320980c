// How CPU kernels are compiled.
#pragma once

// One binary for every x86-64 processor: the loader picks the widest version that runs.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CL_OPTIM_SIMD_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CL_OPTIM_SIMD_CLONES
#endif

// The arrays of one loop never overlap; without this the compiler gives up on so many pointers.
#ifdef __clang__
#define CL_OPTIM_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define CL_OPTIM_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif
