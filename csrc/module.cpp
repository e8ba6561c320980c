// cl_optim._C: importing it registers the operators' CPU implementations. What is not a tensor
// goes through pybind11 here, without torch headers (torch ships a pybind11 of its own, which may
// refuse to compile beside the stable ABI).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "ewc_adamw_plan.h"
#include "multi_tensor.h"
#include "simd.h"

namespace py = pybind11;

namespace {

const char* simd_name() {
  switch (cl_optim::simd_level()) {
    case cl_optim::Simd::avx512:
      return "avx512";
    case cl_optim::Simd::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<std::tuple<int64_t, int64_t, int64_t>> pieces(const std::vector<int64_t>& numels,
                                                          int64_t begin, int64_t end) {
  const cl_optim::MultiTensor work(numels);
  std::vector<std::tuple<int64_t, int64_t, int64_t>> result;
  work.for_each(begin, std::min(end, work.units()), [&](const cl_optim::Piece& piece) {
    result.emplace_back(piece.tensor, piece.begin, piece.end);
  });
  return result;
}

// The decoded values of a block's 256 codes, by what they stand for.
template <cl_optim::Codes codes>
std::vector<float> decoded(float scale) {
  std::vector<float> values;
  for (int code = 0; code < 256; ++code) values.push_back(cl_optim::decode<codes>(code, scale));
  return values;
}

constexpr cl_optim::Launcher kLauncher{
    [](const std::vector<cl_optim::EWCAdamWTensor>&, bool) -> size_t { return 0; },
    [](const std::vector<cl_optim::EWCAdamWTensor>& tensors,
       const cl_optim::EWCAdamWOptions& options, const cl_optim::DeviceNumbers& numbers, void*,
       void*, int) { cl_optim::ewc_adamw_cpu(tensors, options, numbers); }};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of cl_optim; importing this registers them with torch.ops.cl_optim.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = CL_OPTIM_COMPILER;
        info["torch_built_against"] = CL_OPTIM_TORCH_VERSION;
        info["torch_abi_target"] = CL_OPTIM_ABI_TARGET;
        info["simd"] = simd_name();
        return info;
      },
      "What built this extension, and the vector instructions it uses on this processor.");
  m.def(
      "units",
      [](const std::vector<int64_t>& numels) { return cl_optim::MultiTensor(numels).units(); },
      py::arg("numels"), "How many units of work tensors of these sizes make.");
  m.def("pieces", &pieces, py::arg("numels"), py::arg("begin"), py::arg("end"),
        "What the units from begin to end hold: (tensor, first element, last element + 1).");
  m.def(
      "decoded",
      [](float scale) {
        using cl_optim::Codes;
        return std::vector{decoded<Codes::importance>(scale), decoded<Codes::moment>(scale),
                           decoded<Codes::signed_moment>(scale)};
      },
      py::arg("scale"),
      "What each 8-bit code stands for: of importance, of second moments, of first moments.");
  cl_optim::bind_snapshot(m);
  cl_optim::bind_plan<kLauncher>(m);
}
