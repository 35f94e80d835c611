// The kernels of dual_project.cu: W Aᵀ and Bᵀ W of a ragged group from one read of each W.
//
// A CTA walks a block of W from top to bottom, 16 rows of it at a time, which come by asynchronous
// copies through a ring of stages. Each of its eight warps has some of the block's columns (see
// dual_tiles.h), and with them
//
// - its part of A as operands, in registers for the whole walk;
// - its columns of Bᵀ W, in registers until the end;
// - a part of W Aᵀ of these 16 rows: added up over the warps through shared memory, and stored.
//
// So the only thing that is read again and again is B's part of 16 rows, which is small. Products
// of a block are partials; `dual_project_sum` adds them up, always in the same order.
//
// fp32 is multiplied as three bf16 parts, which keep all its bits: factors, and W itself, an fp16 W
// as two. Of the products of parts those below 2⁻²⁴ of the largest are left out. Sums longer than a
// tile are made by fp32 units: tensor cores cut off what they add up.
#pragma once

#include "dual_tiles.h"
#include "warp.cuh"

namespace lora_init {

struct DualProjectLaunch {
  const DualProjectLayer* layers;  // null where `only` is all there is
  DualProjectLayer only;
  int count;
  int columns;            // of a block
  bool factors_are_half;  // of W's own dtype, else fp32
  float scale;            // of W Aᵀ where it is summed
  int target_bytes;       // 4: fp32, 2: fp16 or bf16
  bool target_bf16;
};

namespace dual {

__device__ __forceinline__ const DualProjectLayer* layer_of(const DualProjectLaunch& launch,
                                                            int64_t DualProjectLayer::* first) {
  return launch.layers
             ? launch.layers + find_layer(launch.layers, launch.count, first, int64_t(blockIdx.x))
             : &launch.only;
}

// Two neighbours along k, each as a sum of 16-bit numbers, the largest first.
template <typename Half, int kParts>
__device__ __forceinline__ void split(float x, float y, uint32_t (&words)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    words[i] = Half::round(x, y);
    x -= Half::value(uint16_t(words[i]));
    y -= Half::value(uint16_t(words[i] >> 16));
  }
}

// What W is stored as, and in which parts it is multiplied.
struct Bf16Weight : warp::Bf16 {
  using Element = uint16_t;
  static constexpr int kPlanes = 1;
};
struct Fp16Weight : warp::Fp16 {
  using Element = uint16_t;
  static constexpr int kPlanes = 1;
};
struct Fp16AsBf16 : warp::Bf16 {
  using Element = uint16_t;
  static constexpr int kPlanes = 2;
};
struct Fp32AsBf16 : warp::Bf16 {
  using Element = float;
  static constexpr int kPlanes = 3;
};

template <typename Weight, int kRanks, int kParts>
class DualProjection {
 public:
  using Tile = Layout<sizeof(typename Weight::Element), kRanks, kParts>;
  static constexpr int kFragments = kRanks / 8;

  __device__ __forceinline__ explicit DualProjection(const DualProjectLaunch& launch)
      : launch_(launch), layer_(layer_of(launch, &DualProjectLayer::first_block)) {
    const auto& [out, in] = layer_->sizes;
    const int columns = int(column_blocks(*layer_, Tile::kColumns));
    const int index = int(int64_t(blockIdx.x) - layer_->first_block);
    row_block_ = index / columns;
    column_block_ = index % columns;
    row0_ = int(row_block_ * layer_->block_rows);
    column0_ = column_block_ * Tile::kColumns;
    rows_ = int(out);
    const int64_t end = row0_ + layer_->block_rows;
    tiles_ = int(ceil_div((end < out ? end : out) - row0_, kTileRows));
    // Warps beyond W's columns have nothing to do.
    live_ = min(kWarps, int(ceil_div(in - column0_, Tile::kWarpColumns)));

    const int64_t row_bytes = layer_->row_stride * int64_t(sizeof(Element));
    vectors_ = layer_->column_stride == 1 && row_bytes % kUnit == 0 &&
               reinterpret_cast<uintptr_t>(layer_->weight) % kUnit == 0;
    const int column = column0_ + own_unit() * Tile::kUnitElements;
    inside_ = min(int(in) - column, Tile::kUnitElements);
    if (inside_ < 0) inside_ = 0;
    weight_ = static_cast<const Element*>(layer_->weight) +
              (row0_ + own_row()) * layer_->row_stride + column * layer_->column_stride;
    row_stride_ = layer_->row_stride;

    const DualProjectSide& b = layer_->sides[1];
    b_row_ = b.stride * factor_bytes();
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      b_[i] = static_cast<const char*>(b.factor) + pair_rank(i) * b.rank_stride * factor_bytes() +
              (row0_ + pair_row(i)) * b_row_;
    p_ = int(layer_->sides[0].ranks);
    q_ = int(b.ranks);
    left_ = layer_->sides[0].partials + (column_block_ * out + row0_) * p_;
  }

  __device__ __forceinline__ void run() {
    for (int tile = 0; tile < Tile::kStages - 1; ++tile) load(tile);
    load_operands();
    fetch(0);
    keep(0);
    for (int tile = 0; tile < tiles_; ++tile) {
      warp::wait_copies<Tile::kStages - 2>();
      // This tile and B's part of it are there; all are done with the tile before, whose products
      // they left.
      warp::sync_threads();
      load(tile + Tile::kStages - 1);
      fetch(tile + 1);
      if (tile > 0) store_rows(tile - 1);
      if (warp_ < live_) multiply(tile);
      keep(tile + 1);
    }
    warp::sync_threads();
    store_rows(tiles_ - 1);
    store_columns();
  }

 private:
  using Element = typename Weight::Element;
  using Words = warp::Words;

  struct alignas(8) Pair {
    uint32_t x[2];
  };
  struct alignas(8) Two {
    float x[2];
  };

  __device__ __forceinline__ int factor_bytes() const {
    return kParts == 1 && launch_.factors_are_half ? 2 : 4;
  }
  __device__ __forceinline__ float factor(const char* from) const {
    if constexpr (kParts == 1)
      if (launch_.factors_are_half) return Weight::value(*reinterpret_cast<const uint16_t*>(from));
    return *reinterpret_cast<const float*>(from);
  }

  // A thread's 16 bytes of a tile's rows: these, and every kRowStep-th row on.
  static constexpr int kRowStep = kThreads / Tile::kRowUnits;
  __device__ __forceinline__ static int own_unit() { return threadIdx.x % Tile::kRowUnits; }
  __device__ __forceinline__ static int own_row() { return threadIdx.x / Tile::kRowUnits; }

  // W of the next tile. Zeros beyond it; after the last tile only the count of copies goes on.
  __device__ __forceinline__ void load(int tile) {
    if (tile < tiles_) {
      char* const stage = warp::shared_memory() + Tile::stage(tile);
      const int first = row0_ + tile * kTileRows;
      if (vectors_) {
#pragma unroll
        for (int row = own_row(); row < kTileRows; row += kRowStep) {
          const int count = first + row < rows_ ? inside_ : 0;
          warp::copy_async_bytes(stage + Tile::unit_offset(row, own_unit()), weight_,
                                 count * int(sizeof(Element)));
          weight_ += kRowStep * row_stride_;
        }
      } else {
#pragma unroll 1
        for (int row = own_row(); row < kTileRows; row += kRowStep) {
          gather(stage + Tile::unit_offset(row, own_unit()), first + row < rows_ ? inside_ : 0);
          weight_ += kRowStep * row_stride_;
        }
      }
    }
    warp::commit_copies();
  }

  // Element by element, of memory that asynchronous copies cannot address.
  __device__ __forceinline__ void gather(char* to, int count) const {
#pragma unroll
    for (int i = 0; i < Tile::kUnitElements; ++i)
      reinterpret_cast<Element*>(to)[i] =
          i < count ? weight_[i * layer_->column_stride] : Element(0);
  }

  // A, of this warp's columns.
  __device__ __forceinline__ void load_operands() {
    const DualProjectSide a = layer_->sides[0];
    const int64_t in = layer_->sizes[1];
    const auto number = [&](int rank, int column) {
      if (rank >= p_ || column >= in) return 0.f;
      return factor(static_cast<const char*>(a.factor) +
                    (rank * a.rank_stride + column * a.stride) * factor_bytes());
    };
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step)
#pragma unroll
      for (int n = 0; n < kFragments; ++n)
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const int rank = n * 8 + b_column(lane_);
          const int column =
              column0_ + warp_ * Tile::kWarpColumns + step * kStep + b_k(lane_, word);
          uint32_t words[kParts];
          split<Weight>(number(rank, column), number(rank, column + 1), words);
#pragma unroll
          for (int part = 0; part < kParts; ++part) a_[step][part][n].x[word] = words[part];
        }
  }

  // Two neighbours in a rank of B a thread, or two such pairs; threads beyond the last have none.
  static constexpr int kPairs = int(ceil_div(kRanks * kTileRows / 2, kThreads));
  __device__ __forceinline__ static int pair(int i) { return i * kThreads + threadIdx.x; }
  __device__ __forceinline__ static int pair_rank(int i) { return pair(i) % kRanks; }
  __device__ __forceinline__ static int pair_row(int i) { return pair(i) / kRanks * 2; }

  // B of the next tile's rows: first to registers,
  __device__ __forceinline__ void fetch(int tile) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int row = row0_ + tile * kTileRows + pair_row(i);
      const bool wanted = pair_row(i) < kTileRows && pair_rank(i) < q_ && tile < tiles_;
      next_[i][0] = wanted && row < rows_ ? factor(b_[i]) : 0;
      next_[i][1] = wanted && row + 1 < rows_ ? factor(b_[i] + b_row_) : 0;
      b_[i] += kTileRows * b_row_;
    }
  }

  // then, in parts, to shared memory.
  __device__ __forceinline__ void keep(int tile) const {
    auto* const to = reinterpret_cast<uint32_t*>(warp::shared_memory() + Tile::factor(tile));
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (pair_row(i) >= kTileRows) break;
      uint32_t words[kParts];
      split<Weight>(next_[i][0], next_[i][1], words);
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        to[factor_word(kRanks, part, pair_rank(i), pair_row(i))] = words[part];
    }
  }

  // This warp's part of both products of a tile.
  __device__ __forceinline__ void multiply(int tile) {
    const char* const stage = warp::shared_memory() + Tile::stage(tile);
    Pair b[kParts][kFragments];
    const auto* const from =
        reinterpret_cast<const Pair*>(warp::shared_memory() + Tile::factor(tile)) + lane_;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int n = 0; n < kFragments; ++n) b[part][n] = from[(part * kFragments + n) * 32];

    float rows[kFragments][4] = {};
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      const int column = warp_ * Tile::kWarpColumns + step * kStep;
      Words w[Weight::kPlanes];
      load_planes(stage, column, w);
      if (p_) {
#pragma unroll
        for (int n = 0; n < kFragments; ++n)
          add_products(rows[n], w, [&](int part) { return a_[step][part][n]; });
      }
      if (q_) {
        Words t[Weight::kPlanes];
        transpose_planes(stage, column, w, t);
#pragma unroll
        for (int n = 0; n < kFragments; ++n) {
          float sum[4] = {};
          add_products(sum, t, [&](int part) { return b[part][n]; });
#pragma unroll
          for (int i = 0; i < 4; ++i) columns_[step][n][i] += sum[i];
        }
      }
    }
    auto* const to =
        reinterpret_cast<warp::Floats*>(warp::shared_memory() + Tile::product(tile, warp_)) + lane_;
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      to[n * 32] = {rows[n][0], rows[n][1], rows[n][2], rows[n][3]};
  }

  // The products of two numbers' parts, the small ones first.
  template <typename Operand>
  __device__ __forceinline__ static void add_products(float (&sum)[4],
                                                      const Words (&w)[Weight::kPlanes],
                                                      Operand operand) {
#pragma unroll
    for (int both = kParts - 1; both >= 0; --both)
#pragma unroll
      for (int plane = 0; plane < Weight::kPlanes; ++plane) {
        if (plane > both) continue;
        const Pair f = operand(both - plane);
        const Words& a = w[plane];
        Weight::mma(sum, a.x[0], a.x[1], a.x[2], a.x[3], f.x[0], f.x[1]);
      }
  }

  // 16 × 16 elements of W as operands A.
  __device__ __forceinline__ void load_planes(const char* stage, int column,
                                              Words (&w)[Weight::kPlanes]) const {
    if constexpr (sizeof(Element) == 4) {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const Two two = *reinterpret_cast<const Two*>(
            stage + Tile::element_offset(a_row(lane_, word), column + a_k(lane_, word)));
        split_into(w, word, two.x[0], two.x[1]);
      }
    } else {
      const Words stored = warp::load_matrix(stage + Tile::lane_offset(column, lane_));
      if constexpr (Weight::kPlanes == 1) {
        w[0] = stored;
      } else {
#pragma unroll
        for (int word = 0; word < 4; ++word)
          split_into(w, word, warp::Fp16::value(uint16_t(stored.x[word])),
                     warp::Fp16::value(uint16_t(stored.x[word] >> 16)));
      }
    }
  }

  __device__ __forceinline__ static void split_into(Words (&w)[Weight::kPlanes], int word, float x,
                                                    float y) {
    uint32_t words[Weight::kPlanes];
    split<Weight>(x, y, words);
#pragma unroll
    for (int plane = 0; plane < Weight::kPlanes; ++plane) w[plane].x[word] = words[plane];
  }

  // The same of Wᵀ: from memory where it lies there as it is multiplied, else from registers.
  __device__ __forceinline__ void transpose_planes(const char* stage, int column,
                                                   const Words (&w)[Weight::kPlanes],
                                                   Words (&t)[Weight::kPlanes]) const {
    if constexpr (Weight::kPlanes == 1) {
      t[0] = warp::load_transposed(stage + Tile::transposed_offset(column, lane_));
    } else {
#pragma unroll
      for (int plane = 0; plane < Weight::kPlanes; ++plane)
        t[plane] = {{warp::transpose(w[plane].x[0]), warp::transpose(w[plane].x[2]),
                     warp::transpose(w[plane].x[1]), warp::transpose(w[plane].x[3])}};
    }
  }

  // W Aᵀ of the next tile, added up over the warps.
  __device__ __forceinline__ void store_rows(int tile) {
    const int rows = min(rows_ - row0_ - tile * kTileRows, kTileRows);
#pragma unroll
    for (int index = threadIdx.x; index < kTileRows * kRanks; index += kThreads) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp)
        if (warp < live_)
          sum += reinterpret_cast<const float*>(warp::shared_memory() +
                                                Tile::product(tile, warp))[index];
      const int row = product_row(index), rank = product_rank(index);
      if (row < rows && rank < p_) left_[row * p_ + rank] = sum;
    }
    left_ += kTileRows * p_;
  }

  // This warp's columns of Bᵀ W.
  __device__ __forceinline__ void store_columns() const {
    const int size = int(layer_->sizes[1]);
    float* const to = layer_->sides[1].partials + int64_t(row_block_) * q_ * size;
    const int first = column0_ + warp_ * Tile::kWarpColumns;
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step)
#pragma unroll
      for (int n = 0; n < kFragments; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = first + step * kStep + d_row(lane_, i);
          const int rank = n * 8 + d_column(lane_, i);
          if (rank < q_ && column < size) to[int64_t(rank) * size + column] = columns_[step][n][i];
        }
  }

  const DualProjectLaunch& launch_;
  const DualProjectLayer* const layer_;
  const int lane_ = threadIdx.x % 32, warp_ = warp::index();
  int row_block_, column_block_;
  int row0_, column0_;     // the block's first
  int rows_;               // of W
  int tiles_;              // of the block
  int live_;               // warps
  int p_, q_;              // ranks of A and of B
  bool vectors_;           // W is read 16 bytes at a time
  int inside_;             // elements of this thread's 16 bytes that are W's
  const Element* weight_;  // the next of them
  int64_t row_stride_;
  const char* b_[kPairs];  // the next pairs of B, whose rows are b_row_ bytes apart
  int64_t b_row_;
  float next_[kPairs][2];
  float* left_;  // where the next tile's W Aᵀ goes
  Pair a_[Tile::kSteps][kParts][kFragments];
  float columns_[Tile::kSteps][kFragments][4] = {};
};

// Registers of a thread in A's and B's parts, both products and W: few enough, and two CTAs share a
// multiprocessor.
template <typename Weight, int kRanks, int kParts>
constexpr int resident_ctas() {
  using Tile = Layout<sizeof(typename Weight::Element), kRanks, kParts>;
  constexpr int kHeld =
      kRanks / 8 * (Tile::kSteps * (2 * kParts + 4) + 4 + 2 * kParts) + 8 * Weight::kPlanes;
  return kHeld <= 80 ? 2 : 1;
}

template <typename Weight, int kRanks, int kParts>
__global__ void __launch_bounds__(kThreads, (resident_ctas<Weight, kRanks, kParts>()))
    dual_project(const __grid_constant__ DualProjectLaunch launch) {
  DualProjection<Weight, kRanks, kParts>(launch).run();
}

// One span of one product: its partials, first to last.
__device__ __forceinline__ void sum_span(const DualProjectLaunch& launch) {
  const DualProjectLayer& layer = *layer_of(launch, &DualProjectLayer::first_span);
  int64_t span = int64_t(blockIdx.x) - layer.first_span;
  int which = 0;
  if (span >= spans(layer, 0)) {
    span -= spans(layer, 0);
    which = 1;
  }
  const DualProjectSide& side = layer.sides[which];
  const int64_t size = partial_size(layer, which);
  const int64_t count = partial_count(layer, which, launch.columns);
  // Neighbours of a partial: ranks of a row, or columns of a rank.
  const int64_t inner = which == 0 ? side.ranks : layer.sizes[1];
  for (int i = 0; i < kSpan / kThreads; ++i) {
    const int64_t at = span * kSpan + i * kThreads + threadIdx.x;
    if (at >= size) return;
    float sum = 0;
#pragma unroll 8
    for (int64_t k = 0; k < count; ++k) sum += side.partials[k * size + at];
    if (which == 0) sum *= launch.scale;
    const int64_t outer = at / inner, rest = at - outer * inner;
    const int64_t rank = which == 0 ? rest : outer, other = which == 0 ? outer : rest;
    const int64_t place = rank * side.target_rank + other * side.target_stride;
    if (launch.target_bytes == 4)
      static_cast<float*>(side.target)[place] = sum;
    else
      static_cast<uint16_t*>(side.target)[place] =
          launch.target_bf16 ? warp::Bf16::round(sum) : warp::Fp16::round(sum);
  }
}

__global__ void __launch_bounds__(kThreads)
    dual_project_sum(const __grid_constant__ DualProjectLaunch launch) {
  sum_span(launch);
}

}  // namespace dual
}  // namespace lora_init
