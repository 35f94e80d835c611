#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lora_init {

// y = x Rᵀ + S Bᵀ + bias, or with `transposed` y = x R + S B: the forward, and dX = dY R + dS A.
// Pointers to device memory; 16-bit elements that are contiguous along a row; strides of rows in
// elements. x (m, k), S (m, r), y (m, n); R (n, k) and B (n, r), or R (k, n) and B (r, n).
struct LoraLinear {
  const void *x, *R, *S, *B;
  const void* bias;  // (n), or null
  void* y;
  int64_t m, n, k, r;
  int64_t stride_x, stride_R, stride_S, stride_B, stride_y;
  bool bf16;  // else fp16
  bool transposed;
  bool overlaps;  // only S comes from the launch before, which this one may start under
  int tile_n;     // 128 or 256 columns a CTA, 0: by the shape
  int cluster;    // CTAs that share their part of R, 1 or 2, 0: by the shape
  int device;
  cudaStream_t stream;
};

// Throws std::invalid_argument where TMA cannot address an operand: the bases and the strides of
// rows must be multiples of 16 bytes, n and k of 8.
void lora_linear(const LoraLinear& call);

}  // namespace lora_init
