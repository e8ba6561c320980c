// How CPU kernels are compiled.
#pragma once

// One binary for every x86-64 processor: the loader picks the widest version that runs. With
// CL_OPTIM_WITHOUT_AVX512, defined by CXX="c++ -D...", an AVX-512 processor measures what others
// run.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CL_OPTIM_AVX2
#ifndef CL_OPTIM_WITHOUT_AVX512
#define CL_OPTIM_AVX512
#endif
#endif

#if defined(CL_OPTIM_AVX512)
#define CL_OPTIM_SIMD_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(CL_OPTIM_AVX2)
#define CL_OPTIM_SIMD_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define CL_OPTIM_SIMD_CLONES
#endif

// The arrays of one loop never overlap; without this the compiler gives up on so many pointers.
#ifdef __clang__
#define CL_OPTIM_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define CL_OPTIM_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace cl_optim {

enum class Simd { baseline, avx2, avx512 };

// The widest instructions that are used on this processor.
inline Simd simd_level() {
#ifdef CL_OPTIM_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    return Simd::avx512;
  }
#endif
#ifdef CL_OPTIM_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Simd::avx2;
#endif
  return Simd::baseline;
}

}  // namespace cl_optim
