// Index maths of descend.cuh: how a matrix is cut into blocks, which of a block's elements lie
// where in shared memory, in registers and in packed factors. Plain functions:
// tests/descend_simt.cpp runs the kernel itself on the host over them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LORA_INIT_HD __host__ __device__
#else
#define LORA_INIT_HD
#endif

namespace lora_init::blocks {

// A block is 256 × 256 elements of a 16-bit W, 128 KB, in 16 × 16 tiles of 16 × 16, one operand of
// mma.m16n8k16 each. Two CTAs a multiprocessor hold two of them: three quarters in shared memory
// (192 of 227 KB), one quarter in registers (64 of a thread's 255). A 4096² matrix is 256 blocks,
// which an H100's 132 multiprocessors hold whole; shared memory alone would not.
constexpr int kBlock = 256;
constexpr int kTile = 16;
constexpr int kTiles = kBlock / kTile;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStrip = kTiles / kWarps;  // a warp's rows of tiles, of W Aᵀ and in registers
constexpr int kRegisterTiles = 4;        // columns of tiles in registers: the last ones
constexpr int kSharedTiles = kTiles - kRegisterTiles;
constexpr int kSharedStrip = kSharedTiles / kWarps;  // a warp's columns of tiles, of Bᵀ W
constexpr int kRowBytes = kSharedTiles * kTile * 2;
constexpr int kWeightBytes = kBlock * kRowBytes;

LORA_INIT_HD constexpr int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Where 8 neighbours of row `row`, the `unit`-th of it, lie in shared memory. Rows are whole
// 128-byte lines, so units are permuted by the row mod 8, or the 8 rows of an ldmatrix would meet
// in one bank.
LORA_INIT_HD constexpr int unit_offset(int row, int unit) {
  return row * kRowBytes + ((unit ^ (row & 7)) << 4);
}

// Where lane `lane` points ldmatrix.x4 for a tile: rows 0-7 and 8-15 of its first 8 columns, then
// of its last 8.
LORA_INIT_HD constexpr int lane_offset(int tile_row, int tile_column, int lane) {
  return unit_offset(tile_row * kTile + lane % 16, tile_column * 2 + lane / 16);
}

// Packed factors lie as mma's operand B wants them: for every 16 columns of the factor and 8 of its
// ranks, 16 bytes a lane, the two words of the hi parts before the two of the lo parts. The place
// of a 16-bit element, part 0 or 1, in a group of kBlock columns.
LORA_INIT_HD constexpr int part_index(int ranks, int rank, int column, int part) {
  const int k = column % kTile;
  const int lane = rank % 8 * 4 + k % 8 / 2;
  const int fragment = (column / kTile * (ranks / 8) + rank / 8) * 32 + lane;
  return (fragment * 4 + part * 2 + k / 8) * 2 + k % 2;
}

// What a CTA leaves for others, in its own region of the workspace. Two slots, for odd and even
// steps: a CTA writes the next step's while its slowest reader still reads this one's.
template <int kRanks>
struct Region {
  static constexpr int kExchange = kBlock * kRanks * 4;  // bytes of a partial, and of packed parts
  LORA_INIT_HD static constexpr int partial(int side, int slot) {
    return (side * 2 + slot) * kExchange;
  }
  LORA_INIT_HD static constexpr int parts(int side, int slot) {
    return (4 + side * 2 + slot) * kExchange;
  }
  LORA_INIT_HD static constexpr int gram(int side, int slot) {
    return 8 * kExchange + (side * 2 + slot) * kRanks * kRanks * 4;
  }
  static constexpr int64_t kBytes = 8 * kExchange + 4 * kRanks * kRanks * 4;
};

// Counters of a layer, one a 32-byte sector: its end, Gram matrices done by side, and for every row
// and every column of blocks the partial products and the packed factors done.
constexpr int kCounterWords = 8;
enum Counter { kDone = 0, kGram = 1, kGroups = 3 };
LORA_INIT_HD constexpr int counter_count(int row_blocks, int column_blocks) {
  return kGroups + 2 * (row_blocks + column_blocks);
}

}  // namespace lora_init::blocks
