/* Packed weights without any special instruction: dequantized for a library's GEMM, and multiplied in float32 where
 * the processor has none of packed.c's. Sums go in the same order; products are rounded, since they are not fused.
 */
#include "inner.h"

/* Input `input` (0..31) of the 32 of 16 rows that `w` holds, as code - 2^(bits - 1). */
QB_INLINE lanes input_of(const uint8_t *w, const int bits, int input) {
  int pair = input / 2, half = input % 2 * 16;
  words code;
  if (bits == 8) {
    words byte = load(w + 64 * (pair / 2)) >> (pair % 2 * 8 + half), sign = -((byte >> 7) & 1);
    return __builtin_convertvector((ints)((byte & 127) ^ sign), lanes);
  }
  if (bits == 3 && pair == 15)
    code = ((load(w) >> (15 + half)) & 1) | (((load(w + 64) >> (15 + half)) & 1) << 1) |
           (((load(w + 128) >> (15 + half)) & 1) << 2);
  else
    code = (load(w + 64 * (pair / (16 / bits))) >> (pair % (16 / bits) * bits + half)) & ((1u << bits) - 1);
  return __builtin_convertvector((ints)code - (1 << (bits - 1)), lanes);
}

/* Weights of the 16 rows of a block, a row of `stride` bytes for each input: float32, or rounded to bfloat16. */
QB_INLINE void dequantize_block(const qb_matrix *m, int32_t unit, int b, const int bits, const int narrow, uint8_t *to,
                                int64_t stride) {
  const int held = blocks_of(m, unit), groups = groups_of(m);
  const uint8_t *w = unit_weight(m, unit) + b * bits * 64;
  int64_t at = (int64_t)unit * QB_UNIT_ROWS * groups + b * LANES;
  for (int g = 0; g < groups; g++, at += held * LANES) {
    lanes scale = scale_of(m, at), middle = __builtin_convertvector((1 << (bits - 1)) - zero_of(m, at), lanes);
    for (int32_t k = 0; k < m->group; k += STEP, w += held * bits * 64)
      for (int input = 0; input < STEP; input++, to += stride) {
        lanes value = (input_of(w, bits, input) + middle) * scale;
        if (narrow) {
          halves half = __builtin_convertvector(rounded(value) >> 16, halves);
          memcpy(to, &half, sizeof half);
        } else
          memcpy(to, &value, sizeof value);
      }
  }
}

void bf16_dequantize(const qb_matrix *m, int32_t unit, int b, int32_t kind, uint8_t *to, int64_t stride) {
#define BITS(bits) \
  case bits: \
    if (kind == QB_BF16) dequantize_block(m, unit, b, bits, 1, to, stride); \
    else dequantize_block(m, unit, b, bits, 0, to, stride); \
    break;
  switch (m->kind) { BITS(8) BITS(4) BITS(3) BITS(2) }
#undef BITS
}

#if !QB_AVX512

enum { TOGETHER = 4 };

QB_INLINE float x_of(const uint32_t *pairs, int parts, int64_t tile, int32_t k) {
  float value = 0;
  for (int part = 0; part < parts; part++) {
    uint32_t pair = pairs[(k / 2 * parts + part) * tile];
    value += float_of(k % 2 ? pair & 0xffff0000 : pair << 16);
  }
  return value;
}

/* A block of 16 rows for one token and those after it: `tokens` of a tile of `tile`. */
QB_INLINE void block(const qb_matrix *m, int32_t unit, int b, const uint32_t *pairs, const float *x_sum, int64_t tile,
                     int tokens, const int bits, lanes *total) {
  const int held = blocks_of(m, unit), groups = groups_of(m), parts = parts_of(m);
  const uint8_t *w = unit_weight(m, unit) + b * bits * 64;
  int64_t at = (int64_t)unit * QB_UNIT_ROWS * groups + b * LANES;
  for (int t = 0; t < tokens; t++) total[t] = (lanes){};
  for (int g = 0; g < groups; g++, at += held * LANES) {
    lanes sums[TOGETHER] = {}, scale = scale_of(m, at);
    for (int32_t k = g * m->group; k < (g + 1) * m->group; k += STEP, w += held * bits * 64)
      for (int input = 0; input < STEP; input++) {
        lanes weight = input_of(w, bits, input);
        for (int t = 0; t < tokens; t++) sums[t] += weight * x_of(pairs + t, parts, tile, k + input);
      }
    lanes offset = scale * __builtin_convertvector((1 << (bits - 1)) - zero_of(m, at), lanes);
    for (int t = 0; t < tokens; t++) {
      total[t] += sums[t] * scale;
      if (m->zero) total[t] += offset * x_sum[g * tile + t];
    }
  }
}

void bf16_multiply(const qb_matrix *m, const void *prepared, int32_t tokens, int32_t first, int32_t last, float *y,
                   int64_t y_stride) {
  int32_t size = tile_of(tokens);
  for (int32_t unit = first; unit < last; unit++)
    for (int b = 0; b < blocks_of(m, unit); b++)
      for (int32_t t = 0, now; t < tokens; t += now) {
        int32_t start = t / size * size, tile = least(size, tokens - start);
        const uint32_t *pairs = (const uint32_t *)((const uint8_t *)prepared + start * bf16_prepared_bytes(m, 1));
        const float *x_sum = (const float *)(pairs + (int64_t)tile * m->width / 2 * parts_of(m)) + t - start;
        lanes total[TOGETHER];
        now = least(TOGETHER, start + tile - t);
        pairs += t - start;
        switch (m->kind) {
          case 8: block(m, unit, b, pairs, x_sum, tile, now, 8, total); break;
          case 4: block(m, unit, b, pairs, x_sum, tile, now, 4, total); break;
          case 3: block(m, unit, b, pairs, x_sum, tile, now, 3, total); break;
          case 2: block(m, unit, b, pairs, x_sum, tile, now, 2, total); break;
        }
        int32_t row = unit * QB_UNIT_ROWS + b * LANES;
        for (int32_t i = 0; i < now; i++)
          for (int lane = 0; lane < least(LANES, m->rows - row); lane++)
            y[(t + i) * y_stride + row + lane] = total[i][lane] + (m->bias ? m->bias[row + lane] : 0);
      }
}
#endif
