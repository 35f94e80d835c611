#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lora_init {

// C = scale · op(x) op(f), of which only x is big: S = s X Aᵀ, dS = s dY B, dB = dYᵀ S and
// dA = (Xᵀ dS)ᵀ, at the rate at which x is read. Pointers to device memory, 16-bit elements that
// are contiguous along the rows of x and f; strides in elements.
struct Project {
  const void *x, *f;
  void* c;
  int64_t m, k, r;
  int64_t stride_x, stride_f, stride_c_m, stride_c_r;
  bool bf16;          // else fp16
  bool transposed_x;  // x is (k, m), else (m, k); only with transposed_f
  bool transposed_f;  // f is (k, r), else (r, k)
  bool overlaps;      // may start under the launch before, which made neither x nor f
  float scale;
  int splits;  // of k, over the CTAs of a cluster: 1, 2, 4, 8, or 0: by the shape
  int device;
  cudaStream_t stream;
};

// Throws std::invalid_argument where TMA cannot address x or f: the bases and the strides of rows
// must be multiples of 16 bytes. Runs where lora_linear does.
void project(const Project& call);

}  // namespace lora_init
