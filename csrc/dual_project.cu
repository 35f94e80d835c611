#include <type_traits>

#include "checks.h"
#include "dual_project.cuh"
#include "dual_project.h"

namespace lora_init {

namespace {

constexpr const char* kOp = "dual_project";

struct Variant {
  void (*kernel)(DualProjectLaunch);
  int shared_bytes;
  int columns;
};

template <typename Weight, int kRanks, int kParts>
Variant variant() {
  using Tile = typename dual::DualProjection<Weight, kRanks, kParts>::Tile;
  return {dual::dual_project<Weight, kRanks, kParts>, Tile::kSharedBytes, Tile::kColumns};
}

template <typename Weight, int kParts>
Variant variant(int ranks) {
  return ranks == 8    ? variant<Weight, 8, kParts>()
         : ranks == 16 ? variant<Weight, 16, kParts>()
         : ranks == 32 ? variant<Weight, 32, kParts>()
                       : variant<Weight, 64, kParts>();
}

Variant variant(DualProjectWeight weight, int ranks, int parts) {
  check(ranks == 8 || ranks == 16 || ranks == 32 || ranks == 64, kOp,
        ": ranks must be 8, 16, 32 or 64, got ", ranks);
  check(parts == 3 || (parts == 1 && weight != DualProjectWeight::kFp32), kOp,
        ": a factor has 3 parts, or 1 beside a 16-bit W, got ", parts);
  if (weight == DualProjectWeight::kFp32) return variant<dual::Fp32AsBf16, 3>(ranks);
  if (weight == DualProjectWeight::kFp16)
    return parts == 1 ? variant<dual::Fp16Weight, 1>(ranks) : variant<dual::Fp16AsBf16, 3>(ranks);
  return parts == 1 ? variant<dual::Bf16Weight, 1>(ranks) : variant<dual::Bf16Weight, 3>(ranks);
}

// Of a layer, all that a kernel would not notice; the blocks and spans of the layers before it.
void check_layer(const DualProject& call, const DualProjectLayer& layer, int64_t index,
                 int64_t blocks, int64_t spans) {
  constexpr int64_t kMost = INT32_MAX - 4096;
  const size_t element = call.weight == DualProjectWeight::kFp32 ? 4 : 2;
  const size_t factor = call.factors_are_half ? 2 : 4, target = call.half_targets ? 2 : 4;
  const auto [out, in] = layer.sizes;
  check(out >= 0 && out <= kMost && in >= 0 && in <= kMost, kOp, ": matrix ", index, " of ", out,
        " × ", in, " is out of range");
  check(
      layer.block_rows > 0 && layer.block_rows <= kMost && layer.block_rows % dual::kTileRows == 0,
      kOp, ": rows of a block must be a positive multiple of ", dual::kTileRows, ", got ",
      layer.block_rows);
  check(layer.first_block == blocks && layer.first_span == spans, kOp, ": matrix ", index,
        " begins at block ", layer.first_block, " and span ", layer.first_span, ", expected ",
        blocks, " and ", spans);
  if (out && in) check_pointer(layer.weight, call.device, element, kOp, "W");
  for (int which = 0; which < 2; ++which) {
    const DualProjectSide& side = layer.sides[which];
    const char* const name = which == 0 ? "A" : "B";
    check(side.ranks >= 0 && side.ranks <= call.ranks, kOp, ": ", name, " of matrix ", index,
          " has ", side.ranks, " ranks, this kernel takes up to ", call.ranks);
    if (dual::partial_size(layer, which) == 0) continue;
    if (layer.sizes[1 - which]) {
      check_pointer(side.factor, call.device, factor, kOp, name);
      check_pointer(side.partials, call.device, 4, kOp, "the partial products");
    }
    if (side.target) check_pointer(side.target, call.device, target, kOp, "the product");
  }
}

}  // namespace

int dual_project_columns(DualProjectWeight weight, int ranks, int parts) {
  return variant(weight, ranks, parts).columns;
}

std::optional<std::string> why_no_dual_project(int device) {
  if (const auto reason = why_old_driver()) return reason;
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), kOp);
  if (major < 8)
    return joined("needs compute capability 8.0 or newer, this device has ", major, ".", minor);
  const DeviceGuard guard(device, kOp);
  cudaFuncAttributes attributes{};
  const auto kernel = variant<dual::Bf16Weight, 8, 1>().kernel;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction) {
    check_cuda(status, kOp);
    return std::nullopt;
  }
  cudaGetLastError();  // or the next call of the runtime would report it
  return joined("was built for " LORA_INIT_CUDA_ARCHS ", this device has compute capability ",
                major, ".", minor, ": LORA_INIT_CUDA_ARCHS");
}

void dual_project(const DualProject& call) {
  check(call.count >= 0 && call.count < INT32_MAX, kOp, ": ", call.count, " matrices");
  check(!call.factors_are_half || (call.parts == 1 && call.weight != DualProjectWeight::kFp32), kOp,
        ": factors of 16 bits have one part, beside a W of the same dtype");
  check(call.layers || call.count <= 1, kOp, ": the table of ", call.count,
        " matrices must be on the device");
  const auto [kernel, shared_bytes, columns] = variant(call.weight, call.ranks, call.parts);
  const auto reason = why_no_dual_project(call.device);
  check(!reason, kOp, ": ", reason.value_or(""));
  if (call.count == 0) return;
  const DeviceGuard guard(call.device, kOp);
  int64_t blocks = 0, spans = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    const DualProjectLayer& layer = call.table[i];
    check_layer(call, layer, i, blocks, spans);
    blocks += dual::row_blocks(layer) * dual::column_blocks(layer, columns);
    spans += dual::spans(layer, 0) + dual::spans(layer, 1);
  }
  check(blocks <= INT32_MAX && spans <= INT32_MAX, kOp, ": too much for a launch, ", blocks,
        " blocks and ", spans, " spans");
  if (call.layers) check_pointer(call.layers, call.device, 8, kOp, "the table");

  const DualProjectLaunch launch{call.layers,
                                 call.table[0],
                                 int(call.count),
                                 columns,
                                 call.factors_are_half,
                                 call.scale,
                                 call.half_targets ? 2 : 4,
                                 call.weight == DualProjectWeight::kBf16};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(dual::kThreads);
  config.stream = call.stream;
  if (blocks) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        kOp);
    config.gridDim = dim3(unsigned(blocks));
    config.dynamicSmemBytes = size_t(shared_bytes);
    check_cuda(cudaLaunchKernelEx(&config, kernel, launch), kOp);
  }
  if (spans) {
    config.gridDim = dim3(unsigned(spans));
    config.dynamicSmemBytes = 0;
    check_cuda(cudaLaunchKernelEx(&config, dual::dual_project_sum, launch), kOp);
  }
}

}  // namespace lora_init
