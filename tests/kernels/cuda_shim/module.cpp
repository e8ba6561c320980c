// Launch plans whose steps run the CUDA kernels of KERNELS, a copy of ewc_adamw_cuda.cu with its
// launches rewritten, on the CPU's tensors.
#include KERNELS
#include "ewc_adamw_plan.h"

namespace {

constexpr cl_optim::Launcher kLauncher{
    cl_optim::ewc_adamw_cuda_workspace,
    [](const std::vector<cl_optim::EWCAdamWTensor>& tensors,
       const cl_optim::EWCAdamWOptions& options, const cl_optim::DeviceNumbers& numbers,
       void* workspace, void* stream,
       int) { cl_optim::ewc_adamw_cuda(tensors, options, numbers, workspace, stream); }};

PyModuleDef definition{PyModuleDef_HEAD_INIT, "emulated", nullptr, -1};

}  // namespace

PyMODINIT_FUNC PyInit_emulated() {
  return cl_optim::make_module(
      definition, [](PyObject* module) { cl_optim::add_plan<kLauncher>(module, "emulated.Plan"); });
}
