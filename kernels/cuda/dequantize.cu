// The packed matrix as [n, k] numbers for the vendor's GEMM (M of 1024 and more):
// scale * (code - zero), computed in fp32 and rounded once, as kernels/reference.py does.
//
// Defines: BITS, GROUP, ZEROS (codes.cuh), DTYPE of the result (0 fp16, 1 bf16).
// Block: 256 threads; grid: (row tiles of 16, steps of 128 inputs / 8, rounded up): a warp a step.
#include "codes.cuh"

constexpr int kThreads = 256;

QB_DEVICE void write_8(unsigned short* row, int column, int k, const unsigned (&out)[4]) {
  if (column + 8 <= k && k % 8 == 0) {
    store((uint4*)(row + column), make_uint4(out[0], out[1], out[2], out[3]));
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (column + j < k) store(row + column + j, (unsigned short)(out[j / 2] >> 16 * (j % 2)));
}

QB_KERNEL(kThreads, 4)
dequantize(const unsigned char* words, const unsigned short* scale, const unsigned char* zeros,
           const float* row_scale, unsigned short* out, int n, int k, int k_padded) {
  int steps = k_padded / kStep, step = blockIdx.y * (kThreads / 32) + threadIdx.x / 32;
  int n_tile = blockIdx.x, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (step >= steps) return;
  const unsigned char* from = words + ((long long)n_tile * steps + step) * kTilesPerStep * kTileBytes;
  long long at = GROUP == 0 ? (n_tile * 8 + g) * 2 : scale_index(n_tile, steps, step, g);
#pragma unroll
  for (int unit = 0; unit < kStep / 32; ++unit) {
    const unsigned char* tile = from + unit / kUnits * kTileBytes;
    unsigned local[6];
    uint4 low = load((const uint4*)tile + lane);
    local[0] = low.x, local[1] = low.y, local[2] = low.z, local[3] = low.w;
    if (BITS == 3) {
      uint2 high = load((const uint2*)(tile + 512) + lane);
      local[4] = high.x, local[5] = high.y;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int row = 16 * n_tile + 8 * i + g, q = GROUP == 0 ? 0 : unit * 32 / (GROUP ? GROUP : 1);
      if (row >= n) continue;
      unsigned zero = ZEROS ? load(zeros + at + 2 * q + i) : 0u;
      float by = load(row_scale + row);
      if (GROUP != 0) by *= half_to_float(load(scale + at + 2 * q + i));
      unsigned out4[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        unsigned pair = centred_pair(local, unit % kUnits, i, p, zero);
        float a = half_to_float((unsigned short)pair) * by;
        float b = half_to_float((unsigned short)(pair >> 16)) * by;
        out4[p] = (unsigned)from_float<DTYPE>(b) << 16 | from_float<DTYPE>(a);
      }
      write_8(out + (long long)row * k, step * kStep + unit * 32 + 8 * t, k, out4);
    }
  }
}
