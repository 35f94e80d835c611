// The products of descend.cuh with a block of W that stays on chip, three quarters in shared memory
// and one quarter in registers (blocks.h).
#pragma once

#include "descend_exchange.cuh"

namespace lora_init::blocks {

template <typename Parts_, int kRanks_>
class Resident : protected Exchange<ResidentShape<Parts_::kElementBytes>, Parts_, kRanks_> {
 protected:
  using Parts = Parts_;
  static constexpr int kRanks = kRanks_;
  using Shape = ResidentShape<Parts::kElementBytes>;
  using Base = Exchange<Shape, Parts, kRanks>;
  using Base::Base;
  using Base::chunk, Base::column_, Base::group, Base::kFragments, Base::lane_, Base::launch_,
      Base::layer, Base::member, Base::members, Base::own, Base::owns_gram, Base::parts_of,
      Base::row_, Base::send, Base::total, Base::warp_;
  using typename Base::Gram, typename Base::GramRows, typename Base::GramWords;
  template <int kCount>
  using Sum = typename Base::template Sum<kCount>;

  // Two CTAs fit a multiprocessor of 228 KB with the parts of 16 ranks, which is as many as the
  // sums of a product leave registers for: W goes by once for every 16.
  static constexpr int kGroup = kFragments < 2 ? kFragments : 2;
  static constexpr int kGroups = kFragments / kGroup;
  static constexpr int kStagedBytes = chunk_offset(16, Shape::kColumnTiles, 0, 0);
  static constexpr int kSharedBytes = Shape::kWeightBytes + kStagedBytes;
  static_assert(Shape::kRowTiles <= Shape::kColumnTiles);

  // Updates' places for a tile of parameters: a warp's.
  static constexpr int kPlaces = kStagedBytes / chunk_offset(kRanks, Shape::kWarps, 0, 0);
  // And members whose products are asked for at a time.
  static constexpr int kLoads = kRanks == 8 ? 16 : kRanks == 16 ? 8 : 2;
  __device__ __forceinline__ char* places() const {
    return operand(0) + chunk_offset(kRanks, warp_ * kPlaces, 0, 0);
  }

  // The last columns go through shared memory into registers, then the others take their place.
  __device__ __forceinline__ void begin() {
    load_columns(Shape::kSharedTiles, Shape::kRegisterTiles);
#pragma unroll
    for (int i = 0; i < Shape::kStrip; ++i)
#pragma unroll
      for (int j = 0; j < Shape::kRegisterTiles; ++j)
        weight_[i][j] = tile(Shape::kStrip * warp_ + i, j);
    warp::sync_threads();
    load_columns(0, Shape::kSharedTiles);
  }

  // Returns the Gram matrix that this warp's update wants.
  __device__ __forceinline__ Gram products(int step) {
    GramWords grams;
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      warp::sync_threads();  // the operands' place was the warps', or the other group's
      stage<kBoth ? 2 : 1>(1, g, step);
      if (g == kGroups - 1) make_gram(1, 0, step);
      if (kBoth) make_gram(0, Shape::kWarps / 2, step);
      multiply_rows(own() + this->regions().partial(0, step & 1), g, step);
      if (!kBoth) {
        warp::sync_threads();
        stage<1>(0, g, step);
        if (g == kGroups - 1) make_gram(0, kGroups == 1 ? Shape::kWarps / 2 : 0, step);
      }
      multiply_columns(own() + this->regions().partial(1, step & 1), g, step);
      if (kGramsEarly && g == kGroups - 1) this->request_grams(grams, step);
      multiply_last_columns(own() + this->regions().partial(1, step & 1), g, step);
    }
    if (!kGramsEarly) this->request_grams(grams, step);
    return this->sum_grams(grams, step);
  }

 private:
  static constexpr bool kGramsEarly = kRanks <= 16;  // while the last products are made
  // An fp32 W's parts leave registers for less at a time.
  static constexpr bool kNarrow = Parts::kElementBytes == 4;
  static constexpr int kUnroll = kNarrow ? 1 : 4 / kGroup, kGramUnroll = kNarrow ? 2 : 4;
  using Operands = typename Parts::Operand[kGroup];

  // Memory

  __device__ __forceinline__ void load_columns(int first, int count) const {
    constexpr int kUnit = 16 / Parts::kElementBytes;
    constexpr int kRows = Shape::kRowTiles * kTile, kColumns = Shape::kColumnTiles * kTile;
    const DescendLayer& of = layer();
    const int units = count * kTile / kUnit;
    const int64_t row0 = int64_t(row_) * kRows, column0 = int64_t(column_) * kColumns;
    const bool vectors = of.column_stride == 1 && of.row_stride % kUnit == 0 &&
                         of.sizes[1] % kUnit == 0 &&
                         reinterpret_cast<uintptr_t>(of.weight) % 16 == 0;
    for (int i = threadIdx.x; i < kRows * units; i += Shape::kThreads) {
      const int64_t row = row0 + i / units, column = column0 + first * kTile + i % units * kUnit;
      char* to = warp::shared_memory() +
                 unit_offset<Parts::kElementBytes, Shape::kRowBytes>(i / units, i % units);
      const int64_t at = row * of.row_stride + column * of.column_stride;
      const bool inside = row < of.sizes[0];
      if (vectors) {
        const bool whole = inside && column < of.sizes[1];
        warp::copy_async(to, of.weight + (whole ? at : 0) * Parts::kElementBytes, whole);
      } else {
        memset(to, 0, 16);
        for (int k = 0; k < kUnit; ++k)
          if (inside && column + k < of.sizes[1])
            memcpy(to + k * Parts::kElementBytes,
                   of.weight + (at + k * of.column_stride) * Parts::kElementBytes,
                   Parts::kElementBytes);
      }
    }
    warp::wait_copies();
    warp::sync_threads();
  }

  __device__ __forceinline__ typename Parts::Tile tile(int row, int column) const {
    return Parts::template load<Shape::kRowBytes>(warp::shared_memory(), row, column, lane_);
  }

  // Behind W: a group's parts, of both sides where there is room, then what warps exchange.
  static constexpr bool kBoth = kRanks == 8;
  __device__ __forceinline__ static char* operand(int side) {
    return warp::shared_memory() + Shape::kWeightBytes + (kBoth ? side * kStagedBytes / 2 : 0);
  }
  __device__ __forceinline__ static constexpr int staged_tiles(int side) {
    return side == 0 ? Shape::kRowTiles : Shape::kColumnTiles;
  }

  // Of the `g`-th 16 ranks.
  template <int kSides>
  __device__ __forceinline__ void stage(int first_side, int g, int step) const {
    constexpr int kEach = ceil_div(Shape::kColumnTiles * kGroup * 32, Shape::kThreads);
    // A thread's chunk `i`, here and in the workspace; the last one again where a side has fewer.
    const auto place = [&](int side, int i) {
      const int last = staged_tiles(side) * kGroup * 32 - Shape::kThreads;
      return min(i * Shape::kThreads, last) + threadIdx.x;
    };
    const auto address = [&](int i) {
      const int side = (first_side + i / kEach) % 2, at = place(side, i % kEach);
      const int tile = at / (kGroup * 32), rest = at % (kGroup * 32);
      return this->parts_of(side, step) + chunk_offset(kRanks, tile, g * kGroup, rest);
    };
    Words words[kSides * kEach];
    this->receive(words, step, address);
#pragma unroll
    for (int i = 0; i < kSides * kEach; ++i) {
      const int side = (first_side + i / kEach) % 2;
      *reinterpret_cast<Words*>(operand(side) + place(side, i % kEach) * kChunk) = words[i];
    }
    warp::sync_threads();
  }

  __device__ __forceinline__ Words staged(int side, int tile, int n) const {
    return *reinterpret_cast<const Words*>(operand(side) +
                                           chunk_offset(8 * kGroup, tile, n, lane_));
  }
  __device__ __forceinline__ void load_operands(int side, int tile, Operands& operands) const {
#pragma unroll
    for (int n = 0; n < kGroup; ++n) operands[n] = Parts::operand(staged(side, tile, n));
  }

  // By one warp for every 8 ranks. Of several groups all have arrived, the first no longer here.
  __device__ __forceinline__ void make_gram(int side, int first_warp, int step) const {
    const int n = warp_ - first_warp;
    if (!owns_gram(side) || n < 0 || n >= kFragments) return;
    GramRows rows;
#pragma unroll kGramUnroll
    for (int k = 0; k < staged_tiles(side); ++k)
      Base::add_gram(rows, k % Base::kChains, n, [&](int j) {
        if (kGroups == 1) return staged(side, k, j);
        Words words = warp::load_whole(launch_.workspace + parts_of(side, step) + chunk(k, j));
        words.x[3] &= ~1u;
        return words;
      });
    this->send_gram(side, n, rows, step);
  }

  // W Aᵀ
  __device__ __forceinline__ void multiply_rows(char* partial, int g, int step) const {
    Sum<kGroup> sums[Shape::kStrip];
#pragma unroll kUnroll
    for (int k = 0; k < Shape::kSharedTiles; ++k) {
      Operands a;
      load_operands(1, k, a);
#pragma unroll
      for (int i = 0; i < Shape::kStrip; ++i)
        Base::accumulate(sums[i], a, Parts::weight(tile(Shape::kStrip * warp_ + i, k)));
    }
#pragma unroll
    for (int k = 0; k < Shape::kRegisterTiles; ++k) {
      Operands a;
      load_operands(1, Shape::kSharedTiles + k, a);
#pragma unroll
      for (int i = 0; i < Shape::kStrip; ++i)
        Base::accumulate(sums[i], a, Parts::weight(weight_[i][k]));
    }
#pragma unroll
    for (int i = 0; i < Shape::kStrip; ++i)
#pragma unroll
      for (int n = 0; n < kGroup; ++n)
        send(partial + chunk(Shape::kStrip * warp_ + i, g * kGroup + n),
             cast<Words>(total(sums[i], n)), step);
  }

  // Wᵀ B of the columns in shared memory.
  __device__ __forceinline__ void multiply_columns(char* partial, int g, int step) const {
    Sum<kGroup> sums[Shape::kSharedStrip];
#pragma unroll kUnroll
    for (int k = 0; k < Shape::kRowTiles; ++k) {
      Operands a;
      load_operands(0, k, a);
#pragma unroll
      for (int i = 0; i < Shape::kSharedStrip; ++i)
        Base::accumulate(sums[i], a,
                         Parts::template load_transposed<Shape::kRowBytes>(
                             warp::shared_memory(), k, Shape::kSharedStrip * warp_ + i, lane_));
    }
#pragma unroll
    for (int i = 0; i < Shape::kSharedStrip; ++i)
#pragma unroll
      for (int n = 0; n < kGroup; ++n)
        send(partial + chunk(Shape::kSharedStrip * warp_ + i, g * kGroup + n),
             cast<Words>(total(sums[i], n)), step);
  }

  // Of those in registers each warp has some rows, so that its products are added up.
  __device__ __forceinline__ void multiply_last_columns(char* partial, int g, int step) const {
    Sum<kGroup> last[Shape::kRegisterTiles];
#pragma unroll
    for (int k = 0; k < Shape::kStrip; ++k) {
      Operands a;
      load_operands(0, Shape::kStrip * warp_ + k, a);
#pragma unroll
      for (int i = 0; i < Shape::kRegisterTiles; ++i)
        Base::accumulate(last[i], a, Parts::transposed_weight(Parts::weight(weight_[k][i])));
    }
    constexpr int kBytes = chunk_offset(8 * kGroup, Shape::kRegisterTiles, 0, 0);
    char* scratch = operand(0);
    warp::sync_threads();
#pragma unroll
    for (int i = 0; i < Shape::kRegisterTiles; ++i)
#pragma unroll
      for (int n = 0; n < kGroup; ++n)
        *reinterpret_cast<Floats*>(scratch + warp_ * kBytes +
                                   chunk_offset(8 * kGroup, i, n, lane_)) = total(last[i], n);
    warp::sync_threads();
#pragma unroll
    for (int at = threadIdx.x; at < kBytes / kChunk; at += Shape::kThreads) {
      Floats sum{};
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w)
        Base::add(sum, *reinterpret_cast<const Floats*>(scratch + w * kBytes + at * kChunk));
      const int tile = Shape::kSharedTiles + at / (kGroup * 32);
      send(partial + chunk_offset(kRanks, tile, g * kGroup, at % (kGroup * 32)), cast<Words>(sum),
           step);
    }
  }

  typename Parts::Tile weight_[Shape::kStrip][Shape::kRegisterTiles];
};

}  // namespace lora_init::blocks
