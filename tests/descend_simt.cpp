// The kernel of csrc/descend.cuh on the host: test_cuda_descend.py calls it through ctypes.
#include "../csrc/descend.cuh"

using namespace lora_init;

namespace {

template <typename Half, int kRanks, bool kAdam>
bool run(const DescendLaunch& launch, int grid, unsigned seed) {
  return simt::launch(grid, blocks::kThreads, blocks::kDescendSharedBytes<kRanks>, seed,
                      [&] { blocks::descend<Half, kRanks, kAdam>(launch); });
}

template <typename Half, int kRanks>
bool run(const DescendLaunch& launch, bool adam, int grid, unsigned seed) {
  return adam ? run<Half, kRanks, true>(launch, grid, seed)
              : run<Half, kRanks, false>(launch, grid, seed);
}

template <typename Half>
bool run(const DescendLaunch& launch, int ranks, bool adam, int grid, unsigned seed) {
  return ranks == 8 ? run<Half, 8>(launch, adam, grid, seed)
                    : run<Half, 16>(launch, adam, grid, seed);
}

}  // namespace

extern "C" {

int64_t region_bytes(int ranks) {
  return ranks == 8 ? blocks::Region<8>::kBytes : blocks::Region<16>::kBytes;
}

bool descend(const DescendLaunch* launch, int bf16, int ranks, int adam, int grid, unsigned seed) {
  return bf16 ? run<blocks::Bf16Parts>(*launch, ranks, adam, grid, seed)
              : run<blocks::Fp16Parts>(*launch, ranks, adam, grid, seed);
}
}
