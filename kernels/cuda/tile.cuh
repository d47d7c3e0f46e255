// A tile of y = x W^T for more than 8 tokens: codes are made fp16 weights in registers, as they are
// needed, and multiplied by mma; x and the packed weights come through shared memory by a pipeline
// of asynchronous copies. batch.cu and prefill.cu say how the 8 warps share a tile out:
//   kKWarps 2: four warps of 32 features, twice; each has all tokens and half the inputs of a step;
//   kKWarps 1: four warps of 32 features, twice; each has half the tokens and all inputs.
//
// Weights are scale * (code - zero), the difference exact and the product rounded to fp16; per
// channel the scale comes at the end, in fp32, and the weights are exact. x is fp16 here (prepare.cu
// turns bf16 into fp16 and a power of two per token, and fills rows up to a multiple of 8).
// Sums are fp32; halves, then splits of K are added in a fixed order.
//
// Defines: BITS, GROUP, ZEROS (codes.cuh), DTYPE of bias and result (0 fp16, 1 bf16), TOKEN_TILES
// (tokens of a warp / 8), STAGES (2 or more).
#pragma once
#include "codes.cuh"

constexpr int kThreads = 256;
constexpr int kFeatures = 128;
constexpr int kRowTiles = kFeatures / 16;
constexpr int kTokens = 8 * TOKEN_TILES * (kKWarps == 1 ? 2 : 1);
constexpr int kPitch = kFeatures + 4;  // of the tile of results: no bank conflicts

constexpr int kInputBytes = kTokens * kStep * 2;
constexpr int kStepBytes = kTilesPerStep * kTileBytes;  // of a row tile
constexpr int kScaleBytes = GROUP == 0 ? 0 : 32 * kGroupsPerStep;
constexpr int kZeroBytes = GROUP == 0 || !ZEROS ? 0 : 16 * kGroupsPerStep;
constexpr int kStageBytes = kInputBytes + kRowTiles * (kStepBytes + kScaleBytes + kZeroBytes);

struct Problem {
  const unsigned short* x;      // fp16 [m, x_pitch]
  const float* unscale;         // [m] or null: 1
  const unsigned char* words;   // the layout of fragments.py
  const unsigned short* scale;  // fp16
  const unsigned char* zeros;
  const float* row_scale;       // [n] or more
  const unsigned short* bias;   // [n] or null
  unsigned short* y;            // [m, n]
  float* partial;               // [splits, m, n_padded], where there is more than one split
  unsigned* arrived;            // [gridDim.x * gridDim.y], zero before and after
  int m, n, n_padded, x_columns, x_pitch, steps;  // x_columns and x_pitch are multiples of 8
};

// What a thread copies in each step: where from, and whether it is there at all. Computed once, for a
// step is only 64 weights a thread and could not pay for it.
constexpr int kInputPieces = kTokens * 16 / kThreads;                             // of 16 bytes
constexpr int kWordPieces = (kRowTiles * kStepBytes / 16 + kThreads - 1) / kThreads;

struct Copies {
  const unsigned short* x;  // of the first token
  const unsigned char* words[kWordPieces];
  const unsigned char* scale;
  const unsigned char* zeros;
  int column, columns, tokens;  // of x; `tokens`: how many of its own a thread copies
  unsigned real;                // bit j: piece j of the words is there; bit 8: scales and zeros
};

// Points at the piece `i` of a step's part of all row tiles, `bytes` of each.
QB_DEVICE const unsigned char* tile_piece(const Problem& p, const unsigned char* from, int step,
                                          int bytes, int i, bool& real) {
  int n_tile = blockIdx.x * kRowTiles + i * 16 / bytes;
  real = i * 16 < kRowTiles * bytes && n_tile * 16 < p.n_padded;
  return real ? from + ((long long)n_tile * p.steps + step) * bytes + i * 16 % bytes : from;
}

// The 16-byte pieces of odd tokens change places in fours, so that the 8 lanes of a phase, four
// pieces of two tokens, read all 32 banks. A thread's tokens are 16 apart: all odd or all even.
QB_DEVICE int place_of(int token, int piece) { return (token * 16 + (piece ^ token % 2 * 4)) * 16; }

QB_DEVICE Copies open_copies(const Problem& p, int step) {
  Copies c = {};
  int token = blockIdx.y * kTokens + threadIdx.x / 16;
  c.column = step * kStep + threadIdx.x % 16 * 8, c.columns = p.x_columns;
  c.tokens = token < p.m ? (p.m - token + 15) / 16 : 0;
  c.x = p.x + (token < p.m ? (long long)token * p.x_pitch + c.column : 0);
  bool real = false;
#pragma unroll
  for (int j = 0; j < kWordPieces; ++j) {
    c.words[j] = tile_piece(p, p.words, step, kStepBytes, threadIdx.x + j * kThreads, real);
    c.real |= (real ? 1u : 0u) << j;
  }
  if (GROUP == 0) return c;
  const unsigned char* scale = (const unsigned char*)p.scale;
  c.scale = tile_piece(p, scale, step, kScaleBytes + !kScaleBytes, threadIdx.x, real);
  c.real |= (real ? 1u : 0u) << 8;
  if (ZEROS) c.zeros = tile_piece(p, p.zeros, step, kZeroBytes + !kZeroBytes, threadIdx.x, real);
  return c;
}

// Asks for everything a step needs, and moves on to the next.
QB_DEVICE void copy_step(const Problem& p, Copies& c, unsigned char* stage) {
  unsigned char* to = stage + place_of(threadIdx.x / 16, threadIdx.x % 16);
#pragma unroll
  for (int j = 0; j < kInputPieces; ++j) {
    bool real = j < c.tokens && c.column < c.columns;
    copy_async(to + j * 16 * kStep * 2, real ? c.x + (long long)(16 * j) * p.x_pitch : p.x, real);
  }
  stage += kInputBytes + threadIdx.x * 16;
#pragma unroll
  for (int j = 0; j < kWordPieces; ++j) {
    if ((j + 1) * kThreads * 16 <= kRowTiles * kStepBytes ||
        (int)(threadIdx.x + j * kThreads) * 16 < kRowTiles * kStepBytes)
      copy_async(stage + j * kThreads * 16, c.words[j], c.real >> j & 1);
    if (c.real >> j & 1) c.words[j] += kStepBytes;
  }
  stage += kRowTiles * kStepBytes;
  int at = threadIdx.x * 16;
  if (GROUP != 0 && at < kRowTiles * kScaleBytes) {
    copy_async(stage, c.scale, c.real >> 8);
    if (ZEROS && at < kRowTiles * kZeroBytes)
      copy_async(stage + kRowTiles * kScaleBytes, c.zeros, c.real >> 8);
    if (c.real >> 8) c.scale += kScaleBytes, c.zeros += kZeroBytes;
  }
  c.column += kStep, c.x += kStep;
}

// A lane's words of half a step (two units). 2 and 3 bits: half a k-tile, which then looks like the
// first half, high bits rotated to where those of the first half stand.
QB_DEVICE void load_half(const unsigned char* tile, int half, unsigned (&words)[8]) {
  int lane = threadIdx.x % 32;
  if (BITS == 8) {
    uint4 a = *((const uint4*)(tile + 2 * half * kTileBytes) + lane);
    uint4 b = *((const uint4*)(tile + (2 * half + 1) * kTileBytes) + lane);
    words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w;
    words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
  } else if (BITS == 4) {
    uint4 a = *((const uint4*)(tile + half * kTileBytes) + lane);
    words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w;
  } else {
    uint2 a = *((const uint2*)tile + 2 * lane + half);
    words[0] = a.x, words[1] = a.y;
    if (BITS == 3) {
      uint2 high = *((const uint2*)(tile + 512) + lane);
      words[4] = __funnelshift_r(high.x, high.x, 8 * half);
      words[5] = __funnelshift_r(high.y, high.y, 8 * half);
    }
  }
}

// Unit v of a half step as two A fragments of weights.
QB_DEVICE void weights_of(const unsigned* words, int v, const unsigned (&scale)[2],
                          const unsigned (&zero)[2], unsigned (&a)[2][4]) {
  const int u = BITS == 8 ? 0 : v;
#pragma unroll
  for (int p = 0; p < 4; ++p)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned pair = centred_pair(words + (BITS == 8 ? 4 * v : 0), u, i, p, zero[i]);
      a[p / 2][2 * (p % 2) + i] = GROUP == 0 ? pair : half2_mul(pair, scale[i]);
    }
}

// Scales (as pairs) and zero points of a lane's two rows for unit v of a half.
QB_DEVICE void load_group(const Problem& p, const unsigned char* scales, int row_tile, int unit,
                          unsigned (&scale)[2], unsigned (&zero)[2]) {
  int g = threadIdx.x % 32 / 4;
  if (GROUP == 0) {
    int n_tile = blockIdx.x * kRowTiles + row_tile;
    if (!ZEROS || n_tile * 16 >= p.n_padded) return;
    zero[0] = load(p.zeros + (n_tile * 8 + g) * 2), zero[1] = load(p.zeros + (n_tile * 8 + g) * 2 + 1);
    return;
  }
  int at = (row_tile * 8 + g) * kGroupsPerStep + unit * 32 / (GROUP ? GROUP : 1);
  unsigned both = ((const unsigned*)scales)[at];
  scale[0] = twice(both & 0xffffu), scale[1] = twice(both >> 16);
  if (ZEROS) {
    unsigned pair = ((const unsigned short*)(scales + kRowTiles * kScaleBytes))[at];
    zero[0] = pair & 255, zero[1] = pair >> 8;
  }
}

// Multiplies half a step: two units.
QB_DEVICE void multiply_half(const Problem& p, const unsigned char* stage, int half, int first_tile,
                             int first_token, float (&sums)[2][TOKEN_TILES][4]) {
  const unsigned char* tiles = stage + kInputBytes;
  const unsigned char* scales = tiles + kRowTiles * kStepBytes;
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  unsigned words[2][8];
#pragma unroll
  for (int r = 0; r < 2; ++r) load_half(tiles + (first_tile + r) * kStepBytes, half, words[r]);
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    unsigned a[2][2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      unsigned scale[2] = {}, zero[2] = {};
      load_group(p, scales, first_tile + r, 2 * half + v, scale, zero);
      weights_of(words[r], v, scale, zero, a[r]);
    }
#pragma unroll
    for (int c = 0; c < TOKEN_TILES; ++c) {
      // (first_token + 8c + g is as odd as g is.)
      uint4 b = *(const uint4*)(stage + place_of(g, 8 * half + 4 * v + t) +
                                (first_token + 8 * c) * kStep * 2);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        mma(sums[r][c], a[r][0], b.x, b.y);
        mma(sums[r][c], a[r][1], b.z, b.w);
      }
    }
  }
}

// Puts a warp's sums into the tile of results, or adds them to what is there.
QB_DEVICE void put_sums(float* tile, const float (&sums)[2][TOKEN_TILES][4], int first_tile,
                        int first_token, bool add) {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int c = 0; c < TOKEN_TILES; ++c)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int row = 16 * (first_tile + r) + g + 8 * (j / 2);
        int token = first_token + 8 * c + 2 * t + j % 2;
        float* to = tile + token * kPitch + row;
        *to = (add ? *to : 0.f) + sums[r][c][j];
      }
}

QB_DEVICE void write(const Problem& p, int row, int token, float sum) {
  if (row >= p.n) return;
  float value = sum * load(p.row_scale + row) * (p.unscale ? load(p.unscale + token) : 1.f);
  if (p.bias) value += to_float<DTYPE>(load(p.bias + row));
  store(p.y + (long long)token * p.n + row, from_float<DTYPE>(value));
}

// Writes the tile; where K is split, the last block of a tile adds all splits in their order.
QB_DEVICE void finish(const Problem& p, const float* tile, unsigned* is_last) {
  int splits = gridDim.z, slot = blockIdx.y * gridDim.x + blockIdx.x;
  for (int i = threadIdx.x; i < kTokens * kFeatures; i += kThreads) {
    int row = blockIdx.x * kFeatures + i % kFeatures, token = blockIdx.y * kTokens + i / kFeatures;
    if (row >= p.n_padded || token >= p.m) continue;
    float sum = tile[i / kFeatures * kPitch + i % kFeatures];
    if (splits == 1) write(p, row, token, sum);
    else store(p.partial + ((long long)blockIdx.z * p.m + token) * p.n_padded + row, sum);
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *is_last = atomicAdd(p.arrived + slot, 1u) == splits - 1u;
  __syncthreads();
  if (!*is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < kTokens * kFeatures; i += kThreads) {
    int row = blockIdx.x * kFeatures + i % kFeatures, token = blockIdx.y * kTokens + i / kFeatures;
    if (row >= p.n_padded || token >= p.m) continue;
    float sum = 0.f;
    for (int z = 0; z < splits; ++z)
      sum += load((const volatile float*)p.partial + ((long long)z * p.m + token) * p.n_padded + row);
    write(p, row, token, sum);
  }
  if (threadIdx.x == 0) store(p.arrived + slot, 0u);
}

QB_DEVICE void multiply_tile(const Problem& p, unsigned char* memory) {
  int warp = threadIdx.x / 32, first_tile = 2 * (warp % 4), other = warp / 4;
  int first_token = kKWarps == 1 ? other * 8 * TOKEN_TILES : 0;
  int begin = part_begin(p.steps, gridDim.z, blockIdx.z);
  int count = part_begin(p.steps, gridDim.z, blockIdx.z + 1) - begin;

  Copies copies = open_copies(p, begin);
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < count) copy_step(p, copies, memory + s * kStageBytes);
    commit_copies();
  }
  float sums[2][TOKEN_TILES][4] = {};
  int full = 0, empty = (STAGES - 1) * kStageBytes;
  for (int s = 0; s < count; ++s) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // the step is there for all, and all are done with the one before it
    if (s + STAGES - 1 < count) copy_step(p, copies, memory + empty);
    commit_copies();
    if (kKWarps == 2) {
      multiply_half(p, memory + full, other, first_tile, 0, sums);
    } else {
      multiply_half(p, memory + full, 0, first_tile, first_token, sums);
      multiply_half(p, memory + full, 1, first_tile, first_token, sums);
    }
    empty = full;
    full = full == (STAGES - 1) * kStageBytes ? 0 : full + kStageBytes;
  }
  wait_copies<0>();
  __syncthreads();

  float* tile = (float*)memory;
  if (kKWarps == 1 || other == 0) put_sums(tile, sums, first_tile, first_token, false);
  __syncthreads();
  if (kKWarps == 2) {
    if (other == 1) put_sums(tile, sums, first_tile, 0, true);
    __syncthreads();
  }
  finish(p, tile, (unsigned*)(tile + kTokens * kPitch));
}
