#include <algorithm>

#include "checks.h"
#include "descend.cuh"
#include "descend.h"

namespace lora_init {

namespace {

using Kernel = void (*)(DescendLaunch);

struct Variant {
  Kernel kernel;
  int shared_bytes;
};

template <typename Half, int kRanks>
Variant variant(bool adam) {
  return {adam ? blocks::descend<Half, kRanks, true> : blocks::descend<Half, kRanks, false>,
          blocks::kDescendSharedBytes<kRanks>};
}

Variant variant(int ranks, bool bf16, bool adam) {
  if (ranks == 8)
    return bf16 ? variant<blocks::Bf16Parts, 8>(adam) : variant<blocks::Fp16Parts, 8>(adam);
  return bf16 ? variant<blocks::Bf16Parts, 16>(adam) : variant<blocks::Fp16Parts, 16>(adam);
}

int capacity(const Variant& variant, int device) {
  int multiprocessors = 0, each = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "descend");
  check_cuda(cudaFuncSetAttribute(variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  variant.shared_bytes),
             "descend");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, variant.kernel, blocks::kThreads,
                                                           variant.shared_bytes),
             "descend");
  return each * multiprocessors;
}

}  // namespace

int descend_capacity(int ranks, int device) {
  const DeviceGuard guard(device, "descend");
  return capacity(variant(ranks, true, true), device);
}

int64_t descend_region_bytes(int ranks) {
  return ranks == 8 ? blocks::Region<8>::kBytes : blocks::Region<16>::kBytes;
}

void descend(const Descend& call) {
  check(call.ranks == 8 || call.ranks == 16, "descend: ranks must be 8 or 16, got ", call.ranks);
  check(call.steps >= 0 && call.steps < 1 << 20, "descend: steps must be in [0, 2^20), got ",
        call.steps);
  check(call.blocks < int64_t(1) << 31, "descend: at most 2^31 blocks, got ", call.blocks);
  check_hopper(call.device, "descend");
  if (call.blocks == 0 || call.steps == 0) return;
  const DeviceGuard guard(call.device, "descend");
  const auto [kernel, shared_bytes] = variant(call.ranks, call.bf16, call.adam);
  const int most = capacity({kernel, shared_bytes}, call.device);
  check(call.ctas >= 1 && call.ctas <= most, "descend: ctas must be in [1, ", most, "], got ",
        call.ctas);
  // The CTAs of a layer wait for each other.
  const int fitting = std::min(call.ctas, blocks::kMostBlocks);
  check(call.most_blocks >= 1 && call.most_blocks <= fitting, "descend: a matrix of ",
        call.most_blocks, " blocks does not fit ", fitting, " CTAs");
  check_pointer(call.layers, call.device, 8, "descend", "layers");
  check_pointer(call.schedule, call.device, 4, "descend", "schedule");
  check_pointer(call.workspace, call.device, 16, "descend", "workspace");
  check_pointer(call.counters, call.device, 4, "descend", "counters");
  check_cuda(cudaMemsetAsync(call.counters, 0, call.counter_bytes, call.stream), "descend");

  const DescendLaunch launch{static_cast<const DescendLayer*>(call.layers),
                             call.blocks,
                             int(call.steps),
                             call.schedule,
                             static_cast<char*>(call.workspace),
                             static_cast<uint32_t*>(call.counters),
                             call.one_minus_beta1,
                             call.beta2,
                             call.one_minus_beta2,
                             call.eps};
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(call.ctas);
  config.blockDim = dim3(blocks::kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = call.stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, launch), "descend");
}

}  // namespace lora_init
