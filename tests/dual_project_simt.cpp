// The kernels of csrc/dual_project.cuh on the host, and their index maths one by one:
// test_cuda_dual_project.py calls both through ctypes.
#include <array>
#include <set>

#include "../csrc/dual_project.cuh"

using namespace lora_init;

namespace {

// CTAs share nothing, so that they are run one after the other.
bool run_ctas(int64_t ctas, int shared_bytes, unsigned seed, const std::function<void()>& kernel) {
  for (int64_t index = 0; index < ctas; ++index) {
    const auto body = [&] {
      simt::machine->current->cta->index = {int(index)};
      kernel();
    };
    const int laziness = seed ? 256 : 1;
    if (!simt::launch(1, dual::kThreads, shared_bytes, seed + unsigned(index), body, laziness))
      return false;
  }
  return true;
}

template <typename Weight, int kRanks, int kParts>
struct Run {
  using Tile = typename dual::DualProjection<Weight, kRanks, kParts>::Tile;
  static bool products(const DualProjectLaunch& launch, int64_t blocks, unsigned seed) {
    return run_ctas(blocks, Tile::kSharedBytes, seed,
                    [&] { dual::dual_project<Weight, kRanks, kParts>(launch); });
  }
};

struct Variant {
  bool (*products)(const DualProjectLaunch&, int64_t, unsigned);
  int columns;
};

template <typename Weight, int kRanks, int kParts>
Variant variant() {
  using This = Run<Weight, kRanks, kParts>;
  return {This::products, This::Tile::kColumns};
}

template <typename Weight, int kParts>
Variant variant(int ranks) {
  return ranks == 8    ? variant<Weight, 8, kParts>()
         : ranks == 16 ? variant<Weight, 16, kParts>()
         : ranks == 32 ? variant<Weight, 32, kParts>()
                       : variant<Weight, 64, kParts>();
}

enum Kind { kFp32, kBf16, kFp16 };  // DualProjectWeight

Variant variant(int weight, int ranks, int parts) {
  if (weight == kFp32) return variant<dual::Fp32AsBf16, 3>(ranks);
  if (weight == kFp16)
    return parts == 1 ? variant<dual::Fp16Weight, 1>(ranks) : variant<dual::Fp16AsBf16, 3>(ranks);
  return parts == 1 ? variant<dual::Bf16Weight, 1>(ranks) : variant<dual::Bf16Weight, 3>(ranks);
}

// Index maths: each check says what is wrong, or nothing.

const char* wrong = nullptr;

void expect(bool right, const char* what) {
  if (!right && !wrong) wrong = what;
}

// Bank of a 4-byte word; a phase of a shared-memory access covers 128 bytes, all banks once.
template <typename Addresses>
void expect_all_banks(const Addresses& offsets, int bytes, const char* what) {
  std::set<int> banks;
  for (int offset : offsets)
    for (int i = 0; i < bytes; i += 4) banks.insert((offset + i) / 4 % 32);
  expect(int(banks.size()) == int(offsets.size()) * bytes / 4, what);
}

template <int kBytes, int kRanks, int kParts>
void check_layout() {
  using Tile = dual::Layout<kBytes, kRanks, kParts>;
  // Every element has a place of its own, and 16-byte units stay whole.
  std::set<int> seen;
  for (int row = 0; row < dual::kTileRows; ++row)
    for (int column = 0; column < Tile::kColumns; ++column) {
      const int at = Tile::element_offset(row, column);
      expect(at >= 0 && at + kBytes <= Tile::kStageBytes, "an element is outside its stage");
      expect(seen.insert(at).second, "two elements have one place");
      const int unit = column / Tile::kUnitElements;
      expect(at / dual::kUnit * dual::kUnit == Tile::unit_offset(row, unit),
             "a unit is torn apart");
    }
  for (int column = 0; column < Tile::kColumns; column += dual::kStep) {
    if (kBytes == 2) {
      for (int lane = 0; lane < 32; ++lane) {
        // Word q of lane l is of row l / 4 of matrix q, whose rows lanes 8q … 8q + 7 point to.
        for (int word = 0; word < 4; ++word) {
          const int pointer = word * 8 + lane / 4;
          const int plain = Tile::lane_offset(column, pointer) + lane % 4 * 4;
          expect(plain ==
                     Tile::element_offset(dual::a_row(lane, word), column + dual::a_k(lane, word)),
                 "ldmatrix gives other elements than operand A wants");
          // Transposed: elements 2 (l mod 4) and the next of column l / 4.
          for (int i = 0; i < 2; ++i) {
            const int row = word * 8 + lane % 4 * 2 + i;
            const int at = Tile::transposed_offset(column, row) + lane / 4 * 2;
            expect(at == Tile::element_offset(dual::a_k(lane, word) + i,
                                              column + dual::a_row(lane, word)),
                   "ldmatrix.trans gives other elements than operand A wants");
          }
        }
      }
      for (int matrix = 0; matrix < 4; ++matrix) {
        std::array<int, 8> plain, transposed;
        for (int i = 0; i < 8; ++i) {
          plain[i] = Tile::lane_offset(column, matrix * 8 + i);
          transposed[i] = Tile::transposed_offset(column, matrix * 8 + i);
        }
        expect_all_banks(plain, 16, "ldmatrix meets a bank twice");
        expect_all_banks(transposed, 16, "ldmatrix.trans meets a bank twice");
      }
    } else {
      for (int word = 0; word < 4; ++word)
        for (int half = 0; half < 2; ++half) {
          std::array<int, 16> offsets;
          for (int i = 0; i < 16; ++i) {
            const int lane = half * 16 + i;
            offsets[i] =
                Tile::element_offset(dual::a_row(lane, word), column + dual::a_k(lane, word));
            expect(offsets[i] % 8 == 0, "a pair of fp32 is not aligned");
            expect(offsets[i] + 4 == Tile::element_offset(dual::a_row(lane, word),
                                                          column + dual::a_k(lane, word) + 1),
                   "a pair of fp32 is torn apart");
          }
          expect_all_banks(offsets, 8, "a pair of fp32 meets a bank twice");
        }
    }
  }
  // B's parts: the word of a pair of rows is where operand B's lane looks for it.
  std::set<int> words;
  for (int part = 0; part < kParts; ++part)
    for (int rank = 0; rank < kRanks; ++rank)
      for (int row = 0; row < dual::kTileRows; row += 2) {
        const int at = dual::factor_word(kRanks, part, rank, row);
        expect(at >= 0 && at * 4 < Tile::kFactorBytes, "a part is outside its place");
        expect(words.insert(at).second, "two parts have one place");
        const int lane = at / 2 % 32, word = at % 2, fragment = at / 64;
        expect(fragment == part * (kRanks / 8) + rank / 8 && dual::b_column(lane) == rank % 8 &&
                   dual::b_k(lane, word) == row,
               "a part is not where operand B wants it");
      }
  // W Aᵀ of a tile: each row and rank once.
  std::set<std::array<int, 2>> products;
  for (int i = 0; i < dual::kTileRows * kRanks; ++i) {
    const int row = dual::product_row(i), rank = dual::product_rank(i);
    expect(row >= 0 && row < dual::kTileRows && rank >= 0 && rank < kRanks, "a product is outside");
    expect(products.insert({row, rank}).second, "a product is stored twice");
  }
  // Stages and what is kept twice lie beside each other.
  for (int tile = 0; tile < 2 * Tile::kStages; ++tile) {
    expect(Tile::stage(tile) + Tile::kStageBytes <= Tile::factor(0), "stages overlap parts");
    expect(Tile::factor(tile) + Tile::kFactorBytes <= Tile::product(0, 0),
           "parts overlap products");
    expect(Tile::product(tile, dual::kWarps - 1) + Tile::kProductBytes <= Tile::kSharedBytes,
           "products are outside shared memory");
  }
  expect(Tile::kSharedBytes <= 99 << 10, "a 4090 has less shared memory");
}

template <int kBytes, int kParts>
void check_layouts() {
  check_layout<kBytes, 8, kParts>();
  check_layout<kBytes, 16, kParts>();
  check_layout<kBytes, 32, kParts>();
  check_layout<kBytes, 64, kParts>();
}

// Every block and every span belongs to one layer, layers without any to none.
void check_search() {
  for (unsigned pattern = 0; pattern < 1 << 10; ++pattern) {
    std::vector<DualProjectLayer> layers(5);
    int64_t total = 0;
    for (int i = 0; i < 5; ++i) {
      layers[i].first_block = total;
      total += pattern >> 2 * i & 3;
    }
    for (int i = 0; i < 5; ++i)
      for (unsigned j = 0; j < (pattern >> 2 * i & 3); ++j)
        expect(dual::find_layer(layers.data(), 5, &DualProjectLayer::first_block,
                                layers[i].first_block + j) == i,
               "a block is looked for in another layer");
  }
}

}  // namespace

extern "C" {

int dual_project_columns(int weight, int ranks, int parts) {
  return variant(weight, ranks, parts).columns;
}

// As csrc/dual_project.cu launches them.
bool dual_project(const DualProjectLayer* table, int64_t count, bool by_value, int weight,
                  int ranks, int parts, bool factors_are_half, float scale, bool half_targets,
                  unsigned seed) {
  const Variant of = variant(weight, ranks, parts);
  int64_t blocks = 0, spans = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (table[i].first_block != blocks || table[i].first_span != spans) return false;
    blocks += dual::row_blocks(table[i]) * dual::column_blocks(table[i], of.columns);
    spans += dual::spans(table[i], 0) + dual::spans(table[i], 1);
  }
  const DualProjectLaunch launch{
      by_value ? nullptr : table, table[0], int(count),           of.columns,
      factors_are_half,           scale,    half_targets ? 2 : 4, weight == kBf16};
  return of.products(launch, blocks, seed) &&
         run_ctas(spans, 0, seed, [&] { dual::dual_project_sum(launch); });
}

// What is wrong with the index maths, or null.
const char* check_index_maths() {
  wrong = nullptr;
  check_layouts<2, 1>();
  check_layouts<2, 3>();
  check_layouts<4, 3>();
  check_search();
  return wrong;
}
}
