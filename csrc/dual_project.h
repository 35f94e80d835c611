#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>
#include <string>

#include "dual_tiles.h"

namespace lora_init {

// What a kernel multiplies: fp16 by 16-bit factors of its own dtype, and by fp32 ones.
enum class DualProjectWeight { kFp32, kBf16, kFp16 };

// W Aᵀ and Bᵀ W of a ragged group, each W read once: in one launch, and a second where products
// have several partials or are wanted in another form. The numbers in the table are what the
// kernels run by, and are checked.
struct DualProject {
  const DualProjectLayer* table;   // in the host's memory
  const DualProjectLayer* layers;  // the same on the device, or null where it is only one
  int64_t count;
  DualProjectWeight weight;
  int ranks;              // 8, 16, 32 or 64: at least as many as any factor has
  int parts;              // of a factor, 16 bits each: 3, or 1, which rounds what is fp32
  bool factors_are_half;  // of W's own dtype, with one part; else fp32
  float scale;            // of W Aᵀ where it has a target
  bool half_targets;      // in W's dtype, else in fp32
  int device;
  cudaStream_t stream;
};

// Throws std::invalid_argument where the numbers do not fit each other or the device.
void dual_project(const DualProject& call);

// Why a device cannot run it, or nothing.
std::optional<std::string> why_no_dual_project(int device);

// Columns of a block.
int dual_project_columns(DualProjectWeight weight, int ranks, int parts);

}  // namespace lora_init
