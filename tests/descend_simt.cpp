// The kernels of csrc/descend.cuh on the host: test_cuda_descend.py calls them through ctypes.
#include "../csrc/descend.cuh"

using namespace lora_init;

namespace {

struct Call {
  const DescendLaunch& launch;
  int ranks;
  bool streamed, adam;
  int grid;
  unsigned seed;
};

template <typename Form, typename Shape, typename Kernel>
bool run(const Call& call, Kernel kernel, int stage_bytes) {
  const int bytes = Form::kSharedBytes + call.launch.stages * stage_bytes;
  // With another seed than 0 a warp of each CTA lags so far behind that others would pass it.
  return simt::launch(
      call.grid, Shape::kThreads, bytes, call.seed, [&] { kernel(call.launch); },
      call.seed ? 10 : 1);
}

template <typename Parts, int kRanks, bool kAdam>
bool run(const Call& call) {
  constexpr int kBytes = Parts::kElementBytes;
  if constexpr (blocks::stays_on_chip(kRanks, kBytes)) {
    if (!call.streamed)
      return run<blocks::Descent<blocks::Resident<Parts, kRanks>, kAdam>,
                 blocks::ResidentShape<kBytes>>(call,
                                                blocks::descend_resident<Parts, kRanks, kAdam>, 0);
  }
  using Shape = blocks::StreamedShape<kRanks, kBytes>;
  return run<blocks::Descent<blocks::Streamed<Parts, kRanks>, kAdam>, Shape>(
      call, blocks::descend_streamed<Parts, kRanks, kAdam>, Shape::kStageBytes);
}

template <typename Parts, int kRanks>
bool run(const Call& call) {
  return call.adam ? run<Parts, kRanks, true>(call) : run<Parts, kRanks, false>(call);
}

template <typename Parts>
bool run(const Call& call) {
  return call.ranks == 8    ? run<Parts, 8>(call)
         : call.ranks == 16 ? run<Parts, 16>(call)
                            : run<Parts, 32>(call);
}

}  // namespace

extern "C" {

int64_t region_bytes(int ranks, const int* tiles, const int* slices) {
  return blocks::Region{ranks, {tiles[0], tiles[1]}, {slices[0], slices[1]}}.bytes();
}

// Of a block that stays on chip, or the most of one that is streamed.
void tiles_of(int ranks, int element_bytes, int streamed, int* tiles) {
  using Half = blocks::ResidentShape<2>;
  using Single = blocks::ResidentShape<4>;
  const auto set = [&](int rows, int columns) { tiles[0] = rows, tiles[1] = columns; };
  if (!streamed)
    return element_bytes == 2 ? set(Half::kRowTiles, Half::kColumnTiles)
                              : set(Single::kRowTiles, Single::kColumnTiles);
  return ranks <= 16 && element_bytes == 2 ? set(0, blocks::StreamedShape<16, 2>::kColumnTiles)
                                           : set(0, blocks::StreamedShape<32, 4>::kColumnTiles);
}

// `element` is 0 for bf16, 1 for fp16, 2 for fp32.
bool descend(const DescendLaunch* launch, int element, int ranks, int streamed, int adam, int grid,
             unsigned seed) {
  const Call call{*launch, ranks, streamed != 0, adam != 0, grid, seed};
  return element == 0   ? run<blocks::Bf16Parts>(call)
         : element == 1 ? run<blocks::Fp16Parts>(call)
                        : run<blocks::Fp32Parts>(call);
}
}
