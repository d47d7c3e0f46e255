// Int8 weights times int8 activations for up to 16 tokens, where torch._int_mm refuses:
//   quantize_tokens: x [m, k] -> int8 [m, k_padded], x = scale * code, scale = max |x| / 127 a token;
//   w8a8: y = row_scale * scale * sum((w - zero) * code) + bias, the sum exact in int32.
// Weights are per channel in the W8 layout of kernels/fragments.py: a word there is 4 consecutive
// inputs of a row, which is a register of the A operand of mma.m16n8k32; codes stay unsigned (mma
// multiplies unsigned by signed bytes), so a weight costs no instruction but its load and mma.
//
// Defines: ZEROS (1: zero points stored; else 128), DTYPE (0 fp16, 1 bf16), TOKEN_TILES (tokens / 8:
// 1, 2). Block: 256 threads; grid: one a token; (row tiles of 16, splits of K).
#include "common.cuh"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokens = 8 * TOKEN_TILES;
constexpr int kStep = 128, kTilesPerStep = 4, kTileBytes = 512;  // a k-tile is 32 inputs
constexpr int kDeep = 8;                                         // k-tiles in flight

QB_KERNEL(kThreads, 2)
quantize_tokens(const unsigned short* x, signed char* codes, float* scales, int* code_sums, int k,
                int k_padded) {
  QB_SHARED(memory);
  unsigned* largest = (unsigned*)memory;  // bits of a float that is not negative sort as integers
  unsigned* sum = largest + 1;
  const unsigned short* row = x + (long long)blockIdx.x * k;
  if (threadIdx.x == 0) *largest = 0, *sum = 0;
  __syncthreads();
  unsigned most = 0;
  for (int i = threadIdx.x; i < k; i += kThreads) {
    unsigned bits = float_to_bits(to_float<DTYPE>(load(row + i))) & 0x7fffffffu;
    most = most > bits ? most : bits;
  }
  atomicMax(largest, most);
  __syncthreads();
  float scale = *largest ? bits_to_float(*largest) / 127.f : 1.f;
  unsigned part = 0;
  for (int i = threadIdx.x; i < k_padded; i += kThreads) {
    int code = i < k ? round_even(to_float<DTYPE>(load(row + i)) / scale) : 0;
    code = code > 127 ? 127 : code < -127 ? -127 : code;
    part += (unsigned)code;
    store(codes + (long long)blockIdx.x * k_padded + i, (signed char)code);
  }
  atomicAdd(sum, part);
  __syncthreads();
  if (threadIdx.x == 0) store(scales + blockIdx.x, scale), store(code_sums + blockIdx.x, (int)*sum);
}

struct Problem {
  const signed char* x;         // [m, k_padded]
  const float* x_scale;         // [m]
  const int* x_sum;             // [m]
  const unsigned char* words;   // the layout of fragments.py
  const unsigned char* zeros;   // [n_padded / 16, 8, 2]
  const float* row_scale;       // [n_padded]
  const unsigned short* bias;   // [n] or null
  unsigned short* y;            // [m, n]
  int* partial;                 // [splits, m, n_padded], where there is more than one split
  unsigned* arrived;            // [gridDim.x], zero before and after
  int m, n, k_padded;
};

QB_DEVICE void write(const Problem& p, int row, int token, int sum) {
  if (row >= p.n) return;
  int zero = ZEROS ? (int)load(p.zeros + (row / 16 * 8 + row % 8) * 2 + row % 16 / 8) : 128;
  float value = (float)(sum - zero * load(p.x_sum + token)) * load(p.row_scale + row);
  value *= load(p.x_scale + token);
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
  if (threadIdx.x == 0) store(p.arrived + blockIdx.x, 0u);
}

QB_KERNEL(kThreads, 2)
w8a8(const signed char* x, const float* x_scale, const int* x_sum, const unsigned char* words,
     const unsigned char* zeros, const float* row_scale, const unsigned short* bias,
     unsigned short* y, int* partial, unsigned* arrived, int m, int n, int k_padded) {
  QB_SHARED(memory);
  Problem p{x, x_scale, x_sum, words, zeros, row_scale, bias, y, partial, arrived, m, n, k_padded};
  int steps = k_padded / kStep, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int block_first = part_begin(steps, gridDim.y, blockIdx.y);
  int block_steps = part_begin(steps, gridDim.y, blockIdx.y + 1) - block_first;
  int begin = part_begin(block_steps, kWarps, warp) * kTilesPerStep;
  int count = part_begin(block_steps, kWarps, warp + 1) * kTilesPerStep - begin;
  const uint4* from = (const uint4*)(words + ((long long)blockIdx.x * steps + block_first) *
                                                 kTilesPerStep * kTileBytes) + begin * 32 + lane;
  uint4 slots[kDeep];
#pragma unroll
  for (int d = 0; d < kDeep; ++d)
    if (d < count) slots[d] = load_stream(from + d * 32);

  // Rows 32 bytes off a multiple of 128: the 16 lanes of a phase, four rows, hit 32 banks.
  int columns = block_steps * kStep, stride = columns + 32, pieces = columns / 16;
  for (int i = threadIdx.x; i < m * pieces; i += kThreads) {
    int token = i / pieces, c = i % pieces * 16;
    copy_async(memory + token * stride + c,
               x + (long long)token * k_padded + block_first * kStep + c, true);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  int sums[TOKEN_TILES][4] = {};
  for (int base = 0; base < count; base += kDeep) {
    from += kDeep * 32;
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      if (base + d >= count) break;
      const unsigned a[4] = {slots[d].x, slots[d].z, slots[d].y, slots[d].w};
#pragma unroll
      for (int c = 0; c < TOKEN_TILES; ++c) {
        int token = 8 * c + lane / 4;  // those that are not there read token 0
        const unsigned char* at = memory + (token < m ? token : 0) * stride;
        uint2 b = *((const uint2*)(at + (begin + base + d) * 32) + lane % 4);
        mma_bytes(sums[c], a, b.x, b.y);
      }
      if (base + d + kDeep < count) slots[d] = load_stream(from + d * 32);
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
