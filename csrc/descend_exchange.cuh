// What the CTAs of descend.cuh leave for each other, and how they wait for it.
#pragma once

#include "parts.cuh"

namespace lora_init {

// A row of the table of layers: int64 each.
struct DescendLayer {
  const char* weight;
  int64_t row_stride, column_stride;
  int64_t sizes[2];  // out, in
  int64_t r;
  float *params, *m, *v;  // [Bᵀ | A] (r, out + in); m and v are not touched by plain descent
  int64_t first_block;    // of the launch's blocks
  int64_t first_counter;
  int64_t tiles[2];  // of a block's rows and columns
};

struct DescendLaunch {
  const DescendLayer* layers;
  int64_t blocks;
  int steps;
  int stages;             // of a streamed W in shared memory
  const float* schedule;  // (steps, 2), Optimizer.schedule
  char* workspace;        // a Region for every CTA
  int64_t region_bytes;
  uint32_t* counters;  // zeros
  float one_minus_beta1, beta2, one_minus_beta2, eps;
};

namespace blocks {

// One CTA and its block. Side 0 is B, with W's rows, side 1 is A, with its columns. `Shape` is of
// blocks that stay on chip, all alike, or of those that are streamed.
template <typename Shape, typename Parts, int kRanks>
class Exchange {
 public:
  __device__ __forceinline__ explicit Exchange(const DescendLaunch& launch) : launch_(launch) {}

 protected:
  static constexpr bool kFixed = Shape::kRowTiles > 0;
  static constexpr int kFragments = kRanks / 8;
  static constexpr int kGramChunks = gram_chunks(kRanks);

  // A tile of a factor: 4 columns of each rank of this lane's.
  struct Tile {
    Floats of[kFragments];
  };
  // This lane's rows of a Gram matrix, a quarter of each.
  struct Gram {
    Floats of[kFragments][kGramChunks];
  };
  // A tile's product with the hi parts of a factor, and below with the lo parts.
  template <int kCount>
  struct Sum {
    float half[kCount][2][4] = {};
  };

  // Geometry

  __device__ __forceinline__ void find(int block) {
    while (true) {
      if constexpr (!kFixed)
        row_tiles_ = int(layer().tiles[0]), column_tiles_ = int(layer().tiles[1]);
      rows_ = ceil_div(layer().sizes[0], tiles(0) * kTile);
      columns_ = ceil_div(layer().sizes[1], tiles(1) * kTile);
      if (block < layer().first_block + rows_ * columns_) break;
      ++layer_;
    }
    const int index = int(block - layer().first_block);
    row_ = index / columns_;
    column_ = index % columns_;
    base_ = int(layer().first_block % gridDim.x);
    mean_ = 2 / (float(layer().sizes[0]) * float(layer().sizes[1]));
    if constexpr (!kFixed) {
      first_ = slice_begin(member(side()), members(side()), tiles(side()));
      end_ = slice_begin(member(side()) + 1, members(side()), tiles(side()));
      const Region region{kRanks,
                          {tiles(0), tiles(1)},
                          {most_slice(members(0), tiles(0)), most_slice(members(1), tiles(1))}};
      state_ = region.state(side(), 0);
      state_pitch_ = region.state(side(), 1) - state_;
    }
  }

  __device__ __forceinline__ const DescendLayer& layer() const { return launch_.layers[layer_]; }

  __device__ __forceinline__ int tiles(int side) const {
    if constexpr (kFixed) return side == 0 ? Shape::kRowTiles : Shape::kColumnTiles;
    return side == 0 ? row_tiles_ : column_tiles_;
  }

  // A group is the blocks of a row (side 0) or column (side 1); it has a member in each group of
  // the other side.
  __device__ __forceinline__ int members(int side) const { return side == 0 ? columns_ : rows_; }
  __device__ __forceinline__ int group(int side) const { return side == 0 ? row_ : column_; }
  __device__ __forceinline__ int member(int side) const { return group(1 - side); }

  // The tiles that this warp's side of the CTA updates, and where it keeps them. Of a streamed
  // block found once: the quotients take instructions.
  __device__ __forceinline__ int slice_first() const {
    if constexpr (kFixed) return slice_begin(member(side()), members(side()), tiles(side()));
    return first_;
  }
  __device__ __forceinline__ int slice_end() const {
    if constexpr (kFixed) return slice_begin(member(side()) + 1, members(side()), tiles(side()));
    return end_;
  }
  __device__ __forceinline__ int state_offset(int which) const {
    if constexpr (kFixed) return regions().state(side(), which);
    return state_ + which * state_pitch_;
  }

  // What others see of it.
  __device__ __forceinline__ Region regions() const {
    return {kRanks, {tiles(0), tiles(1)}, {tiles(0), tiles(1)}};
  }
  __device__ __forceinline__ uint32_t region_of(int cta) const {
    return uint32_t(cta) * uint32_t(kFixed ? regions().bytes() : launch_.region_bytes);
  }
  __device__ __forceinline__ uint32_t region(int side, int group, int member) const {
    const int index = side == 0 ? group * columns_ + member : member * columns_ + group;
    const int cta = base_ + index, grid = gridDim.x;  // a layer has no more blocks than the grid
    return region_of(cta < grid ? cta : cta - grid);
  }
  __device__ __forceinline__ char* own() const { return launch_.workspace + region_of(blockIdx.x); }
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
    for (int at = threadIdx.x * kChunk; at < regions().shared_bytes();
         at += Shape::kThreads * kChunk)
      warp::store_whole(own() + at, {{0, 0, 0, 1}});
  }

  // Where a group's parts are that its members sent.
  __device__ __forceinline__ uint32_t parts_of(int side, int step) const {
    return region(side, group(side), 0) + regions().parts(side, step & 1);
  }

  // Products

  template <int kCount>
  __device__ __forceinline__ static void accumulate(Sum<kCount>& sum,
                                                    const typename Parts::Operand (&a)[kCount],
                                                    const typename Parts::Weight& w) {
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) Parts::accumulate(sum.half[n][i], a[n], w, i);
  }

  // The same with operands that come out of shared memory one by one, where registers hold no more.
  template <int kCount, typename Packed>
  __device__ __forceinline__ static void accumulate_from(Sum<kCount>& sum, Packed packed,
                                                         const typename Parts::Weight& w) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      warp::sync_warp();  // or they are all read first
      const auto a = Parts::operand(packed(n));
#pragma unroll
      for (int i = 0; i < 2; ++i) Parts::accumulate(sum.half[n][i], a, w, i);
    }
  }

  template <int kCount>
  __device__ __forceinline__ static Floats total(const Sum<kCount>& sum, int n) {
    Floats result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& half = sum.half[n][i / 2];
      result.x[i] = Parts::total(half[i % 2], half[2 + i % 2]);
    }
    return result;
  }

  __device__ __forceinline__ static void add(Floats& sum, const Floats& term) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.x[i] += term.x[i];
  }

  // Gram matrices, of the same parts that W is multiplied by: a group's by one of its members, the
  // diagonal's for side 0 and the one beside for side 1.

  __device__ __forceinline__ bool owns_gram(int side) const {
    return member(side) == gram_owner(side, group(side));
  }
  __device__ __forceinline__ int gram_owner(int side, int group) const {
    return group + side < members(side) ? group + side : 0;
  }

  // A warp makes 8 rows of it, in `kChains` sums, as many as hide an mma's time.
  static constexpr int kChains = kFragments < 4 ? 2 : 1;
  struct GramRows {
    typename Parts::Gram of[kFragments][kChains];
  };

  // Of one tile: `packed(n)` is its chunk of 8 ranks.
  template <typename Packed>
  __device__ __forceinline__ static void add_gram(GramRows& rows, int chain, int n, Packed packed) {
    const auto a = Parts::operand(packed(n));
#pragma unroll
    for (int j = 0; j < kFragments; ++j)
      Parts::accumulate(rows.of[j][chain], a, Parts::operand(packed(j)));
  }

  __device__ __forceinline__ void send_gram(int side, int n, const GramRows& rows, int step) const {
    char* to = own() + regions().gram(side, step & 1);
#pragma unroll
    for (int c = 0; c < kGramChunks; ++c) {
      Floats result{};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (2 * c + i / 2 < kFragments)
#pragma unroll
          for (int chain = 0; chain < kChains; ++chain)
            result.x[i] += Parts::total(rows.of[2 * c + i / 2][chain], i % 2);
      send(to + chunk(0, n * kGramChunks + c), cast<Words>(result), step);
    }
  }

  // That of the other side's factor, of which each of its groups has sent a part.
  static constexpr int kGramWords = kFragments * kGramChunks;
  static constexpr int kGrams = kRanks == 8 ? 8 : kRanks == 16 ? 4 : 1;
  using GramWords = Words[kGrams * kGramWords];
  struct GramAddress {
    const Exchange& self;
    int first, step;
    __device__ __forceinline__ uint32_t operator()(int i) const {
      const int from = 1 - self.side();
      const int g = min(first + i / kGramWords, self.members(self.side()) - 1);
      return self.region(from, g, self.gram_owner(from, g)) + self.regions().gram(from, step & 1) +
             self.chunk(0, i % kGramWords);
    }
  };

  __device__ __forceinline__ void request_grams(GramWords& words, int step) const {
    request(words, GramAddress{*this, 0, step});
  }
  __device__ __forceinline__ Gram sum_grams(GramWords& words, int step) const {
    Gram sum{};
    for (int first = 0;;) {
      settle(words, step, GramAddress{*this, first, step});
#pragma unroll
      for (int i = 0; i < kGrams * kGramWords; ++i)
        if (first + i / kGramWords < members(side()))
          add(sum.of[i % kGramWords / kGramChunks][i % kGramChunks], cast<Floats>(words[i]));
      first += kGrams;
      if (first >= members(side())) return sum;
      request(words, GramAddress{*this, first, step});
    }
  }

  // Of which side this warp updates: half of them each.
  __device__ __forceinline__ int side() const { return warp_ / (Shape::kWarps / 2); }

  const DescendLaunch& launch_;
  const int lane_ = threadIdx.x % 32, warp_ = warp::index();
  int layer_ = 0;
  int rows_ = 0, columns_ = 0;  // blocks of the layer
  int row_ = 0, column_ = 0;    // the block's
  int base_ = 0;                // the CTA of the layer's first block
  float mean_ = 0;              // 2 / elements of W
  // Of a streamed block:
  int row_tiles_ = 0, column_tiles_ = 0;
  int first_ = 0, end_ = 0;
  int state_ = 0, state_pitch_ = 0;
};

}  // namespace blocks
}  // namespace lora_init
