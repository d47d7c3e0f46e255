// Rounds a matrix to BITS bits by the range of each group and packs the codes as kernels/pack.py
// does (layout version 1), bit for bit as methods/affine.py with `minmax` and float16 scales:
//   asymmetric: scale = (high - low) / (2^b - 1), zero = round(-low / scale);
//   symmetric: scale = max |w| / (2^(b-1) - 1), zero = 2^(b-1).
// A scale beyond float16 becomes infinite: the caller refuses it. Weights must be finite.
//
// Defines: BITS, SYMMETRIC (1, 0), SOURCE (0 fp16, 1 bf16, 2 fp32).
// Block: 256 threads; grid: groups of all rows / 8, rounded up: a warp a group. Groups are a multiple
// of 8 inputs, or the whole row.
#include "common.cuh"

constexpr int kThreads = 256;
constexpr int kLevels = (1 << BITS) - 1;

struct Group {
  const void* weight;  // [n, k]
  long long row;
  int k, first, size;  // columns from `first`; those from k on are zeros
};

QB_DEVICE float weight_at(const Group& g, int column) {
  if (g.first + column >= g.k) return 0.f;
  long long at = g.row * g.k + g.first + column;
  return SOURCE == 2   ? load((const float*)g.weight + at)
         : SOURCE == 1 ? bf16_to_float(load((const unsigned short*)g.weight + at))
                       : half_to_float(load((const unsigned short*)g.weight + at));
}

// A scale below the smallest normal number is rounded up, and is never 0.
QB_DEVICE unsigned short stored_scale(float scale) {
  const float step = 1.f / 16777216.f;
  if (scale == 0.f) return 0x3c00;
  if (scale >= 1024.f * step) return float_to_half(scale);
  int steps = (int)(scale / step);
  steps += (float)steps * step < scale ? 1 : 0;
  return float_to_half((float)(steps < 1 ? 1 : steps) * step);
}

// Writes 8 codes of a row, the first at `column`: BITS bytes, or what is left of the row.
QB_DEVICE void pack_8(unsigned char* row, int row_bytes, int column, const unsigned (&codes)[8]) {
  unsigned long long low = 0, high = 0;
  const int width = BITS == 3 ? 2 : BITS;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    low |= (unsigned long long)(codes[j] & ((1u << width) - 1)) << (width * j);
    high |= (unsigned long long)(codes[j] >> 2) << j;
  }
  int at = column / 8 * width;
#pragma unroll
  for (int b = 0; b < width; ++b)
    if (at + b < row_bytes) store(row + at + b, (unsigned char)(low >> 8 * b));
  if (BITS == 3) store(row + row_bytes / 3 * 2 + column / 8, (unsigned char)high);
}

QB_KERNEL(kThreads, 4)
quantize(const void* weight, unsigned char* packed, unsigned short* scales, unsigned char* zeros,
         int n, int k, int size, int groups, int row_bytes) {
  long long index = (long long)blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (index >= (long long)n * groups) return;
  int lane = threadIdx.x % 32;
  Group g{weight, index / groups, k, (int)(index % groups) * size, size};
  float low = 0.f, high = 0.f;
  for (int c = lane; c < size; c += 32) {
    float w = weight_at(g, c);
    low = w < low ? w : low;
    high = w > high ? w : high;
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    float other_low = shuffle_xor(low, mask), other_high = shuffle_xor(high, mask);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  float most = -low > high ? -low : high;
  // Divided first, as the reference does: the difference of large numbers could overflow.
  unsigned short stored = stored_scale(SYMMETRIC ? most / (float)(kLevels / 2)
                                                 : high / (float)kLevels - low / (float)kLevels);
  float scale = half_to_float(stored);
  int zero = SYMMETRIC ? 1 << (BITS - 1) : round_even(-low / scale);
  zero = zero > kLevels ? kLevels : zero;
  if (lane == 0) {
    store(scales + index, stored);
    if (!SYMMETRIC) store(zeros + index, (unsigned char)zero);
  }
  for (int c = 8 * lane; c < size; c += 256) {
    unsigned codes[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      int code = round_even(weight_at(g, c + j) / scale) + zero;
      code = code < 0 ? 0 : code > kLevels ? kLevels : code;
      codes[j] = c + j < size ? (unsigned)code : 0u;  // a row is filled up with zero codes
    }
    pack_8(packed + g.row * row_bytes, row_bytes, g.first + c, codes);
  }
}
