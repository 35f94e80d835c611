// The kernel of descend.cu: all steps of a ragged group on mean((W − B·A)²) in one launch.
//
// A CTA has a block of W, which it keeps on chip (descend_resident.cuh) or reads anew each step
// (descend_streamed.cuh), and takes part in each step of its layer:
//
// 1. products: W Aᵀ and Bᵀ W of its block, from the parts of A and B; they are left in global
//    memory, which is to say in the L2;
// 2. updates: half of the warps add up the products of a slice of B's rows, half those of a slice
//    of A's columns, do an optimiser step on it and leave its new parts.
//
// So CTAs wait for each other twice a step (descend_exchange.cuh), and a step on chip is mostly
// such waits, of trips to the L2. B's rows need only the CTAs beside, A's columns those above and
// below; only the Gram matrices AAᵀ and BᵀB are of a whole layer, and layers never wait for each
// other. What is left for others says itself of which step it is: a counter would be two trips and
// a fence more.
#pragma once

#include "descend_resident.cuh"
#include "descend_streamed.cuh"

namespace lora_init::blocks {

template <typename Form, bool kAdam>
class Descent : Form {
 public:
  using Form::Form, Form::kSharedBytes;

  // A layer's blocks lie on different CTAs, and each CTA takes its blocks in order: the layers
  // before a layer end without it, so it begins everywhere.
  __device__ __forceinline__ void run() {
    for (int block = blockIdx.x; block < launch_.blocks; block += gridDim.x) {
      this->find(block);
      this->begin();
      load_state();
      this->clear();
      this->meet(kReady);
      for (int tile = first_tile(); tile < slice_end(); tile += kWarps)
        send_parts(tile, stored(tile, 0), 0);
      for (int step = 0; step < launch_.steps; ++step) {
        update(step, this->products(step));
      }
      store_state();
      this->meet(kDone);
    }
  }

 private:
  using Parts = typename Form::Parts;
  using Form::add, Form::chunk, Form::group, Form::kFragments, Form::kRanks, Form::lane_,
      Form::launch_, Form::layer, Form::mean_, Form::member, Form::members, Form::own, Form::region,
      Form::regions, Form::side, Form::slice_end, Form::slice_first, Form::state_offset,
      Form::tiles, Form::warp_;
  using typename Form::Gram, typename Form::Tile;

  // Updates: the warps of a side have their CTA's slice of the group tile by tile in turn.
  static constexpr int kWarps = Form::Shape::kWarps / 2;

  __device__ __forceinline__ int first_tile() const { return slice_first() + warp_ % kWarps; }

  // A tile of the parameters, of m or of v as this CTA keeps it.
  __device__ __forceinline__ char* state(int tile, int which, int n) const {
    return own() + state_offset(which) + chunk(tile - slice_first(), n);
  }
  __device__ __forceinline__ Tile stored(int tile, int which) const {
    Tile result;
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      result.of[n] = *reinterpret_cast<const Floats*>(state(tile, which, n));
    return result;
  }
  __device__ __forceinline__ void keep(int tile, int which, const Tile& values) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      *reinterpret_cast<Floats*>(state(tile, which, n)) = values.of[n];
  }

  // f(element of the tensors of the state, which, value) for all that exist.
  template <typename Function>
  __device__ __forceinline__ void each_element(int tile, int n, Function f) const {
    const auto& sizes = layer().sizes;
    const int rank = chunk_rank(n, lane_);
    for (int i = 0; i < 4; ++i) {
      const int64_t column =
          int64_t(group(side())) * tiles(side()) * kTile + chunk_column(tile, lane_, i);
      if (rank < layer().r && column < sizes[side()])
        f(i, rank * (sizes[0] + sizes[1]) + side() * sizes[0] + column);
    }
  }

  // Zeros where a factor has no column or rank: they stay.
  __device__ __forceinline__ void load_state() const {
    for (int which = 0; which < kStates; ++which)
      for (int tile = first_tile(); tile < slice_end(); tile += kWarps) {
        Tile values{};
#pragma unroll
        for (int n = 0; n < kFragments; ++n)
          each_element(tile, n, [&](int i, int64_t at) { values.of[n].x[i] = tensor(which)[at]; });
        keep(tile, which, values);
      }
  }

  __device__ __forceinline__ void store_state() const {
    for (int which = 0; which < kStates; ++which)
      for (int tile = first_tile(); tile < slice_end(); tile += kWarps) {
        const Tile values = stored(tile, which);
#pragma unroll
        for (int n = 0; n < kFragments; ++n)
          each_element(tile, n, [&](int i, int64_t at) { tensor(which)[at] = values.of[n].x[i]; });
      }
  }

  static constexpr int kStates = kAdam ? 3 : 1;
  __device__ __forceinline__ float* tensor(int which) const {
    return which == 0 ? layer().params : which == 1 ? layer().m : layer().v;
  }

  __device__ __forceinline__ void update(int step, const Gram& gram) const {
    warp::sync_threads();  // the warps' places were the products'
    // Few members have many tiles each, many members few; as many as registers hold.
    constexpr int kMost = kRanks == 8 ? 3 : kRanks == 16 && kAdam ? 2 : 1;
    if (members(side()) <= 4)
      advance < kMost < Form::kPlaces ? kMost : Form::kPlaces,
          Form::kLoads<4 ? Form::kLoads : 4>(step, gram);
    else
      advance<1, Form::kLoads>(step, gram);
  }

  // Moments come while the products are waited for, where registers hold them meanwhile.
  static constexpr bool kMomentsEarly = kRanks <= 16;

  template <int kMost, int kLoads>
  __device__ __forceinline__ void advance(int step, const Gram& gram) const {
    const float alpha = launch_.schedule[2 * step], inverse_root = launch_.schedule[2 * step + 1];
    for (int first = first_tile(); first < slice_end(); first += kWarps * kMost) {
      Tile p[kMost], m[kMost], v[kMost], projected[kMost] = {}, gradients[kMost] = {};
#pragma unroll
      for (int t = 0; t < kMost; ++t) {
        p[t] = stored(within(first, t), 0);
        if (kAdam && kMomentsEarly) m[t] = stored(within(first, t), 1);
        if (kAdam && kMomentsEarly) v[t] = stored(within(first, t), 2);
      }
      for (int k = 0; k < members(side()); k += kLoads)
        add_products<kMost, kLoads>(first, k, step, projected);
      warp::sync_warp();  // the tiles before have been read
#pragma unroll
      for (int t = 0; t < kMost; ++t) show(t, p[t]);
      warp::sync_warp();
      add_gram_times(gram, gradients);
#pragma unroll
      for (int t = 0; t < kMost; ++t) {
        if (first + kWarps * t >= slice_end()) break;
        if (kAdam && !kMomentsEarly) m[t] = stored(first + kWarps * t, 1);
        if (kAdam && !kMomentsEarly) v[t] = stored(first + kWarps * t, 2);
        optimize(alpha, inverse_root, gradients[t], projected[t], p[t], m[t], v[t]);
        send_parts(first + kWarps * t, p[t], step + 1);
      }
#pragma unroll
      for (int t = 0; t < kMost; ++t) {
        if (first + kWarps * t >= slice_end()) break;
        keep(first + kWarps * t, 0, p[t]);
        if (kAdam) keep(first + kWarps * t, 1, m[t]);
        if (kAdam) keep(first + kWarps * t, 2, v[t]);
      }
    }
  }

  // The t-th tile from `first` on, or the first where there are fewer.
  __device__ __forceinline__ int within(int first, int t) const {
    return first + kWarps * t < slice_end() ? first + kWarps * t : first;
  }

  // What members k0, k0 + 1, ... found.
  template <int kMost, int kLoads>
  __device__ __forceinline__ void add_products(int first, int k0, int step,
                                               Tile (&projected)[kMost]) const {
    constexpr int kEach = kMost * kFragments;
    const int slot = regions().partial(side(), step & 1);
    Words words[kLoads * kEach];
    this->receive(words, step, [&](int i) {
      const int k = min(k0 + i / kEach, members(side()) - 1), t = i % kEach / kFragments;
      return region(side(), group(side()), k) + slot + chunk(within(first, t), i % kFragments);
    });
#pragma unroll
    for (int i = 0; i < kLoads * kEach; ++i)
      if (k0 + i / kEach < members(side()))
        add(projected[i % kEach / kFragments].of[i % kFragments], cast<Floats>(words[i]));
  }

  // A place of the warp's for the parameters of a tile, all ranks of which a lane wants.
  __device__ __forceinline__ char* place(int t) const {
    return Form::places() + chunk_offset(kRanks, t, 0, 0);
  }
  __device__ __forceinline__ void show(int t, const Tile& p) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      *reinterpret_cast<Floats*>(place(t) + chunk(0, n)) = p.of[n];
  }

  // The Gram matrix' rows of a lane's ranks come from the four lanes that have a quarter each.
  template <int kMost>
  __device__ __forceinline__ void add_gram_times(const Gram& gram, Tile (&sums)[kMost]) const {
#pragma unroll
    for (int j = 0; j < kRanks; ++j) {
      float row[kFragments];
#pragma unroll
      for (int n = 0; n < kFragments; ++n)
        row[n] = warp::from_lane(gram.of[n][j / 16].x[j / 8 % 2 * 2 + j % 2], j % 8 / 2, 4);
#pragma unroll
      for (int t = 0; t < kMost; ++t) {
        const char* at = place(t) + chunk_offset(kRanks, 0, j / 8, j % 8 * 4 + lane_ % 4);
        const Floats p = *reinterpret_cast<const Floats*>(at);
#pragma unroll
        for (int n = 0; n < kFragments; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[t].of[n].x[i] += row[n] * p.x[i];
      }
    }
  }

  // One step of Adam or plain descent.
  __device__ __forceinline__ void optimize(float alpha, float inverse_root, const Tile& gram_times,
                                           const Tile& projected, Tile& p, Tile& m, Tile& v) const {
    // Or 0 / 0 where there is no column or rank, beside an eps of 0.
    const float eps = launch_.eps + 1e-37f;
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float gradient = mean_ * (gram_times.of[n].x[i] - projected.of[n].x[i]);
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
    char* to = launch_.workspace + this->parts_of(side(), step);
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      this->send(to + chunk(tile, n), Parts::packed(p.of[n]), step);
  }
};

// Compiled for sm_90a alone: multiprocessors of others hold less, and registers spill there.
template <typename Parts, int kRanks, bool kAdam>
__global__ void __launch_bounds__(ResidentShape<Parts::kElementBytes>::kThreads, 2)
    descend_resident(const __grid_constant__ DescendLaunch launch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
  Descent<Resident<Parts, kRanks>, kAdam>(launch).run();
#endif
}

template <typename Parts, int kRanks, bool kAdam>
__global__ void __launch_bounds__(StreamedShape<kRanks, Parts::kElementBytes>::kThreads, 1)
    descend_streamed(const __grid_constant__ DescendLaunch launch) {
  Descent<Streamed<Parts, kRanks>, kAdam>(launch).run();
}

}  // namespace lora_init::blocks
