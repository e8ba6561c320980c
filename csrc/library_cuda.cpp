// The operators' CUDA implementations, on LibTorch's stable ABI. An object of its own, _C_cuda: one
// linked with libtorch_cuda cannot be loaded under a torch without CUDA.
#include <torch/csrc/stable/accelerator.h>

#include "ewc_adamw_launch.h"
#include "ewc_adamw_operator.h"

namespace cl_optim {
namespace {

void launch(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
            const Tensor& on_device) {
  const int32_t device = on_device.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  // Back to the caching allocator at the end of the call, which hands it out in stream order.
  const auto bytes = static_cast<int64_t>(ewc_adamw_cuda_workspace(tensors.size()));
  const Tensor workspace =
      torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, on_device.device());
  ewc_adamw_cuda(tensors, options, workspace.mutable_data_ptr(), stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cl_optim, CUDA, m) { implement_ewc_adamw<launch>(m); }

}  // namespace cl_optim
