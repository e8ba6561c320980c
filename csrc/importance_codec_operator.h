// Whole tensors to the 8-bit codes of importance and back: for consolidation and for files.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "importance_codec.h"

namespace cl_optim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The numbers are float32 and contiguous; a block of codes may be begun.
void encode_log8_cpu(const float* values, int64_t count, PackedBlock* blocks);
void decode_log8_cpu(const PackedBlock* blocks, int64_t count, float* values);

inline void check_log8(const char* operation, const Tensor& packed, const Tensor& values) {
  const bool fits = packed.dim() == 2 && packed.size(1) == sizeof(PackedBlock) &&
                    packed.size(0) == (values.numel() + kBlock - 1) / kBlock;
  if (!fits || packed.scalar_type() != ScalarType::Byte || !packed.is_contiguous()) {
    throw std::runtime_error(std::string(operation) +
                             ": packed must be contiguous uint8 [ceil(n / 256), 260]");
  }
  if (values.scalar_type() != ScalarType::Float || !values.is_contiguous()) {
    throw std::runtime_error(std::string(operation) + ": values must be contiguous float32");
  }
}

inline void log8_encode_(const Tensor& packed, const Tensor& values) {
  check_log8("log8_encode_", packed, values);
  encode_log8_cpu(static_cast<const float*>(values.const_data_ptr()), values.numel(),
                  static_cast<PackedBlock*>(packed.mutable_data_ptr()));
}

inline void log8_decode_(const Tensor& values, const Tensor& packed) {
  check_log8("log8_decode_", packed, values);
  decode_log8_cpu(static_cast<const PackedBlock*>(packed.const_data_ptr()), values.numel(),
                  static_cast<float*>(values.mutable_data_ptr()));
}

inline void implement_log8(torch::stable::detail::StableLibrary& m) {
  m.impl("log8_encode_", TORCH_BOX(&log8_encode_));
  m.impl("log8_decode_", TORCH_BOX(&log8_decode_));
}

}  // namespace cl_optim
