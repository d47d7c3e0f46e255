// y = x W^T (+ bias) for 9 to 64 tokens: still bound by the memory, so the inputs of a step are shared
// out over two sets of warps, and K over blocks (grid z) until the card is full; every weight is made
// fp16 once. TOKEN_TILES is the number of tokens / 8: 2, 4 or 8.
// Block: 256 threads; grid: (features / 128, tokens / (8 * TOKEN_TILES), splits of K), rounded up.
constexpr int kKWarps = 2;
#include "tile.cuh"

QB_KERNEL(kThreads, TOKEN_TILES == 8 ? 1 : 2)
batch(const unsigned short* x, const float* unscale, const unsigned char* words,
      const unsigned short* scale, const unsigned char* zeros, const float* row_scale,
      const unsigned short* bias, unsigned short* y, float* partial, unsigned* arrived, int m,
      int n, int n_padded, int x_columns, int x_pitch, int k_padded) {
  QB_SHARED(memory);
  Problem p{x,    unscale, words,   scale, zeros, row_scale, bias,    y,
            partial, arrived, m, n,     n_padded, x_columns, x_pitch, k_padded / kStep};
  multiply_tile(p, memory);
}
