// Blocks of codes on the CPU, one after another.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "importance_codec_operator.h"
#include "simd.h"

namespace cl_optim {
namespace {

constexpr int64_t kBlocksPerThread = 64;

CL_OPTIM_SIMD_CLONES void encode_block(const float* values, int64_t count, PackedBlock& block) {
  const float scale = block.scale = block_scale(largest_magnitude(values, count));
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

}  // namespace

void encode_log8_cpu(const float* values, int64_t count, PackedBlock* blocks) {
  for_each_block(count, [&](int64_t block, int64_t elements) {
    encode_block(values + block * kBlock, elements, blocks[block]);
  });
}

void decode_log8_cpu(const PackedBlock* blocks, int64_t count, float* values) {
  for_each_block(count, [&](int64_t block, int64_t elements) {
    decode_block(blocks[block], elements, values + block * kBlock);
  });
}

}  // namespace cl_optim
