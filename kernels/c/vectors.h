/* Arithmetic of vectors between two matrices of a decoder, in float32, for one thread. */
#ifndef QB_VECTORS_H
#define QB_VECTORS_H

#include "inner.h"

#include <math.h>

enum { CACHE_LINE = 64, AHEAD = 4096 };

static inline void normalize(const float *x, const float *weight, int32_t size, float epsilon,
                             float *y) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int32_t i = 0; i < size; i++) squares = fmaf(x[i], x[i], squares);
  const float factor = 1.0f / sqrtf(squares / (float)size + epsilon);
#pragma omp simd
  for (int32_t i = 0; i < size; i++) y[i] = x[i] * factor * weight[i];
}

/* e^x to 2 ulp where it is a normal number, by 2^n * p(r) (Cody and Waite 1980): unlike expf it is
 * no call, so that loops over it become vector instructions. */
QB_INLINE float exponential(float x) {
  const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
  const float bounded = x > -87.0f ? (x < 88.0f ? x : 88.0f) : -87.0f;
  const float n = (bounded * 1.44269504f + shift) - shift;
  const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, bounded));
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p * r, r, r) + 1.0f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  /* NaN is bounded to -87 above, and must come out as NaN. */
  return x == x ? p * power : x;
}

static inline void softmax(float *scores, int64_t count) {
  float most = scores[0], sum = 0.0f;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; i++) most = scores[i] > most ? scores[i] : most;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) {
    scores[i] = exponential(scores[i] - most);
    sum += scores[i];
  }
  const float factor = 1.0f / sum;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) scores[i] *= factor;
}

/* Element i of keys or values, which are float32 or bfloat16. */
QB_INLINE float element(const void *values, int64_t i, int32_t kind) {
  if (kind == QB_F32) return ((const float *)values)[i];
  return float_of((uint32_t)((const uint16_t *)values)[i] << 16);
}

static inline void store_row(const float *x, int32_t size, int32_t kind, void *row) {
  if (kind == QB_F32) {
    memcpy(row, x, (size_t)size * sizeof *x);
    return;
  }
  uint16_t *to = row;
#pragma omp simd
  for (int32_t i = 0; i < size; i++) to[i] = bf16_of(x[i]);
}

/* Ask for memory that is read soon: heads are short stretches, which the processor's own prefetching
 * takes a while to notice. */
QB_INLINE void ask_for(const char *place, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += CACHE_LINE) __builtin_prefetch(place + AHEAD + at);
}

/* Scores of keys from..to-1, which lie at `keys`, for one query: four keys at once, so that their
 * sums do not wait for each other. */
QB_INLINE void score_keys(const float *query, const char *keys, int64_t from, int64_t to,
                          int32_t size, float scaling, float *scores, const int32_t kind) {
  const int64_t bytes = size * (kind == QB_F32 ? 4 : 2);
  int64_t p = from;
  for (; p + 4 <= to; p += 4, keys += 4 * bytes) {
    ask_for(keys, 4 * bytes);
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int32_t i = 0; i < size; i++) {
      a = fmaf(query[i], element(keys, i, kind), a);
      b = fmaf(query[i], element(keys + bytes, i, kind), b);
      c = fmaf(query[i], element(keys + 2 * bytes, i, kind), c);
      d = fmaf(query[i], element(keys + 3 * bytes, i, kind), d);
    }
    scores[p] = a * scaling;
    scores[p + 1] = b * scaling;
    scores[p + 2] = c * scaling;
    scores[p + 3] = d * scaling;
  }
  for (; p < to; p++, keys += bytes) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int32_t i = 0; i < size; i++) sum = fmaf(query[i], element(keys, i, kind), sum);
    scores[p] = sum * scaling;
  }
}

/* Add values from..to-1 times their weights to `out`, four at once: each reads and writes it. */
QB_INLINE void add_values(float *out, const char *values, int64_t from, int64_t to, int32_t size,
                          const float *weights, const int32_t kind) {
  const int64_t bytes = size * (kind == QB_F32 ? 4 : 2);
  int64_t p = from;
  for (; p + 4 <= to; p += 4, values += 4 * bytes) {
    ask_for(values, 4 * bytes);
    const float a = weights[p], b = weights[p + 1], c = weights[p + 2], d = weights[p + 3];
#pragma omp simd
    for (int32_t i = 0; i < size; i++) {
      float sum = fmaf(a, element(values, i, kind), out[i]);
      sum = fmaf(b, element(values + bytes, i, kind), sum);
      sum = fmaf(c, element(values + 2 * bytes, i, kind), sum);
      out[i] = fmaf(d, element(values + 3 * bytes, i, kind), sum);
    }
  }
  for (; p < to; p++, values += bytes) {
    const float weight = weights[p];
#pragma omp simd
    for (int32_t i = 0; i < size; i++) out[i] = fmaf(weight, element(values, i, kind), out[i]);
  }
}

#endif
