// The operators' CUDA implementations that are not in Triton, on LibTorch's stable ABI, in an
// object of their own, _C_cuda: one linked with libtorch_cuda cannot be loaded under a torch
// without CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "ewc_adamw_launch.h"
#include "ewc_adamw_operator.h"
#include "nnqp_operator.h"

namespace cl_optim {
namespace {

// What a launch on a tensor's device needs: the device made current, its stream, and memory that
// goes back to the caching allocator at the end, which hands it out in the order of the stream.
struct Device {
  Device(const Tensor& on_device, size_t workspace_bytes)
      : guard(on_device.get_device_index()),
        workspace(torch::stable::empty({static_cast<int64_t>(workspace_bytes)}, ScalarType::Byte,
                                       std::nullopt, on_device.device())) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(on_device.get_device_index(), &stream));
  }

  torch::stable::accelerator::DeviceGuard guard;
  Tensor workspace;
  void* stream = nullptr;
};

void launch(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
            const DeviceNumbers& numbers, const Tensor& on_device) {
  const Device device(on_device, ewc_adamw_cuda_workspace(tensors, numbers.sums != nullptr));
  ewc_adamw_cuda(tensors, options, numbers, device.workspace.mutable_data_ptr(), device.stream);
}

void launch_nnqp(const NNQPBatch& batch, const NNQPOptions& options, const Tensor& on_device) {
  const torch::stable::accelerator::DeviceGuard guard(on_device.get_device_index());
  const Device device(on_device, nnqp_cuda_workspace(batch.count, batch.size));
  nnqp_cuda(batch, options, device.workspace.mutable_data_ptr(), device.stream);
}

}  // namespace

void ewc_adamw_cuda_on(int device, const std::vector<EWCAdamWTensor>& tensors,
                       const EWCAdamWOptions& options, const DeviceNumbers& numbers,
                       void* workspace, void* stream) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  ewc_adamw_cuda(tensors, options, numbers, workspace, stream);
}

STABLE_TORCH_LIBRARY_IMPL(cl_optim, CUDA, m) {
  m.impl("ewc_adamw_", &ewc_adamw_<launch>);
  m.impl("ewc_pull_", &ewc_pull_<launch>);
  m.impl("nnqp", TORCH_BOX(&nnqp<launch_nnqp>));
}

}  // namespace cl_optim
