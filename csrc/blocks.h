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

// Where lane `lane` points ldmatrix.x4 for a tile, so that its words are two operands B of mma, of
// 8 rows each: a row's first and last 8 columns are together.
LORA_INIT_HD constexpr int lane_offset(int tile_row, int tile_column, int lane) {
  return unit_offset(tile_row * kTile + lane / 16 * 8 + lane % 8, tile_column * 2 + lane / 8 % 2);
}
// Transposed, of 8 columns each.
LORA_INIT_HD constexpr int transposed_offset(int tile_row, int tile_column, int lane) {
  return unit_offset(tile_row * kTile + lane % 16, tile_column * 2 + lane / 16);
}

// A tile of 16 columns of a factor, or of its gradient, lies as mma's operands want it: in chunks
// of 16 bytes, for every 8 ranks one a lane, which has rank lane / 4 of 4 columns: floats, or the
// hi and lo parts of two columns and of the other two.
constexpr int kChunk = 16;
LORA_INIT_HD constexpr int chunk_offset(int ranks, int tile, int n, int lane) {
  return ((tile * (ranks / 8) + n) * 32 + lane) * kChunk;
}
LORA_INIT_HD constexpr int chunk_rank(int n, int lane) { return n * 8 + lane / 4; }
LORA_INIT_HD constexpr int chunk_column(int tile, int lane, int i) {
  return tile * kTile + lane % 4 * 2 + i / 2 * 8 + i % 2;
}

// The first of a group's tiles that one of its members updates. Up to 16 members have one or more
// each, so that every CTA of up to kMostBlocks has some, of B or of A. That is what keeps a Gram
// matrix until all have read it: the next but one, in its place, waits for parts of every tile, and
// a CTA sends its own after it has read.
LORA_INIT_HD constexpr int slice_begin(int member, int members) {
  return members <= kTiles ? member * kTiles / members : member < kTiles ? member : kTiles;
}
constexpr int kMostBlocks = (kTiles + 1) * (kTiles + 1) - 1;

// What a CTA leaves for others, in its own region of the workspace, before what it keeps for
// itself. Two slots, for odd and even steps: a CTA writes the next step's while its slowest reader
// still reads this one's.
template <int kRanks>
struct Region {
  static constexpr int kExchange = chunk_offset(kRanks, kTiles, 0, 0);  // bytes of a block's factor
  static constexpr int kGramBytes = kRanks / 8 * 32 * kChunk;
  LORA_INIT_HD static constexpr int partial(int side, int slot) {
    return (side * 2 + slot) * kExchange;
  }
  LORA_INIT_HD static constexpr int parts(int side, int slot) {
    return (4 + side * 2 + slot) * kExchange;
  }
  LORA_INIT_HD static constexpr int gram(int side, int slot) {
    return 8 * kExchange + (side * 2 + slot) * kGramBytes;
  }
  static constexpr int kSharedBytes = 8 * kExchange + 4 * kGramBytes;
  // Parameters, m and v.
  LORA_INIT_HD static constexpr int state(int side, int which) {
    return kSharedBytes + (side * 3 + which) * kExchange;
  }
  static constexpr int kBytes = kSharedBytes + 6 * kExchange;
};

// Counters of a layer, one a 32-byte sector: CTAs that are ready for it, and that are done with it.
constexpr int kCounterWords = 8;
enum Counter { kReady, kDone, kCounters };

}  // namespace lora_init::blocks
