// For wheels alone: what newer compilers and C libraries would have the extension need, in the
// versions of glibc 2.28 and GCC 8, so that it loads wherever manylinux_2_28 does. The linker is
// told to --wrap what has an older version.
#include <new>
#include <sstream>

#if defined(__aarch64__)
#define CL_OPTIM_FIRST_GLIBC "GLIBC_2.17"
#else
#define CL_OPTIM_FIRST_GLIBC "GLIBC_2.2.5"
#endif

// Made here, where libstdc++'s own are of GCC 9 and 11.
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

extern "C" {

// 0: reference counts are atomic, whoever counts.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

double cl_optim_pow(double, double);
__asm__(".symver cl_optim_pow,pow@" CL_OPTIM_FIRST_GLIBC);
double __wrap_pow(double base, double exponent) { return cl_optim_pow(base, exponent); }

void* cl_optim_dlsym(void*, const char*);
__asm__(".symver cl_optim_dlsym,dlsym@" CL_OPTIM_FIRST_GLIBC);
void* __wrap_dlsym(void* library, const char* symbol) { return cl_optim_dlsym(library, symbol); }
}
