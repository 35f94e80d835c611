#include <algorithm>
#include <type_traits>

#include "checks.h"
#include "descend.cuh"
#include "descend.h"

namespace lora_init {

namespace {

struct Kernel {
  void (*function)(DescendLaunch);
  int threads;
  int shared_bytes;  // without stages
  int stage_bytes;   // 0 where W stays on chip
  DescendSize tiles;
};

template <typename Parts, int kRanks, bool kAdam>
Kernel kernel(bool streamed) {
  if constexpr (blocks::stays_on_chip(kRanks, Parts::kElementBytes)) {
    using Shape = blocks::ResidentShape<Parts::kElementBytes>;
    if (!streamed)
      return {blocks::descend_resident<Parts, kRanks, kAdam>,
              Shape::kThreads,
              blocks::Descent<blocks::Resident<Parts, kRanks>, kAdam>::kSharedBytes,
              0,
              {Shape::kRowTiles, Shape::kColumnTiles}};
  }
  using Shape = blocks::StreamedShape<kRanks, Parts::kElementBytes>;
  return {blocks::descend_streamed<Parts, kRanks, kAdam>,
          Shape::kThreads,
          blocks::Descent<blocks::Streamed<Parts, kRanks>, kAdam>::kSharedBytes,
          Shape::kStageBytes,
          {0, Shape::kColumnTiles}};
}

template <typename Parts>
Kernel kernel(const DescendVariant& variant, bool adam) {
  const auto of = [&](auto ranks) {
    return adam ? kernel<Parts, ranks, true>(variant.streamed)
                : kernel<Parts, ranks, false>(variant.streamed);
  };
  return variant.ranks == 8    ? of(std::integral_constant<int, 8>())
         : variant.ranks == 16 ? of(std::integral_constant<int, 16>())
                               : of(std::integral_constant<int, 32>());
}

Kernel kernel(const DescendVariant& variant, bool bf16, bool adam) {
  check(variant.ranks == 8 || variant.ranks == 16 || variant.ranks == 32,
        "descend: ranks must be 8, 16 or 32, got ", variant.ranks);
  check(variant.element_bytes == 2 || variant.element_bytes == 4,
        "descend: elements have 2 or 4 bytes, got ", variant.element_bytes);
  check(variant.streamed || blocks::stays_on_chip(variant.ranks, variant.element_bytes),
        "descend: matrices of ", variant.element_bytes, " bytes an element are streamed beside ",
        variant.ranks, " ranks");
  if (variant.element_bytes == 4) return kernel<blocks::Fp32Parts>(variant, adam);
  return bf16 ? kernel<blocks::Bf16Parts>(variant, adam) : kernel<blocks::Fp16Parts>(variant, adam);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "descend");
  return value;
}

// As many stages as fit beside the rest, and no fewer than two.
int stages(const Kernel& kernel, int device) {
  if (kernel.stage_bytes == 0) return 0;
  const int room = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - kernel.shared_bytes;
  return std::clamp(room / kernel.stage_bytes, 2, blocks::kMostStages);
}

cudaError_t launch(const Kernel& kernel, const DescendLaunch& launch, int ctas,
                   cudaStream_t stream) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = kernel.shared_bytes + launch.stages * kernel.stage_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel.function, launch);
}

// What CTAs the device has room for; its shared memory is granted on the way.
int occupancy(const Kernel& kernel, int device) {
  const int shared_bytes = kernel.shared_bytes + stages(kernel, device) * kernel.stage_bytes;
  if (shared_bytes > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return 0;
  int each = 0;
  check_cuda(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shared_bytes),
             "descend");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel.function, kernel.threads,
                                                           shared_bytes),
             "descend");
  return each * attribute(cudaDevAttrMultiProcessorCount, device);
}

}  // namespace

std::optional<std::string> why_no_descend(const DescendVariant& variant, int device) {
  if (!variant.streamed && !blocks::stays_on_chip(variant.ranks, variant.element_bytes))
    return joined("streams fp32 matrices beside more than 16 ranks");
  if (!variant.streamed) return why_no_hopper(device);
  if (const auto reason = why_old_driver()) return reason;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  if (major < 8)
    return joined("needs compute capability 8.0, this device has ", major, ".",
                  attribute(cudaDevAttrComputeCapabilityMinor, device));
  const DeviceGuard guard(device, "descend");
  cudaFuncAttributes found{};
  const Kernel made = kernel(variant, true, true);
  const cudaError_t status = cudaFuncGetAttributes(&found, made.function);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    return joined("was built for ", LORA_INIT_CUDA_ARCHS,
                  ", not for this device: ", "LORA_INIT_CUDA_ARCHS");
  }
  check_cuda(status, "descend");
  const int least = made.shared_bytes + 2 * made.stage_bytes;
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (least > most)
    return joined("needs ", least, " bytes of shared memory for ", variant.ranks,
                  " ranks, this device has ", most);
  return std::nullopt;
}

int descend_capacity(const DescendVariant& variant, int device) {
  const DeviceGuard guard(device, "descend");
  const Kernel made = kernel(variant, true, true);
  DescendLaunch nothing{};
  nothing.stages = stages(made, device);
  int ctas = occupancy(made, device);
  cudaStream_t stream;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "descend");
  cudaError_t status = cudaSuccess;
  for (; ctas > 0; ctas -= blocks::ceil_div(ctas, 8)) {
    status = launch(made, nothing, ctas, stream);
    if (status != cudaErrorCooperativeLaunchTooLarge) break;
    cudaGetLastError();
    status = cudaSuccess;
  }
  const cudaError_t closed = cudaStreamDestroy(stream);
  check_cuda(status, "descend");
  check_cuda(closed, "descend");
  return ctas;
}

DescendSize descend_tiles(const DescendVariant& variant) {
  return kernel(variant, true, true).tiles;
}

int64_t descend_region_bytes(const DescendVariant& variant, DescendSize tiles, DescendSize blocks) {
  // On chip a region is as if each block were alone in its row and column.
  const DescendSize members = variant.streamed ? blocks : DescendSize{1, 1};
  return blocks::Region{variant.ranks,
                        {tiles.rows, tiles.columns},
                        {blocks::most_slice(members.columns, tiles.rows),
                         blocks::most_slice(members.rows, tiles.columns)}}
      .bytes();
}

void descend(const Descend& call) {
  const Kernel made = kernel(call.variant, call.bf16, call.adam);
  check(call.steps >= 0 && call.steps < 1 << 20, "descend: steps must be in [0, 2^20), got ",
        call.steps);
  check(call.blocks < int64_t(1) << 31, "descend: at most 2^31 blocks, got ", call.blocks);
  const auto reason = why_no_descend(call.variant, call.device);
  check(!reason, "descend: ", reason.value_or(""));
  if (call.blocks == 0 || call.steps == 0) return;
  const DeviceGuard guard(call.device, "descend");
  const int most = occupancy(made, call.device);
  check(call.ctas >= 1 && call.ctas <= most, "descend: ctas must be in [1, ", most, "], got ",
        call.ctas);
  // The CTAs of a layer wait for each other.
  check(call.most_blocks >= 1 && call.most_blocks <= call.ctas, "descend: a matrix of ",
        call.most_blocks, " blocks does not fit ", call.ctas, " CTAs");
  const int64_t least =
      call.variant.streamed ? 1 : descend_region_bytes(call.variant, made.tiles, {1, 1});
  check(call.region_bytes >= least && call.region_bytes % 16 == 0 &&
            call.region_bytes * call.ctas < int64_t(1) << 32,
        "descend: regions must have multiples of 16 bytes from ", least, " to 4 GB for ", call.ctas,
        " CTAs, got ", call.region_bytes);
  check_pointer(call.layers, call.device, 8, "descend", "layers");
  check_pointer(call.schedule, call.device, 4, "descend", "schedule");
  check_pointer(call.workspace, call.device, 16, "descend", "workspace");
  check_pointer(call.counters, call.device, 4, "descend", "counters");
  check_cuda(cudaMemsetAsync(call.counters, 0, call.counter_bytes, call.stream), "descend");

  const DescendLaunch table{static_cast<const DescendLayer*>(call.layers),
                            call.blocks,
                            int(call.steps),
                            stages(made, call.device),
                            call.schedule,
                            static_cast<char*>(call.workspace),
                            call.region_bytes,
                            static_cast<uint32_t*>(call.counters),
                            call.one_minus_beta1,
                            call.beta2,
                            call.one_minus_beta2,
                            call.eps};
  check_cuda(launch(made, table, call.ctas, call.stream), "descend");
}

}  // namespace lora_init
