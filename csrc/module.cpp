// cl_optim._C: importing it registers the operators' CPU implementations. What is not a tensor
// goes through python.h here, without torch headers.
#include <algorithm>
#include <tuple>
#include <vector>

#include "ewc_adamw_plan.h"
#include "multi_tensor.h"
#include "simd.h"

namespace {

using cl_optim::arguments;
using cl_optim::from_python;
using cl_optim::guarded;
using cl_optim::method;
using cl_optim::Object;
using cl_optim::to_python;

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

PyObject* build_info(PyObject*, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    arguments<0>(args, kwargs);
    return cl_optim::dict({{"compiler", CL_OPTIM_COMPILER},
                           {"torch_built_against", CL_OPTIM_TORCH_VERSION},
                           {"torch_abi_target", CL_OPTIM_ABI_TARGET},
                           {"simd", simd_name()}});
  });
}

PyObject* units(PyObject*, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    const auto [numels] = arguments<1>(args, kwargs, {"numels"});
    return cl_optim::MultiTensor(from_python<std::vector<int64_t>>(numels)).units();
  });
}

PyObject* pieces_of(PyObject*, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    const auto [numels, begin, end] = arguments<3>(args, kwargs, {"numels", "begin", "end"});
    return pieces(from_python<std::vector<int64_t>>(numels), from_python<int64_t>(begin),
                  from_python<int64_t>(end));
  });
}

PyObject* decoded_codes(PyObject*, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    using cl_optim::Codes;
    const auto [given] = arguments<1>(args, kwargs, {"scale"});
    const auto scale = static_cast<float>(from_python<double>(given));
    return std::vector{decoded<Codes::importance>(scale), decoded<Codes::moment>(scale),
                       decoded<Codes::signed_moment>(scale)};
  });
}

PyMethodDef functions[] = {
    method("build_info", build_info,
           "What built this extension, and the vector instructions it uses on this processor."),
    method("units", units, "How many units of work tensors of these sizes make."),
    method("pieces", pieces_of,
           "What the units from begin to end hold: (tensor, first element, last element + 1)."),
    method("decoded", decoded_codes,
           "What each 8-bit code stands for: of importance, of second moments, of first moments."),
    {}};

PyModuleDef definition{
    PyModuleDef_HEAD_INIT, "cl_optim._C",
    "CPU kernels of cl_optim; importing this registers them with torch.ops.cl_optim.", -1,
    functions};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return cl_optim::make_module(definition, [](PyObject* module) {
    cl_optim::add_snapshot(module);
    cl_optim::add_plan<kLauncher>(module, "cl_optim._C.Plan");
  });
}
