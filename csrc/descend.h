#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>
#include <string>

namespace lora_init {

// A kernel of descend.cuh: what it takes, and how.
struct DescendVariant {
  int ranks;          // 8, 16 or 32, at least every matrix' r
  int element_bytes;  // of the matrices: 2 or 4
  bool streamed;      // read anew each step, else kept on chip
};

// Steps of Adam or plain descent on mean((W − B·A)²) for a ragged group of matrices of one dtype,
// in place and in one launch; the tables are DescendLayer and DescendLaunch. All pointers are to
// device memory.
struct Descend {
  DescendVariant variant;
  const void* layers;   // DescendLayer, one a matrix
  int64_t blocks;       // of all matrices
  int64_t most_blocks;  // of one matrix: at most `ctas`
  int64_t steps;
  const float* schedule;  // (steps, 2)
  void* workspace;        // region_bytes for each CTA, below 4 GB together
  int64_t region_bytes;   // the most that a matrix' blocks need
  void* counters;         // counter_bytes, set to zero here
  int64_t counter_bytes;
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  bool bf16;  // else fp16, of 2 bytes
  bool adam;  // else plain descent
  int ctas;   // at most descend_capacity
  int device;
  cudaStream_t stream;
};

// Throws std::invalid_argument where the numbers do not fit each other or the device.
void descend(const Descend& call);

// Why a device cannot run it, or nothing.
std::optional<std::string> why_no_descend(const DescendVariant& variant, int device);

// CTAs, of a block each, that the device runs at a time. Launches an empty kernel to find out: what
// shares the device with others has less of it than its properties say.
int descend_capacity(const DescendVariant& variant, int device);

// Rows and columns, of a block in tiles of 16 × 16, or of a matrix in blocks.
struct DescendSize {
  int rows, columns;
};

// Of a block that stays on chip, or the most of one that is streamed (0 rows: any number).
DescendSize descend_tiles(const DescendVariant& variant);

// Of each CTA, for a matrix of so many blocks of so many tiles.
int64_t descend_region_bytes(const DescendVariant& variant, DescendSize tiles, DescendSize blocks);

}  // namespace lora_init
