// The part of decode.cu that brings a block's range of x into shared memory, as fp16 and with the sums
// that take the offsets of the codes off again.
#pragma once
#include "codes.cuh"

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16 * TILES;
constexpr int kChunk = GROUP == 0 ? kStep : GROUP;  // inputs whose offsets are summed together
constexpr int kChunksPerStep = kStep / kChunk;
constexpr bool kSums = ZEROS != 0;                  // whether the sums of x themselves are needed

// The zero that is taken off with the offsets: where zeros are stored, each group takes off its own.
constexpr int kFixedZero = kSums ? 0 : kSymmetricZero;

struct Problem {
  const unsigned short* x;      // [m, k]
  const unsigned char* words;   // the layout of fragments.py
  const unsigned short* scale;  // fp16
  const unsigned char* zeros;
  const float* row_scale;       // [n] or more
  const unsigned short* bias;   // [n] or null
  unsigned short* y;            // [m, n]
  float* partial;               // [splits, m, n_padded], where there is more than one split
  unsigned* arrived;            // [gridDim.x], zero before and after
  int m, n, k, k_padded;
};

// Shared memory, in this order; kernels/plans.py computes the same size.
struct Shared {
  unsigned short* x;    // [m, stride] fp16
  float* offsets;       // [chunks, 8]: minus the sum of offset * x
  float* sums;          // [chunks, 8]: the sum of x, where zero points are stored
  float* partial;       // [kWarps, kRows, 8]
  float* unscale;       // [8]: what gives bf16 x back
  float* total;         // [8]: the sum of x over the block's range
  unsigned* largest;    // [8]: bits of the largest |x| of a token; [0] later: is this block last
  int stride;
};

// Rows of x are 64 bytes off a multiple of 128, so that the 8 lanes of a phase hit 32 banks.
QB_DEVICE int row_stride(int columns) { return columns + 32; }

QB_DEVICE Shared shared_layout(unsigned char* base, int m, int columns) {
  Shared s;
  int chunks = columns / kChunk;
  s.stride = row_stride(columns);
  s.x = (unsigned short*)base;
  s.offsets = (float*)(s.x + m * s.stride);
  s.sums = s.offsets + chunks * 8;
  s.partial = s.sums + (kSums ? chunks * 8 : 0);
  s.unscale = s.partial + kWarps * kRows * 8;
  s.total = s.unscale + 8;
  s.largest = (unsigned*)(s.total + 8);
  return s;
}

// The 8 inputs from column `c` of a token, as raw bits; zeros beyond the end of the row.
QB_DEVICE void load_inputs(const Problem& p, int token, int c, unsigned (&raw)[4]) {
  const unsigned short* row = p.x + (long long)token * p.k;
  raw[0] = raw[1] = raw[2] = raw[3] = 0;
  if (c + 8 <= p.k && p.k % 8 == 0) {
    uint4 v = load((const uint4*)(row + c));
    raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (c + j < p.k) raw[j / 2] |= (unsigned)load(row + c + j) << 16 * (j % 2);
}

// Finds the largest |x| of each token in the block's range; bits of magnitudes sort as integers.
QB_DEVICE void find_largest(const Problem& p, const Shared& s, int first, int columns) {
  int per_row = columns / 8, all = p.m * per_row;  // 16 neighbouring threads are of one token
  for (int begin = 0; begin < all; begin += kThreads) {
    int v = begin + threadIdx.x;
    unsigned raw[4] = {}, most = 0;
    if (v < all) load_inputs(p, v / per_row, first + v % per_row * 8, raw);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      most = larger(most, raw[j] & 0x7fffu);
      most = larger(most, raw[j] >> 16 & 0x7fffu);
    }
    most = largest_of_16(most);
    if (v < all && threadIdx.x % 16 == 0) atomicMax(&s.largest[v / per_row], most);
  }
}

// Puts 8 inputs into shared memory as fp16 and returns their sums of offset * x and of x.
QB_DEVICE void stage_inputs(const Shared& s, int token, int c, const unsigned (&raw)[4], float scale,
                            float& offsets, float& sum) {
  unsigned out[4];
  offsets = sum = 0.f;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    float a = to_float<DTYPE>((unsigned short)raw[p]);
    float b = to_float<DTYPE>((unsigned short)(raw[p] >> 16));
    if (DTYPE == 1) {
      out[p] = half2(a * scale, b * scale);
      a = half_to_float((unsigned short)out[p]), b = half_to_float((unsigned short)(out[p] >> 16));
    } else {
      out[p] = raw[p];
    }
    // Only the parity of the unit matters, and only for 2 bits.
    float odd = (float)(code_offset(1, p) + kFixedZero);
    float even = (float)(code_offset(0, p) + kFixedZero);
    offsets -= (c / 32 % 2 && kUnits > 1 ? odd : even) * (a + b);
    sum += a + b;
  }
  *(uint4*)(s.x + token * s.stride + c) = make_uint4(out[0], out[1], out[2], out[3]);
}

// Stages the block's range of x, with the sums of each chunk: kChunk / 8 neighbouring threads.
QB_DEVICE void stage_x(const Problem& p, const Shared& s, int first, int columns) {
  for (int i = threadIdx.x; i < columns / kChunk * 8; i += kThreads) {
    s.offsets[i] = 0.f;
    if (kSums) s.sums[i] = 0.f;
  }
  if (threadIdx.x < 8) s.largest[threadIdx.x] = 0, s.unscale[threadIdx.x] = 1.f;
  __syncthreads();
  if (DTYPE == 1) {
    find_largest(p, s, first, columns);
    __syncthreads();
    if (threadIdx.x < 8) s.unscale[threadIdx.x] = power_of_two(-bf16_shift(s.largest[threadIdx.x]));
  }
  int per_row = columns / 8, all = p.m * per_row;
  for (int begin = 0; begin < all; begin += kThreads) {
    int v = begin + threadIdx.x, token = v / per_row, c = v % per_row * 8;
    float offsets = 0.f, sum = 0.f;
    if (v < all) {
      unsigned raw[4];
      load_inputs(p, token, first + c, raw);
      float scale = DTYPE == 1 ? power_of_two(bf16_shift(s.largest[token])) : 1.f;
      stage_inputs(s, token, c, raw, scale, offsets, sum);
    }
#pragma unroll
    for (int mask = 1; mask < kChunk / 8; mask *= 2) {
      offsets += shuffle_xor(offsets, mask);
      if (kSums) sum += shuffle_xor(sum, mask);
    }
    if (v < all && c % kChunk == 0) {
      s.offsets[c / kChunk * 8 + token] = offsets;
      if (kSums) s.sums[c / kChunk * 8 + token] = sum;
    }
  }
  __syncthreads();
}
