// The adapted linear layer as one Hopper GEMM, y = x Rᵀ + S Bᵀ + bias: the loop over K runs on into
// the low-rank operands, which are a few more of its chunks, into the same accumulators.
//
// A CTA has one warpgroup that only issues TMA loads into a ring of stages, and two that multiply
// (wgmma) and store 64 rows each of a 128 × 256 or 128 × 128 tile. It is persistent: the loads of
// the next tile run while the last one is stored. Two CTAs of a cluster compute tiles one above the
// other; each loads half of R's part of a stage for both.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "checks.h"
#include "gemm_tiles.h"
#include "hopper.cuh"
#include "lora_linear.h"
#include "tensor_map.h"

namespace lora_init {
namespace {

using namespace gemm;

constexpr const char* kOp = "lora_linear";
constexpr int kThreads = 128 * (1 + kConsumers);

struct Operands {
  CUtensorMap x, R, S, B, y;
  const void* bias;
  int m_tiles, n_tiles;  // tiles of all CTAs of a cluster, one above the other, count as one
  int n, k, r;
};

template <int TILE_N>
struct Shared {
  alignas(kAtomBytes) uint8_t stages[stage_count(TILE_N)][stage_bytes(TILE_N)];
  alignas(kAtomBytes) uint8_t stores[4 * kConsumers][2][kStoreBytes];  // two for each warp
  uint64_t full[stage_count(TILE_N)], empty[stage_count(TILE_N)];
};

template <int TILE_N>
constexpr int shared_bytes =
    sizeof(Shared<TILE_N>) + kAtomBytes;  // its start is aligned at run time
static_assert(shared_bytes<256> <= 227 << 10 && shared_bytes<128> <= 227 << 10);

template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <typename T>
__device__ uint32_t packed(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

template <typename T>
__device__ float2 unpacked(uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

// Pairs of bias[column + 8·i], zeros beyond n, which is even. Volatile, so that they are loaded
// where that is asked for, ahead of their use.
template <int PAIRS>
__device__ void load_bias(const Operands& operands, int column, uint32_t (&pairs)[PAIRS]) {
  const int columns = operands.bias ? operands.n - column : 0;
  const uint32_t* const first = static_cast<const uint32_t*>(operands.bias) + column / 2;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    pairs[i] = 0;
    if (8 * i < columns)
      asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(pairs[i]) : "l"(first + 4 * i));
  }
}

// One thread fills the stages, tile after tile.
template <int TILE_N, int CLUSTER, bool TRANSPOSED>
__device__ void produce(const Operands& operands, Shared<TILE_N>& shared) {
  constexpr int kShare = TILE_N / CLUSTER;  // of R's rows or columns, loaded by this CTA
  constexpr uint16_t kAll = (1 << CLUSTER) - 1;
  const int rank = CLUSTER == 1 ? 0 : hopper::cluster_rank();
  const int chunks = ceil_div(operands.k, kTileK), rank_chunks = ceil_div(operands.r, kTileK);
  hopper::prefetch_tensormap(&operands.x);
  hopper::prefetch_tensormap(&operands.R);
  hopper::prefetch_tensormap(&operands.y);
  if (operands.r) {
    hopper::prefetch_tensormap(&operands.S);
    hopper::prefetch_tensormap(&operands.B);
  }
  Ring<stage_count(TILE_N)> ring;
  for (int index = blockIdx.x / CLUSTER; index < operands.m_tiles * operands.n_tiles;
       index += gridDim.x / CLUSTER) {
    const auto [tile_m, tile_n] =
        tile_at(index, operands.m_tiles, operands.n_tiles, kBandM / (kTileM * CLUSTER));
    const int m = (tile_m * CLUSTER + rank) * kTileM, n = tile_n * TILE_N + rank * kShare;
    for (int chunk = 0; chunk < chunks + rank_chunks; ++chunk) {
      const bool low_rank = chunk >= chunks;
      // S may still be in the making, by the launch before. The next one may read it too, so that
      // it must not start earlier.
      if (chunk == chunks) {
        hopper::wait_for_previous_launch();
        hopper::launch_dependents();
      }
      const int k = (low_rank ? chunk - chunks : chunk) * kTileK;
      const CUtensorMap* const map_a = low_rank ? &operands.S : &operands.x;
      const CUtensorMap* const map_b = low_rank ? &operands.B : &operands.R;
      uint64_t* const full = &shared.full[ring.stage];
      uint8_t* const a = shared.stages[ring.stage];
      uint8_t* const b = a + kTileABytes + rank * kShare * kRowBytes;
      hopper::mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      hopper::mbarrier_arrive_expect(full, stage_bytes(TILE_N));
      hopper::tma_load<false>(map_a, a, full, k, m, 0);
      if constexpr (TRANSPOSED) {
        for (int block = 0; block < kShare; block += 64)
          hopper::tma_load<(CLUSTER > 1)>(map_b, b + block * kRowBytes, full, n + block, k, kAll);
      } else {
        hopper::tma_load<(CLUSTER > 1)>(map_b, b, full, k, n, kAll);
      }
      ring.advance();
    }
  }
}

// Rounds a warp's accumulators, 16 rows of them, and stores them 64 columns at a time: by stmatrix
// to one of its two buffers, from there by TMA.
template <typename T, int TILE_N>
__device__ void store(const Operands& operands, const float (&accumulators)[TILE_N / 2],
                      const uint32_t (&bias)[TILE_N / 8], uint8_t (&buffers)[2][kStoreBytes], int m,
                      int n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < TILE_N / 64; ++block) {
    uint8_t* const buffer = buffers[block % 2];
    if (lane == 0) hopper::tma_store_wait_read<1>();
    __syncwarp();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t registers[4];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int i = block * 32 + step * 8 + pair * 2;
        const float2 shift = unpacked<T>(bias[i / 4]);
        registers[pair] = packed<T>(accumulators[i] + shift.x, accumulators[i + 1] + shift.y);
      }
      hopper::stmatrix_x4(hopper::shared_address(buffer) + store_offset(lane, step), registers);
    }
    hopper::fence_proxy_async();
    __syncwarp();
    if (lane == 0) hopper::tma_store(&operands.y, buffer, n + block * 64, m);
  }
}

// A warpgroup multiplies its 64 rows of every tile and stores them.
template <typename T, int TILE_N, int CLUSTER, bool TRANSPOSED>
__device__ void consume(const Operands& operands, Shared<TILE_N>& shared, int consumer) {
  constexpr int kStepB = TRANSPOSED ? kStepMNMajor : kStepKMajor;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int rank = CLUSTER == 1 ? 0 : hopper::cluster_rank();
  const int chunks = ceil_div(operands.k, kTileK), rank_steps = ceil_div(operands.r, kStepK);
  Ring<stage_count(TILE_N)> ring;
  float accumulators[TILE_N / 2];

  // The stage may be filled again, as far as this warp is concerned: every CTA whose loads it holds
  // is told.
  const auto release = [&](int stage) {
    if (lane < CLUSTER) hopper::mbarrier_arrive_at(&shared.empty[stage], lane);
  };
  const auto multiply = [&](int step, bool accumulate) {
    const uint32_t a = hopper::shared_address(shared.stages[ring.stage]);
    const uint64_t of_a = k_major(a + consumer * kBlockBytes + step * kStepKMajor);
    const uint32_t b = a + kTileABytes + step * kStepB;
    hopper::wgmma<T, false, TRANSPOSED>(accumulators, of_a, TRANSPOSED ? mn_major(b) : k_major(b),
                                        accumulate);
  };

  for (int index = blockIdx.x / CLUSTER; index < operands.m_tiles * operands.n_tiles;
       index += gridDim.x / CLUSTER) {
    const auto [tile_m, tile_n] =
        tile_at(index, operands.m_tiles, operands.n_tiles, kBandM / (kTileM * CLUSTER));
    const int m = (tile_m * CLUSTER + rank) * kTileM + consumer * 64 + warp * kStoreRows;
    const int n = tile_n * TILE_N;
    // One chunk's products are in flight while those of the chunk before are waited for.
    int previous = -1;
    const auto finish_chunk = [&] {
      hopper::wgmma_commit();
      hopper::wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = ring.stage;
      ring.advance();
    };
    for (int chunk = 0; chunk < chunks; ++chunk) {
      hopper::mbarrier_wait(&shared.full[ring.stage], ring.parity);
      hopper::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kTileK / kStepK; ++step) multiply(step, chunk > 0 || step > 0);
      finish_chunk();
    }
    // While the last products run: the tensor cores idle from their end until the tile is stored.
    uint32_t bias[TILE_N / 8];  // of the columns of registers 4·i … 4·i + 3
    load_bias(operands, n + fragment_column(lane, 0), bias);
    for (int first = 0; first < rank_steps; first += kTileK / kStepK) {
      hopper::mbarrier_wait(&shared.full[ring.stage], ring.parity);
      hopper::wgmma_fence();
      const int steps = min(rank_steps - first, kTileK / kStepK);
      // Committed one by one: of a group of an unknown number, ptxas makes as many and one more.
#pragma unroll 1
      for (int step = 0; step < steps - 1; ++step) {
        multiply(step, true);
        hopper::wgmma_commit();
      }
      multiply(steps - 1, true);
      finish_chunk();
    }
    hopper::wgmma_wait<0>();
    release(previous);
    store<T, TILE_N>(operands, accumulators, bias, shared.stores[consumer * 4 + warp], m, n);
  }
  // The last stores read shared memory that must not be given back before.
  if (lane == 0) hopper::tma_store_wait_read<0>();
}

template <typename T, int TILE_N, int CLUSTER, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, 1)
    lora_linear_kernel(const __grid_constant__ Operands operands) {
  extern __shared__ uint8_t raw[];
  auto& shared =
      *reinterpret_cast<Shared<TILE_N>*>(raw + (-hopper::shared_address(raw) & (kAtomBytes - 1)));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stage_count(TILE_N); ++stage) {
      hopper::mbarrier_init(&shared.full[stage], 1);
      hopper::mbarrier_init(&shared.empty[stage], 4 * kConsumers * CLUSTER);
    }
    hopper::fence_mbarrier_init();
  }
  __syncthreads();
  if constexpr (CLUSTER > 1) hopper::cluster_sync();

  // The producer's registers go to the consumers, who hold a tile in theirs.
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == kConsumers) {
    hopper::give_registers<40>();
    if (threadIdx.x % 128 == 0) produce<TILE_N, CLUSTER, TRANSPOSED>(operands, shared);
    __syncwarp();
  } else {
    hopper::take_registers<232>();
    consume<T, TILE_N, CLUSTER, TRANSPOSED>(operands, shared, warpgroup);
  }
  // A CTA that is done stays while the other one may still arrive at its barriers.
  if constexpr (CLUSTER > 1) hopper::cluster_sync();
}

#else

template <typename T, int TILE_N, int CLUSTER, bool TRANSPOSED>
__global__ void lora_linear_kernel(const __grid_constant__ Operands) {}

#endif

template <typename T, int TILE_N, int CLUSTER, bool TRANSPOSED>
void launch(const LoraLinear& call, int processors) {
  const TensorMaps map{call.bf16, call.device, kOp};
  const int share = TILE_N / CLUSTER;
  const auto shared_operand = [&](const void* base, const char* name, int64_t k, int64_t stride) {
    return TRANSPOSED ? map(base, name, k, call.n, stride, kTileK)
                      : map(base, name, call.n, k, stride, share);
  };
  Operands operands{};
  operands.x = map(call.x, "x", call.m, call.k, call.stride_x, kTileM);
  operands.R = shared_operand(call.R, "R", call.k, call.stride_R);
  if (call.r) {
    operands.S = map(call.S, "S", call.m, call.r, call.stride_S, kTileM);
    operands.B = shared_operand(call.B, "B", call.r, call.stride_B);
  }
  operands.y = map(call.y, "y", call.m, call.n, call.stride_y, kStoreRows);
  operands.bias = call.bias;
  operands.m_tiles = ceil_div(int(call.m), kTileM * CLUSTER);
  operands.n_tiles = ceil_div(int(call.n), TILE_N);
  operands.n = int(call.n);
  operands.k = int(call.k);
  operands.r = int(call.r);

  const auto kernel = &lora_linear_kernel<T, TILE_N, CLUSTER, TRANSPOSED>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shared_bytes<TILE_N>),
             kOp);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {CLUSTER, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = call.overlaps;
  const int64_t clusters =
      std::min<int64_t>(processors / CLUSTER, int64_t(operands.m_tiles) * operands.n_tiles);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(clusters * CLUSTER));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes<TILE_N>;
  config.stream = call.stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  check_cuda(cudaLaunchKernelEx(&config, kernel, operands), kOp);
}

template <typename T, int TILE_N, int CLUSTER>
void launch(const LoraLinear& call, int processors) {
  call.transposed ? launch<T, TILE_N, CLUSTER, true>(call, processors)
                  : launch<T, TILE_N, CLUSTER, false>(call, processors);
}

template <typename T, int TILE_N>
void launch(const LoraLinear& call, int processors) {
  // Sharing R pays from about four rounds of tiles on (H200: +2% at 8192 × 4096 × 4096, −2% at a
  // quarter of its rows); with one row of tiles, the second CTA would have none.
  const int64_t m_tiles = ceil_div(int(call.m), kTileM), n_tiles = ceil_div(int(call.n), TILE_N);
  const bool shares = m_tiles > 1 && m_tiles * n_tiles > 4 * processors;
  const int cluster = call.cluster ? call.cluster : 1 + shares;
  cluster == 2 ? launch<T, TILE_N, 2>(call, processors) : launch<T, TILE_N, 1>(call, processors);
}

// Rounds of all processors × columns of a tile: the narrower tile wins where it fills the last
// round better by more than it costs, R's operand being read from shared memory for half as much
// work.
int tile_n_for(const LoraLinear& call, int processors) {
  const auto cost = [&](int tile_n, int weight) {
    const int64_t tiles = int64_t(ceil_div(int(call.m), kTileM)) * ceil_div(int(call.n), tile_n);
    return (tiles + processors - 1) / processors * weight;
  };
  return cost(128, 23) < cost(256, 40) ? 128 : 256;
}

template <typename T>
void launch(const LoraLinear& call, int processors) {
  const int tile_n = call.tile_n ? call.tile_n : tile_n_for(call, processors);
  tile_n == 256 ? launch<T, 256>(call, processors) : launch<T, 128>(call, processors);
}

}  // namespace

void lora_linear(const LoraLinear& call) {
  constexpr int64_t kMost = INT32_MAX - kBandM;  // TMA's coordinates are 32-bit
  check(call.m >= 0 && call.m <= kMost && call.n > 0 && call.n <= kMost && call.k > 0 &&
            call.k <= kMost && call.r >= 0 && call.r <= kMost,
        kOp, ": sizes are out of range: m ", call.m, ", n ", call.n, ", k ", call.k, ", r ",
        call.r);
  check(call.n % 8 == 0 && call.k % 8 == 0, kOp, ": n and k must be multiples of 8, got ", call.n,
        " and ", call.k);
  check(call.tile_n == 0 || call.tile_n == 128 || call.tile_n == 256, kOp,
        ": tile_n must be 128, 256 or 0, got ", call.tile_n);
  check(call.cluster >= 0 && call.cluster <= 2, kOp, ": cluster must be 1, 2 or 0, got ",
        call.cluster);
  check_hopper(call.device, kOp);
  if (call.m == 0) return;
  const DeviceGuard guard(call.device, kOp);
  if (call.bias) check_pointer(call.bias, call.device, 4, kOp, "bias");
  int processors = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, call.device), kOp);
  call.bf16 ? launch<__nv_bfloat16>(call, processors) : launch<__half>(call, processors);
}

}  // namespace lora_init
