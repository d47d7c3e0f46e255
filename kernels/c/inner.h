/* What the sources of this library share and nobody else includes. */
#ifndef QB_INNER_H
#define QB_INNER_H

#include "linear.h"

#include <string.h>

#if !defined(QB_PORTABLE) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define QB_AVX512 1
#include <immintrin.h>
#else
#define QB_AVX512 0
#endif

#define QB_INLINE static inline __attribute__((always_inline))
#define QB_UNROLL _Pragma("GCC unroll 16")

enum { LANES = 16, STEP = 32, BLOCKS = QB_UNIT_ROWS / LANES, TILE = 12 };

QB_INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
QB_INLINE int64_t up_to(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

QB_INLINE int is_packed(const qb_matrix *m) { return m->kind <= QB_W8; }
QB_INLINE int groups_of(const qb_matrix *m) { return m->width / m->group; }
/* Whether sums of activations are needed: by zero points, and by 8 bits (see byte_pair in packed.c). */
QB_INLINE int has_sums(const qb_matrix *m) { return m->zero || m->kind == QB_W8; }
QB_INLINE int parts_of(const qb_matrix *m) { return m->activation == QB_TWO_BF16 ? 2 : 1; }
/* Tokens are multiplied in tiles of at most TILE, all of this size but the last. */
QB_INLINE int32_t tile_of(int32_t tokens) {
  int32_t tiles = (tokens + TILE - 1) / TILE;
  return (tokens + tiles - 1) / tiles;
}
/* Blocks of 16 rows in a unit: the last unit may have fewer. */
QB_INLINE int blocks_of(const qb_matrix *m, int32_t unit) {
  return least(BLOCKS, (m->rows - unit * QB_UNIT_ROWS + LANES - 1) / LANES);
}
/* Weights of a unit: 4 * LANES bytes hold LANES rows of 32 / bits inputs. */
QB_INLINE const uint8_t *unit_weight(const qb_matrix *m, int32_t unit) {
  return (const uint8_t *)m->weight + (int64_t)unit * QB_UNIT_ROWS * m->width * m->kind / 8;
}

QB_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
QB_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
QB_INLINE float half_of(uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, sizeof value);
  return (float)value;
}
/* Round to the nearest bfloat16, ties to even; infinity and NaN stay. */
QB_INLINE uint16_t bf16_of(float value) {
  uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));

typedef uint16_t halves __attribute__((vector_size(32)));

QB_INLINE words load(const void *from) {
  words found;
  memcpy(&found, from, sizeof found);
  return found;
}

/* 16 values as the nearest bfloat16, ties to even, in the high halves of words; infinity and NaN stay. */
QB_INLINE words rounded(lanes value) {
  words bits = (words)value, nan = (words)(value != value);
  return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~nan & 0xffff0000) | ((bits | 0x400000) & nan & 0xffff0000);
}

/* Scales of 16 rows. */
QB_INLINE lanes scale_of(const qb_matrix *m, int64_t at) {
  if (m->scale_kind == QB_F32) return (lanes)load((const float *)m->scale + at);
  const uint16_t *half = (const uint16_t *)m->scale + at;
#if QB_AVX512
  if (m->scale_kind == QB_F16) return (lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)half));
#endif
  float found[LANES];
  if (m->scale_kind == QB_F16)
    for (int i = 0; i < LANES; i++) found[i] = half_of(half[i]);
  else
    for (int i = 0; i < LANES; i++) found[i] = float_of((uint32_t)half[i] << 16);
  return (lanes)load(found);
}

/* Zero points of 16 rows. */
QB_INLINE ints zero_of(const qb_matrix *m, int64_t at) {
  int32_t found[LANES];
  for (int i = 0; i < LANES; i++) found[i] = m->zero ? m->zero[at + i] : 1 << (m->kind - 1);
  return (ints)load(found);
}

/* Ask for the bytes from..to-1 of the next slice while this one is multiplied: it begins where this one ends. */
QB_INLINE void fetch(const uint8_t *next, int64_t from, int64_t to) {
  for (int64_t at = (from + 63) / 64 * 64; at < to; at += 64) __builtin_prefetch(next + at);
}

/* qb_prepare for tokens first..last-1 of all of them. */
void prepare_some(const qb_matrix *m, const float *x, int64_t x_stride, int32_t tokens, int32_t first, int32_t last,
                  void *prepared);

/* One family of kernels each: what linear.h says of the functions that begin with qb_. */
int64_t bf16_prepared_bytes(const qb_matrix *m, int32_t tokens);
void bf16_prepare(const qb_matrix *m, const float *x, int64_t x_stride, int32_t tokens, int32_t first, int32_t last,
                  void *prepared);
void bf16_multiply(const qb_matrix *m, const void *prepared, int32_t tokens, int32_t first, int32_t last, float *y,
                   int64_t y_stride);
void bf16_dequantize(const qb_matrix *m, int32_t unit, int b, int32_t kind, uint8_t *to, int64_t stride);
int64_t int8_prepared_bytes(const qb_matrix *m, int32_t tokens);
void int8_prepare(const qb_matrix *m, const float *x, int64_t x_stride, int32_t tokens, int32_t first, int32_t last,
                  void *prepared);
void int8_multiply(const qb_matrix *m, const void *prepared, int32_t tokens, int32_t first, int32_t last, float *y,
                   int64_t y_stride);
int64_t dense_prepared_bytes(const qb_matrix *m, int32_t tokens);
void dense_prepare(const qb_matrix *m, const float *x, int64_t x_stride, int32_t first, int32_t last, void *prepared);
void dense_multiply(const qb_matrix *m, const void *prepared, int32_t tokens, int32_t first, int32_t last, float *y,
                    int64_t y_stride);

#endif
