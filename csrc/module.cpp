// cl_optim._C: importing it registers the operators of library.cpp. What is not a tensor goes
// through pybind11 here, without torch headers (torch ships a pybind11 of its own, which may
// refuse to compile beside the stable ABI).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "multi_tensor.h"

namespace py = pybind11;

namespace {

const char* simd_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    return "avx512";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "baseline";
}

std::vector<std::tuple<int64_t, int64_t, int64_t>> chunks(const std::vector<int64_t>& numels,
                                                          int64_t chunk_size, int64_t begin,
                                                          int64_t end) {
  const cl_optim::ChunkTable table(numels, chunk_size);
  std::vector<std::tuple<int64_t, int64_t, int64_t>> result;
  table.for_each(begin, std::min(end, table.size()), [&](const cl_optim::Chunk& chunk) {
    result.emplace_back(chunk.tensor, chunk.begin, chunk.size);
  });
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of cl_optim; importing this registers torch.ops.cl_optim.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = CL_OPTIM_COMPILER;
        info["torch_built_against"] = CL_OPTIM_TORCH_VERSION;
        info["torch_abi_target"] = CL_OPTIM_ABI_TARGET;
        info["simd"] = simd_level();
        return info;
      },
      "What built this extension, and the vector instructions it uses on this processor.");
  m.def("chunks", &chunks, py::arg("numels"), py::arg("chunk_size"), py::arg("begin") = 0,
        py::arg("end") = INT64_MAX,
        "The pieces of work (tensor, first element, elements) with indices begin to end.");
}
