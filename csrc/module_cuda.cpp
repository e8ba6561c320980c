// cl_optim._C_cuda: importing it registers the operators of library_cuda.cpp. No torch headers, as
// in module.cpp.
#include "ewc_adamw_plan.h"

namespace {

constexpr cl_optim::Launcher kLauncher{
    cl_optim::ewc_adamw_cuda_workspace,
    [](const std::vector<cl_optim::EWCAdamWTensor>& tensors,
       const cl_optim::EWCAdamWOptions& options, const cl_optim::DeviceNumbers& numbers,
       void* workspace, void* stream, int device) {
      cl_optim::ewc_adamw_cuda_on(device, tensors, options, numbers, workspace, stream);
    }};

PyObject* build_info(PyObject*, PyObject* args, PyObject* kwargs) {
  return cl_optim::guarded([&] {
    cl_optim::arguments<0>(args, kwargs);
    return cl_optim::dict({{"compiler", CL_OPTIM_NVCC},
                           {"torch_built_against", CL_OPTIM_TORCH_VERSION},
                           {"torch_abi_target", CL_OPTIM_ABI_TARGET},
                           {"architectures", CL_OPTIM_CUDA_ARCHS}});
  });
}

PyMethodDef functions[] = {
    cl_optim::method("build_info", build_info, "What built these kernels, and for which GPUs."),
    {}};

PyModuleDef definition{
    PyModuleDef_HEAD_INIT, "cl_optim._C_cuda",
    "CUDA kernels of cl_optim; importing this registers them with torch.ops.cl_optim.", -1,
    functions};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() {
  return cl_optim::make_module(definition, [](PyObject* module) {
    cl_optim::add_plan<kLauncher>(module, "cl_optim._C_cuda.Plan");
  });
}
