// Replays csrc/gemm_tiles.h on the host: every element of a tile from the boxes that TMA writes to
// the operand element that wgmma reads, and from the accumulators to the box that TMA stores. The
// hardware's side is a plain model of what the PTX ISA says of it. Exits with 1 at the first error.
#include "gemm_tiles.h"

#include <cstdio>
#include <cstdlib>
#include <set>
#include <utility>
#include <vector>

using namespace lora_init::gemm;

namespace {

void expect(bool right, const char* what, int a, int b, int c) {
  if (right) return;
  std::printf("%s: %d %d %d\n", what, a, b, c);
  std::exit(1);
}

// The 128-byte swizzle of an address: bits 4-6 are XORed with bits 7-9.
int hardware_swizzle(int address) { return address ^ (address >> 3 & 0x70); }

struct Descriptor {
  int start, leading, stride;
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4) {
    expect(bits >> 62 == 1, "swizzle mode", 0, 0, 0);
    expect((bits >> 49 & 7) == 0, "base offset", 0, 0, 0);
  }
  // Where wgmma finds element (mn, k) of an operand.
  int k_major(int mn, int k) const {
    return hardware_swizzle(start + mn / 8 * stride + mn % 8 * 128 + k * 2);
  }
  int mn_major(int mn, int k) const {
    return hardware_swizzle(start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2);
  }
};

// Shared memory as 16-bit elements that know where in the tile they come from.
using Memory = std::vector<int>;
constexpr int kNothing = -1;

// TMA writes a box of `rows` × 64 at `to`: element (row, column) of it is first + row·pitch +
// column·step.
void tma_load(Memory& memory, int to, int rows, int first, int pitch, int step) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < 64; ++column) {
      const int linear = to + row * 128 + column * 2;
      expect(to + swizzled(row, column) == hardware_swizzle(linear), "swizzle", to, row, column);
      int& place = memory.at(hardware_swizzle(linear) / 2);
      expect(place == kNothing, "written twice", to, row, column);
      place = first + row * pitch + column * step;
    }
  }
}

// A stage as `produce` fills it and `consume` reads it. Element (mn, k) is mn·64 + k.
void replay_stage(int tile_n, int cluster, bool transposed) {
  constexpr int kBase = 5 * kAtomBytes;  // anywhere that is aligned
  Memory shared((kBase + stage_bytes(tile_n)) / 2, kNothing);
  tma_load(shared, kBase, kTileM, 0, kTileK, 1);
  const int b = kBase + kTileABytes, share = tile_n / cluster;
  for (int rank = 0; rank < cluster; ++rank) {
    const int to = b + rank * share * kRowBytes, n = rank * share;
    if (transposed) {
      for (int block = 0; block < share; block += 64)
        tma_load(shared, to + block * kRowBytes, kTileK, (n + block) * kTileK, 1, kTileK);
    } else {
      tma_load(shared, to, share, n * kTileK, kTileK, 1);
    }
  }
  for (int offset = kBase / 2; offset < int(shared.size()); ++offset)
    expect(shared[offset] != kNothing, "not written", tile_n, cluster, offset);

  for (int step = 0; step < kTileK / kStepK; ++step) {
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      const Descriptor a(k_major(kBase + consumer * kBlockBytes + step * kStepKMajor));
      for (int m = 0; m < 64; ++m)
        for (int k = 0; k < kStepK; ++k)
          expect(shared.at(a.k_major(m, k) / 2) == (consumer * 64 + m) * kTileK + step * kStepK + k,
                 "operand a", step, m, k);
    }
    const int address = b + step * (transposed ? kStepMNMajor : kStepKMajor);
    const Descriptor of_b(transposed ? mn_major(address) : k_major(address));
    for (int n = 0; n < tile_n; ++n)
      for (int k = 0; k < kStepK; ++k)
        expect(shared.at((transposed ? of_b.mn_major(n, k) : of_b.k_major(n, k)) / 2) ==
                   n * kTileK + step * kStepK + k,
               transposed ? "operand b, n-major" : "operand b, k-major", step, n, k);
  }
}

// A stage of project.cu, likewise. Of f, only the first `ranks` are asked for.
void replay_project(bool transposed_x, bool transposed_f, int ranks) {
  constexpr int kBase = 3 * kAtomBytes;
  Memory shared((kBase + kProjectStageBytes) / 2, kNothing);
  if (transposed_x) {
    for (int consumer = 0; consumer < kConsumers; ++consumer)
      tma_load(shared, kBase + consumer * kBlockBytes, kTileK, consumer * 64 * kTileK, 1, kTileK);
  } else {
    tma_load(shared, kBase, kTileM, 0, kTileK, 1);
  }
  const int f = kBase + kTileABytes;
  if (transposed_f) {
    tma_load(shared, f, kTileK, 0, 1, kTileK);
  } else {
    tma_load(shared, f, ceil_div(ranks, 8) * 8, 0, kTileK, 1);
  }
  for (int step = 0; step < kTileK / kStepK; ++step) {
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      const int address =
          kBase + consumer * kBlockBytes + step * (transposed_x ? kStepMNMajor : kStepKMajor);
      const Descriptor of_x(transposed_x ? mn_major(address) : k_major(address));
      for (int m = 0; m < 64; ++m)
        for (int k = 0; k < kStepK; ++k)
          expect(shared.at((transposed_x ? of_x.mn_major(m, k) : of_x.k_major(m, k)) / 2) ==
                     (consumer * 64 + m) * kTileK + step * kStepK + k,
                 "operand x", step, m, k);
    }
    const int address = f + step * (transposed_f ? kStepMNMajor : kStepKMajor);
    const Descriptor of_f(transposed_f ? mn_major(address) : k_major(address));
    for (int rank = 0; rank < ranks; ++rank)
      for (int k = 0; k < kStepK; ++k)
        expect(shared.at((transposed_f ? of_f.mn_major(rank, k) : of_f.k_major(rank, k)) / 2) ==
                   rank * kTileK + step * kStepK + k,
               "operand f", step, rank, k);
  }
}

// The accumulators of a tile of project.cu as sums in shared memory, each in a place of its own.
void replay_partials() {
  std::set<int> seen;
  for (int consumer = 0; consumer < kConsumers; ++consumer) {
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < kRanks / 2; ++i) {
        const int row = consumer * 64 + fragment_row(thread, i), rank = fragment_column(thread, i);
        expect(row < kTileM && rank < kRanks, "partial outside", row, rank, i);
        expect(seen.insert(row * kPartialPitch + rank).second, "partial twice", row, rank, i);
        expect(i % 2 == 0 || rank == fragment_column(thread, i - 1) + 1, "pair", row, rank, i);
      }
    }
  }
  expect(seen.size() == size_t(kTileM * kRanks), "partials", int(seen.size()), 0, 0);
}

void every_chunk_once(int chunks, int parts) {
  expect(first_chunk(chunks, 0, parts) == 0, "first chunk", chunks, parts, 0);
  expect(first_chunk(chunks, parts, parts) == chunks, "last chunk", chunks, parts, 0);
  for (int part = 0; part < parts; ++part)
    expect(first_chunk(chunks, part, parts) <= first_chunk(chunks, part + 1, parts), "chunks",
           chunks, parts, part);
}

// What a warp's accumulators become in global memory, 64 columns at a time, as `store` does it.
void replay_store(int tile_n) {
  for (int warp = 0; warp < 4; ++warp) {
    std::set<std::pair<int, int>> seen;
    for (int block = 0; block < tile_n / 64; ++block) {
      Memory buffer(kStoreBytes / 2, kNothing);
      for (int step = 0; step < 4; ++step) {
        // stmatrix: lane 8·i + j names row j of matrix i; lane 4·j + p holds its elements 2·p, 2·p
        // + 1.
        for (int matrix = 0; matrix < 4; ++matrix) {
          for (int row = 0; row < 8; ++row) {
            const int at = store_offset(8 * matrix + row, step);
            expect(at % 16 == 0, "stmatrix alignment", step, matrix, row);
            for (int element = 0; element < 8; ++element) {
              const int thread = warp * 32 + 4 * row + element / 2;
              const int i = block * 32 + step * 8 + matrix * 2 + element % 2;
              const int m = fragment_row(thread, i), n = fragment_column(thread, i);
              buffer.at(at / 2 + element) = m * tile_n + n;
              expect(seen.emplace(m, n).second, "stored twice", m, n, i);
            }
          }
        }
      }
      for (int row = 0; row < kStoreRows; ++row)
        for (int column = 0; column < 64; ++column)
          expect(buffer.at(hardware_swizzle(row * 128 + column * 2) / 2) ==
                     (warp * 16 + row) * tile_n + block * 64 + column,
                 "stored", block, row, column);
    }
    expect(seen.size() == size_t(16 * tile_n), "elements stored", warp, tile_n, int(seen.size()));
  }
}

void every_tile_once(int m_tiles, int n_tiles, int band) {
  std::set<std::pair<int, int>> seen;
  for (int index = 0; index < m_tiles * n_tiles; ++index) {
    const auto [m, n] = tile_at(index, m_tiles, n_tiles, band);
    expect(m >= 0 && m < m_tiles && n >= 0 && n < n_tiles, "tile outside", m, n, index);
    expect(seen.emplace(m, n).second, "tile twice", m, n, index);
  }
}

}  // namespace

int main() {
  for (int tile_n : {128, 256}) {
    for (int cluster : {1, 2})
      for (bool transposed : {false, true}) replay_stage(tile_n, cluster, transposed);
    replay_store(tile_n);
  }
  for (int ranks : {1, 8, 17, 64})
    for (bool transposed_f : {false, true}) replay_project(false, transposed_f, ranks);
  for (int ranks : {1, 64}) replay_project(true, true, ranks);
  replay_partials();
  for (int chunks : {1, 3, 64, 1 << 25})
    for (int parts : {1, 2, 4, 8}) every_chunk_once(chunks, parts);
  for (int m_tiles = 1; m_tiles < 40; ++m_tiles)
    for (int n_tiles = 1; n_tiles < 30; ++n_tiles)
      for (int band : {1, 8, 16}) every_tile_once(m_tiles, n_tiles, band);
  std::puts("every element is where it is read");
}
