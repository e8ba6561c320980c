// Denormal numbers as zeros, while a kernel runs.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace cl_optim {

// Takes denormal numbers for 0 in this thread until it ends, and leaves none. Moments of units that
// get no gradient any more decay to such, with which Intel's cores calculate many times slower.
class DenormalsAsZeros {
 public:
  DenormalsAsZeros() : before_(control()) { set_control(before_ | kZeros); }
  ~DenormalsAsZeros() { set_control(before_); }
  DenormalsAsZeros(const DenormalsAsZeros&) = delete;
  DenormalsAsZeros& operator=(const DenormalsAsZeros&) = delete;

 private:
#if defined(__x86_64__)
  using Control = unsigned int;
  static constexpr Control kZeros = 0x8040;  // of what is written, and of what is read
  static Control control() { return _mm_getcsr(); }
  static void set_control(Control value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
  using Control = uint64_t;
  static constexpr Control kZeros = uint64_t{1} << 24;
  static Control control() {
    Control value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set_control(Control value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
  using Control = int;
  static constexpr Control kZeros = 0;
  static Control control() { return 0; }
  static void set_control(Control) {}
#endif

  const Control before_;
};

}  // namespace cl_optim
