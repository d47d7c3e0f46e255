// Runs the CUDA kernels on the processor: the second definition of what common.cuh keeps behind
// QB_HOST, and a scheduler. Each thread of a block is a context of its own that runs the kernel's own
// code and stops only where threads meet: a barrier, a shuffle, an mma. So index arithmetic, packing,
// fragment layouts, splits and reductions are those of the card; only the instructions differ:
//   - mma takes fragments as the PTX ISA lays them out over lanes, keeps products exactly, aligns
//     them with the accumulator to 25 bits and truncates, which is no better than tensor cores do;
//   - asynchronous copies land only when they are waited for;
//   - shared memory begins as NaN, accesses through `load` and `store` must be aligned and inside a
//     range that `register_range` announced.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define QB_DEVICE static inline
#define QB_KERNEL(threads, blocks) extern "C" void
#define QB_SHARED(name) unsigned char* name = host::shared_memory()

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, gridDim, blockDim;

static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace host {

constexpr size_t kStack = 64 << 10, kGuard = 4096;
constexpr unsigned char kGuardByte = 0xa5;

struct Copy { void* to; const void* from; bool real; };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  bool finished;
};
union Lane { float f[8]; int i[8]; unsigned u[8]; };
struct Warp { int arrived, generation, kind; unsigned in[32][10]; unsigned out[32][4]; };

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<unsigned char> shared;
static std::vector<std::pair<uintptr_t, size_t>> ranges;
static ucontext_t scheduler;
static std::string message;
static unsigned current, barrier_arrived, barrier_generation;
static unsigned long progress;
static bool backwards;  // last thread first: where a barrier is missing, results differ

static void fail(const char* what) { if (message.empty()) message = what; }
static unsigned char* shared_memory() {
  return (unsigned char*)(((uintptr_t)shared.data() + 127) & ~(uintptr_t)127);
}
static void yield() { swapcontext(&fibers[current].context, &scheduler); }

static bool inside(const volatile void* at, size_t bytes, size_t alignment) {
  uintptr_t a = (uintptr_t)at;
  if (a % alignment) { fail("an address is not aligned"); return false; }
  for (auto& r : ranges) if (a >= r.first && a + bytes <= r.first + r.second) return true;
  fail("an access is outside every tensor");
  return false;
}

// Waits until all 32 lanes have put down what they bring, then gives each its result.
template <class Work>
static Warp& meet(int kind, Work work) {
  Warp& w = warps[current / 32];
  if (w.arrived == 0) w.kind = kind;
  if (w.kind != kind) fail("lanes of a warp meet at different places");
  int generation = w.generation;
  if (++w.arrived == 32) {
    work(w);
    w.arrived = 0, ++w.generation, ++progress;
  }
  while (w.generation == generation && message.empty()) yield();
  return w;
}

static float half_value(unsigned bits) {
  uint16_t b = (uint16_t)bits;
  _Float16 h;
  std::memcpy(&h, &b, 2);
  return (float)h;
}

static uint16_t half_bits(double value) {
  _Float16 h = (_Float16)value;
  uint16_t b;
  std::memcpy(&b, &h, 2);
  return b;
}

static float as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
static unsigned as_bits(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }

// The sum of some numbers as a tensor core adds them (see above).
static float truncated_sum(const double* parts, int count) {
  double most = 0, sum = 0;
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(parts[i])) { for (int j = 0; j < count; ++j) sum += parts[j]; return (float)sum; }
    most = std::fmax(most, std::fabs(parts[i]));
  }
  if (most == 0) return 0.f;
  double quantum = std::ldexp(1.0, std::ilogb(most) - 24);
  for (int i = 0; i < count; ++i) sum += std::trunc(parts[i] / quantum) * quantum;
  float rounded = (float)sum;
  return std::fabs((double)rounded) > std::fabs(sum) ? std::nextafterf(rounded, 0.f) : rounded;
}

// Lane l = 4g + t. A: registers hold (row g | g + 8 for odd ones, columns from 2t | + half the k);
// B: rows as A's columns, column g; C: row g | g + 8, columns 2t, 2t + 1.
static void multiply_half(Warp& w) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 2; ++h) {
        int column = 2 * (l % 4) + h + 8 * (r / 2);
        a[l / 4 + 8 * (r % 2)][column] = half_value(w.in[l][r] >> 16 * h);
        if (r < 2) b[2 * (l % 4) + h + 8 * r][l / 4] = half_value(w.in[l][4 + r] >> 16 * h);
      }
  for (int l = 0; l < 32; ++l)
    for (int j = 0; j < 4; ++j) {
      int row = l / 4 + 8 * (j / 2), column = 2 * (l % 4) + j % 2;
      double parts[17];
      for (int k = 0; k < 16; ++k) parts[k] = (double)a[row][k] * b[k][column];
      parts[16] = as_float(w.in[l][6 + j]);
      w.out[l][j] = as_bits(truncated_sum(parts, 17));
    }
}

static void multiply_bytes(Warp& w) {
  int a[16][32], b[32][8];
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 4; ++h) {
        int column = 4 * (l % 4) + h + 16 * (r / 2);
        a[l / 4 + 8 * (r % 2)][column] = (int8_t)(w.in[l][r] >> 8 * h);
        if (r < 2) b[4 * (l % 4) + h + 16 * r][l / 4] = (int8_t)(w.in[l][4 + r] >> 8 * h);
      }
  for (int l = 0; l < 32; ++l)
    for (int j = 0; j < 4; ++j) {
      int sum = (int)w.in[l][6 + j];
      for (int k = 0; k < 32; ++k) sum += a[l / 4 + 8 * (j / 2)][k] * b[k][2 * (l % 4) + j % 2];
      w.out[l][j] = (unsigned)sum;
    }
}

template <class D>
static void mma_lanes(D (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int kind) {
  unsigned* in = warps[current / 32].in[current % 32];
  std::memcpy(in, a, 16);
  in[4] = b0, in[5] = b1;
  std::memcpy(in + 6, d, 16);
  Warp& w = meet(kind, kind == 1 ? multiply_half : multiply_bytes);
  std::memcpy(d, w.out[current % 32], 16);
}

}  // namespace host

QB_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  host::mma_lanes(d, a, b0, b1, 1);
}
QB_DEVICE void mma_bytes(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  host::mma_lanes(d, a, b0, b1, 2);
}
QB_DEVICE float shuffle_xor(float v, int mask) {
  std::memcpy(host::warps[host::current / 32].in[host::current % 32], &v, 4);
  host::Warp& w = host::meet(100 + mask, [mask](host::Warp& all) {
    for (int l = 0; l < 32; ++l) all.out[l][0] = all.in[l ^ mask][0];
  });
  return host::as_float(w.out[host::current % 32][0]);
}
QB_DEVICE void __syncthreads() {
  unsigned generation = host::barrier_generation;
  if (++host::barrier_arrived == host::fibers.size())
    host::barrier_arrived = 0, ++host::barrier_generation, ++host::progress;
  while (host::barrier_generation == generation && host::message.empty()) host::yield();
}
QB_DEVICE void __threadfence() {}

template <class T>
QB_DEVICE T load(const T* from) {
  return host::inside(from, sizeof(T), sizeof(T)) ? *from : T();
}
template <class T>
QB_DEVICE void store(T* to, T value) {
  if (host::inside(to, sizeof(T), sizeof(T))) *to = value;
}
template <class T>
QB_DEVICE T load_stream(const T* from) { return load(from); }
QB_DEVICE unsigned atomicAdd(unsigned* at, unsigned value) {
  unsigned old = *at;
  *at += value;
  return old;
}
QB_DEVICE unsigned atomicMax(unsigned* at, unsigned value) {
  unsigned old = *at;
  *at = old > value ? old : value;
  return old;
}

QB_DEVICE void copy_async(void* to, const void* from, bool real) {
  if ((uintptr_t)to % 16) host::fail("a copy to shared memory is not aligned");
  if (!real || host::inside(from, 16, 16)) host::fibers[host::current].open.push_back({to, from, real});
}
QB_DEVICE void commit_copies() {
  host::Fiber& f = host::fibers[host::current];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
template <int PENDING>
QB_DEVICE void wait_copies() {
  auto& groups = host::fibers[host::current].groups;
  while (groups.size() > PENDING) {
    for (auto& c : groups.front())
      if (c.real) std::memcpy(c.to, c.from, 16); else std::memset(c.to, 0, 16);
    groups.erase(groups.begin());
  }
}

QB_DEVICE float half_to_float(unsigned short h) { return host::half_value(h); }
QB_DEVICE unsigned short float_to_half(float f) { return host::half_bits(f); }
QB_DEVICE unsigned half2_sub(unsigned a, unsigned b) {
  return host::half_bits((double)host::half_value(a) - host::half_value(b)) |
         (unsigned)host::half_bits((double)host::half_value(a >> 16) - host::half_value(b >> 16)) << 16;
}
QB_DEVICE unsigned half2_mul(unsigned a, unsigned b) {
  return host::half_bits((double)host::half_value(a) * host::half_value(b)) |
         (unsigned)host::half_bits((double)host::half_value(a >> 16) * host::half_value(b >> 16)) << 16;
}
QB_DEVICE unsigned and_or(unsigned a, unsigned mask, unsigned bits) { return (a & mask) | bits; }
QB_DEVICE float bits_to_float(unsigned bits) { return host::as_float(bits); }
QB_DEVICE unsigned float_to_bits(float f) { return host::as_bits(f); }
QB_DEVICE int round_even(float f) { return (int)std::nearbyint(f); }
QB_DEVICE unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
QB_DEVICE unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}

namespace host {

template <class T>
static T argument(long long slot) {
  T value;
  std::memcpy(&value, &slot, sizeof(T));
  return value;
}
template <class... A, size_t... I>
static void call(void (*kernel)(A...), const long long* slots, std::index_sequence<I...>) {
  kernel(argument<A>(slots[I])...);
}

static const long long* slots;
static void (*entry)();

static void thread_main() {
  entry();
  fibers[current].finished = true;
  ++progress;
  swapcontext(&fibers[current].context, &scheduler);
}

// Runs a warp until it ends or waits for others: as far ahead of them as it may get.
static unsigned run_warp(unsigned warp) {
  unsigned running = 0;
  for (unsigned long before = progress - 1; before != progress && message.empty();) {
    before = progress, running = 0;
    for (unsigned i = 0; i < 32; ++i) {
      current = warp * 32 + (backwards ? 31 - i : i);
      if (fibers[current].finished) continue;
      threadIdx = {current, 0, 0};
      swapcontext(&scheduler, &fibers[current].context);
      running += !fibers[current].finished;
    }
  }
  return running;
}

static void run_block(unsigned threads, unsigned shared_bytes) {
  shared.assign(shared_bytes + 128 + kGuard, 0xff);
  std::memset(shared_memory() + shared_bytes, kGuardByte, kGuard - 128);
  fibers.resize(threads);
  warps.assign(threads / 32, Warp());
  barrier_arrived = 0;
  for (auto& f : fibers) {
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.groups.clear(), f.open.clear(), f.finished = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, thread_main, 0);
  }
  unsigned running = threads;
  while (running && message.empty()) {
    unsigned long before = progress;
    running = 0;
    for (unsigned i = 0; i < threads / 32; ++i)
      running += run_warp(backwards ? threads / 32 - 1 - i : i);
    if (running && progress == before) fail("threads wait for each other");
  }
  for (size_t i = 0; i < kGuard - 128; ++i)
    if (shared_memory()[shared_bytes + i] != kGuardByte) fail("shared memory is too small");
}

template <class... A>
static const char* launch(void (*kernel)(A...), const unsigned* grid, unsigned threads,
                          unsigned shared_bytes, const long long* given) {
  static void (*function)(A...);
  function = kernel, slots = given;
  entry = [] { call(function, slots, std::index_sequence_for<A...>()); };
  message.clear();
  gridDim = {grid[0], grid[1], grid[2]}, blockDim = {threads, 1, 1};
  for (unsigned z = 0; z < grid[2]; ++z)
    for (unsigned y = 0; y < grid[1]; ++y)
      for (unsigned x = 0; x < grid[0] && message.empty(); ++x) {
        blockIdx = {x, y, z};
        run_block(threads, shared_bytes);
      }
  return message.c_str();
}

}  // namespace host

#define QB_HOST_ENTRY(kernel)                                                                    \
  extern "C" void register_range(const void* at, size_t bytes) {                                 \
    host::ranges.push_back({(uintptr_t)at, bytes});                                              \
  }                                                                                              \
  extern "C" void forget_ranges() { host::ranges.clear(); }                                      \
  extern "C" const char* launch(const unsigned* grid, unsigned threads, unsigned shared_bytes,   \
                                int backwards, const long long* slots) {                         \
    host::backwards = backwards;                                                                 \
    return host::launch(kernel, grid, threads, shared_bytes, slots);                             \
  }
