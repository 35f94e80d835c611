// The skinny products of an adapted layer, C (m, r) = scale · op(x) op(f), where x is read once and
// everything else hides behind that.
//
// A CTA has a tile of 128 × 64 ranks: one warp issues TMA loads into a ring of stages, and two
// warpgroups multiply 64 rows each (wgmma). The k of a tile are split over the CTAs of a cluster,
// so that few rows keep the whole GPU reading too; their partial sums are added in a fixed order,
// from shared memory to shared memory.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "checks.h"
#include "gemm_tiles.h"
#include "hopper.cuh"
#include "project.h"
#include "tensor_map.h"

namespace lora_init {
namespace {

using namespace gemm;

constexpr const char* kOp = "project";
constexpr int kThreads = 128 * kConsumers + 32;
constexpr int kMostSplits = 8;  // CTAs that every GPU takes in a cluster

struct Operands {
  CUtensorMap x, f;
  void* c;
  int64_t stride_c_m, stride_c_r;
  int m, k, r;
  int box_f;  // bytes
  float scale;
};

struct Shared {
  alignas(kAtomBytes) uint8_t stages[kProjectStages][kProjectStageBytes];
  uint64_t full[kProjectStages], empty[kProjectStages];
};
constexpr int kSharedBytes = sizeof(Shared) + kAtomBytes;  // its start is aligned at run time
static_assert(2 * (kSharedBytes + 1024) <= 228 << 10, "two CTAs to a multiprocessor");
static_assert(kTileM * kPartialPitch * sizeof(float) <= sizeof(Shared::stages));

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct Work {
  int m, rank;              // the first of the tile
  int first_chunk, chunks;  // of k
};

template <bool TRANSPOSED_X, bool TRANSPOSED_F>
__device__ void produce(const Operands& operands, Shared& shared, const Work& work) {
  for (int i = 0; i < work.chunks; ++i) {
    const int stage = i % kProjectStages, k = (work.first_chunk + i) * kTileK;
    uint64_t* const full = &shared.full[stage];
    uint8_t* const x = shared.stages[stage];
    uint8_t* const f = x + kTileABytes;
    hopper::mbarrier_wait(&shared.empty[stage], i / kProjectStages % 2 ^ 1);
    hopper::mbarrier_arrive_expect(full, kTileABytes + operands.box_f);
    if constexpr (TRANSPOSED_X) {
      for (int consumer = 0; consumer < kConsumers; ++consumer)
        hopper::tma_load<false>(&operands.x, x + consumer * kBlockBytes, full,
                                work.m + consumer * 64, k, 0);
    } else {
      hopper::tma_load<false>(&operands.x, x, full, k, work.m, 0);
    }
    if constexpr (TRANSPOSED_F) {
      hopper::tma_load<false>(&operands.f, f, full, work.rank, k, 0);
    } else {
      hopper::tma_load<false>(&operands.f, f, full, k, work.rank, 0);
    }
  }
}

// Adds a warpgroup's 64 rows of the tile.
template <typename T, bool TRANSPOSED_X, bool TRANSPOSED_F>
__device__ void consume(Shared& shared, const Work& work, int consumer,
                        float (&accumulators)[kRanks / 2]) {
  constexpr int kStepX = TRANSPOSED_X ? kStepMNMajor : kStepKMajor;
  constexpr int kStepF = TRANSPOSED_F ? kStepMNMajor : kStepKMajor;
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < work.chunks; ++i) {
    const int stage = i % kProjectStages;
    hopper::mbarrier_wait(&shared.full[stage], i / kProjectStages % 2);
    const uint32_t x = hopper::shared_address(shared.stages[stage]) + consumer * kBlockBytes;
    const uint32_t f = hopper::shared_address(shared.stages[stage]) + kTileABytes;
    hopper::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileK / kStepK; ++step) {
      const uint32_t at_x = x + step * kStepX, at_f = f + step * kStepF;
      hopper::wgmma<T, TRANSPOSED_X, TRANSPOSED_F>(
          accumulators, TRANSPOSED_X ? mn_major(at_x) : k_major(at_x),
          TRANSPOSED_F ? mn_major(at_f) : k_major(at_f), true);
    }
    hopper::wgmma_commit();
    hopper::wgmma_wait<1>();
    if (i > 0 && lane == 0) hopper::mbarrier_arrive(&shared.empty[(i - 1) % kProjectStages]);
  }
  hopper::wgmma_wait<0>();
}

// Adds what the CTAs of the cluster have, and stores this one's share of it.
template <typename T>
__device__ void store(const Operands& operands, const float* partials, const Work& work, int split,
                      int splits) {
  const int rows = min(operands.m - work.m, kTileM), ranks = min(operands.r - work.rank, kRanks);
  const bool along_m = operands.stride_c_m == 1;  // neighbouring threads store neighbours
  T* const c =
      static_cast<T*>(operands.c) + work.m * operands.stride_c_m + work.rank * operands.stride_c_r;
  for (int i = split * kThreads + threadIdx.x; i < rows * ranks; i += splits * kThreads) {
    const int row = along_m ? i % rows : i / ranks, rank = along_m ? i / rows : i % ranks;
    float parts[kMostSplits];
#pragma unroll
    for (int cta = 0; cta < kMostSplits; ++cta) {
      parts[cta] = 0;
      if (cta < splits)
        parts[cta] = hopper::load_from_cta(partials + row * kPartialPitch + rank, cta);
    }
    float sum = parts[0];
#pragma unroll
    for (int cta = 1; cta < kMostSplits; ++cta) sum += parts[cta];
    c[row * operands.stride_c_m + rank * operands.stride_c_r] = T(sum * operands.scale);
  }
}

template <typename T, bool TRANSPOSED_X, bool TRANSPOSED_F>
__global__ void __launch_bounds__(kThreads, 2)
    project_kernel(const __grid_constant__ Operands operands) {
  extern __shared__ uint8_t raw[];
  auto& shared =
      *reinterpret_cast<Shared*>(raw + (-hopper::shared_address(raw) & (kAtomBytes - 1)));
  // What may overlap starts on processors that are done here.
  hopper::launch_dependents();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kProjectStages; ++stage) {
      hopper::mbarrier_init(&shared.full[stage], 1);
      hopper::mbarrier_init(&shared.empty[stage], 4 * kConsumers);
    }
    hopper::fence_mbarrier_init();
  }
  __syncthreads();

  const int splits = hopper::cluster_size(), split = hopper::cluster_rank();
  const int chunks = ceil_div(operands.k, kTileK), begin = first_chunk(chunks, split, splits);
  const Work work{int(blockIdx.x / splits) * kTileM, int(blockIdx.y) * kRanks, begin,
                  first_chunk(chunks, split + 1, splits) - begin};
  const int consumer = threadIdx.x / 128, lane = threadIdx.x % 32;
  float accumulators[kRanks / 2] = {};
  if (consumer < kConsumers) {
    consume<T, TRANSPOSED_X, TRANSPOSED_F>(shared, work, consumer, accumulators);
  } else {
    if (lane == 0) produce<TRANSPOSED_X, TRANSPOSED_F>(operands, shared, work);
    __syncwarp();
  }
  __syncthreads();  // the stages are free: all that was loaded has been multiplied

  float* const partials = reinterpret_cast<float*>(shared.stages);
  if (consumer < kConsumers) {
#pragma unroll
    for (int i = 0; i < kRanks / 2; i += 2) {
      const int row = consumer * 64 + fragment_row(threadIdx.x % 128, i);
      const int rank = fragment_column(threadIdx.x % 128, i);
      *reinterpret_cast<float2*>(partials + row * kPartialPitch + rank) = {accumulators[i],
                                                                           accumulators[i + 1]};
    }
  }
  hopper::cluster_sync();
  store<T>(operands, partials, work, split, splits);
  hopper::cluster_sync_relaxed();  // a CTA stays while others read its sums
  // The end of this launch tells the next one that all those before have ended.
  hopper::wait_for_previous_launch();
}

#else

template <typename T, bool TRANSPOSED_X, bool TRANSPOSED_F>
__global__ void project_kernel(const __grid_constant__ Operands) {}

#endif

// As many parts of k as leave every processor two CTAs.
int splits_for(const Project& call, int processors) {
  const int64_t tiles = int64_t(ceil_div(int(call.m), kTileM)) * ceil_div(int(call.r), kRanks);
  int splits = 1;
  while (splits < kMostSplits && tiles * splits * 2 <= 2 * processors) splits *= 2;
  return splits;
}

template <typename T, bool TRANSPOSED_X, bool TRANSPOSED_F>
void launch(const Project& call) {
  const TensorMaps map{call.bf16, call.device, kOp};
  Operands operands{};
  operands.x = TRANSPOSED_X ? map(call.x, "x", call.k, call.m, call.stride_x, kTileK)
                            : map(call.x, "x", call.m, call.k, call.stride_x, kTileM);
  // Ranks beyond the last eight are not loaded: what they multiply is not stored.
  const int box_f = TRANSPOSED_F ? kTileK : std::min(ceil_div(int(call.r), 8) * 8, kRanks);
  operands.f = TRANSPOSED_F ? map(call.f, "f", call.k, call.r, call.stride_f, box_f)
                            : map(call.f, "f", call.r, call.k, call.stride_f, box_f);
  operands.box_f = box_f * kRowBytes;
  operands.c = call.c;
  operands.stride_c_m = call.stride_c_m;
  operands.stride_c_r = call.stride_c_r;
  operands.m = int(call.m);
  operands.k = int(call.k);
  operands.r = int(call.r);
  operands.scale = call.scale;

  int processors = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, call.device), kOp);
  const int splits = call.splits ? call.splits : splits_for(call, processors);
  const auto kernel = &project_kernel<T, TRANSPOSED_X, TRANSPOSED_F>;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), kOp);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(splits), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = call.overlaps;
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(unsigned(ceil_div(operands.m, kTileM) * splits), unsigned(ceil_div(operands.r, kRanks)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = call.stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  check_cuda(cudaLaunchKernelEx(&config, kernel, operands), kOp);
}

template <typename T>
void launch(const Project& call) {
  if (call.transposed_x) {
    launch<T, true, true>(call);
  } else {
    call.transposed_f ? launch<T, false, true>(call) : launch<T, false, false>(call);
  }
}

}  // namespace

void project(const Project& call) {
  constexpr int64_t kMost = INT32_MAX / kMostSplits - kTileM;
  check(call.m >= 0 && call.m <= kMost && call.k > 0 && call.k <= kMost && call.r > 0 &&
            call.r <= kMost,
        kOp, ": sizes are out of range: m ", call.m, ", k ", call.k, ", r ", call.r);
  check(call.transposed_f || !call.transposed_x, kOp, ": transposed_x needs transposed_f");
  check(call.splits == 0 || call.splits == 1 || call.splits == 2 || call.splits == 4 ||
            call.splits == kMostSplits,
        kOp, ": splits must be 0, 1, 2, 4 or ", kMostSplits, ", got ", call.splits);
  check_hopper(call.device, kOp);
  if (call.m == 0) return;
  const DeviceGuard guard(call.device, kOp);
  check_pointer(call.c, call.device, 2, kOp, "c");
  call.bf16 ? launch<__nv_bfloat16>(call) : launch<__half>(call);
}

}  // namespace lora_init
