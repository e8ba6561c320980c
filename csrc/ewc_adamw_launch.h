// The launchers that the operator's implementations call, one per device.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "ewc_adamw.h"

namespace cl_optim {

inline Penalty parse_penalty(const std::string& name) {
  if (name == "gradient") return Penalty::gradient;
  if (name == "decoupled") return Penalty::decoupled;
  if (name == "proximal") return Penalty::proximal;
  throw std::runtime_error(
      "ewc_adamw_: penalty must be 'gradient', 'decoupled' or 'proximal', not '" + name + "'");
}

// Advances every tensor's step count and updates it. The arrays are in host memory.
void ewc_adamw_cpu(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
                   const DeviceNumbers& numbers);

// The same for arrays in the memory of the current CUDA device, on a cudaStream_t; returns before
// the work is done. The workspace has as many bytes as the function below says, and stays until
// then; tensors may share it in the order of the stream.
void ewc_adamw_cuda(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
                    const DeviceNumbers& numbers, void* workspace, void* stream);
size_t ewc_adamw_cuda_workspace(const std::vector<EWCAdamWTensor>& tensors, bool sums);

// ewc_adamw_cuda on the device of an index, which it makes the current one for the time.
void ewc_adamw_cuda_on(int device, const std::vector<EWCAdamWTensor>& tensors,
                       const EWCAdamWOptions& options, const DeviceNumbers& numbers,
                       void* workspace, void* stream);

}  // namespace cl_optim
