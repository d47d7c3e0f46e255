// Codes of kernels/pack.py (layout version 1), one byte each: [rows, row_bytes] -> [rows, width].
//
// Defines: BITS (8, 4, 3, 2). Block: 256 threads; grid: 8 codes of a row a thread, rounded up.
#include "common.cuh"

constexpr int kThreads = 256;
constexpr int kPlane = BITS == 3 ? 2 : BITS;  // bits of a code in the first plane

QB_KERNEL(kThreads, 4)
unpack(const unsigned char* packed, unsigned char* codes, long long rows, int row_bytes, int width) {
  int units = (width + 7) / 8;
  long long index = (long long)blockIdx.x * kThreads + threadIdx.x, row = index / units;
  if (row >= rows) return;
  int unit = (int)(index % units);
  const unsigned char* from = packed + row * row_bytes;
  unsigned long long low = 0;
#pragma unroll
  for (int b = 0; b < kPlane; ++b)
    if (unit * kPlane + b < row_bytes)
      low |= (unsigned long long)load(from + unit * kPlane + b) << 8 * b;
  unsigned high = BITS == 3 ? load(from + row_bytes / 3 * 2 + unit) : 0u;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    unsigned code = (unsigned)(low >> kPlane * j) & ((1u << kPlane) - 1);
    if (BITS == 3) code |= (high >> j & 1u) << 2;
    if (unit * 8 + j < width) store(codes + row * width + unit * 8 + j, (unsigned char)code);
  }
}
