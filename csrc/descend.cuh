// The kernel of descend.cu: all steps of a ragged group on mean((W − B·A)²) in one launch.
//
// A CTA keeps a block of W on chip (blocks.h) and takes part in each step of its layer:
//
// 1. products: W Aᵀ and Bᵀ W of its block, from the parts of A and B; they are left in global
// memory,
//    which is to say in the L2;
// 2. updates: two warps add up the products of a slice of B's rows, two those of a slice of A's
//    columns, do an optimiser step on it and leave its new parts.
//
// CTAs wait for each other twice a step, by counters, one a row and one a column of blocks: B's
// rows need only the CTAs beside, A's columns those above and below. Only the Gram matrices AAᵀ and
// BᵀB are of a whole layer, and layers never wait for each other. What a wait costs is its trips to
// the L2, so both sides make theirs together.
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
  __device__ __forceinline__ explicit Descent(const DescendLaunch& launch)
      : launch_(launch), layer_(launch.layers) {}

  // A layer's blocks lie on different CTAs, and each CTA takes its blocks in order: the layers
  // before a layer end without it, so it begins everywhere.
  __device__ __forceinline__ void run() {
    for (int64_t block = blockIdx.x; block < launch_.blocks; block += gridDim.x) {
      while (layer_->first_block + block_count() <= block) ++layer_;
      const int index = int(block - layer_->first_block);
      row_ = index / groups(1);
      column_ = index % groups(1);
      base_ = int(layer_->first_block % gridDim.x);
      load_weight();
      publish();
      for (int step = 0; step < launch_.steps; ++step) {
        products(step);
        update(step);
      }
      // The next block's products go where this layer's may still be read.
      arrive({counter(kDone)});
      await({counter(kDone)}, {uint32_t(block_count())});
    }
  }

 private:
  using Regions = Region<kRanks>;
  static constexpr int kFragments = kRanks / 8;
  static constexpr int kUnroll = 4 / kFragments;

  // A tile's product with the hi and with the lo parts of a factor.
  struct Sum {
    float high[kFragments][4] = {}, low[kFragments][4] = {};
  };

  // Geometry

  // A group is the blocks of a row (side 0) or column (side 1); it has a member in each group of
  // the other side.
  __device__ __forceinline__ int groups(int side) const {
    return ceil_div(layer_->sizes[side], kBlock);
  }
  __device__ __forceinline__ int members(int side) const { return groups(1 - side); }
  __device__ __forceinline__ int group(int side) const { return side == 0 ? row_ : column_; }
  __device__ __forceinline__ int member(int side) const { return group(1 - side); }
  __device__ __forceinline__ int block_count() const { return groups(0) * groups(1); }

  __device__ __forceinline__ char* region(int side, int group, int member) const {
    const int index = side == 0 ? group * groups(1) + member : member * groups(1) + group;
    const int cta = base_ + index, grid = gridDim.x;  // a layer has no more blocks than the grid
    return launch_.workspace + (cta < grid ? cta : cta - grid) * Regions::kBytes;
  }

  __device__ __forceinline__ uint32_t* counter(int index) const {
    return launch_.counters + (layer_->first_counter + index) * kCounterWords;
  }
  __device__ __forceinline__ uint32_t* products_done(int side) const {
    return counter(kGroups + 2 * (side * groups(0) + group(side)));
  }
  __device__ __forceinline__ uint32_t* parts_done(int side) const {
    return products_done(side) + kCounterWords;
  }

  // Waiting

  // All threads' writes are visible to whoever sees the counts.
  template <int kCounters>
  __device__ __forceinline__ void arrive(uint32_t* const (&counters)[kCounters]) const {
    warp::sync_threads();
    if (threadIdx.x != 0) return;
    warp::fence();
    for (uint32_t* counter : counters)
      if (counter) warp::add(counter);
  }

  // A warp for each.
  template <int kCounters>
  __device__ __forceinline__ void await(const uint32_t* const (&counters)[kCounters],
                                        const uint32_t (&counts)[kCounters]) const {
#pragma unroll
    for (int i = 0; i < kCounters; ++i)
      if (threadIdx.x == i * 32) spin(counters[i], counts[i]);
    warp::sync_threads();
  }

  __device__ __forceinline__ static void spin(const uint32_t* counter, uint32_t count) {
#ifdef LORA_INIT_SPIN_LIMIT
    for (int64_t i = 0; i < LORA_INIT_SPIN_LIMIT; ++i)
      if (warp::load_acquire(counter) >= count) return;
    warp::stop();
#else
    while (warp::load_acquire(counter) < count) {
    }
#endif
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
    const auto [weight, row_stride, column_stride, sizes, r, p, m, v, block, counters] = *layer_;
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

  __device__ __forceinline__ const char* tile_address(int row, int column) const {
    return warp::shared_memory() + lane_offset(row, column, lane_);
  }
  __device__ __forceinline__ warp::Words tile(int row, int column) const {
    return warp::load_matrix(tile_address(row, column));
  }

  // Behind W: a group's parts, of both sides where there is room, then what warps exchange.
  static constexpr bool kBoth = kRanks == 8;
  __device__ __forceinline__ static char* operand(int side) {
    return warp::shared_memory() + kWeightBytes + (kBoth ? side * Regions::kExchange : 0);
  }

  __device__ __forceinline__ void stage_parts(int side, int step) const {
    const char* from = region(side, group(side), 0) + Regions::parts(side, step & 1);
#pragma unroll
    for (int at = threadIdx.x * 16; at < Regions::kExchange; at += kThreads * 16)
      warp::copy_async(operand(side) + at, from + at, true);
  }

  // The hi words, then the lo words, of tile `k` of a staged factor and its `n`-th 8 ranks.
  __device__ __forceinline__ warp::Words parts(int side, int k, int n) const {
    const int fragment = (k * kFragments + n) * 32 + lane_;
    return reinterpret_cast<const warp::Words*>(operand(side))[fragment];
  }

  // Products

  __device__ __forceinline__ void products(int step) {
    await({parts_done(0), parts_done(1)},
          {members(0) * uint32_t(step + 1), members(1) * uint32_t(step + 1)});
    stage_parts(1, step);
    if (kBoth) stage_parts(0, step);
    warp::wait_copies();
    warp::sync_threads();
    char* own = region(0, row_, column_);
    if (member(1) == 0) gram(1, own, step);
    multiply_rows(reinterpret_cast<float*>(own + Regions::partial(0, step & 1)));
    if (!kBoth) {
      warp::sync_threads();
      stage_parts(0, step);
      warp::wait_copies();
      warp::sync_threads();
    }
    if (member(0) == 0) gram(0, own, step);
    multiply_columns(reinterpret_cast<float*>(own + Regions::partial(1, step & 1)));
    arrive({products_done(0), products_done(1), member(0) == 0 ? counter(kGram) : nullptr,
            member(1) == 0 ? counter(kGram + 1) : nullptr});
  }

  // partial (256, ranks) = W Aᵀ
  __device__ __forceinline__ void multiply_rows(float* partial) const {
    Sum sums[kStrip];
#pragma unroll kUnroll
    for (int k = 0; k < kSharedTiles; ++k) {
      warp::Words b[kFragments];
#pragma unroll
      for (int n = 0; n < kFragments; ++n) b[n] = parts(1, k, n);
#pragma unroll
      for (int i = 0; i < kStrip; ++i) accumulate(sums[i], tile(kStrip * warp_ + i, k), b);
    }
#pragma unroll
    for (int k = 0; k < kRegisterTiles; ++k) {
      warp::Words b[kFragments];
#pragma unroll
      for (int n = 0; n < kFragments; ++n) b[n] = parts(1, kSharedTiles + k, n);
#pragma unroll
      for (int i = 0; i < kStrip; ++i) accumulate(sums[i], weight_[i][k], b);
    }
#pragma unroll
    for (int i = 0; i < kStrip; ++i)
      store(sums[i], partial + (kStrip * warp_ + i) * kTile * kRanks);
  }

  // partial (256, ranks) = Wᵀ B. Of the columns in registers each warp has some rows, so that its
  // products are added up.
  __device__ __forceinline__ void multiply_columns(float* partial) const {
    Sum sums[kSharedStrip];
#pragma unroll kUnroll
    for (int k = 0; k < kTiles; ++k) {
      warp::Words b[kFragments];
#pragma unroll
      for (int n = 0; n < kFragments; ++n) b[n] = parts(0, k, n);
#pragma unroll
      for (int i = 0; i < kSharedStrip; ++i) {
        const auto w = warp::load_transposed(tile_address(k, kSharedStrip * warp_ + i));
        accumulate(sums[i], {w.x[0], w.x[2], w.x[1], w.x[3]}, b);
      }
    }
#pragma unroll
    for (int i = 0; i < kSharedStrip; ++i)
      store(sums[i], partial + (kSharedStrip * warp_ + i) * kTile * kRanks);

    Sum last[kRegisterTiles];
#pragma unroll
    for (int k = 0; k < kStrip; ++k) {
      warp::Words b[kFragments];
#pragma unroll
      for (int n = 0; n < kFragments; ++n) b[n] = parts(0, kStrip * warp_ + k, n);
#pragma unroll
      for (int i = 0; i < kRegisterTiles; ++i) {
        const auto& w = weight_[k][i];
        accumulate(last[i],
                   {warp::transpose(w.x[0]), warp::transpose(w.x[2]), warp::transpose(w.x[1]),
                    warp::transpose(w.x[3])},
                   b);
      }
    }
    constexpr int kColumns = kRegisterTiles * kTile * kRanks;
    float* scratch = reinterpret_cast<float*>(operand(0));
    warp::sync_threads();
#pragma unroll
    for (int i = 0; i < kRegisterTiles; ++i)
      store(last[i], scratch + warp_ * kColumns + i * kTile * kRanks);
    warp::sync_threads();
    for (int i = threadIdx.x; i < kColumns; i += kThreads) {
      float sum = scratch[i];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += scratch[w * kColumns + i];
      partial[kSharedTiles * kTile * kRanks + i] = sum;
    }
  }

  __device__ __forceinline__ static void accumulate(Sum& sum, const warp::Words& a,
                                                    const warp::Words (&b)[kFragments]) {
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
      Half::mma(sum.high[n], a.x[0], a.x[1], a.x[2], a.x[3], b[n].x[0], b[n].x[1]);
      Half::mma(sum.low[n], a.x[0], a.x[1], a.x[2], a.x[3], b[n].x[2], b[n].x[3]);
    }
  }

  // A tile's 16 rows of (256, ranks).
  __device__ __forceinline__ void store(const Sum& sum, float* to) const {
    to += lane_ / 4 * kRanks + lane_ % 4 * 2;
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to[i / 2 * 8 * kRanks + n * 8 + i % 2] =
            (sum.high[n][i] + sum.low[n][i] * (1 / Half::kLow)) * (1 / Half::kScale);
  }

  // The Gram matrix (ranks, ranks) of the staged 256 columns of a factor, from the same parts that
  // W is multiplied by: hi over lo is an operand A. One warp does it, or each of four a quarter.
  __device__ __forceinline__ void gram(int side, char* own, int step) const {
    const int row = warp_ / kFragments, column = warp_ % kFragments;
    if (row >= kFragments) return;
    float* to = reinterpret_cast<float*>(own + Regions::gram(side, step & 1));
    float high[2][4] = {}, low[2][4] = {};
#pragma unroll 4
    for (int k = 0; k < kTiles; ++k) {
      const auto a = parts(side, k, row), b = parts(side, k, column);
      Half::mma(high[k & 1], a.x[0], a.x[2], a.x[1], a.x[3], b.x[0], b.x[1]);
      Half::mma(low[k & 1], a.x[0], a.x[2], a.x[1], a.x[3], b.x[2], b.x[3]);
    }
    constexpr float kUnscale = 1 / (Half::kScale * Half::kScale);
    to += (row * 8 + lane_ / 4) * kRanks + column * 8 + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float mixed = high[0][2 + i] + high[1][2 + i] + low[0][i] + low[1][i];
      const float least = (low[0][2 + i] + low[1][2 + i]) * (1 / Half::kLow);
      to[i] = (high[0][i] + high[1][i] + (mixed + least) * (1 / Half::kLow)) * kUnscale;
    }
  }

  // Updates. Two warps a side; a thread has one rank of every kColumns-th column of its CTA's slice
  // of the group.

  static constexpr int kColumns = kThreads / 2 / kRanks;

  // The parts of step 0.
  __device__ __forceinline__ void publish() const {
    const Slice own = slice_of(warp_ / 2);
    Columns<4> columns;
    for (int first = own.begin; first < own.end; first += 4 * kColumns) {
      load_state(own, first, columns);
      write_parts(own, first, columns, 0);
    }
    arrive({parts_done(0), parts_done(1)});
  }

  __device__ __forceinline__ void update(int step) const {
    const uint32_t steps = step + 1;
    await({products_done(0), products_done(1), counter(kGram), counter(kGram + 1)},
          {members(0) * steps, members(1) * steps, groups(0) * steps, groups(1) * steps});
    // Few columns have many members, many columns few; three members have 86 each.
    if (slice(warp_ / 2) <= 2 * kColumns)
      advance<2, 128 / kRanks>(step);
    else
      advance<11, 32 / kRanks>(step);
    arrive({parts_done(0), parts_done(1)});
  }

  // Of a group's columns, those that one of its members updates; pointers to this thread's rank.
  struct Slice {
    int side, begin, end;
    int inside;  // columns that exist, 0 for a rank that does not
    float *p, *m, *v;
    uint16_t* parts;
  };

  template <int kElements>
  struct Columns {
    float p[kElements], m[kElements], v[kElements];
  };

  __device__ __forceinline__ int slice(int side) const { return ceil_div(kBlock, members(side)); }

  __device__ __forceinline__ Slice slice_of(int side) const {
    const auto& sizes = layer_->sizes;
    const int begin = member(side) * slice(side), end = min(begin + slice(side), kBlock);
    const int column0 = group(side) * kBlock, rank = threadIdx.x % kRanks;
    const int inside = rank < layer_->r ? min(end, int(sizes[side]) - column0) : 0;
    const int64_t at = rank * (sizes[0] + sizes[1]) + side * sizes[0] + column0;
    char* parts = region(side, group(side), 0) + Regions::parts(side, 0);
    return {side,
            begin,
            end,
            inside,
            layer_->params + at,
            layer_->m + at,
            layer_->v + at,
            reinterpret_cast<uint16_t*>(parts)};
  }

  // The e-th of this thread's columns from `first` on.
  __device__ __forceinline__ static int column(int first, int e) {
    return first + e * kColumns + int(threadIdx.x) % (kThreads / 2) / kRanks;
  }

  template <int kElements, int kLoads>
  __device__ __forceinline__ void advance(int step) const {
    const Slice own = slice_of(warp_ / 2);
    Columns<kElements> columns;
    float found[kLoads][kElements];
    // All that is loaded is under way before the first sum waits for it.
    load_state(own, own.begin, columns);
    load_products(own, own.begin, 0, step, found);
    const float* gram = sum_gram(1 - own.side, step);
    float gram_row[kRanks];
#pragma unroll
    for (int j = 0; j < kRanks; ++j) gram_row[j] = gram[threadIdx.x % kRanks * kRanks + j];

    int first = own.begin;
    while (true) {
      float projected[kElements] = {};
      add(found, projected);
      for (int k = kLoads; k < members(own.side); k += kLoads) {
        load_products(own, first, k, step, found);
        add(found, projected);
      }
      optimize(own, first, step, gram_row, projected, columns);
      write_parts(own, first, columns, step + 1);
      first += kElements * kColumns;
      if (first >= own.end) break;
      load_state(own, first, columns);
      load_products(own, first, 0, step, found);
    }
  }

  // Zeros where a factor has no column or rank.
  template <int kElements>
  __device__ __forceinline__ void load_state(const Slice& own, int first,
                                             Columns<kElements>& columns) const {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int c = column(first, e);
      const bool inside = c < own.inside;
      columns.p[e] = inside ? own.p[c] : 0.f;
      columns.m[e] = kAdam && inside ? own.m[c] : 0.f;
      columns.v[e] = kAdam && inside ? own.v[c] : 0.f;
    }
  }

  // What members k0, k0 + 1, ... found.
  template <int kElements, int kLoads>
  __device__ __forceinline__ void load_products(const Slice& own, int first, int k0, int step,
                                                float (&found)[kLoads][kElements]) const {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const bool there = k0 + k < members(own.side);
      const char* from = region(own.side, group(own.side), there ? k0 + k : 0);
      const float* products =
          reinterpret_cast<const float*>(from + Regions::partial(own.side, step & 1)) +
          threadIdx.x % kRanks;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int c = column(first, e);
        found[k][e] =
            there && c < own.inside ? warp::load_shared_by_all(products + c * kRanks) : 0.f;
      }
    }
  }

  template <int kElements, int kLoads>
  __device__ __forceinline__ static void add(const float (&found)[kLoads][kElements],
                                             float (&sums)[kElements]) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
#pragma unroll
      for (int e = 0; e < kElements; ++e) sums[e] += found[k][e];
  }

  // The Gram matrix (ranks, ranks) of a whole factor, by the two warps that need it.
  __device__ __forceinline__ const float* sum_gram(int side, int step) const {
    float* total = reinterpret_cast<float*>(operand(0)) + side * kRanks * kRanks;
    for (int i = threadIdx.x % (kThreads / 2); i < kRanks * kRanks; i += kThreads / 2) {
      float sum = 0;
#pragma unroll 16
      for (int g = 0; g < groups(side); ++g) {
        const char* from = region(side, g, 0) + Regions::gram(side, step & 1);
        sum += warp::load_shared_by_all(reinterpret_cast<const float*>(from) + i);
      }
      total[i] = sum;
    }
    warp::sync_threads();
    return total;
  }

  // One step of Adam or plain descent on these columns.
  template <int kElements>
  __device__ __forceinline__ void optimize(const Slice& own, int first, int step,
                                           const float (&gram_row)[kRanks],
                                           const float (&projected)[kElements],
                                           Columns<kElements>& columns) const {
    const float alpha = launch_.schedule[2 * step], inverse_root = launch_.schedule[2 * step + 1];
    const float mean = warp::divide(2, float(layer_->sizes[0]) * float(layer_->sizes[1]));
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      float gradient = 0;
#pragma unroll
      for (int j = 0; j < kRanks; ++j)
        gradient += gram_row[j] * warp::from_lane(columns.p[e], j, kRanks);
      gradient = mean * gradient - mean * projected[e];
      float change = gradient;
      float& m = columns.m[e];
      float& v = columns.v[e];
      if constexpr (kAdam) {
        m += launch_.one_minus_beta1 * (gradient - m);
        v = launch_.beta2 * v + launch_.one_minus_beta2 * (gradient * gradient);
        change = warp::divide(m, warp::root(v) * inverse_root + launch_.eps);
      }
      const int c = column(first, e);
      if (c < own.inside) {
        columns.p[e] -= alpha * change;
        own.p[c] = columns.p[e];
        if (kAdam) own.m[c] = m;
        if (kAdam) own.v[c] = v;
      }
    }
  }

  template <int kElements>
  __device__ __forceinline__ static void write_parts(const Slice& own, int first,
                                                     const Columns<kElements>& columns, int step) {
    uint16_t* parts = own.parts + (step & 1) * (Regions::kExchange / 2);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int c = column(first, e), rank = threadIdx.x % kRanks;
      const float scaled = columns.p[e] * Half::kScale;
      const uint16_t high = Half::round(scaled);
      if (c < own.end) {
        parts[part_index(kRanks, rank, c, 0)] = high;
        parts[part_index(kRanks, rank, c, 1)] =
            Half::round((scaled - Half::value(high)) * Half::kLow);
      }
    }
  }

  const DescendLaunch& launch_;
  const DescendLayer* layer_;
  const int lane_ = threadIdx.x % 32, warp_ = threadIdx.x / 32;
  int row_ = 0, column_ = 0;  // of the block
  int base_ = 0;              // the CTA of the layer's first block
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
