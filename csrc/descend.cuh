// The kernel of descend.cu: all steps of a ragged group on mean((W − B·A)²) in one launch.
//
// A CTA keeps a block of W on chip (blocks.h) and takes part in each step of its layer:
//
// 1. products: W Aᵀ and Bᵀ W of its block, from the parts of A and B; they are left in global
//    memory, which is to say in the L2;
// 2. updates: two warps add up the products of a slice of B's rows, two those of a slice of A's
//    columns, do an optimiser step on it and leave its new parts.
//
// So CTAs wait for each other twice a step, and a step is mostly such waits, of trips to the L2.
// B's rows need only the CTAs beside, A's columns those above and below; only the Gram matrices AAᵀ
// and BᵀB are of a whole layer, and layers never wait for each other. What is left for others says
// itself of which step it is: a counter would be two trips and a fence more.
#pragma once

#include "blocks.h"
#include "warp.cuh"

namespace lora_init {

// A row of the table of layers: int64 each.
struct DescendLayer {
  const uint16_t* weight;
  int64_t row_stride, column_stride;
  int64_t sizes[2];  // out, in
  int64_t r;
  float *params, *m, *v;  // [Bᵀ | A] (r, out + in); m and v are not touched by plain descent
  int64_t first_block;    // of the launch's blocks
  int64_t first_counter;
};

struct DescendLaunch {
  const DescendLayer* layers;
  int64_t blocks;
  int steps;
  const float* schedule;  // (steps, 2), Optimizer.schedule
  char* workspace;        // a Region for every CTA
  uint32_t* counters;     // zeros
  float one_minus_beta1, beta2, one_minus_beta2, eps;
};

namespace blocks {

// One CTA. Side 0 is B, with W's rows, side 1 is A, with its columns.
template <typename Half, int kRanks, bool kAdam>
class Descent {
 public:
  __device__ __forceinline__ explicit Descent(const DescendLaunch& launch) : launch_(launch) {}

  // A layer's blocks lie on different CTAs, and each CTA takes its blocks in order: the layers
  // before a layer end without it, so it begins everywhere.
  __device__ __forceinline__ void run() {
    for (int block = blockIdx.x; block < launch_.blocks; block += gridDim.x) {
      find(block);
      load_weight();
      load_state();
      clear();
      meet(kReady);
      for (int tile = first_tile(); tile < end_tile(); tile += 2)
        send_parts(tile, stored(tile, 0), 0);
      for (int step = 0; step < launch_.steps; ++step) {
        update(step, products(step));
      }
      store_state();
      meet(kDone);
    }
  }

 private:
  using Regions = Region<kRanks>;
  using Words = warp::Words;
  using Floats = warp::Floats;
  static constexpr int kFragments = kRanks / 8;
  static constexpr int kUnroll = 4 / kFragments;

  // A tile of a factor: 4 columns of each rank of this lane's.
  struct Tile {
    Floats of[kFragments];
  };
  // A tile's product with the hi parts of a factor, and below with the lo parts.
  struct Sum {
    float half[kFragments][2][4] = {};
  };

  // Geometry

  __device__ __forceinline__ void find(int block) {
    while (true) {
      rows_ = ceil_div(layer().sizes[0], kBlock);
      columns_ = ceil_div(layer().sizes[1], kBlock);
      if (block < layer().first_block + rows_ * columns_) break;
      ++layer_;
    }
    const int index = int(block - layer().first_block);
    row_ = index / columns_;
    column_ = index % columns_;
    base_ = int(layer().first_block % gridDim.x);
    mean_ = 2 / (float(layer().sizes[0]) * float(layer().sizes[1]));
  }

  __device__ __forceinline__ const DescendLayer& layer() const { return launch_.layers[layer_]; }

  // A group is the blocks of a row (side 0) or column (side 1); it has a member in each group of
  // the other side.
  __device__ __forceinline__ int members(int side) const { return side == 0 ? columns_ : rows_; }
  __device__ __forceinline__ int group(int side) const { return side == 0 ? row_ : column_; }
  __device__ __forceinline__ int member(int side) const { return group(1 - side); }

  __device__ __forceinline__ uint32_t region(int side, int group, int member) const {
    const int index = side == 0 ? group * columns_ + member : member * columns_ + group;
    const int cta = base_ + index, grid = gridDim.x;  // a layer has no more blocks than the grid
    return (cta < grid ? cta : cta - grid) * Regions::kBytes;
  }
  __device__ __forceinline__ char* own() const {
    return launch_.workspace + uint32_t(blockIdx.x * Regions::kBytes);
  }
  __device__ __forceinline__ int chunk(int tile, int n) const {
    return chunk_offset(kRanks, tile, n, lane_);
  }

  // Waiting

  // For the whole layer; what its CTAs wrote before, all see afterwards.
  __device__ __forceinline__ void meet(Counter which) const {
    warp::sync_threads();
    if (threadIdx.x == 0) {
      uint32_t* counter = launch_.counters + (layer().first_counter + which) * kCounterWords;
      warp::fence();
      warp::add(counter);
      Patience patience;
      while (warp::load_acquire(counter) < uint32_t(rows_ * columns_)) patience.wait();
    }
    warp::sync_threads();
  }

  struct Patience {
#ifdef LORA_INIT_SPIN_LIMIT
    int left = LORA_INIT_SPIN_LIMIT;
    __device__ __forceinline__ void wait() {
      if (--left == 0) warp::stop();
    }
#else
    __device__ __forceinline__ void wait() {}
#endif
  };

  // The last bit of 16 bytes left for others says of which step they are: a slot is written every
  // second step, and it changes.
  __device__ __forceinline__ static uint32_t mark(int step) { return step >> 1 & 1; }

  __device__ __forceinline__ static void send(char* to, Words words, int step) {
    words.x[3] = (words.x[3] & ~1u) | mark(step);
    warp::store_whole(to, words);
  }

  // From `address(i)` in the workspace.
  template <int kCount, typename Address>
  __device__ __forceinline__ void request(Words (&words)[kCount], Address address) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) words[i] = warp::load_whole(launch_.workspace + address(i));
  }

  // Until all are there: the first is asked for until it is, then the others together.
  template <int kCount, typename Address>
  __device__ __forceinline__ void settle(Words (&words)[kCount], int step, Address address) const {
    Patience patience;
    const auto late = [&](const Words& w) { return (w.x[3] & 1) != mark(step); };
    while (warp::any(late(words[0]))) {
      words[0] = warp::load_whole(launch_.workspace + address(0));
      patience.wait();
    }
    while (true) {
      bool again = false;
#pragma unroll
      for (int i = 1; i < kCount; ++i) again |= late(words[i]);
      if (!warp::any(again)) break;
#pragma unroll
      for (int i = 1; i < kCount; ++i) words[i] = warp::load_whole(launch_.workspace + address(i));
      patience.wait();
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) words[i].x[3] &= ~1u;
  }

  template <int kCount, typename Address>
  __device__ __forceinline__ void receive(Words (&words)[kCount], int step, Address address) const {
    request(words, address);
    settle(words, step, address);
  }

  // The slots of this CTA, as if of the steps before.
  __device__ __forceinline__ void clear() const {
    for (int at = threadIdx.x * kChunk; at < Regions::kSharedBytes; at += kThreads * kChunk)
      warp::store_whole(own() + at, {{0, 0, 0, 1}});
  }

  // Memory

  // The last columns go through shared memory into registers, then the others take their place.
  __device__ __forceinline__ void load_weight() {
    load_columns(kSharedTiles, kRegisterTiles);
#pragma unroll
    for (int i = 0; i < kStrip; ++i)
#pragma unroll
      for (int j = 0; j < kRegisterTiles; ++j) weight_[i][j] = tile(kStrip * warp_ + i, j);
    warp::sync_threads();
    load_columns(0, kSharedTiles);
  }

  __device__ __forceinline__ void load_columns(int first, int count) const {
    const auto [weight, row_stride, column_stride, sizes, r, p, m, v, block, counters] = layer();
    const int units = 2 * count;
    const int64_t row0 = int64_t(row_) * kBlock,
                  column0 = int64_t(column_) * kBlock + first * kTile;
    const bool vectors = column_stride == 1 && row_stride % 8 == 0 && sizes[1] % 8 == 0 &&
                         reinterpret_cast<uintptr_t>(weight) % 16 == 0;
    for (int i = threadIdx.x; i < kBlock * units; i += kThreads) {
      const int64_t row = row0 + i / units, column = column0 + i % units * 8;
      char* to = warp::shared_memory() + unit_offset(i / units, i % units);
      const uint16_t* from = weight + row * row_stride + column * column_stride;
      const bool inside = row < sizes[0];
      if (vectors) {
        const bool whole = inside && column < sizes[1];
        warp::copy_async(to, whole ? from : weight, whole);
      } else {
        for (int k = 0; k < 8; ++k)
          reinterpret_cast<uint16_t*>(to)[k] =
              inside && column + k < sizes[1] ? from[k * column_stride] : uint16_t(0);
      }
    }
    warp::wait_copies();
    warp::sync_threads();
  }

  __device__ __forceinline__ Words tile(int row, int column) const {
    return warp::load_matrix(warp::shared_memory() + lane_offset(row, column, lane_));
  }
  __device__ __forceinline__ Words transposed(int row, int column) const {
    return warp::load_transposed(warp::shared_memory() + transposed_offset(row, column, lane_));
  }

  // Behind W: a group's parts, of both sides where there is room, then what warps exchange.
  static constexpr bool kBoth = kRanks == 8;
  __device__ __forceinline__ static char* operand(int side) {
    return warp::shared_memory() + kWeightBytes + (kBoth ? side * Regions::kExchange : 0);
  }

  template <int kSides>
  __device__ __forceinline__ void stage_parts(int first_side, int step) const {
    constexpr int kEach = Regions::kExchange / (kThreads * kChunk);
    const int at = threadIdx.x * kChunk;
    uint32_t from[kSides];
#pragma unroll
    for (int i = 0; i < kSides; ++i) {
      const int side = (first_side + i) % 2;
      from[i] = region(side, group(side), 0) + Regions::parts(side, step & 1) + at;
    }
    Words words[kSides * kEach];
    receive(words, step, [&](int i) { return from[i / kEach] + i % kEach * (kThreads * kChunk); });
#pragma unroll
    for (int i = 0; i < kSides * kEach; ++i)
      *reinterpret_cast<Words*>(operand((first_side + i / kEach) % 2) + at +
                                i % kEach * (kThreads * kChunk)) = words[i];
    warp::sync_threads();
  }

  // Of a staged factor.
  __device__ __forceinline__ void load_parts(int side, int tile, Words (&parts)[kFragments]) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      parts[n] = *reinterpret_cast<const Words*>(operand(side) + chunk(tile, n));
  }

  // Products

  // Returns the Gram matrix that this warp's update wants.
  __device__ __forceinline__ Tile products(int step) {
    warp::sync_threads();  // the operands' place was the warps'
    stage_parts<kBoth ? 2 : 1>(1, step);
    if (member(1) == gram_owner(1, column_)) send_gram(1, 0, step);
    if (kBoth && member(0) == gram_owner(0, row_)) send_gram(0, kWarps / 2, step);
    multiply_rows(own() + Regions::partial(0, step & 1), step);
    if (!kBoth) {
      warp::sync_threads();
      stage_parts<1>(0, step);
      if (member(0) == gram_owner(0, row_)) send_gram(0, kWarps / 2, step);
    }
    multiply_columns(own() + Regions::partial(1, step & 1), step);
    GramWords grams;
    request(grams, GramAddress{*this, 0, step});
    multiply_last_columns(own() + Regions::partial(1, step & 1), step);
    return sum_grams(grams, step);
  }

  // W Aᵀ
  __device__ __forceinline__ void multiply_rows(char* partial, int step) const {
    Sum sums[kStrip];
#pragma unroll kUnroll
    for (int k = 0; k < kSharedTiles; ++k) {
      Words a[kFragments];
      load_parts(1, k, a);
#pragma unroll
      for (int i = 0; i < kStrip; ++i) accumulate(sums[i], a, tile(kStrip * warp_ + i, k));
    }
#pragma unroll
    for (int k = 0; k < kRegisterTiles; ++k) {
      Words a[kFragments];
      load_parts(1, kSharedTiles + k, a);
#pragma unroll
      for (int i = 0; i < kStrip; ++i) accumulate(sums[i], a, weight_[i][k]);
    }
#pragma unroll
    for (int i = 0; i < kStrip; ++i)
#pragma unroll
      for (int n = 0; n < kFragments; ++n)
        send(partial + chunk(kStrip * warp_ + i, n), cast<Words>(total(sums[i], n)), step);
  }

  // Wᵀ B of the columns in shared memory.
  __device__ __forceinline__ void multiply_columns(char* partial, int step) const {
    Sum sums[kSharedStrip];
#pragma unroll kUnroll
    for (int k = 0; k < kTiles; ++k) {
      Words a[kFragments];
      load_parts(0, k, a);
#pragma unroll
      for (int i = 0; i < kSharedStrip; ++i)
        accumulate(sums[i], a, transposed(k, kSharedStrip * warp_ + i));
    }
#pragma unroll
    for (int i = 0; i < kSharedStrip; ++i)
#pragma unroll
      for (int n = 0; n < kFragments; ++n)
        send(partial + chunk(kSharedStrip * warp_ + i, n), cast<Words>(total(sums[i], n)), step);
  }

  // Of those in registers each warp has some rows, so that its products are added up.
  __device__ __forceinline__ void multiply_last_columns(char* partial, int step) const {
    Sum last[kRegisterTiles];
#pragma unroll
    for (int k = 0; k < kStrip; ++k) {
      Words a[kFragments];
      load_parts(0, kStrip * warp_ + k, a);
#pragma unroll
      for (int i = 0; i < kRegisterTiles; ++i) {
        const auto& w = weight_[k][i];
        accumulate(last[i], a,
                   {{warp::transpose(w.x[0]), warp::transpose(w.x[2]), warp::transpose(w.x[1]),
                     warp::transpose(w.x[3])}});
      }
    }
    constexpr int kBytes = chunk_offset(kRanks, kRegisterTiles, 0, 0);
    char* scratch = operand(0);
    warp::sync_threads();
#pragma unroll
    for (int i = 0; i < kRegisterTiles; ++i)
#pragma unroll
      for (int n = 0; n < kFragments; ++n)
        *reinterpret_cast<Floats*>(scratch + warp_ * kBytes + chunk(i, n)) = total(last[i], n);
    warp::sync_threads();
#pragma unroll
    for (int i = 0; i < kBytes / (kThreads * kChunk); ++i) {
      const int at = (i * kThreads + threadIdx.x) * kChunk;
      Floats sum{};
#pragma unroll
      for (int w = 0; w < kWarps; ++w)
        add(sum, *reinterpret_cast<const Floats*>(scratch + w * kBytes + at));
      send(partial + chunk_offset(kRanks, kSharedTiles, 0, 0) + at, cast<Words>(sum), step);
    }
  }

  // Hi over lo parts of 8 ranks are an operand A, two halves of a tile of W two operands B.
  __device__ __forceinline__ static void accumulate(Sum& sum, const Words (&a)[kFragments],
                                                    const Words& w) {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        Half::mma(sum.half[n][i], a[n].x[0], a[n].x[1], a[n].x[2], a[n].x[3], w.x[2 * i],
                  w.x[2 * i + 1]);
  }

  __device__ __forceinline__ static Floats total(const Sum& sum, int n) {
    Floats result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& half = sum.half[n][i / 2];
      result.x[i] = (half[i % 2] + half[2 + i % 2] * (1 / Half::kLow)) * (1 / Half::kScale);
    }
    return result;
  }

  // The member of a group that does it: the diagonal's, and the one beside.
  __device__ __forceinline__ int gram_owner(int side, int group) const {
    return group + side < members(side) ? group + side : 0;
  }

  // The Gram matrix of the staged 256 columns of a factor, from the same parts that W is multiplied
  // by. A warp has 8 ranks with all: a lane's chunk, of rank lane / 4, has ranks 2 (lane mod 4) and
  // the next, and both 8 on.
  __device__ __forceinline__ void send_gram(int side, int first_warp, int step) const {
    const int n = warp_ - first_warp;
    if (n < 0 || n >= kFragments) return;
    float high[kFragments][2][4] = {}, low[kFragments][2][4] = {};
#pragma unroll 4
    for (int k = 0; k < kTiles; ++k) {
      Words b[kFragments];
      load_parts(side, k, b);
      const Words a = kFragments == 1 || n == 0 ? b[0] : b[kFragments - 1];
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
        Half::mma(high[j][k & 1], a.x[0], a.x[1], a.x[2], a.x[3], b[j].x[0], b[j].x[2]);
        Half::mma(low[j][k & 1], a.x[0], a.x[1], a.x[2], a.x[3], b[j].x[1], b[j].x[3]);
      }
    }
    constexpr float kUnscale = 1 / (Half::kScale * Half::kScale);
    Floats result{};
#pragma unroll
    for (int j = 0; j < kFragments; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float mixed = high[j][0][2 + i] + high[j][1][2 + i] + low[j][0][i] + low[j][1][i];
        const float least = (low[j][0][2 + i] + low[j][1][2 + i]) * (1 / Half::kLow);
        result.x[2 * j + i] =
            (high[j][0][i] + high[j][1][i] + (mixed + least) * (1 / Half::kLow)) * kUnscale;
      }
    send(own() + Regions::gram(side, step & 1) + chunk(0, n), cast<Words>(result), step);
  }

  // That of the other side's factor, of which each of its groups has sent a part.
  static constexpr int kGrams = kRanks == 8 ? 8 : 4;
  using GramWords = Words[kGrams * kFragments];
  struct GramAddress {
    const Descent& self;
    int first, step;
    __device__ __forceinline__ uint32_t operator()(int i) const {
      const int from = 1 - self.side();
      const int g = min(first + i / kFragments, self.members(self.side()) - 1);
      return self.region(from, g, self.gram_owner(from, g)) + Regions::gram(from, step & 1) +
             self.chunk(0, i % kFragments);
    }
  };

  __device__ __forceinline__ Tile sum_grams(GramWords& words, int step) const {
    Tile sum{};
    for (int first = 0;;) {
      settle(words, step, GramAddress{*this, first, step});
#pragma unroll
      for (int i = 0; i < kGrams * kFragments; ++i)
        if (first + i / kFragments < members(side()))
          add(sum.of[i % kFragments], cast<Floats>(words[i]));
      first += kGrams;
      if (first >= members(side())) return sum;
      request(words, GramAddress{*this, first, step});
    }
  }

  // Updates. Two warps a side; each has every second tile of its CTA's slice of the group.

  __device__ __forceinline__ int side() const { return warp_ / 2; }
  __device__ __forceinline__ int first_tile() const {
    return slice_begin(member(side()), members(side())) + warp_ % 2;
  }
  __device__ __forceinline__ int end_tile() const {
    return slice_begin(member(side()) + 1, members(side()));
  }

  // A tile of the parameters, of m or of v as this CTA keeps it.
  __device__ __forceinline__ char* state(int tile, int which) const {
    return own() + Regions::state(side(), which) + chunk(tile, 0);
  }
  __device__ __forceinline__ Tile stored(int tile, int which) const {
    Tile result;
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      result.of[n] =
          *reinterpret_cast<const Floats*>(state(tile, which) + chunk_offset(8, n, 0, 0));
    return result;
  }
  __device__ __forceinline__ void keep(int tile, int which, const Tile& values) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      *reinterpret_cast<Floats*>(state(tile, which) + chunk_offset(8, n, 0, 0)) = values.of[n];
  }

  // f(element of the tensors of the state, which, value) for all that exist.
  template <typename Function>
  __device__ __forceinline__ void each_element(int tile, int n, Function f) const {
    const auto& sizes = layer().sizes;
    const int rank = chunk_rank(n, lane_);
    for (int i = 0; i < 4; ++i) {
      const int64_t column = int64_t(group(side())) * kBlock + chunk_column(tile, lane_, i);
      if (rank < layer().r && column < sizes[side()])
        f(i, rank * (sizes[0] + sizes[1]) + side() * sizes[0] + column);
    }
  }

  // Zeros where a factor has no column or rank: they stay.
  __device__ __forceinline__ void load_state() const {
    for (int which = 0; which < kStates; ++which)
      for (int tile = first_tile(); tile < end_tile(); tile += 2) {
        Tile values{};
        for (int n = 0; n < kFragments; ++n)
          each_element(tile, n, [&](int i, int64_t at) { values.of[n].x[i] = tensor(which)[at]; });
        keep(tile, which, values);
      }
  }

  __device__ __forceinline__ void store_state() const {
    for (int which = 0; which < kStates; ++which)
      for (int tile = first_tile(); tile < end_tile(); tile += 2) {
        const Tile values = stored(tile, which);
        for (int n = 0; n < kFragments; ++n)
          each_element(tile, n, [&](int i, int64_t at) { tensor(which)[at] = values.of[n].x[i]; });
      }
  }

  static constexpr int kStates = kAdam ? 3 : 1;
  __device__ __forceinline__ float* tensor(int which) const {
    return which == 0 ? layer().params : which == 1 ? layer().m : layer().v;
  }

  __device__ __forceinline__ void update(int step, const Tile& gram) const {
    warp::sync_threads();  // the warps' place was the operands'
    // Few members have many tiles each, many members few; as many as registers hold.
    if (members(side()) <= 4)
      advance<kRanks == 8 ? 3 : kAdam ? 2 : 1, 4>(step, gram);
    else
      advance<1, kRanks == 8 ? 16 : 8>(step, gram);
  }

  template <int kMost, int kLoads>
  __device__ __forceinline__ void advance(int step, const Tile& gram) const {
    const float alpha = launch_.schedule[2 * step], inverse_root = launch_.schedule[2 * step + 1];
    for (int first = first_tile(); first < end_tile(); first += 2 * kMost) {
      Tile p[kMost], m[kMost], v[kMost], projected[kMost] = {};
#pragma unroll
      for (int t = 0; t < kMost; ++t) {
        p[t] = stored(within(first, t), 0);
        if (kAdam) m[t] = stored(within(first, t), 1);
        if (kAdam) v[t] = stored(within(first, t), 2);
      }
      for (int k = 0; k < members(side()); k += kLoads)
        add_products<kMost, kLoads>(first, k, step, projected);
      float rows[kFragments][kRanks];
      spread(gram, rows);
      warp::sync_warp();  // the tiles before have been read
#pragma unroll
      for (int t = 0; t < kMost; ++t) show(t, p[t]);
      warp::sync_warp();
#pragma unroll
      for (int t = 0; t < kMost; ++t) {
        if (first + 2 * t >= end_tile()) break;
        const Tile gradient = gradient_of(t, rows, projected[t]);
        optimize(alpha, inverse_root, gradient, p[t], m[t], v[t]);
        send_parts(first + 2 * t, p[t], step + 1);
      }
#pragma unroll
      for (int t = 0; t < kMost; ++t) {
        if (first + 2 * t >= end_tile()) break;
        keep(first + 2 * t, 0, p[t]);
        if (kAdam) keep(first + 2 * t, 1, m[t]);
        if (kAdam) keep(first + 2 * t, 2, v[t]);
      }
    }
  }

  // The t-th tile from `first` on, or the first where there are fewer.
  __device__ __forceinline__ int within(int first, int t) const {
    return first + 2 * t < end_tile() ? first + 2 * t : first;
  }

  // What members k0, k0 + 1, ... found.
  template <int kMost, int kLoads>
  __device__ __forceinline__ void add_products(int first, int k0, int step,
                                               Tile (&projected)[kMost]) const {
    constexpr int kEach = kMost * kFragments;
    const int slot = Regions::partial(side(), step & 1);
    Words words[kLoads * kEach];
    receive(words, step, [&](int i) {
      const int k = min(k0 + i / kEach, members(side()) - 1), t = i % kEach / kFragments;
      return region(side(), group(side()), k) + slot + chunk(within(first, t), i % kFragments);
    });
#pragma unroll
    for (int i = 0; i < kLoads * kEach; ++i)
      if (k0 + i / kEach < members(side()))
        add(projected[i % kEach / kFragments].of[i % kFragments], cast<Floats>(words[i]));
  }

  // The Gram matrix' rows of this lane's ranks, from the four lanes that have a quarter each.
  __device__ __forceinline__ void spread(const Tile& gram,
                                         float (&rows)[kFragments][kRanks]) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int j = 0; j < kRanks; ++j)
        rows[n][j] = warp::from_lane(gram.of[n].x[j / 8 * 2 + j % 2], j % 8 / 2, 4);
  }

  // A place of the warp's for the parameters of a tile, all ranks of which a lane wants.
  __device__ __forceinline__ char* place(int t) const {
    constexpr int kPlaces = Regions::kExchange / chunk_offset(kRanks, kWarps, 0, 0);
    return operand(0) + chunk_offset(kRanks, warp_ * kPlaces + t, 0, 0);
  }
  __device__ __forceinline__ void show(int t, const Tile& p) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      *reinterpret_cast<Floats*>(place(t) + chunk(0, n)) = p.of[n];
  }

  __device__ __forceinline__ Tile gradient_of(int t, const float (&rows)[kFragments][kRanks],
                                              const Tile& projected) const {
    Tile sum{};
#pragma unroll
    for (int j = 0; j < kRanks; ++j) {
      const char* at = place(t) + chunk_offset(kRanks, 0, j / 8, j % 8 * 4 + lane_ % 4);
      const Floats p = *reinterpret_cast<const Floats*>(at);
#pragma unroll
      for (int n = 0; n < kFragments; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.of[n].x[i] += rows[n][j] * p.x[i];
    }
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.of[n].x[i] = mean_ * (sum.of[n].x[i] - projected.of[n].x[i]);
    return sum;
  }

  // One step of Adam or plain descent.
  __device__ __forceinline__ void optimize(float alpha, float inverse_root, const Tile& gradients,
                                           Tile& p, Tile& m, Tile& v) const {
    // Or 0 / 0 where there is no column or rank, beside an eps of 0.
    const float eps = launch_.eps + 1e-37f;
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float gradient = gradients.of[n].x[i];
        float change = gradient;
        if constexpr (kAdam) {
          float &first = m.of[n].x[i], &second = v.of[n].x[i];
          first += launch_.one_minus_beta1 * (gradient - first);
          second = launch_.beta2 * second + launch_.one_minus_beta2 * (gradient * gradient);
          change = warp::divide(first, warp::root(second) * inverse_root + eps);
        }
        p.of[n].x[i] -= alpha * change;
      }
  }

  __device__ __forceinline__ void send_parts(int tile, const Tile& p, int step) const {
    char* to =
        launch_.workspace + region(side(), group(side()), 0) + Regions::parts(side(), step & 1);
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
      Words words{};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scaled = p.of[n].x[i] * Half::kScale;
        const uint16_t high = Half::round(scaled);
        const uint16_t low = Half::round((scaled - Half::value(high)) * Half::kLow);
        words.x[i / 2 * 2] |= uint32_t(high) << (i % 2 * 16);
        words.x[i / 2 * 2 + 1] |= uint32_t(low) << (i % 2 * 16);
      }
      send(to + chunk(tile, n), words, step);
    }
  }

  template <typename To, typename From>
  __device__ __forceinline__ static To cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
  }

  __device__ __forceinline__ static void add(Floats& sum, const Floats& term) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.x[i] += term.x[i];
  }

  const DescendLaunch& launch_;
  const int lane_ = threadIdx.x % 32, warp_ = warp::index();
  int layer_ = 0;
  int rows_ = 0, columns_ = 0;  // blocks of the layer
  int row_ = 0, column_ = 0;    // the block's
  int base_ = 0;                // the CTA of the layer's first block
  float mean_ = 0;              // 2 / elements of W
  warp::Words weight_[kStrip][kRegisterTiles];
};

// Shared memory of a CTA: two fit a multiprocessor of 228 KB up to 16 ranks.
template <int kRanks>
constexpr int kDescendSharedBytes = kWeightBytes + Region<16>::kExchange;

// Beside an fp16 W a factor's parts are scaled, so that entries down to 2⁻⁴⁰ are kept; factors
// beyond 4,094, where a descent has long diverged, overflow. At a fixed scale, so that bits do not
// depend on where a call began.
struct Bf16Parts : warp::Bf16 {
  static constexpr float kScale = 1, kLow = 1;
};
struct Fp16Parts : warp::Fp16 {
  static constexpr float kScale = 16, kLow = 2048;
};

// Compiled for sm_90a alone: on others it is untried, and spills registers.
template <typename Half, int kRanks, bool kAdam>
__global__ void __launch_bounds__(kThreads, 2)
    descend(const __grid_constant__ DescendLaunch launch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
  Descent<Half, kRanks, kAdam>(launch).run();
#endif
}

}  // namespace blocks
}  // namespace lora_init
