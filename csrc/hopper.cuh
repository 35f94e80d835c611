// sm_90a instructions as functions, named after their PTX.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace lora_init::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Every thread of every CTA of the cluster arrives and waits.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// The same without what was written becoming visible, which waits for stores to global memory.
__device__ __forceinline__ void cluster_sync_relaxed() {
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait;" ::
          : "memory");
}

// What CTA `rank` of the cluster has at the address of *pointer in this one's shared memory.
__device__ __forceinline__ float load_from_cta(const float* pointer, uint32_t rank) {
  float value;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n"
      "}"
      : "=f"(value)
      : "r"(shared_address(pointer)), "r"(rank)
      : "memory");
  return value;
}

// Launches that may overlap the one before them in the stream

// When every CTA has said so, those of the next launch may start where there is room.
__device__ __forceinline__ void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until the launch before has ended and its writes are visible; at once if this launch may not
// overlap it.
__device__ __forceinline__ void wait_for_previous_launch() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Barriers in shared memory

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// Makes mbarrier_init visible to the other CTAs and to TMA; a cluster_sync must follow.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives at the same barrier of CTA `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}

// Until the phase of that parity is complete. With LORA_INIT_BOUNDED_WAITS a deadlock is a trap
// after a second, not a hang.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef LORA_INIT_BOUNDED_WAITS
  const long long start = clock64();
  while (!mbarrier_try_wait(barrier, parity))
    if (clock64() - start > 1ll << 31) __trap();
#else
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#endif
}

// TMA

__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at (column, row) into shared memory; what lies outside the tensor is filled with zeros
// and counts among the bytes that `barrier` expects. With a mask of several CTAs, into each of them
// at the same offset, with that CTA's barrier.
template <bool MULTICAST>
__device__ __forceinline__ void tma_load(const CUtensorMap* map, void* to, uint64_t* barrier,
                                         int column, int row, uint16_t mask) {
  if constexpr (MULTICAST) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(mask)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
  }
}

// The box at (column, row) from shared memory; what lies outside the tensor is not written.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* from, int column,
                                          int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared_address(from)), "r"(column), "r"(row)
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all but the last PENDING stores of this thread have read their shared memory.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Before TMA reads what this thread wrote to shared memory.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Tensor cores

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// clang-format off
#define LORA_INIT_TEXT8(a, b, c, d, e, f, g, h) \
  "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define LORA_INIT_TEXT32                          \
  LORA_INIT_TEXT8(0, 1, 2, 3, 4, 5, 6, 7) ","         \
  LORA_INIT_TEXT8(8, 9, 10, 11, 12, 13, 14, 15) ","   \
  LORA_INIT_TEXT8(16, 17, 18, 19, 20, 21, 22, 23) "," \
  LORA_INIT_TEXT8(24, 25, 26, 27, 28, 29, 30, 31)
#define LORA_INIT_TEXT64                          \
  LORA_INIT_TEXT32 ","                                \
  LORA_INIT_TEXT8(32, 33, 34, 35, 36, 37, 38, 39) "," \
  LORA_INIT_TEXT8(40, 41, 42, 43, 44, 45, 46, 47) "," \
  LORA_INIT_TEXT8(48, 49, 50, 51, 52, 53, 54, 55) "," \
  LORA_INIT_TEXT8(56, 57, 58, 59, 60, 61, 62, 63)
#define LORA_INIT_TEXT128                                   \
  LORA_INIT_TEXT64 ","                                          \
  LORA_INIT_TEXT8(64, 65, 66, 67, 68, 69, 70, 71) ","           \
  LORA_INIT_TEXT8(72, 73, 74, 75, 76, 77, 78, 79) ","           \
  LORA_INIT_TEXT8(80, 81, 82, 83, 84, 85, 86, 87) ","           \
  LORA_INIT_TEXT8(88, 89, 90, 91, 92, 93, 94, 95) ","           \
  LORA_INIT_TEXT8(96, 97, 98, 99, 100, 101, 102, 103) ","       \
  LORA_INIT_TEXT8(104, 105, 106, 107, 108, 109, 110, 111) ","   \
  LORA_INIT_TEXT8(112, 113, 114, 115, 116, 117, 118, 119) ","   \
  LORA_INIT_TEXT8(120, 121, 122, 123, 124, 125, 126, 127)
#define LORA_INIT_OUT8(i)                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
  "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LORA_INIT_OUT32(i) \
  LORA_INIT_OUT8(i), LORA_INIT_OUT8(i + 8), LORA_INIT_OUT8(i + 16), LORA_INIT_OUT8(i + 24)
#define LORA_INIT_OUT64(i) LORA_INIT_OUT32(i), LORA_INIT_OUT32(i + 32)
// clang-format on
#define LORA_INIT_WGMMA(N, TYPE, TEXT, A, B, SCALE, A_MAJOR, B_MAJOR, ...)                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #SCALE                                 \
               ", 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" TEXT \
               "},"                                                                        \
               " %" #A ", %" #B ", p, 1, 1, %" #A_MAJOR ", %" #B_MAJOR ";\n}"              \
               : __VA_ARGS__                                                               \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(A_M_MAJOR)), "n"(int(B_N_MAJOR)))

// d (64, 2·SIZE) = a b + d, or a b where `accumulate` is false: 16 k of a (64, 16) and of b, each
// K-major or not. d may be touched only after wgmma_wait, and is ready for it after wgmma_fence.
template <typename T, bool A_M_MAJOR, bool B_N_MAJOR, int SIZE>
__device__ __forceinline__ void wgmma(float (&d)[SIZE], uint64_t a, uint64_t b, bool accumulate) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBf16 || std::is_same_v<T, __half>);
  static_assert(SIZE == 128 || SIZE == 64 || SIZE == 32);
  if constexpr (SIZE == 128 && kBf16) {
    LORA_INIT_WGMMA(256, bf16, LORA_INIT_TEXT128, 128, 129, 130, 131, 132, LORA_INIT_OUT64(0),
                    LORA_INIT_OUT64(64));
  } else if constexpr (SIZE == 128) {
    LORA_INIT_WGMMA(256, f16, LORA_INIT_TEXT128, 128, 129, 130, 131, 132, LORA_INIT_OUT64(0),
                    LORA_INIT_OUT64(64));
  } else if constexpr (SIZE == 64 && kBf16) {
    LORA_INIT_WGMMA(128, bf16, LORA_INIT_TEXT64, 64, 65, 66, 67, 68, LORA_INIT_OUT64(0));
  } else if constexpr (SIZE == 64) {
    LORA_INIT_WGMMA(128, f16, LORA_INIT_TEXT64, 64, 65, 66, 67, 68, LORA_INIT_OUT64(0));
  } else if constexpr (kBf16) {
    LORA_INIT_WGMMA(64, bf16, LORA_INIT_TEXT32, 32, 33, 34, 35, 36, LORA_INIT_OUT32(0));
  } else {
    LORA_INIT_WGMMA(64, f16, LORA_INIT_TEXT32, 32, 33, 34, 35, 36, LORA_INIT_OUT32(0));
  }
}

#undef LORA_INIT_WGMMA
#undef LORA_INIT_OUT64
#undef LORA_INIT_OUT32
#undef LORA_INIT_OUT8
#undef LORA_INIT_TEXT128
#undef LORA_INIT_TEXT64
#undef LORA_INIT_TEXT32
#undef LORA_INIT_TEXT8

// Four 8 × 8 matrices of 16-bit elements from a warp's registers: lane 8·i + j gives the address of
// row j of matrix i.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&registers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

// Registers

template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

}  // namespace lora_init::hopper
