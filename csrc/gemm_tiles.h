// Index maths of the Hopper GEMMs in lora_linear.cu and project.cu: which tile a CTA computes, and
// where an element lies in shared memory, in a wgmma operand and in the accumulators. Plain
// functions, so that tests/gemm_tiles_test.cpp can replay a whole tile on the host.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lora_init::gemm {

constexpr int kTileM = 128;  // two consumer warpgroups of 64 rows
constexpr int kTileK = 64;   // one row of the 128-byte swizzle in 16-bit elements
constexpr int kStepK = 16;   // K of one wgmma
constexpr int kConsumers = 2;
constexpr int kRowBytes = 128;
constexpr int kAtomBytes = 1024;                 // the swizzle repeats every 8 rows
constexpr int kBlockBytes = kTileK * kRowBytes;  // 64 rows: a consumer's part of X, 64 columns of R
constexpr int kBandM = 2048;  // rows that are worked on together, to share reads of R in L2

constexpr int kTileABytes = kTileM * kRowBytes;
constexpr int kStoreRows = 16;                       // a warp's rows of the accumulators
constexpr int kStoreBytes = kStoreRows * kRowBytes;  // 64 columns of them, one TMA store

// project.cu: tiles of 128 × 64 ranks. Its partial sums have rows that start 8 banks apart.
constexpr int kRanks = 64;
constexpr int kProjectStages = 4;  // 64 KB of X in flight, and two CTAs in a multiprocessor
constexpr int kProjectStageBytes = kTileABytes + kBlockBytes;
constexpr int kPartialPitch = kRanks + 8;

LORA_INIT_HD constexpr int stage_count(int tile_n) { return tile_n == 256 ? 4 : 6; }
LORA_INIT_HD constexpr int stage_bytes(int tile_n) { return kTileABytes + tile_n * kRowBytes; }
LORA_INIT_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Of `chunks` of k, the first of part `part` of `parts`.
LORA_INIT_HD constexpr int first_chunk(int chunks, int part, int parts) {
  return int(int64_t(chunks) * part / parts);
}

struct Tile {
  int m, n;
};

// The index-th tile of an m_tiles × n_tiles grid: down the columns of bands of `band` tile rows, so
// that the tiles in flight cover a near-square of the output.
LORA_INIT_HD constexpr Tile tile_at(int index, int m_tiles, int n_tiles, int band) {
  const int first = index / (band * n_tiles) * band;
  const int rows = m_tiles - first < band ? m_tiles - first : band;
  const int within = index - first * n_tiles;
  return {first + within % rows, within / rows};
}

// Byte offset of 16-bit element (row, column) of a box 64 elements wide, as TMA writes or reads it
// under CU_TENSOR_MAP_SWIZZLE_128B: 16-byte units of a row are permuted by the row mod 8.
LORA_INIT_HD constexpr int swizzled(int row, int column) {
  return row * kRowBytes + (((column >> 3) ^ (row & 7)) << 4) + (column & 7) * 2;
}

// wgmma's matrix descriptor of shared memory under the 128-byte swizzle (PTX ISA, "Matrix
// descriptor format"): address, leading and stride byte offsets without their lowest four bits.
LORA_INIT_HD constexpr uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// K-major (X, S; R and B of the forward): rows of 64 k, eight rows an atom. The leading offset is
// not used. A step of 16 k is 32 bytes further inside the same row.
LORA_INIT_HD constexpr uint64_t k_major(uint32_t address) {
  return descriptor(address, 0, kAtomBytes);
}
// MN-major (R and A of dX; what `project` transposes): blocks of 64 n, each with a row of 64 n for
// every k. A step of 16 k is two atoms further.
LORA_INIT_HD constexpr uint64_t mn_major(uint32_t address) {
  return descriptor(address, kBlockBytes, kAtomBytes);
}
constexpr int kStepKMajor = kStepK * 2;
constexpr int kStepMNMajor = kStepK * kRowBytes;

// Which element of a consumer's 64 × N accumulators thread `thread` of its warpgroup has in its
// register i (PTX ISA, "wgmma D fragment").
LORA_INIT_HD constexpr int fragment_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + (i & 2) * 4;
}
LORA_INIT_HD constexpr int fragment_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + (i & 1);
}

// Where lane `lane` points stmatrix.x4 when its warp stores 16 columns, the `step`-th of 64, of its
// 16 rows: the four 8 × 8 matrices are rows 0-7, rows 8-15, and these again 8 columns on, the order
// in which a thread has them in registers 8·step … 8·step + 7.
LORA_INIT_HD constexpr int store_offset(int lane, int step) {
  return swizzled(lane % 16, step * 16 + lane / 16 * 8);
}

}  // namespace lora_init::gemm
