// cl_optim._C_cuda: importing it registers the operators of library_cuda.cpp. No torch headers, as
// in module.cpp.
#include <pybind11/pybind11.h>

#include "ewc_adamw_plan.h"

namespace py = pybind11;

namespace {

constexpr cl_optim::Launcher kLauncher{
    cl_optim::ewc_adamw_cuda_workspace,
    [](const std::vector<cl_optim::EWCAdamWTensor>& tensors,
       const cl_optim::EWCAdamWOptions& options, const cl_optim::DeviceNumbers& numbers,
       void* workspace, void* stream, int device) {
      cl_optim::ewc_adamw_cuda_on(device, tensors, options, numbers, workspace, stream);
    }};

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of cl_optim; importing this registers them with torch.ops.cl_optim.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = CL_OPTIM_NVCC;
        info["torch_built_against"] = CL_OPTIM_TORCH_VERSION;
        info["torch_abi_target"] = CL_OPTIM_ABI_TARGET;
        info["architectures"] = CL_OPTIM_CUDA_ARCHS;
        return info;
      },
      "What built these kernels, and for which GPUs.");
  cl_optim::bind_plan<kLauncher>(m);
}
