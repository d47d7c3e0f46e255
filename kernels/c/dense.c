/* Weights that are not quantized, row-major, for few tokens: each row is read once for up to four of them.
 *
 * A row's sum runs in 16 lanes over its inputs and is added up at the end. bfloat16 weights meet bfloat16
 * activations (one, or two parts); the other kinds meet float32. Many tokens are the business of a library's GEMM.
 */
#include "inner.h"

enum { TOKENS = 4 };

static int in_halves(const qb_matrix *m) { return QB_AVX512 && m->kind == QB_BF16; }
static int64_t padded(const qb_matrix *m) { return up_to(m->columns, STEP); }

int64_t dense_prepared_bytes(const qb_matrix *m, int32_t tokens) {
  return tokens * padded(m) * (in_halves(m) ? 2 * parts_of(m) : 4);
}

void dense_prepare(const qb_matrix *m, const float *x, int64_t x_stride, int32_t first, int32_t last, void *prepared) {
  int64_t width = padded(m);
  if (!in_halves(m)) {
    for (int32_t t = first; t < last; t++) {
      float *to = (float *)prepared + t * width;
      for (int32_t k = 0; k < m->columns; k++) {
        float value = x[t * x_stride + k];
        if (m->kind == QB_BF16) { /* the same parts as where the processor multiplies bfloat16 */
          float high = float_of((uint32_t)bf16_of(value) << 16);
          value = high + (parts_of(m) == 2 ? float_of((uint32_t)bf16_of(value - high) << 16) : 0);
        }
        to[k] = value;
      }
      memset(to + m->columns, 0, (size_t)(width - m->columns) * 4);
    }
    return;
  }
  for (int32_t t = first; t < last; t++) {
    uint16_t *high = (uint16_t *)prepared + t * width * parts_of(m), *low = high + width;
    for (int32_t k = 0; k < width; k++) {
      float value = k < m->columns ? x[t * x_stride + k] : 0;
      high[k] = bf16_of(value);
      if (parts_of(m) == 2) low[k] = bf16_of(value - float_of((uint32_t)high[k] << 16));
    }
  }
}

#if QB_AVX512
/* The sum of 16 lanes of up to `tokens` tokens for one row. */
QB_INLINE void row_bf16(const uint16_t *w, const uint16_t *x, int32_t columns, int64_t width, const int parts,
                        const int tokens, float *sums) {
  __m512 total[TOKENS];
  QB_UNROLL for (int t = 0; t < tokens; t++) total[t] = _mm512_setzero_ps();
  for (int32_t k = 0; k < columns; k += STEP) {
    __mmask32 mask = columns - k < STEP ? (1u << (columns - k)) - 1 : ~0u;
    __m512bh weight = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + k);
    QB_UNROLL for (int t = 0; t < tokens; t++) QB_UNROLL for (int part = 0; part < parts; part++) {
      __m512bh given = (__m512bh)_mm512_load_si512(x + (t * parts + part) * width + k);
      total[t] = _mm512_dpbf16_ps(total[t], weight, given);
    }
  }
  QB_UNROLL for (int t = 0; t < tokens; t++) sums[t] = _mm512_reduce_add_ps(total[t]);
}

QB_INLINE __m512 weights_at(const void *w, int32_t kind, int64_t k, __mmask16 mask) {
  if (kind == QB_F32) return _mm512_maskz_loadu_ps(mask, (const float *)w + k);
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)w + k));
}

QB_INLINE void row_float(const void *w, int32_t kind, const float *x, int32_t columns, int64_t width, const int tokens,
                         float *sums) {
  __m512 total[TOKENS][2];
  QB_UNROLL for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = _mm512_setzero_ps();
  for (int32_t k = 0; k < columns; k += STEP) {
    uint32_t mask = columns - k < STEP ? (1u << (columns - k)) - 1 : ~0u;
    QB_UNROLL for (int half = 0; half < 2; half++) {
      __m512 weight = weights_at(w, kind, k + half * LANES, (__mmask16)(mask >> half * LANES));
      QB_UNROLL for (int t = 0; t < tokens; t++) total[t][half] =
          _mm512_fmadd_ps(weight, _mm512_load_ps(x + t * width + k + half * LANES), total[t][half]);
    }
  }
  QB_UNROLL for (int t = 0; t < tokens; t++) sums[t] = _mm512_reduce_add_ps(total[t][0] + total[t][1]);
}

QB_INLINE void row_any(const qb_matrix *m, const void *w, const void *x, const int tokens, float *sums) {
  if (m->kind != QB_BF16)
    row_float(w, m->kind, x, m->columns, padded(m), tokens, sums);
  else if (parts_of(m) == 2)
    row_bf16(w, x, m->columns, padded(m), 2, tokens, sums);
  else
    row_bf16(w, x, m->columns, padded(m), 1, tokens, sums);
}
#else
QB_INLINE float weight_at(const void *w, int32_t kind, int64_t k) {
  if (kind == QB_F32) return ((const float *)w)[k];
  uint16_t half = ((const uint16_t *)w)[k];
  return kind == QB_BF16 ? float_of((uint32_t)half << 16) : half_of(half);
}

QB_INLINE void row_any(const qb_matrix *m, const void *w, const void *x, const int tokens, float *sums) {
  lanes total[TOKENS] = {};
  for (int32_t k = 0; k < m->columns; k += LANES) {
    lanes weight = {};
    for (int32_t lane = 0; lane < least(LANES, m->columns - k); lane++) weight[lane] = weight_at(w, m->kind, k + lane);
    for (int t = 0; t < tokens; t++) {
      lanes given;
      memcpy(&given, (const float *)x + t * padded(m) + k, sizeof given);
      total[t] += weight * given;
    }
  }
  for (int t = 0; t < tokens; t++) {
    sums[t] = 0;
    for (int lane = 0; lane < LANES; lane++) sums[t] += total[t][lane];
  }
}
#endif

void dense_multiply(const qb_matrix *m, const void *prepared, int32_t tokens, int32_t first, int32_t last, float *y,
                    int64_t y_stride) {
  int64_t row_bytes = (int64_t)m->columns * (m->kind == QB_F32 ? 4 : 2);
  int64_t token_bytes = dense_prepared_bytes(m, 1);
  for (int32_t row = first * QB_UNIT_ROWS; row < least(m->rows, last * QB_UNIT_ROWS); row++) {
    const uint8_t *w = (const uint8_t *)m->weight + row * row_bytes;
    float bias = m->bias ? m->bias[row] : 0;
    for (int32_t t = 0; t < tokens; t += TOKENS) {
      const uint8_t *x = (const uint8_t *)prepared + t * token_bytes;
      float sums[TOKENS];
      switch (tokens - t) {
        case 1: row_any(m, w, x, 1, sums); break;
        case 2: row_any(m, w, x, 2, sums); break;
        case 3: row_any(m, w, x, 3, sums); break;
        default: row_any(m, w, x, TOKENS, sums);
      }
      for (int32_t i = 0; i < least(TOKENS, tokens - t); i++) y[(t + i) * y_stride + row] = sums[i] + bias;
    }
  }
}
