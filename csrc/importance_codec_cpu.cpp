// Whole tensors to the 8-bit codes of importance and back, for consolidation and for files: blocks
// of codes, one after another.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "check.h"
#include "formats.h"
#include "simd.h"

namespace cl_optim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlocksPerThread = 64;

CL_OPTIM_SIMD_CLONES void encode_block(const float* values, int64_t count, PackedBlock& block) {
  const float scale = block.scale = importance_scale(largest_magnitude(values, count));
  for (int64_t i = 0; i < count; ++i) block.codes[i] = encode_log8(values[i], scale);
  for (int64_t i = count; i < kBlock; ++i) block.codes[i] = 0;
}

CL_OPTIM_SIMD_CLONES void decode_block(const PackedBlock& block, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) {
    // What is frozen has no importance of its own here.
    values[i] = std::fabs(decode_log8(block.codes[i], block.scale));
  }
}

template <typename F>
void for_each_block(int64_t count, F&& f) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, kBlocksPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      f(block, std::min(kBlock, count - block * kBlock));
    }
  });
}

void check_log8(const Check& check, const Tensor& packed, const Tensor& values) {
  check(packed.dim() == 2 && are_blocks(packed.size(0), packed.size(1), values.numel()) &&
            packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
        "packed must be contiguous uint8 [ceil(n / 256), 260]");
  check(values.scalar_type() == ScalarType::Float && values.is_contiguous(),
        "values must be contiguous float32");
}

void log8_encode_(const Tensor& packed, const Tensor& values) {
  check_log8({"log8_encode_"}, packed, values);
  const auto* from = static_cast<const float*>(values.const_data_ptr());
  auto* blocks = static_cast<PackedBlock*>(packed.mutable_data_ptr());
  for_each_block(values.numel(), [&](int64_t block, int64_t elements) {
    encode_block(from + block * kBlock, elements, blocks[block]);
  });
}

void log8_decode_(const Tensor& values, const Tensor& packed) {
  check_log8({"log8_decode_"}, packed, values);
  const auto* blocks = static_cast<const PackedBlock*>(packed.const_data_ptr());
  auto* to = static_cast<float*>(values.mutable_data_ptr());
  for_each_block(values.numel(), [&](int64_t block, int64_t elements) {
    decode_block(blocks[block], elements, to + block * kBlock);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cl_optim, CPU, m) {
  m.impl("log8_encode_", TORCH_BOX(&log8_encode_));
  m.impl("log8_decode_", TORCH_BOX(&log8_decode_));
}

}  // namespace cl_optim
