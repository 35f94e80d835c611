// The products of descend.cuh with a block of W that is read anew each step.
//
// A CTA has a block as large as the matrix makes it, at most 512 columns (256 of fp32, or beside 32
// ranks), so that partial sums are few: of 14336 × 4096 bf16 in 896 × 512, 10% of W's bytes at 16
// ranks, 5% at 8, written and read in the L2. W goes by in stages of 16 rows × all columns, loaded
// as far ahead as shared memory reaches and on into the next step, for W does not change: what a
// multiprocessor has in flight, 112 KB up to 16 ranks, is 5 µs of its share of 3 TB/s, for which
// the CTAs may wait for each other before the memory idles. That is the floor: one read of W a
// step.
#pragma once

#include "descend_exchange.cuh"

namespace lora_init::blocks {

template <typename Parts_, int kRanks_>
class Streamed
    : protected Exchange<StreamedShape<kRanks_, Parts_::kElementBytes>, Parts_, kRanks_> {
 protected:
  using Parts = Parts_;
  static constexpr int kRanks = kRanks_;
  using Shape = StreamedShape<kRanks, Parts::kElementBytes>;
  using Base = Exchange<Shape, Parts, kRanks>;
  using Base::Base;
  using Base::chunk, Base::column_, Base::group, Base::kFragments, Base::lane_, Base::launch_,
      Base::layer, Base::own, Base::owns_gram, Base::parts_of, Base::regions, Base::row_,
      Base::send, Base::tiles, Base::total, Base::warp_;
  using typename Base::Gram, typename Base::GramRows, typename Base::GramWords;
  using Sum = typename Base::template Sum<kFragments>;
  using Operands = typename Parts::Operand[kFragments];

  // Shared memory: the parts of all columns; of the rows of two stages; what the warps found for
  // two stages' rows; the stages of W.
  static constexpr int kTileBytes = chunk_offset(kRanks, 1, 0, 0);
  static constexpr int kRowParts = chunk_offset(kRanks, Shape::kColumnTiles, 0, 0);
  static constexpr int kFound = kRowParts + 2 * kTileBytes;
  static constexpr int kSharedBytes = kFound + 2 * Shape::kWarps * kTileBytes;  // and the stages

  // Updates' places for a tile of parameters: a warp's.
  static constexpr int kPlaces = 1;
  // And members whose products are asked for at a time.
  static constexpr int kLoads = kRanks == 8 ? 8 : kRanks == 16 ? 4 : 1;
  __device__ __forceinline__ char* places() const {
    return warp::shared_memory() + kFound + warp_ * kPlaces * kTileBytes;
  }

  __device__ __forceinline__ void begin() {
    to_copy_ = slot_ = 0;
    for (int i = 0; i < launch_.stages - 1; ++i) copy_stage(i, is_there(0, i));
  }

  // Returns the Gram matrix that this warp's update wants.
  __device__ __forceinline__ Gram products(int step) {
    stage_columns(step);
    make_column_gram(step);
    if constexpr (kKeeps) {
#pragma unroll
      for (int t = 0; t < Shape::kWarpTiles; ++t) load_operands(column_tile(t), kept_.of[t]);
    }
    Words coming[1];
    request_row_parts(coming, 0, step);
    keep_row_parts(coming, 0, step);

    Sum columns[Shape::kWarpTiles];
    GramRows gram;
    const int gram_row = warp_ - kFragments;  // of 8 ranks, of B's Gram matrix
    const bool makes_gram = owns_gram(0) && gram_row >= 0 && gram_row < kFragments;
    for (int stage = 0; stage < tiles(0); ++stage) {
      warp::wait_copies(launch_.stages - 2);
      warp::sync_threads();
      const int ahead = launch_.stages - 1;  // where the stage before was
      copy_stage(slot_ > 0 ? slot_ - 1 : ahead, is_there(step, stage + ahead));
      if (stage > 0) send_rows(stage - 1, step);
      if (stage + 1 < tiles(0)) request_row_parts(coming, stage + 1, step);
      multiply(stage, columns);
      if (makes_gram) Base::add_gram(gram, 0, gram_row, [&](int n) { return row_parts(stage, n); });
      if (stage + 1 < tiles(0)) keep_row_parts(coming, stage + 1, step);
      slot_ = slot_ + 1 < launch_.stages ? slot_ + 1 : 0;
    }
    warp::sync_threads();
    send_rows(tiles(0) - 1, step);
    send_columns(columns, step);
    if (makes_gram) this->send_gram(0, gram_row, gram, step);
    GramWords grams;
    this->request_grams(grams, step);
    return this->sum_grams(grams, step);
  }

 private:
  // Memory

  // Whether a stage that lies so far from the step's first is one of all steps'.
  __device__ __forceinline__ bool is_there(int step, int stage) const {
    return int64_t(launch_.steps - step) * tiles(0) > stage;
  }
  __device__ __forceinline__ static char* ring(int slot) {
    return warp::shared_memory() + kSharedBytes + slot * Shape::kStageBytes;
  }

  // The next one, if there is one; a group of copies even if there is none.
  __device__ __forceinline__ void copy_stage(int slot, bool there) {
    if (there) {
      constexpr int kUnit = 16 / Parts::kElementBytes, kUnits = Shape::kRowBytes / 16;
      const DescendLayer& of = layer();
      const int64_t row0 = (int64_t(row_) * tiles(0) + to_copy_) * kTile;
      const int64_t column0 = int64_t(column_) * tiles(1) * kTile;
      const int64_t right = column0 + tiles(1) * kTile;
      const int64_t columns = right < of.sizes[1] ? right : of.sizes[1];
#pragma unroll 2
      for (int i = threadIdx.x; i < kTile * kUnits; i += Shape::kThreads) {
        const int64_t row = row0 + i / kUnits, column = column0 + i % kUnits * kUnit;
        const int64_t left = row < of.sizes[0] ? columns - column : 0;
        const int inside = left >= kUnit ? kUnit : left > 0 ? int(left) : 0;
        const int64_t at = inside > 0 ? row * of.row_stride + column : 0;
        warp::stream_async(ring(slot) + unit_offset<Parts::kElementBytes, Shape::kRowBytes>(
                                            i / kUnits, i % kUnits),
                           of.weight + at * Parts::kElementBytes, inside * Parts::kElementBytes);
      }
      to_copy_ = to_copy_ + 1 < tiles(0) ? to_copy_ + 1 : 0;
    }
    warp::commit_copies();
  }

  // Parts

  __device__ __forceinline__ void stage_columns(int step) const {
    constexpr int kEach = kRowParts / (Shape::kThreads * kChunk);
    const int count = tiles(1) * kFragments * 32;
    const auto place = [&](int i) {
      return min(i * Shape::kThreads + int(threadIdx.x), count - 32 + lane_) * kChunk;
    };
    const uint32_t from = parts_of(1, step);
    Words words[kEach];
    this->receive(words, step, [&](int i) { return from + place(i); });
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      *reinterpret_cast<Words*>(warp::shared_memory() + place(i)) = words[i];
    warp::sync_threads();
  }

  __device__ __forceinline__ Words column_parts(int tile, int n) const {
    return *reinterpret_cast<const Words*>(warp::shared_memory() + chunk(tile, n));
  }
  __device__ __forceinline__ void load_operands(int tile, Operands& operands) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n) operands[n] = Parts::operand(column_parts(tile, n));
  }

  // A stage's rows: a chunk for each thread of the first warps, asked for a stage ahead.
  __device__ __forceinline__ bool has_row_parts() const { return warp_ < kFragments; }
  __device__ __forceinline__ char* row_place(int stage) const {
    return warp::shared_memory() + kRowParts + (stage & 1) * kTileBytes;
  }
  __device__ __forceinline__ auto row_source(int stage, int step) const {
    return [=](int) { return parts_of(0, step) + chunk(stage, warp_); };
  }
  __device__ __forceinline__ void request_row_parts(Words (&words)[1], int stage, int step) const {
    if (has_row_parts()) this->request(words, row_source(stage, step));
  }
  __device__ __forceinline__ void keep_row_parts(Words (&words)[1], int stage, int step) const {
    if (!has_row_parts()) return;
    this->settle(words, step, row_source(stage, step));
    *reinterpret_cast<Words*>(row_place(stage) + chunk(0, warp_)) = words[0];
  }
  __device__ __forceinline__ Words row_parts(int stage, int n) const {
    return *reinterpret_cast<const Words*>(row_place(stage) + chunk(0, n));
  }

  // Products

  __device__ __forceinline__ int column_tile(int t) const { return t * Shape::kWarps + warp_; }

  // Both of a stage, each warp with its own columns.
  __device__ __forceinline__ void multiply(int stage, Sum (&columns)[Shape::kWarpTiles]) const {
    Sum rows;
    Operands b;
    if constexpr (kKeeps) {
#pragma unroll
      for (int n = 0; n < kFragments; ++n) b[n] = Parts::operand(row_parts(stage, n));
    }
#pragma unroll
    for (int t = 0; t < Shape::kWarpTiles; ++t) {
      if (column_tile(t) >= tiles(1)) break;
      const auto tile =
          Parts::template load<Shape::kRowBytes>(ring(slot_), 0, column_tile(t), lane_);
      const auto weight = Parts::weight(tile);
      if constexpr (kKeeps)
        Base::accumulate(rows, kept_.of[t], weight);
      else
        Base::accumulate_from(rows, [&](int n) { return column_parts(column_tile(t), n); }, weight);
      typename Parts::Weight turned;
      if constexpr (Parts::kElementBytes == 2)
        turned = Parts::template load_transposed<Shape::kRowBytes>(ring(slot_), 0, column_tile(t),
                                                                   lane_);
      else  // the parts are there already
        turned = Parts::transposed_weight(weight);
      if constexpr (kKeeps)
        Base::accumulate(columns[t], b, turned);
      else
        Base::accumulate_from(columns[t], [&](int n) { return row_parts(stage, n); }, turned);
    }
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      *reinterpret_cast<Floats*>(found(stage, warp_) + chunk(0, n)) = total(rows, n);
  }

  __device__ __forceinline__ char* found(int stage, int warp) const {
    return warp::shared_memory() + kFound + ((stage & 1) * Shape::kWarps + warp) * kTileBytes;
  }

  // W Aᵀ of a stage's rows, of all columns.
  __device__ __forceinline__ void send_rows(int stage, int step) const {
    if (!has_row_parts()) return;
    Floats sum{};
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w)
      Base::add(sum, *reinterpret_cast<const Floats*>(found(stage, w) + chunk(0, warp_)));
    send(own() + regions().partial(0, step & 1) + chunk(stage, warp_), cast<Words>(sum), step);
  }

  __device__ __forceinline__ void send_columns(const Sum (&columns)[Shape::kWarpTiles],
                                               int step) const {
#pragma unroll
    for (int t = 0; t < Shape::kWarpTiles; ++t) {
      if (column_tile(t) >= tiles(1)) break;
#pragma unroll
      for (int n = 0; n < kFragments; ++n)
        send(own() + regions().partial(1, step & 1) + chunk(column_tile(t), n),
             cast<Words>(total(columns[t], n)), step);
    }
  }

  // A's, by one warp for every 8 ranks, while the first stages arrive. That of B grows with the
  // stages.
  __device__ __forceinline__ void make_column_gram(int step) const {
    if (!owns_gram(1) || warp_ >= kFragments) return;
    GramRows rows;
    for (int k = 0; k < tiles(1); ++k)
      Base::add_gram(rows, 0, warp_, [&](int j) { return column_parts(k, j); });
    this->send_gram(1, warp_, rows, step);
  }

  // A's parts of a warp's columns stay in registers where there are enough.
  static constexpr bool kKeeps = Parts::kElementBytes == 2 && kRanks <= 16;
  struct Kept {
    Operands of[Shape::kWarpTiles];
  };
  struct Nothing {};

  std::conditional_t<kKeeps, Kept, Nothing> kept_;
  int to_copy_ = 0;  // the stage to be asked for next
  int slot_ = 0;     // where the one at hand is
};

}  // namespace lora_init::blocks
