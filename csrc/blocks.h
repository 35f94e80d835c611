// Index maths of descend.cuh: how a matrix is cut into blocks, which of a block's elements lie
// where in shared memory, in registers and in packed factors. Plain functions:
// tests/descend_simt.cpp runs the kernel itself on the host over them.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lora_init::blocks {

// W goes into products in tiles of 16 × 16, two operands of mma.m16n8k16 each.
constexpr int kTile = 16;
// What a lane has of 8 ranks of a tile of a factor, or of its gradient.
constexpr int kChunk = 16;

LORA_INIT_HD constexpr int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// A block that stays on chip is 256 × 256 elements of 16 bits, 128 KB. Two CTAs a multiprocessor
// hold two of them: three quarters in shared memory (192 of 227 KB), one quarter in registers (64
// of a thread's 255). A 4096² matrix is 256 blocks, which an H100's 132 multiprocessors hold whole;
// shared memory alone would not. Of 32 bits it is 128 × 224: what makes parts of them takes half of
// those registers.
template <int kElementBytes>
struct ResidentShape {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = 32 / kElementBytes;
  static constexpr int kStrip = kRowTiles / kWarps;           // a warp's rows of tiles, of W Aᵀ
  static constexpr int kSharedTiles = 12;                     // columns of tiles in shared memory
  static constexpr int kSharedStrip = kSharedTiles / kWarps;  // a warp's, of Bᵀ W
  static constexpr int kRegisterTiles = kElementBytes == 2 ? 4 : 2;  // in registers: the last ones
  static constexpr int kColumnTiles = kSharedTiles + kRegisterTiles;
  static constexpr int kRowBytes = kSharedTiles * kTile * kElementBytes;
  static constexpr int kWeightBytes = kRowTiles * kTile * kRowBytes;
};

// What makes parts of an fp32 W leaves no registers for the sums of 32 ranks.
LORA_INIT_HD constexpr bool stays_on_chip(int ranks, int element_bytes) {
  return element_bytes == 2 || ranks <= 16;
}

// A block that is read anew each step has any number of rows, and goes by in stages of 16 of them.
// A warp keeps the sums of Bᵀ W of its columns in registers: 64 of them up to 16 ranks, as for half
// the columns of 32 ranks. An fp32 W takes twice the room, and the warps' time.
template <int kRanks, int kElementBytes>
struct StreamedShape {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpTiles = kRanks <= 16 && kElementBytes == 2 ? 4 : 2;
  static constexpr int kRowTiles = 0;                       // any number
  static constexpr int kColumnTiles = kWarps * kWarpTiles;  // at most
  static constexpr int kRowBytes = kColumnTiles * kTile * kElementBytes;
  static constexpr int kStageBytes = kTile * kRowBytes;
};

constexpr int kMostStages = 8;

// Where the `unit`-th 16 bytes of row `row` lie in shared memory. Rows are whole 128-byte lines, so
// units are permuted by the row, or what a warp reads at a time would meet in one bank: the 8 rows
// of an ldmatrix, or the 4 rows, 32 bytes each, of a half warp's pairs of floats.
template <int kElementBytes, int kRowBytes>
LORA_INIT_HD constexpr int unit_offset(int row, int unit) {
  return row * kRowBytes + ((unit ^ (kElementBytes == 2 ? row & 7 : (row & 3) << 1)) << 4);
}

// Where lane `lane` points ldmatrix.x4 for a tile, so that its words are two operands B of mma, of
// 8 rows each: a row's first and last 8 columns are together.
template <int kRowBytes>
LORA_INIT_HD constexpr int lane_offset(int tile_row, int tile_column, int lane) {
  return unit_offset<2, kRowBytes>(tile_row * kTile + lane / 16 * 8 + lane % 8,
                                   tile_column * 2 + lane / 8 % 2);
}
// Transposed, of 8 columns each.
template <int kRowBytes>
LORA_INIT_HD constexpr int transposed_offset(int tile_row, int tile_column, int lane) {
  return unit_offset<2, kRowBytes>(tile_row * kTile + lane % 16, tile_column * 2 + lane / 16);
}
// Where the two floats are of which a lane makes word `q` of those operands. As unit_offset has it;
// what depends on the lane is apart from what is known beforehand, or each place of a tile would
// take a register.
template <int kRowBytes>
LORA_INIT_HD constexpr int pair_offset(int tile_row, int tile_column, int lane, int q) {
  const int row = lane / 4 * kRowBytes + lane % 2 * 8;
  const int unit = lane % 4 / 2 ^ (lane / 4 & 3) << 1;
  return row + ((unit ^ (tile_column % 2 * 4 + q % 2 * 2)) << 4) +
         (tile_row * kTile + q / 2 * 8) * kRowBytes + tile_column / 2 * 128;
}

// A tile of 16 columns of a factor, or of its gradient, lies as mma's operands want it: in chunks,
// for every 8 ranks one a lane, which has rank lane / 4 of 4 columns: floats, or the hi and lo
// parts of two columns and of the other two.
LORA_INIT_HD constexpr int chunk_offset(int ranks, int tile, int n, int lane) {
  return ((tile * (ranks / 8) + n) * 32 + lane) * kChunk;
}
LORA_INIT_HD constexpr int chunk_rank(int n, int lane) { return n * 8 + lane / 4; }
LORA_INIT_HD constexpr int chunk_column(int tile, int lane, int i) {
  return tile * kTile + lane % 4 * 2 + i / 2 * 8 + i % 2;
}
// A Gram matrix lies in chunks too: a lane has rank lane / 4 of 8, with ranks 2 (lane mod 4) and
// the next of every 8, two of which fill a chunk.
LORA_INIT_HD constexpr int gram_chunks(int ranks) { return ranks < 16 ? 1 : ranks / 16; }

// The first of a group's tiles that one of its members updates. Up to as many members as tiles have
// one or more each; of a matrix with more of both than that, some CTA would have none, of B or of A
// (`all_update`). That all have some is what keeps a Gram matrix until all have read it: the next
// but one, in its place, waits for parts of every tile, and a CTA sends its own after it has read.
LORA_INIT_HD constexpr int slice_begin(int member, int members, int tiles) {
  return members <= tiles ? member * tiles / members : member < tiles ? member : tiles;
}
LORA_INIT_HD constexpr int most_slice(int members, int tiles) {
  return members <= tiles ? ceil_div(tiles, members) : 1;
}

// What a CTA leaves for others, in its own region of the workspace, before what it keeps for
// itself. Two slots, for odd and even steps: a CTA writes the next step's while its slowest reader
// still reads this one's.
struct Region {
  int ranks;
  int tiles[2];  // of a block: of its rows, of its columns
  int slice[2];  // of those that a member updates, at most

  LORA_INIT_HD constexpr int exchange(int side) const {
    return chunk_offset(ranks, tiles[side], 0, 0);
  }
  LORA_INIT_HD constexpr int partial(int side, int slot) const {
    return slot * (exchange(0) + exchange(1)) + side * exchange(0);
  }
  LORA_INIT_HD constexpr int parts(int side, int slot) const { return partial(side, 2 + slot); }
  LORA_INIT_HD constexpr int gram_bytes() const {
    return ranks / 8 * gram_chunks(ranks) * 32 * kChunk;
  }
  LORA_INIT_HD constexpr int gram(int side, int slot) const {
    return partial(0, 4) + (side * 2 + slot) * gram_bytes();
  }
  LORA_INIT_HD constexpr int shared_bytes() const { return gram(0, 0) + 4 * gram_bytes(); }
  // Parameters, m and v.
  LORA_INIT_HD constexpr int state(int side, int which) const {
    const int first = chunk_offset(ranks, slice[0], 0, 0);
    const int second = chunk_offset(ranks, slice[1], 0, 0);
    return shared_bytes() + which * (first + second) + side * first;
  }
  LORA_INIT_HD constexpr int bytes() const { return state(0, 3); }
};

// Counters of a layer, one a 32-byte sector: CTAs that are ready for it, and that are done with it.
constexpr int kCounterWords = 8;
enum Counter { kReady, kDone, kCounters };

}  // namespace lora_init::blocks
