// y = x W^T (+ bias) for M = 1 to 8 tokens: bound by the memory, so by loads in flight and by
// instructions per weight. Weights are the A operand of mma, x (M rows, read as 8) is B.
//
// Defines: BITS, GROUP, ZEROS (codes.cuh), DTYPE (0 fp16, 1 bf16), TILES (row tiles of 16 a warp
// holds: 1, 2, 4). Block: 256 threads; grid: (padded N / (16 * TILES), splits of K).
//
// A block owns 16 * TILES rows and a range of K; its 8 warps share that range out by steps of 128.
// Each lane keeps the next loads in registers, issued before x is even looked at. Codes stay
// offset + q: the sum of offset * x (and of zero * x, where the zero is fixed) over each group is
// computed once per block and is where the sums of a group begin, negated.
// bf16 x is brought to fp16 by a power of two per token, which is exact (common.cuh, bf16_shift).
// Sums are fp32, in a fixed order: over k in the mma, over warps, over blocks (the last to finish).
#include "decode_inputs.cuh"

// Registers of a lane that hold what is in flight and the sums; with what addresses and unpacking
// take, fewer than 56 of them leave room for two blocks on a multiprocessor, which matters more than
// depth (with 57 the assembler spills for some formats). At the least depth up to 63 have room.
QB_DEVICE constexpr int held(int deep) {
  return TILES * (deep * kWords + deep / kTilesPerStep * (2 + ZEROS) * kGroupsPerStep / 2 + 8);
}
QB_DEVICE constexpr int deepest() {
  const int most = BITS == 3 ? 4 : 8;  // unpacking 3 bits takes more registers, and its tiles are large
  int deep = most / TILES > kTilesPerStep ? most / TILES : kTilesPerStep;
  while (deep > kTilesPerStep && held(deep) >= 56) deep -= kTilesPerStep;
  return deep;
}
constexpr int kDeep = deepest();  // k-tiles in flight, whole steps

// What a lane has in flight: one k-tile of each row tile, and at the head of a step its scales.
struct Slot {
  unsigned words[TILES][kWords];
  unsigned scale[TILES][kGroupsPerStep];            // of rows g and g + 8
  unsigned zeros[TILES][(kGroupsPerStep + 1) / 2];  // likewise as bytes, so two groups a word
};

// Where a lane reads at the beginning of a round of kDeep k-tiles: what is added to these within a
// round is known when compiling, so it costs no instruction.
struct Cursor {
  const unsigned char* words[TILES];
  const unsigned short* scale;
  const unsigned char* zeros;
  int scales;  // of a row tile: how far the next one's are; a pointer each takes too many registers
  const unsigned short* x;
  const float* offsets;
  const float* sums;
};

constexpr int kStepsPerRound = kDeep / kTilesPerStep;
constexpr int kScalesPerStep = 8 * 2 * kGroupsPerStep;  // of a row tile

// Begins at k-tile `tile`, the head of a step; x and its sums begin at the block's first step.
QB_DEVICE Cursor open_cursor(const Problem& p, int tile) {
  Cursor c = {};
  int lane = threadIdx.x % 32, step = tile / kTilesPerStep;
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    int n_tile = blockIdx.x * TILES + r;
    c.words[r] = p.words + ((long long)n_tile * (p.k_padded / kTile) + tile) * kTileBytes;
  }
  if (GROUP == 0) return c;
  int steps = p.k_padded / kStep;
  long long at = scale_index(blockIdx.x * TILES, steps, step, lane / 4);
  c.scale = p.scale + at, c.zeros = p.zeros + at, c.scales = steps * kScalesPerStep;
  return c;
}

QB_DEVICE void next_round(Cursor& c) {
#pragma unroll
  for (int r = 0; r < TILES; ++r) c.words[r] += kDeep * kTileBytes;
  c.scale += kStepsPerRound * kScalesPerStep;
  c.zeros += kStepsPerRound * kScalesPerStep;
}

QB_DEVICE void next_inputs(Cursor& c) {
  c.x += kDeep * kTile;
  c.offsets += kStepsPerRound * kChunksPerStep * 8;
  c.sums += kStepsPerRound * kChunksPerStep * 8;
}

// Loads the scales of a step, 4 to 16 bytes, and the zero points, half as many.
QB_DEVICE void issue_scales(const Cursor& c, Slot& slot, int r, int step) {
  long long at = (long long)r * c.scales + step * kScalesPerStep;
  const unsigned short* scale = c.scale + at;
  const unsigned char* zeros = c.zeros + at;
  if (kGroupsPerStep == 4) {
    uint4 v = load((const uint4*)scale);
    slot.scale[r][0] = v.x, slot.scale[r][kGroupsPerStep / 2 - 1] = v.y;
    slot.scale[r][kGroupsPerStep / 2] = v.z, slot.scale[r][kGroupsPerStep - 1] = v.w;
    if (ZEROS) {
      uint2 z = load((const uint2*)zeros);
      slot.zeros[r][0] = z.x, slot.zeros[r][kGroupsPerStep / 4] = z.y;
    }
  } else if (kGroupsPerStep == 2) {
    uint2 v = load((const uint2*)scale);
    slot.scale[r][0] = v.x, slot.scale[r][kGroupsPerStep - 1] = v.y;
    if (ZEROS) slot.zeros[r][0] = load((const unsigned*)zeros);
  } else {
    slot.scale[r][0] = load((const unsigned*)scale);
    if (ZEROS) slot.zeros[r][0] = load((const unsigned short*)zeros);
  }
}

// Asks for k-tile d of the cursor's round.
QB_DEVICE void issue(const Cursor& c, Slot& slot, int d) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const unsigned char* from = c.words[r] + d * kTileBytes;
    uint4 low = load_stream((const uint4*)from + lane);
    slot.words[r][0] = low.x, slot.words[r][1] = low.y;
    slot.words[r][2] = low.z, slot.words[r][3] = low.w;
    if (BITS == 3) {
      uint2 high = load_stream((const uint2*)(from + 512) + lane);
      slot.words[r][4] = high.x, slot.words[r][kWords - 1] = high.y;
    }
    if (GROUP != 0 && d % kTilesPerStep == 0) issue_scales(c, slot, r, d / kTilesPerStep);
  }
}

// Takes a group's sums to the row's: y += scale * (group - zero * sum of x).
QB_DEVICE void close_group(const Slot& head, int r, int q, float2 sum, const float (&group)[4],
                           float (&y)[4]) {
  float scale[2] = {half_to_float((unsigned short)head.scale[r][q]),
                    half_to_float((unsigned short)(head.scale[r][q] >> 16))};
  float zero[2] = {};
  if (ZEROS) {
    unsigned pair = head.zeros[r][q / 2] >> 16 * (q % 2);
    zero[0] = (float)(pair & 255), zero[1] = (float)(pair >> 8 & 255);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float centred = ZEROS ? group[j] - zero[j / 2] * (j % 2 ? sum.y : sum.x) : group[j];
    y[j] += scale[j / 2] * centred;
  }
}

// Multiplies k-tile d of the round, for each row tile; `head` holds the scales of its step.
QB_DEVICE void consume(const Cursor& c, const Slot& slot, const Slot& head, int d,
                       float (&group)[TILES][4], float (&y)[TILES][4]) {
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    int column = d * kTile + u * 32, chunk = column / kChunk;
    bool opens = column % kChunk == 0, closes = (column + 32) % kChunk == 0;
    uint4 b = *(const uint4*)(c.x + column);
    float2 start = make_float2(0.f, 0.f), sum = make_float2(0.f, 0.f);
    if (opens) start = *(const float2*)(c.offsets + chunk * 8);
    if (closes && GROUP != 0 && ZEROS) sum = *(const float2*)(c.sums + chunk * 8);
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float begin = j % 2 ? start.y : start.x;
        if (opens) group[r][j] = GROUP == 0 ? group[r][j] + begin : begin;
      }
      unsigned a[2][4];
      fragments_of(slot.words[r], u, a);
      mma(group[r], a[0], b.x, b.y);
      mma(group[r], a[1], b.z, b.w);
      if (closes && GROUP != 0)
        close_group(head, r, column % kStep / kChunk, sum, group[r], y[r]);
    }
  }
}

// Goes through a warp's `count` k-tiles. The scales at the head of a step are needed until its end,
// so its slots are filled again together.
QB_DEVICE void multiply(Cursor& c, Slot (&slots)[kDeep], int count, float (&group)[TILES][4],
                        float (&y)[TILES][4]) {
  for (; count >= kDeep; count -= kDeep) {
    next_round(c);
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      int place = d % kTilesPerStep;
      consume(c, slots[d], slots[d - place], d, group, y);
      if (place == kTilesPerStep - 1 && d - place < count - kDeep)
#pragma unroll
        for (int e = d - place; e <= d; ++e) issue(c, slots[e], e);
    }
    next_inputs(c);
  }
#pragma unroll
  for (int d = 0; d < kDeep; ++d) {
    if (d >= count) break;
    consume(c, slots[d], slots[d - d % kTilesPerStep], d, group, y);
  }
}

// Adds the warps' sums in order; thread by thread an output of the block, in fp32.
QB_DEVICE float block_sum(const Problem& p, const Shared& s, int row, int token) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += s.partial[(w * kRows + row) * 8 + token];
  int global = blockIdx.x * kRows + row;
  if (GROUP == 0 && ZEROS)
    sum -= s.total[token] * (float)load(p.zeros + (global / 16 * 8 + row % 8) * 2 + row % 16 / 8);
  return global < p.n ? sum * load(p.row_scale + global) * s.unscale[token] : 0.f;
}

QB_DEVICE void write(const Problem& p, int row, int token, float value) {
  if (row >= p.n) return;
  if (p.bias) value += to_float<DTYPE>(load(p.bias + row));
  store(p.y + (long long)token * p.n + row, from_float<DTYPE>(value));
}

// Leaves the block's sums in p.partial; the last block of these rows adds them, in order of splits.
QB_DEVICE void join_splits(const Problem& p, const Shared& s, int n_padded) {
  int splits = gridDim.y;
  for (int i = threadIdx.x; i < kRows * p.m; i += kThreads) {
    int row = i % kRows, token = i / kRows;
    float* to = p.partial + ((long long)blockIdx.y * p.m + token) * n_padded;
    store(to + blockIdx.x * kRows + row, block_sum(p, s, row, token));
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) s.largest[0] = atomicAdd(p.arrived + blockIdx.x, 1u) == splits - 1u;
  __syncthreads();
  if (!s.largest[0]) return;
  __threadfence();
  for (int i = threadIdx.x; i < kRows * p.m; i += kThreads) {
    int row = blockIdx.x * kRows + i % kRows, token = i / kRows;
    float sum = 0.f;
    for (int z = 0; z < splits; ++z)
      sum += load((const volatile float*)p.partial + ((long long)z * p.m + token) * n_padded + row);
    write(p, row, token, sum);
  }
  if (threadIdx.x == 0) store(p.arrived + blockIdx.x, 0u);
}

QB_KERNEL(kThreads, held(kDeep) >= 64 ? 1 : 2)
decode(const unsigned short* x, const unsigned char* words, const unsigned short* scale,
       const unsigned char* zeros, const float* row_scale, const unsigned short* bias,
       unsigned short* y, float* partial, unsigned* arrived, int m, int n, int k, int k_padded) {
  QB_SHARED(memory);
  Problem p{x, words, scale, zeros, row_scale, bias, y, partial, arrived, m, n, k, k_padded};
  int steps = k_padded / kStep, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int block_first = part_begin(steps, gridDim.y, blockIdx.y);
  int block_steps = part_begin(steps, gridDim.y, blockIdx.y + 1) - block_first;
  int first = (block_first + part_begin(block_steps, kWarps, warp)) * kTilesPerStep;
  int last = (block_first + part_begin(block_steps, kWarps, warp + 1)) * kTilesPerStep;

  Slot slots[kDeep];
  Cursor c = open_cursor(p, first);
#pragma unroll
  for (int d = 0; d < kDeep; ++d)
    if (first + d < last) issue(c, slots[d], d);

  Shared s = shared_layout(memory, m, block_steps * kStep);
  stage_x(p, s, block_first * kStep, block_steps * kStep);

  // Tokens that are not there read token 0: what they give is never written.
  int token = lane / 4 < m ? lane / 4 : 0, column = first * kTile - block_first * kStep;
  c.x = s.x + token * s.stride + column + 8 * (lane % 4);
  c.offsets = s.offsets + column / kChunk * 8 + 2 * (lane % 4);
  c.sums = s.sums + column / kChunk * 8 + 2 * (lane % 4);
  float group[TILES][4] = {}, sums[TILES][4] = {};
  multiply(c, slots, last - first, group, sums);

#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int row = 16 * r + lane / 4 + 8 * (j / 2), column = 2 * (lane % 4) + j % 2;
      s.partial[(warp * kRows + row) * 8 + column] = GROUP == 0 ? group[r][j] : sums[r][j];
    }
  if (GROUP == 0 && ZEROS && threadIdx.x < 8) {
    float total = 0.f;
    for (int c = 0; c < block_steps * kChunksPerStep; ++c) total += s.sums[c * 8 + threadIdx.x];
    s.total[threadIdx.x] = total;
  }
  __syncthreads();
  if (gridDim.y > 1) {
    join_splits(p, s, gridDim.x * kRows);
    return;
  }
  for (int i = threadIdx.x; i < kRows * m; i += kThreads)
    write(p, blockIdx.x * kRows + i % kRows, i / kRows, block_sum(p, s, i % kRows, i / kRows));
}
