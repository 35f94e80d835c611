// Index maths of dual_project.cuh: how a matrix is cut into blocks and tiles, which of a tile's
// elements lie where in shared memory and in operands of mma.m16n8k16. Plain functions:
// tests/dual_project_simt.cpp goes through them one by one, and runs the kernel itself over them.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lora_init {

// A factor, and the product that is made with it.
struct DualProjectSide {
  const void* factor;           // rank i of row or column j: i · rank_stride + j · stride
  int64_t rank_stride, stride;  // elements
  int64_t ranks;                // 0 where the product is not wanted
  float* partials;              // side 0: (column blocks, out, ranks), 1: (row blocks, ranks, in)
  void* target;                 // their sum, or null where the only partial is the product
  int64_t target_rank, target_stride;  // elements from one rank, row or column to the next
};

// A row of the table of layers: int64 each.
struct DualProjectLayer {
  const void* weight;
  int64_t row_stride, column_stride;  // elements
  int64_t sizes[2];                   // out, in
  int64_t block_rows;                 // a multiple of kTileRows
  int64_t first_block, first_span;    // of the launch's
  DualProjectSide sides[2];           // W Aᵀ from A (ranks, in), Bᵀ W from Bᵀ (ranks, out)
};

namespace dual {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 16;
constexpr int kStep = 16;    // columns of an operand
constexpr int kUnit = 16;    // bytes of one asynchronous copy
constexpr int kSpan = 1024;  // elements of a sum that a CTA makes
constexpr int kMostRanks = 64;

// A CTA's block is as wide as eight warps, of which each has its columns for both products. Wide,
// for every column block costs a partial W Aᵀ: 4·ranks / columns of W's own bytes, 12% at 16 ranks;
// narrower where a warp's part of A and of Bᵀ W, which it holds in registers, would not fit them.
LORA_INIT_HD constexpr int warp_columns(int element_bytes, int ranks, int parts) {
  return element_bytes == 2 && ranks * parts <= 48 ? 64 : ranks * parts <= 96 ? 32 : 16;
}

constexpr int kMostShared = 99 << 10;  // of a CTA, on a 4090
constexpr int kMostStages = 4;  // 48 KB of W under way; two CTAs of 8 or 16 ranks fit an A100

template <int kElementBytes, int kRanks, int kParts>
struct Layout {
  static constexpr int kWarpColumns = warp_columns(kElementBytes, kRanks, kParts);
  static constexpr int kSteps = kWarpColumns / kStep;
  static constexpr int kColumns = kWarps * kWarpColumns;
  static constexpr int kRowBytes = kColumns * kElementBytes;
  static constexpr int kRowUnits = kRowBytes / kUnit;
  static constexpr int kUnitElements = kUnit / kElementBytes;
  static constexpr int kStageBytes = kTileRows * kRowBytes;
  // Of a tile: B's parts of its rows, and what each warp has of W Aᵀ.
  static constexpr int kFactorBytes = kTileRows * kRanks * kParts * 2;
  static constexpr int kProductBytes = kTileRows * kRanks * 4;
  static constexpr int kTwice = 2 * (kFactorBytes + kWarps * kProductBytes);
  static constexpr int kFitting = (kMostShared - kTwice) / kStageBytes;
  static constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;
  static constexpr int kSharedBytes = kStages * kStageBytes + kTwice;
  static_assert(kStages >= 2 && kThreads % kRowUnits == 0 && kRowUnits % 8 == 0);

  LORA_INIT_HD static constexpr int stage(int tile) { return tile % kStages * kStageBytes; }
  LORA_INIT_HD static constexpr int factor(int tile) {
    return kStages * kStageBytes + tile % 2 * kFactorBytes;
  }
  LORA_INIT_HD static constexpr int product(int tile, int warp) {
    return kStages * kStageBytes + 2 * kFactorBytes + (tile % 2 * kWarps + warp) * kProductBytes;
  }

  // Where 16 bytes of row `row`, the `unit`-th, lie in a stage. Rows are whole 128-byte lines, so
  // units are permuted by the row: the 8 rows that an ldmatrix reads at a time are in different
  // banks, and so are the 4 rows of 32 bytes that half a warp reads of fp32.
  LORA_INIT_HD static constexpr int unit_offset(int row, int unit) {
    const int key = kElementBytes == 2 ? row & 7 : (row & 3) << 1;
    return row * kRowBytes + ((unit ^ key) << 4);
  }
  LORA_INIT_HD static constexpr int element_offset(int row, int column) {
    return unit_offset(row, column / kUnitElements) + column % kUnitElements * kElementBytes;
  }

  // Where lane `lane` points ldmatrix.x4 so that its words are an operand A, of W's rows.
  LORA_INIT_HD static constexpr int lane_offset(int column, int lane) {
    return unit_offset(lane / 8 % 2 * 8 + lane % 8, column / 8 + lane / 16);
  }
  // Transposed: an operand A of W's columns.
  LORA_INIT_HD static constexpr int transposed_offset(int column, int lane) {
    return unit_offset(lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2);
  }
};

// The operands of mma.m16n8k16: A has 4 words, of m × k, B has 2, of k × n, each with two
// neighbours along k; D has 4 numbers, of m × n.
LORA_INIT_HD constexpr int a_row(int lane, int word) { return lane / 4 + word % 2 * 8; }
LORA_INIT_HD constexpr int a_k(int lane, int word) { return lane % 4 * 2 + word / 2 * 8; }
LORA_INIT_HD constexpr int b_column(int lane) { return lane / 4; }
LORA_INIT_HD constexpr int b_k(int lane, int word) { return lane % 4 * 2 + word * 8; }
LORA_INIT_HD constexpr int d_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
LORA_INIT_HD constexpr int d_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// B's parts of a tile's rows lie as operands B, 8 bytes a lane: the word with rows `row` and
// row + 1 (`row` even) of a rank.
LORA_INIT_HD constexpr int factor_word(int ranks, int part, int rank, int row) {
  return ((part * (ranks / 8) + rank / 8) * 32 + rank % 8 * 4 + row % 8 / 2) * 2 + row / 8;
}

// A warp's part of W Aᵀ lies as its lanes have it, 4 numbers each for every 8 ranks.
LORA_INIT_HD constexpr int product_row(int index) { return d_row(index / 4 % 32, index % 4); }
LORA_INIT_HD constexpr int product_rank(int index) {
  return index / 128 * 8 + d_column(index / 4 % 32, index % 4);
}

LORA_INIT_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The blocks of a layer are numbered along its rows, so that CTAs beside each other read the same
// rows of W and of B.
LORA_INIT_HD constexpr int64_t column_blocks(const DualProjectLayer& layer, int columns) {
  return ceil_div(layer.sizes[1], columns);
}
LORA_INIT_HD constexpr int64_t row_blocks(const DualProjectLayer& layer) {
  return ceil_div(layer.sizes[0], layer.block_rows);
}

// Of side 0 the partials are as many as there are column blocks, of side 1 as row blocks.
LORA_INIT_HD constexpr int64_t partial_count(const DualProjectLayer& layer, int side, int columns) {
  return side == 0 ? column_blocks(layer, columns) : row_blocks(layer);
}
LORA_INIT_HD constexpr int64_t partial_size(const DualProjectLayer& layer, int side) {
  return layer.sizes[side] * layer.sides[side].ranks;
}
LORA_INIT_HD constexpr int64_t spans(const DualProjectLayer& layer, int side) {
  return layer.sides[side].target ? ceil_div(partial_size(layer, side), kSpan) : 0;
}

// The last layer whose `first` is at most `index`: layers without any are passed over.
LORA_INIT_HD inline int find_layer(const DualProjectLayer* layers, int count,
                                   int64_t DualProjectLayer::* first, int64_t index) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (layers[middle].*first <= index ? low : high) = middle;
  }
  return low;
}

}  // namespace dual
}  // namespace lora_init
