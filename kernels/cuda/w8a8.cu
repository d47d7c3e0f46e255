// Int8 weights times int8 activations, both signed, sums exact in int32:
//   quantize_tokens: x [m, k] -> int8 [m, pitch], x = scale * code, scale = max |x| / 127 a token; and
//   zeros the `counters` numbers by which the blocks of w8a8 count themselves;
//   w8a8: y = row_scale * scale * sum(w * code) + bias for up to 16 tokens, which torch._int_mm refuses;
//   rescale: the same from the int32 sums of torch._int_mm, for more.
// Weights are int8 [rows, pitch], row by row, as torch._int_mm wants them: pitch is a multiple of 16,
// filled up with anything, for the codes of x are zero there. The sum over k does not care in which
// order k goes: lane t of a row has inputs 16t .. 16t + 15 of each 64, one 16-byte load, whose words are
// registers of the A operand of mma.m16n8k32; so a weight costs no instruction but its load and mma.
//
// Defines: DTYPE (0 fp16, 1 bf16), TOKEN_TILES (tokens of w8a8 / 8: 1, 2). Block: 256 threads; grid:
// one a token; (rows / 16, splits of K); (m, n / 256); rounded up.
#include "common.cuh"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokens = 8 * TOKEN_TILES;
constexpr int kStep = 64;
constexpr int kDeep = 4;  // steps in flight, 1 KiB a warp each

QB_KERNEL(kThreads, 2)
quantize_tokens(const unsigned short* x, signed char* codes, float* scales, unsigned* arrived, int k,
                int pitch, int counters) {
  QB_SHARED(memory);
  unsigned* largest = (unsigned*)memory;  // bits of a float that is not negative sort as integers
  const unsigned short* row = x + (long long)blockIdx.x * k;
  if (threadIdx.x == 0) *largest = 0;
  __syncthreads();
  unsigned most = 0;
  for (int i = threadIdx.x; i < k; i += kThreads)
    most = larger(most, float_to_bits(to_float<DTYPE>(load(row + i))) & 0x7fffffffu);
  most = largest_of_16(most);
  if (threadIdx.x % 16 == 0) atomicMax(largest, most);
  __syncthreads();
  float scale = *largest ? bits_to_float(*largest) / 127.f : 1.f;
  for (int i = threadIdx.x; i < pitch; i += kThreads) {
    int code = i < k ? round_even(to_float<DTYPE>(load(row + i)) / scale) : 0;
    code = code > 127 ? 127 : code < -127 ? -127 : code;
    store(codes + (long long)blockIdx.x * pitch + i, (signed char)code);
  }
  if (threadIdx.x == 0) store(scales + blockIdx.x, scale);
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < counters; i += kThreads) store(arrived + i, 0u);
}

struct Problem {
  const signed char* x;        // [m, pitch]
  const float* x_scale;        // [m]
  const signed char* weight;   // [n or more, pitch]
  const float* row_scale;      // [n]
  const unsigned short* bias;  // [n] or null
  unsigned short* y;           // [m, n]
  int* partial;                // [splits, m, n_padded], where there is more than one split
  unsigned* arrived;           // [gridDim.x], zero
  int m, n, pitch;
};

QB_DEVICE void write(const Problem& p, int row, int token, int sum) {
  if (row >= p.n) return;
  float value = (float)sum * load(p.row_scale + row) * load(p.x_scale + token);
  if (p.bias) value += to_float<DTYPE>(load(p.bias + row));
  store(p.y + (long long)token * p.n + row, from_float<DTYPE>(value));
}

// Adds the warps; then, where K is split, the last block of these rows adds the blocks.
QB_DEVICE void finish(const Problem& p, const int* parts, unsigned* is_last) {
  int splits = gridDim.y, n_padded = gridDim.x * 16;
  for (int i = threadIdx.x; i < 16 * p.m; i += kThreads) {
    int row = blockIdx.x * 16 + i % 16, token = i / 16, sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[(w * 16 + i % 16) * kTokens + token];
    if (splits == 1) write(p, row, token, sum);
    else store(p.partial + ((long long)blockIdx.y * p.m + token) * n_padded + row, sum);
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *is_last = atomicAdd(p.arrived + blockIdx.x, 1u) == splits - 1u;
  __syncthreads();
  if (!*is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < 16 * p.m; i += kThreads) {
    int row = blockIdx.x * 16 + i % 16, token = i / 16, sum = 0;
    for (int z = 0; z < splits; ++z)
      sum += load((const volatile int*)p.partial + ((long long)z * p.m + token) * n_padded + row);
    write(p, row, token, sum);
  }
}

// What a lane reads: rows g and g + 8 of the block, from its own 16 columns of a step. Rows beyond the
// last one read that one, and columns beyond the end the first: neither is counted.
struct Rows {
  const signed char* at[2];
  int column, pitch;
};

struct Slot {
  uint4 row[2];
};

QB_DEVICE Rows open_rows(const Problem& p, int step) {
  Rows r;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int row = blockIdx.x * 16 + threadIdx.x % 32 / 4 + 8 * i;
    r.at[i] = p.weight + (long long)(row < p.n ? row : p.n - 1) * p.pitch;
  }
  r.column = step * kStep + threadIdx.x % 4 * 16, r.pitch = p.pitch;
  return r;
}

QB_DEVICE void issue(const Rows& r, Slot& slot, int ahead) {
  int column = r.column + ahead * kStep;
  column = column < r.pitch ? column : 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) slot.row[i] = load_stream((const uint4*)(r.at[i] + column));
}

QB_KERNEL(kThreads, 2)
w8a8(const signed char* x, const float* x_scale, const signed char* weight, const float* row_scale,
     const unsigned short* bias, unsigned short* y, int* partial, unsigned* arrived, int m, int n,
     int pitch) {
  QB_SHARED(memory);
  Problem p{x, x_scale, weight, row_scale, bias, y, partial, arrived, m, n, pitch};
  int steps = (pitch + kStep - 1) / kStep, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int block_first = part_begin(steps, gridDim.y, blockIdx.y);
  int block_steps = part_begin(steps, gridDim.y, blockIdx.y + 1) - block_first;
  int begin = part_begin(block_steps, kWarps, warp);
  int count = part_begin(block_steps, kWarps, warp + 1) - begin;
  Rows rows = open_rows(p, block_first + begin);
  Slot slots[kDeep];
#pragma unroll
  for (int d = 0; d < kDeep; ++d)
    if (d < count) issue(rows, slots[d], d);

  // Rows of x are 64 bytes off a multiple of 128: the 8 lanes of a phase, two rows, hit 32 banks.
  int columns = block_steps * kStep, stride = columns + 64 - columns % 128, pieces = columns / 16;
  for (int i = threadIdx.x; i < m * pieces; i += kThreads) {
    int token = i / pieces, c = i % pieces * 16, from = block_first * kStep + c;
    bool real = from < pitch;
    copy_async(memory + token * stride + c, x + (long long)token * pitch + (real ? from : 0), real);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  int sums[TOKEN_TILES][4] = {};
  for (int base = 0; base < count; base += kDeep) {
    rows.column += kDeep * kStep;
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      if (base + d >= count) break;
      uint4 low = slots[d].row[0], high = slots[d].row[1];
      const unsigned a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
      for (int c = 0; c < TOKEN_TILES; ++c) {
        int token = 8 * c + lane / 4;  // those that are not there read token 0
        const unsigned char* at = memory + (token < m ? token : 0) * stride;
        uint4 b = *((const uint4*)(at + (begin + base + d) * kStep) + lane % 4);
        mma_bytes(sums[c], a[0], b.x, b.y);
        mma_bytes(sums[c], a[1], b.z, b.w);
      }
      if (base + d + kDeep < count) issue(rows, slots[d], d);
    }
  }
  int* parts = (int*)(memory + m * stride);
#pragma unroll
  for (int c = 0; c < TOKEN_TILES; ++c)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      parts[(warp * 16 + lane / 4 + 8 * (j / 2)) * kTokens + 8 * c + 2 * (lane % 4) + j % 2] =
          sums[c][j];
  __syncthreads();
  finish(p, parts, (unsigned*)(parts + kWarps * 16 * kTokens));
}

QB_KERNEL(kThreads, 4)
rescale(const int* sums, const float* x_scale, const float* row_scale, const unsigned short* bias,
        unsigned short* y, int n, int sum_pitch) {
  int token = blockIdx.x, row = blockIdx.y * kThreads + threadIdx.x;
  Problem p{nullptr, x_scale, nullptr, row_scale, bias, y, nullptr, nullptr, 0, n, 0};
  if (row < n) write(p, row, token, load(sums + (long long)token * sum_pitch + row));
}
