// The launchers that the operator's implementations call, one per device.
#pragma once

#include <vector>

#include "ewc_adamw.h"

namespace cl_optim {

// Advances every tensor's step count and updates it. The arrays are in host memory.
void ewc_adamw_cpu(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options);

}  // namespace cl_optim
