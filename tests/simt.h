// A multiprocessor on the host, for kernels written on csrc/warp.cuh: every CUDA thread is a fiber,
// and which one goes on is drawn at random, so that what is not synchronised comes out differently
// from seed to seed. Warp instructions are done lane by lane as the PTX ISA describes their
// fragments. Asynchronous copies arrive at once or when they are waited for, at random.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (lora_init::simt::machine->current->thread)
#define blockIdx (lora_init::simt::machine->current->cta->index)
#define gridDim (lora_init::simt::machine->grid)

inline int min(int a, int b) { return a < b ? a : b; }

namespace lora_init::simt {

struct Dim {
  int x;
};

struct Fiber;

struct Barrier {
  int size;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Barrier barrier{32, {}};
  alignas(16) char slots[2][32][16];  // what lanes show each other, two collectives deep
  bool lazy = false;
};

struct Cta {
  Dim index;
  std::vector<char> memory;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  Dim thread;
  Cta* cta;
  Warp* warp;
  int lane, collectives = 0, groups = 0;
  std::vector<Copy> copies;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

struct Machine {
  Dim grid;
  std::vector<Fiber*> ready;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::mt19937 random;
};

inline Machine* machine = nullptr;

inline void yield() { swapcontext(&machine->current->context, &machine->scheduler); }

inline void wait(Barrier& barrier) {
  barrier.waiting.push_back(machine->current);
  if (int(barrier.waiting.size()) < barrier.size) {
    std::swap(*std::find(machine->ready.begin(), machine->ready.end(), machine->current),
              machine->ready.back());
    machine->ready.pop_back();
    yield();
    return;
  }
  barrier.waiting.pop_back();
  machine->ready.insert(machine->ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

// What every lane of the warp shows at this point of the program.
template <typename T>
const T (&gather(const T& mine))[32] {
  static_assert(sizeof(T) <= 16);
  Fiber& fiber = *machine->current;
  auto& slots = fiber.warp->slots[fiber.collectives++ & 1];
  // 32 slots of T, packed
  std::memcpy(reinterpret_cast<char*>(slots) + fiber.lane * sizeof(T), &mine, sizeof(T));
  wait(fiber.warp->barrier);
  return *reinterpret_cast<const T(*)[32]>(slots);
}

inline void start() {
  machine->kernel();
  auto& ready = machine->ready;
  std::swap(*std::find(ready.begin(), ready.end(), machine->current), ready.back());
  ready.pop_back();
  yield();
}

// Runs a kernel; false if its threads wait for each other for ever. One warp of each CTA goes on so
// many times less often than others, so that what others do not wait for comes too late.
inline bool launch(int grid, int threads, int shared_bytes, unsigned seed,
                   std::function<void()> kernel, int laziness = 1) {
  constexpr int kStack = 256 << 10;
  constexpr int64_t kSwitches = int64_t(1) << 30;
  Machine here{{grid}, {}, nullptr, {}, std::move(kernel), std::mt19937(seed)};
  machine = &here;
  std::vector<Cta> ctas(grid);
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (int i = 0; i < grid; ++i) {
    ctas[i].index = {i};
    ctas[i].memory.assign(shared_bytes, char(0xff));
    ctas[i].barrier = {threads, {}};
    ctas[i].warps.resize(threads / 32);
    ctas[i].warps[here.random() % (threads / 32)].lazy = true;
    for (int j = 0; j < threads; ++j) {
      auto fiber = std::make_unique<Fiber>();
      fiber->thread = {j};
      fiber->cta = &ctas[i];
      fiber->warp = &ctas[i].warps[j / 32];
      fiber->lane = j % 32;
      fiber->stack.reset(new char[kStack]);
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack.get();
      fiber->context.uc_stack.ss_size = kStack;
      makecontext(&fiber->context, start, 0);
      here.ready.push_back(fiber.get());
      fibers.push_back(std::move(fiber));
    }
  }
  int64_t switches = 0;
  while (!here.ready.empty() && ++switches < kSwitches) {
    here.current = here.ready[here.random() % here.ready.size()];
    if (here.current->warp->lazy && here.random() % laziness) continue;
    swapcontext(&here.scheduler, &here.current->context);
  }
  bool stuck = !here.ready.empty();
  for (const Cta& cta : ctas) {
    stuck |= !cta.barrier.waiting.empty();
    for (const Warp& warp : cta.warps) stuck |= !warp.barrier.waiting.empty();
  }
  machine = nullptr;
  return !stuck;
}

}  // namespace lora_init::simt

namespace lora_init::warp {

using simt::gather;
using simt::machine;

struct alignas(16) Words {
  uint32_t x[4];
};
struct alignas(16) Floats {
  float x[4];
};

inline char* shared_memory() { return machine->current->cta->memory.data(); }

inline uint16_t half_of(uint32_t word, int i) { return uint16_t(word >> (16 * i)); }

// Row i of matrix q is where lane 8q + i points; lane l gets its elements 2(l mod 4) and the next
// of row l / 4, or of column l / 4.
inline Words load_matrix(const void* pointer) {
  const auto& rows = gather(static_cast<const uint16_t*>(pointer));
  const int lane = machine->current->lane;
  Words w;
  for (int q = 0; q < 4; ++q) {
    const uint16_t* row = rows[8 * q + lane / 4] + lane % 4 * 2;
    w.x[q] = uint32_t(row[0]) | uint32_t(row[1]) << 16;
  }
  return w;
}

inline Words load_transposed(const void* pointer) {
  const auto& rows = gather(static_cast<const uint16_t*>(pointer));
  const int lane = machine->current->lane;
  Words w;
  for (int q = 0; q < 4; ++q) {
    const uint16_t first = rows[8 * q + lane % 4 * 2][lane / 4];
    w.x[q] = first | uint32_t(rows[8 * q + lane % 4 * 2 + 1][lane / 4]) << 16;
  }
  return w;
}

inline uint32_t transpose(uint32_t word) {
  const auto& words = gather(word);
  const int lane = machine->current->lane, column = lane / 4, row = lane % 4 * 2;
  const auto element = [&](int i) { return half_of(words[i * 4 + column / 2], column % 2); };
  return element(row) | uint32_t(element(row + 1)) << 16;
}

inline void arrive(const simt::Copy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, copy.bytes);
}
inline void copy_async_bytes(void* to, const void* from, int bytes) {
  const simt::Copy copy{to, from, bytes, machine->current->groups};
  if (machine->random() % 4)
    machine->current->copies.push_back(copy);
  else
    arrive(copy);
}
inline void stream_async(void* to, const void* from, int bytes) {
  copy_async_bytes(to, from, bytes);
}
inline void copy_async(void* to, const void* from, bool inside) {
  copy_async_bytes(to, from, inside ? 16 : 0);
}
inline void commit_copies() { ++machine->current->groups; }

inline void finish_copies(int groups) {
  auto& copies = machine->current->copies;
  const auto done = std::find_if(copies.begin(), copies.end(),
                                 [&](const simt::Copy& copy) { return copy.group >= groups; });
  std::for_each(copies.begin(), done, arrive);
  copies.erase(copies.begin(), done);
}
inline void wait_copies() { finish_copies(machine->current->groups + 1); }
template <int kPending>
void wait_copies() {
  finish_copies(machine->current->groups - kPending);
}

inline void wait_copies(int pending) { finish_copies(machine->current->groups - pending); }

inline Words load_whole(const void* pointer) {
  simt::yield();
  return *static_cast<const Words*>(pointer);
}
inline void store_whole(void* pointer, const Words& words) {
  simt::yield();
  *static_cast<Words*>(pointer) = words;
}

inline uint32_t load_acquire(const uint32_t* pointer) {
  simt::yield();
  return *pointer;
}

inline void fence() {}
inline void add(uint32_t* pointer) { ++*pointer; }
inline void stop() { std::abort(); }
inline void sync_threads() { simt::wait(machine->current->cta->barrier); }
inline int index() { return machine->current->thread.x / 32; }
inline void sync_warp() { simt::wait(machine->current->warp->barrier); }
inline bool any(bool here) {
  const auto& all = gather(here);
  return std::any_of(all, all + 32, [](bool one) { return one; });
}

inline float from_lane(float value, int lane, int width) {
  return gather(value)[machine->current->lane / width * width + lane];
}

inline float divide(float a, float b) { return a / b; }
inline float root(float a) { return std::sqrt(a); }

// mma.m16n8k16: lane l has of A rows l / 4 and 8 more, k 2(l mod 4), the next, and both 8 on; of B
// column l / 4 and the same k; of D those rows and columns 2(l mod 4) and the next.
template <typename Half>
void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
              uint32_t b1) {
  const Words mine{{a0, a1, a2, a3}};
  const auto& a = gather(mine);
  Words all[32];
  std::memcpy(all, a, sizeof(all));
  const auto& b = gather(uint64_t(b0) | uint64_t(b1) << 32);
  const int lane = machine->current->lane;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t word = all[row % 8 * 4 + k % 8 / 2].x[row / 8 + k / 8 * 2];
      const uint32_t other = uint32_t(b[column * 4 + k % 8 / 2] >> (k / 8 * 32));
      sum += double(Half::value(half_of(word, k % 2))) * Half::value(half_of(other, k % 2));
    }
    d[i] = float(sum);
  }
}

struct Bf16 {
  static uint16_t round(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static uint32_t round(float x, float y) { return round(x) | uint32_t(round(y)) << 16; }
  static float value(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
  }
  template <typename... Operands>
  static void mma(float (&d)[4], Operands... operands) {
    multiply<Bf16>(d, operands...);
  }
};

struct Fp16 {
  static uint16_t round(float x) {
    const _Float16 rounded = _Float16(x);
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
  }
  static uint32_t round(float x, float y) { return round(x) | uint32_t(round(y)) << 16; }
  static float value(uint16_t x) {
    _Float16 half;
    std::memcpy(&half, &x, 2);
    return float(half);
  }
  template <typename... Operands>
  static void mma(float (&d)[4], Operands... operands) {
    multiply<Fp16>(d, operands...);
  }
};

}  // namespace lora_init::warp
