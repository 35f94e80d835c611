// How descend's products go through tensor cores: a tile of W, and of a factor in fp32, as operands
// of mma in 16 bits that together have what the factor, and an fp32 W, have.
#pragma once

#include "blocks.h"
#include "warp.cuh"

namespace lora_init::blocks {

using warp::Floats;
using warp::Words;

template <typename To, typename From>
__device__ __forceinline__ To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

__device__ __forceinline__ Words transposed(const Words& w) {
  return {{warp::transpose(w.x[0]), warp::transpose(w.x[2]), warp::transpose(w.x[1]),
           warp::transpose(w.x[3])}};
}

// Of a W of 16 bits. A factor is hi + lo, 8 ranks of hi over 8 of lo one operand A; two halves of a
// tile of W are two operands B.
template <typename Half>
struct TwoParts {
  static constexpr int kElementBytes = 2;
  using Tile = Words;     // of W as a lane keeps it
  using Weight = Words;   // and as products take it
  using Operand = Words;  // of 8 ranks of a tile of a factor
  struct Gram {
    float high[4] = {}, low[4] = {};
  };

  // What is sent of a factor.
  __device__ __forceinline__ static Words packed(const Floats& p) {
    Words words{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scaled = p.x[i] * Half::kScale;
      const uint16_t high = Half::round(scaled);
      const uint16_t low = Half::round((scaled - Half::value(high)) * Half::kLow);
      words.x[i / 2 * 2] |= uint32_t(high) << (i % 2 * 16);
      words.x[i / 2 * 2 + 1] |= uint32_t(low) << (i % 2 * 16);
    }
    return words;
  }
  __device__ __forceinline__ static Operand operand(const Words& packed) { return packed; }

  template <int kRowBytes>
  __device__ __forceinline__ static Tile load(const char* memory, int row, int column, int lane) {
    return warp::load_matrix(memory + lane_offset<kRowBytes>(row, column, lane));
  }
  __device__ __forceinline__ static Weight weight(const Tile& tile) { return tile; }
  __device__ __forceinline__ static Weight transposed_weight(const Weight& w) {
    return transposed(w);
  }
  template <int kRowBytes>
  __device__ __forceinline__ static Weight load_transposed(const char* memory, int row, int column,
                                                           int lane) {
    return warp::load_transposed(memory + transposed_offset<kRowBytes>(row, column, lane));
  }

  // The product with half `i` of a tile: of hi above, of lo below.
  __device__ __forceinline__ static void accumulate(float (&d)[4], const Operand& a,
                                                    const Weight& w, int i) {
    Half::mma(d, a.x[0], a.x[1], a.x[2], a.x[3], w.x[2 * i], w.x[2 * i + 1]);
  }
  __device__ __forceinline__ static float total(float high, float low) {
    return (high + low * (1 / Half::kLow)) * (1 / Half::kScale);
  }

  __device__ __forceinline__ static void accumulate(Gram& sum, const Operand& a, const Operand& b) {
    Half::mma(sum.high, a.x[0], a.x[1], a.x[2], a.x[3], b.x[0], b.x[2]);
    Half::mma(sum.low, a.x[0], a.x[1], a.x[2], a.x[3], b.x[1], b.x[3]);
  }
  __device__ __forceinline__ static float total(const Gram& sum, int i) {
    const float least = sum.low[2 + i] * (1 / Half::kLow);
    const float mixed = sum.high[2 + i] + sum.low[i];
    return (sum.high[i] + (mixed + least) * (1 / Half::kLow)) * (1 / (Half::kScale * Half::kScale));
  }
};

struct UnscaledBf16 : warp::Bf16 {
  static constexpr float kScale = 1, kLow = 1;
};
// Beside an fp16 W a factor's parts are scaled, so that entries down to 2⁻⁴⁰ are kept; factors
// beyond 4,094, where a descent has long diverged, overflow. At a fixed scale, so that bits do not
// depend on where a call began.
struct ScaledFp16 : warp::Fp16 {
  static constexpr float kScale = 16, kLow = 2048;
};
using Bf16Parts = TwoParts<UnscaledBf16>;
using Fp16Parts = TwoParts<ScaledFp16>;

// Of an fp32 W. Both it and a factor are three bf16 parts of 8 bits each, made where they are used;
// of the nine products the six are taken that fp32 would keep.
struct Fp32Parts {
  static constexpr int kElementBytes = 4;
  struct Tile {
    float x[4][2];
  };
  struct Weight {
    Words part[3];
  };
  struct Operand {
    Words first;        // two parts, as a factor beside a W of 16 bits
    uint32_t least[2];  // the third
  };
  struct Gram {
    float of[4] = {};
  };

  // Two neighbours as parts.
  __device__ __forceinline__ static void split(float x, float y, uint32_t (&part)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      part[i] = warp::Bf16::round(x, y);
      x -= warp::Bf16::value(uint16_t(part[i]));
      y -= warp::Bf16::value(uint16_t(part[i] >> 16));
    }
  }

  __device__ __forceinline__ static Words packed(const Floats& p) { return cast<Words>(p); }
  __device__ __forceinline__ static Operand operand(const Words& packed) {
    const Floats p = cast<Floats>(packed);
    Operand result;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t part[3];
      split(p.x[2 * i], p.x[2 * i + 1], part);
      result.first.x[2 * i] = part[0];
      result.first.x[2 * i + 1] = part[1];
      result.least[i] = part[2];
    }
    return result;
  }

  template <int kRowBytes>
  __device__ __forceinline__ static Tile load(const char* memory, int row, int column, int lane) {
    Tile tile;
#pragma unroll
    for (int q = 0; q < 4; ++q)
      memcpy(tile.x[q],
             __builtin_assume_aligned(memory + pair_offset<kRowBytes>(row, column, lane, q), 8), 8);
    return tile;
  }
  __device__ __forceinline__ static Weight weight(const Tile& tile) {
    Weight w;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      uint32_t part[3];
      split(tile.x[q][0], tile.x[q][1], part);
#pragma unroll
      for (int i = 0; i < 3; ++i) w.part[i].x[q] = part[i];
    }
    return w;
  }
  __device__ __forceinline__ static Weight transposed_weight(const Weight& w) {
    return {{transposed(w.part[0]), transposed(w.part[1]), transposed(w.part[2])}};
  }
  template <int kRowBytes>
  __device__ __forceinline__ static Weight load_transposed(const char* memory, int row, int column,
                                                           int lane) {
    return transposed_weight(weight(load<kRowBytes>(memory, row, column, lane)));
  }

  __device__ __forceinline__ static void accumulate(float (&d)[4], const Operand& a,
                                                    const Weight& w, int i) {
    uint32_t b[3][2];
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      b[part][0] = w.part[part].x[2 * i];
      b[part][1] = w.part[part].x[2 * i + 1];
    }
    multiply(d, a, b);
  }
  __device__ __forceinline__ static float total(float high, float low) { return high + low; }

  __device__ __forceinline__ static void accumulate(Gram& sum, const Operand& a, const Operand& b) {
    multiply(
        sum.of, a,
        {{b.first.x[0], b.first.x[2]}, {b.first.x[1], b.first.x[3]}, {b.least[0], b.least[1]}});
  }
  __device__ __forceinline__ static float total(const Gram& sum, int i) {
    return sum.of[i] + sum.of[2 + i];
  }

  // The least first, while the sum is small.
  __device__ __forceinline__ static void multiply(float (&d)[4], const Operand& a,
                                                  const uint32_t (&b)[3][2]) {
    const Words& f = a.first;
    warp::Bf16::mma(d, f.x[0], 0, f.x[2], 0, b[2][0], b[2][1]);
    warp::Bf16::mma(d, a.least[0], 0, a.least[1], 0, b[0][0], b[0][1]);
    warp::Bf16::mma(d, f.x[0], f.x[1], f.x[2], f.x[3], b[1][0], b[1][1]);
    warp::Bf16::mma(d, f.x[0], f.x[1], f.x[2], f.x[3], b[0][0], b[0][1]);
  }
};

}  // namespace lora_init::blocks
