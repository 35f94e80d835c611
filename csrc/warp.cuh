// What the kernels on mma.sync use of the machine, as functions. tests/simt.h has the same ones for
// the host.
#pragma once

#ifndef __CUDACC__
#include "simt.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lora_init::warp {

struct alignas(16) Words {
  uint32_t x[4];
};
struct alignas(16) Floats {
  float x[4];
};

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 × 8 matrices, their rows where the lanes point: two elements of a row a lane.
__device__ __forceinline__ Words load_matrix(const void* pointer) {
  Words w;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x[0]), "=r"(w.x[1]), "=r"(w.x[2]), "=r"(w.x[3])
               : "r"(shared_address(pointer))
               : "memory");
  return w;
}

// Two elements of a column a lane.
__device__ __forceinline__ Words load_transposed(const void* pointer) {
  Words w;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x[0]), "=r"(w.x[1]), "=r"(w.x[2]), "=r"(w.x[3])
               : "r"(shared_address(pointer))
               : "memory");
  return w;
}

// An 8 × 8 matrix in registers, from the first form to the second.
__device__ __forceinline__ uint32_t transpose(uint32_t word) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
}

// 16 bytes from global to shared memory, zeros unless `inside`; past the L1.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}

// The first `bytes` of 16, then zeros.
__device__ __forceinline__ void copy_async_bytes(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

// The same of what is not read again soon: it is the first to leave the L2.
__device__ __forceinline__ void stream_async(void* to, const void* from, int bytes) {
  asm volatile(
      "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
      " cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, policy;}" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Makes a group of the thread's copies since the group before.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// For all but the last so many groups.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same of at most 7, known when it runs.
__device__ __forceinline__ void wait_copies(int pending) {
  switch (pending) {
    case 7:
      return wait_copies<7>();
    case 6:
      return wait_copies<6>();
    case 5:
      return wait_copies<5>();
    case 4:
      return wait_copies<4>();
    case 3:
      return wait_copies<3>();
    case 2:
      return wait_copies<2>();
    case 1:
      return wait_copies<1>();
    default:
      return wait_copies<0>();
  }
}

// What CTAs leave for each other: of all 16 bytes or of none, in no order with other 16 bytes.
__device__ __forceinline__ Words load_whole(const void* pointer) {
  Words w;
  asm volatile(
      "{.reg .b128 whole; .reg .b64 low, high; ld.relaxed.gpu.global.b128 whole, [%4];"
      " mov.b128 {low, high}, whole; mov.b64 {%0, %1}, low; mov.b64 {%2, %3}, high;}"
      : "=r"(w.x[0]), "=r"(w.x[1]), "=r"(w.x[2]), "=r"(w.x[3])
      : "l"(pointer)
      : "memory");
  return w;
}
__device__ __forceinline__ void store_whole(void* pointer, const Words& w) {
  asm volatile(
      "{.reg .b128 whole; .reg .b64 low, high; mov.b64 low, {%1, %2}; mov.b64 high, {%3, %4};"
      " mov.b128 whole, {low, high}; st.relaxed.gpu.global.b128 [%0], whole;}" ::"l"(pointer),
      "r"(w.x[0]), "r"(w.x[1]), "r"(w.x[2]), "r"(w.x[3])
      : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* pointer) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}

// Before `add`, and after what all threads wrote and a sync_threads.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ __forceinline__ void add(uint32_t* pointer) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(pointer) : "memory");
}

__device__ __forceinline__ void stop() { __trap(); }

__device__ __forceinline__ void sync_threads() { __syncthreads(); }
// Of the CTA's warps; the compiler cannot know of a quotient that it is one for all lanes.
__device__ __forceinline__ int index() { return __shfl_sync(0xffffffff, threadIdx.x / 32, 0); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ bool any(bool here) { return __any_sync(0xffffffff, here); }

// Of the lane that has number `lane` among `width` neighbours.
__device__ __forceinline__ float from_lane(float value, int lane, int width) {
  return __shfl_sync(0xffffffff, value, lane, width);
}

// Of normal numbers to 2 and 1 units in the last place; IEEE's were most of an update's time.
__device__ __forceinline__ float divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ float root(float a) {
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

struct Bf16 {
  static __device__ __forceinline__ uint16_t round(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
  // Two, the first in the lower half.
  static __device__ __forceinline__ uint32_t round(float x, float y) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  static __device__ __forceinline__ float value(uint16_t x) {
    return __bfloat162float(__ushort_as_bfloat16(x));
  }
  // d (16 × 8) += a (16 × 16) b (16 × 8)
  static __device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

struct Fp16 {
  static __device__ __forceinline__ uint16_t round(float x) {
    return __half_as_ushort(__float2half_rn(x));
  }
  static __device__ __forceinline__ uint32_t round(float x, float y) {
    const __half2 both = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  static __device__ __forceinline__ float value(uint16_t x) {
    return __half2float(__ushort_as_half(x));
  }
  static __device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

}  // namespace lora_init::warp

#endif
