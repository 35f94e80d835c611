#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lora_init {

// Steps of Adam or plain descent on mean((W − B·A)²) for a ragged group of 16-bit matrices, in
// place and in one launch; the tables are descend.cuh's DescendLayer and DescendLaunch. All
// pointers are to device memory.
struct Descend {
  const void* layers;   // DescendLayer, one a matrix
  int64_t blocks;       // of all matrices
  int64_t most_blocks;  // of one matrix: at most `ctas`
  int64_t steps;
  const float* schedule;  // (steps, 2)
  void* workspace;        // descend_region_bytes(ranks) for each CTA
  void* counters;         // counter_bytes, set to zero here
  int64_t counter_bytes;
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  int ranks;  // 8 or 16, at least every matrix' r
  bool bf16;  // else fp16
  bool adam;  // else plain descent
  int ctas;   // at most descend_capacity
  int device;
  cudaStream_t stream;
};

// Throws std::invalid_argument where the numbers do not fit each other or the device.
void descend(const Descend& call);

// Blocks of 256 × 256 that a device holds at a time.
int descend_capacity(int ranks, int device);

int64_t descend_region_bytes(int ranks);

}  // namespace lora_init
