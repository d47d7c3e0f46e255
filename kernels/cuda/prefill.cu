// y = x W^T (+ bias) for more than 64 tokens: bound by the tensor cores. A block makes 128 features
// of 128 tokens (TOKEN_TILES is 8); a warp reads each weight fragment for 64 tokens and each x
// fragment for 32 features, which halves the traffic to shared memory against 16 features.
// Block: 256 threads; grid: (features / 128, tokens / 128, splits of K), rounded up.
constexpr int kKWarps = 1;
#include "tile.cuh"

QB_KERNEL(kThreads, 1)
prefill(const unsigned short* x, const float* unscale, const unsigned char* words,
        const unsigned short* scale, const unsigned char* zeros, const float* row_scale,
        const unsigned short* bias, unsigned short* y, float* partial, unsigned* arrived, int m,
        int n, int n_padded, int x_columns, int x_pitch, int k_padded) {
  QB_SHARED(memory);
  Problem p{x,    unscale, words,   scale, zeros, row_scale, bias,    y,
            partial, arrived, m, n,     n_padded, x_columns, x_pitch, k_padded / kStep};
  multiply_tile(p, memory);
}
