/* Packed weights times bfloat16 activations.
 *
 * Codes become whole numbers in bfloat16 (exact: code - 2^(bits - 1)) by a table of 32 entries in one register: a
 * lookup reads the low 5 bits of each 16, so a word is only shifted, never masked. 8 bits: `byte_pair`. One instruction multiplies pairs
 * of inputs of 16 rows and adds them up in float32; the sums of a group are scaled at its end, where zero points cost
 * one more product with the sum of the group's activations.
 *
 * Up to DIRECT tokens (half as many in two parts) the codes are converted on the way (`direct`); for more, SLICE inputs
 * at a time into `panel`, which stays in the first cache, and tiles of up to TILE tokens are multiplied by it (`tile`).
 * Both add an output's products one after another in order of inputs, within a group from 0 and then group by group:
 * equal bit for bit. Processors without these instructions: plain.c.
 */
#include "inner.h"

enum { DIRECT = 6, SLICE = 128, HELD = 11 * TILE };

/* Bytes ahead of the weights being read that are asked for, into the second cache: the processor's own prefetching ends
 * at a page of 4 KiB, however large the system's are. */
enum { AHEAD = 12288 };

/* Bytes of a prepared token: pairs of bfloat16, and sums of groups. A tile has [pair][part][token], [group][token]. */
QB_INLINE int64_t token_bytes(const qb_matrix *m) {
  return 2 * (int64_t)m->width * parts_of(m) + (has_sums(m) ? 4 * groups_of(m) : 0);
}

int64_t bf16_prepared_bytes(const qb_matrix *m, int32_t tokens) { return tokens * token_bytes(m); }

QB_INLINE void write_pairs(words rounded, uint32_t *to, int64_t stride) {
  halves half = __builtin_convertvector(rounded >> 16, halves);
  uint32_t pairs[LANES / 2];
  memcpy(pairs, &half, sizeof pairs);
  for (int i = 0; i < LANES / 2; i++) to[i * stride] = pairs[i];
}

static void prepare_token(const qb_matrix *m, const float *x, uint32_t *pairs, float *sums, int64_t tile) {
  int parts = parts_of(m);
  lanes sum = {};
  for (int32_t k = 0; k < m->width; k += LANES) {
    lanes value = {};
    memcpy(&value, x + least(k, m->columns), (size_t)least(LANES, m->columns - least(k, m->columns)) * 4);
    words high = rounded(value);
    write_pairs(high, pairs + k / 2 * parts * tile, parts * tile);
    sum += (lanes)high;
    if (parts == 2) {
      words low = rounded(value - (lanes)high);
      write_pairs(low, pairs + (k / 2 * parts + 1) * tile, parts * tile);
      sum += (lanes)low;
    }
    if ((k + LANES) % m->group == 0) {
      float all = 0;
      for (int i = 0; i < LANES; i++) all += sum[i];
      if (has_sums(m)) sums[k / m->group * tile] = all;
      sum = (lanes){};
    }
  }
}

void bf16_prepare(const qb_matrix *m, const float *x, int64_t x_stride, int32_t tokens, int32_t first, int32_t last,
                  void *prepared) {
  int32_t size = tile_of(tokens);
  for (int32_t t = first; t < last; t++) {
    int32_t start = t / size * size, tile = least(size, tokens - start);
    uint32_t *pairs = (uint32_t *)((uint8_t *)prepared + start * token_bytes(m));
    float *sums = (float *)(pairs + (int64_t)tile * m->width / 2 * parts_of(m));
    prepare_token(m, x + t * x_stride, pairs + t - start, sums + t - start, tile);
  }
}

#if QB_AVX512

/* Scales of 16 rows, and scale * (2^(bits - 1) - zero point); for 8 bits half a scale less. */
typedef struct { __m512 scale, offset; } grid;

QB_INLINE grid grid_of(const qb_matrix *m, int64_t at) {
  grid found = {(__m512)scale_of(m, at), _mm512_setzero_ps()};
  if (m->zero) {
    __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(m->zero + at)));
    __m512i middle = _mm512_set1_epi32(1 << (m->kind - 1));
    found.offset = _mm512_mul_ps(found.scale, _mm512_cvtepi32_ps(_mm512_sub_epi32(middle, zero)));
  }
  if (m->kind == QB_W8) found.offset = _mm512_fnmadd_ps(found.scale, _mm512_set1_ps(0.5f), found.offset);
  return found;
}

QB_INLINE __m512 finish(const qb_matrix *m, grid g, __m512 sums, __m512 total, const float *x_sum) {
  total = _mm512_fmadd_ps(sums, g.scale, total);
  return has_sums(m) ? _mm512_fmadd_ps(g.offset, _mm512_set1_ps(*x_sum), total) : total;
}

/* Low and high bytes of 0.5, 1.5, .. 127.5 in bfloat16. */
static uint8_t magnitudes[2][128];

__attribute__((constructor)) static void fill_magnitudes(void) {
  for (int i = 0; i < 128; i++) {
    uint16_t value = bf16_of((float)i + 0.5f);
    magnitudes[0][i] = (uint8_t)value, magnitudes[1][i] = (uint8_t)(value >> 8);
  }
}

/* For 8 bits the four registers of `magnitudes`, else one of whole numbers. */
typedef struct { __m512i part[4]; } table;

QB_INLINE table table_of(const int bits) {
  table found;
  if (bits == 8) {
    QB_UNROLL for (int i = 0; i < 4; i++) found.part[i] = _mm512_loadu_si512(&magnitudes[i / 2][i % 2 * 64]);
    return found;
  }
  uint16_t entries[32];
  for (int i = 0; i < 32; i++) entries[i] = bf16_of((float)((i & ((1 << bits) - 1)) - (1 << (bits - 1))));
  found.part[0] = _mm512_loadu_si512(entries);
  return found;
}

/* Of 16 words that hold two pairs the first or second, as bfloat16. No 16 bits and no table of words reach 256 values,
 * but sign and magnitude of code - 127.5 do: the magnitude's bytes are looked up by the low 7 bits, the sign is the 8th.
 * The half that is too much is taken off with the zero point, by the sum of the activations. */
QB_INLINE __m512i byte_pair(__m512i codes, const int second, const table *t) {
  __m512i low = _mm512_permutex2var_epi8(t->part[0], codes, t->part[1]);
  __m512i high = _mm512_permutex2var_epi8(t->part[2], codes, t->part[3]);
  high = _mm512_ternarylogic_epi32(_mm512_set1_epi8(-128), codes, high, 0xEA); /* 128 & codes | high */
  if (second)
    low = _mm512_srli_epi16(low, 8);
  else
    high = _mm512_slli_epi16(high, 8);
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16(0xff), low, high, 0xCA); /* 255 ? low : high */
}

/* Pair `pair` (0..15, a constant) of the 32 inputs of 16 rows that `w` holds, as bfloat16. */
QB_INLINE __m512i pair_of(const uint8_t *w, const int bits, const int pair, const table *t) {
  if (bits == 8) return byte_pair(_mm512_loadu_si512(w + 64 * (pair / 2)), pair % 2, t);
  if (bits == 3 && pair == 15) {
    __m512i a = _mm512_srli_epi16(_mm512_loadu_si512(w), 15), b = _mm512_srli_epi16(_mm512_loadu_si512(w + 64), 14),
            c = _mm512_srli_epi16(_mm512_loadu_si512(w + 128), 13);
    /* Bit 0 of a, bit 1 of b, bit 2 of c; the lookup ignores the others: b & 2 | a, then c & 4 | that. */
    __m512i ab = _mm512_ternarylogic_epi32(_mm512_set1_epi16(2), b, a, 0xCA);
    return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(_mm512_set1_epi16(4), c, ab, 0xCA), t->part[0]);
  }
  const int in_word = 16 / bits;
  __m512i words = _mm512_loadu_si512(w + 64 * (pair / in_word));
  const int shift = pair % in_word * bits;
  return _mm512_permutexvar_epi16(shift ? _mm512_srli_epi32(words, shift) : words, t->part[0]);
}

/* All the inputs of up to `blocks` blocks of a unit, for `tokens` tokens: y gets totals. */
QB_INLINE void direct(const qb_matrix *m, int32_t unit, const uint32_t *x, const int bits, const int tokens,
                      const int parts, __m512 (*out)[BLOCKS]) {
  const int held = blocks_of(m, unit), block_bytes = bits * 64, groups = groups_of(m);
  const float *x_sum = (const float *)(x + (int64_t)tokens * parts * m->width / 2);
  const uint8_t *w[BLOCKS];
  /* A unit with fewer blocks multiplies its last one again: nobody reads the result. */
  QB_UNROLL for (int b = 0; b < BLOCKS; b++) w[b] = unit_weight(m, unit) + least(b, held - 1) * block_bytes;
  int64_t at = (int64_t)unit * QB_UNIT_ROWS * groups;
  const table numbers = table_of(bits);
  __m512 total[DIRECT][BLOCKS], sums[DIRECT][BLOCKS];
  QB_UNROLL for (int t = 0; t < tokens; t++) QB_UNROLL for (int b = 0; b < BLOCKS; b++) total[t][b] =
      _mm512_setzero_ps();
  for (int g = 0; g < groups; g++) {
    QB_UNROLL for (int t = 0; t < tokens; t++) QB_UNROLL for (int b = 0; b < BLOCKS; b++) sums[t][b] =
        _mm512_setzero_ps();
    for (int32_t k = 0; k < m->group; k += STEP) {
      QB_UNROLL for (int pair = 0; pair < STEP / 2; pair++) {
        __m512bh weight[BLOCKS];
        if (pair % (16 / bits) == 0)
          QB_UNROLL for (int b = 0; b < BLOCKS; b++) __builtin_prefetch(w[b] + pair / (16 / bits) * 64 + AHEAD, 0, 2);
        QB_UNROLL for (int b = 0; b < BLOCKS; b++) weight[b] = (__m512bh)pair_of(w[b], bits, pair, &numbers);
        QB_UNROLL for (int t = 0; t < tokens; t++) QB_UNROLL for (int part = 0; part < parts; part++) {
          __m512bh given = (__m512bh)_mm512_set1_epi32((int)x[(pair * parts + part) * tokens + t]);
          QB_UNROLL for (int b = 0; b < BLOCKS; b++) sums[t][b] = _mm512_dpbf16_ps(sums[t][b], weight[b], given);
        }
      }
      x += STEP / 2 * parts * tokens;
      QB_UNROLL for (int b = 0; b < BLOCKS; b++) w[b] += held * block_bytes;
    }
    QB_UNROLL for (int b = 0; b < BLOCKS; b++) {
      grid scales = grid_of(m, at + (int64_t)(g * held + least(b, held - 1)) * LANES);
      QB_UNROLL for (int t = 0; t < tokens; t++) total[t][b] =
          finish(m, scales, sums[t][b], total[t][b], x_sum + g * tokens + t);
    }
  }
  QB_UNROLL for (int t = 0; t < tokens; t++) QB_UNROLL for (int b = 0; b < BLOCKS; b++) out[t][b] = total[t][b];
}

static void direct_any(const qb_matrix *m, int32_t unit, const uint32_t *x, int32_t tokens, __m512 (*out)[BLOCKS]) {
#define TOKENS(bits, n) case n: direct(m, unit, x, bits, n, 1, out); break;
#define TWICE(bits, n) case 8 + n: direct(m, unit, x, bits, n, 2, out); break;
#define BITS(bits) \
  case bits: \
    switch (parts_of(m) == 1 ? tokens : 8 + tokens) { \
      TOKENS(bits, 1) TOKENS(bits, 2) TOKENS(bits, 3) TOKENS(bits, 4) TOKENS(bits, 5) TOKENS(bits, 6) \
      TWICE(bits, 1) TWICE(bits, 2) TWICE(bits, 3) \
    } \
    break;
  switch (m->kind) { BITS(8) BITS(4) BITS(3) BITS(2) }
#undef TOKENS
#undef TWICE
#undef BITS
}

typedef struct {
  __m512i panel[SLICE / 2][BLOCKS];
  __m512 sums[HELD][BLOCKS], total[HELD][BLOCKS];
} scratch;

QB_INLINE void convert(const uint8_t *w, int held, int32_t inputs, const int bits, __m512i (*panel)[BLOCKS]) {
  const table numbers = table_of(bits);
  for (int32_t k = 0; k < inputs; k += STEP)
    for (int b = 0; b < held; b++, w += bits * 64)
      QB_UNROLL for (int pair = 0; pair < STEP / 2; pair++) panel[k / 2 + pair][b] = pair_of(w, bits, pair, &numbers);
}

static void convert_any(const uint8_t *w, int held, int32_t inputs, int bits, __m512i (*panel)[BLOCKS]) {
  switch (bits) {
    case 8: convert(w, held, inputs, 8, panel); break;
    case 4: convert(w, held, inputs, 4, panel); break;
    case 3: convert(w, held, inputs, 3, panel); break;
    case 2: convert(w, held, inputs, 2, panel); break;
  }
}

/* A slice of two blocks, and a tile of tokens. */
typedef struct {
  const __m512i (*panel)[BLOCKS];
  int32_t inputs;
  const uint32_t *x;
  const float *x_sum;            /* of the group */
  int first, last;               /* slice of the group */
  grid scales[2];
  __m512 (*sums)[BLOCKS], (*total)[BLOCKS];
} slice;

QB_INLINE void tile(const qb_matrix *m, const slice *s, const int tokens, const int parts) {
  __m512 sums[TILE][2];
  QB_UNROLL for (int t = 0; t < tokens; t++) QB_UNROLL for (int b = 0; b < 2; b++) sums[t][b] =
      s->first ? _mm512_setzero_ps() : s->sums[t][b];
  const uint32_t *x = s->x;
  for (int32_t pair = 0; pair < s->inputs / 2; pair++, x += parts * tokens) {
    __m512bh w0 = (__m512bh)s->panel[pair][0], w1 = (__m512bh)s->panel[pair][1];
    QB_UNROLL for (int t = 0; t < tokens; t++) QB_UNROLL for (int part = 0; part < parts; part++) {
      __m512bh given = (__m512bh)_mm512_set1_epi32((int)x[part * tokens + t]);
      sums[t][0] = _mm512_dpbf16_ps(sums[t][0], w0, given);
      sums[t][1] = _mm512_dpbf16_ps(sums[t][1], w1, given);
    }
  }
  QB_UNROLL for (int t = 0; t < tokens; t++) QB_UNROLL for (int b = 0; b < 2; b++) {
    if (s->last)
      s->total[t][b] = finish(m, s->scales[b], sums[t][b], s->total[t][b], s->x_sum + t);
    else
      s->sums[t][b] = sums[t][b];
  }
}

static void tile_any(const qb_matrix *m, const slice *s, int32_t tokens) {
#define TOKENS(n) \
  case n: \
    if (parts_of(m) == 1) tile(m, s, n, 1); \
    else tile(m, s, n, 2); \
    break;
  switch (tokens) {
    TOKENS(1) TOKENS(2) TOKENS(3) TOKENS(4) TOKENS(5) TOKENS(6)
    TOKENS(7) TOKENS(8) TOKENS(9) TOKENS(10) TOKENS(11) TOKENS(12)
  }
#undef TOKENS
}

/* Totals of `tokens` prepared tokens (at most HELD, in tiles of `size`) for one unit. */
static void through_panel(const qb_matrix *m, int32_t unit, const uint8_t *x, int32_t tokens, int32_t size,
                          scratch *s) {
  const int held = blocks_of(m, unit), parts = parts_of(m), groups = groups_of(m);
  const uint8_t *w = unit_weight(m, unit);
  int64_t at = (int64_t)unit * QB_UNIT_ROWS * groups;
  memset(s->total, 0, (size_t)tokens * sizeof s->total[0]);
  for (int g = 0; g < groups; g++, at += held * LANES) {
    grid scales[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) scales[b] = grid_of(m, at + least(b, held - 1) * LANES);
    for (int32_t from = 0; from < m->group; from += SLICE) {
      int32_t inputs = least(SLICE, m->group - from);
      convert_any(w, held, inputs, m->kind, s->panel);
      const int64_t bytes = (int64_t)held * inputs * m->kind * 2;
      w += bytes;
      for (int32_t t = 0; t < tokens; t += size) {
        int32_t now = least(size, tokens - t);
        fetch(w, bytes * t / tokens, bytes * (t + now) / tokens);
        const uint32_t *given = (const uint32_t *)(x + t * token_bytes(m));
        for (int b = 0; b < held; b += 2) {
          slice part = {(const __m512i(*)[BLOCKS]) & s->panel[0][b], inputs,
                        given + ((int64_t)g * m->group + from) / 2 * parts * now,
                        (const float *)given + (int64_t)now * (m->width / 2 * parts + g),
                        from == 0, from + inputs == m->group, {scales[b], scales[b + 1]},
                        (__m512(*)[BLOCKS]) & s->sums[t][b], (__m512(*)[BLOCKS]) & s->total[t][b]};
          tile_any(m, &part, now);
        }
      }
    }
  }
}

static void write(const qb_matrix *m, int32_t unit, const __m512 *totals, float *y) {
  for (int b = 0; b < blocks_of(m, unit); b++) {
    int32_t row = unit * QB_UNIT_ROWS + b * LANES, left = m->rows - row;
    __mmask16 mask = left < LANES ? (__mmask16)((1u << left) - 1) : 0xffff;
    __m512 value = totals[b];
    if (m->bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, m->bias + row));
    _mm512_mask_storeu_ps(y + row, mask, value);
  }
}

void bf16_multiply(const qb_matrix *m, const void *prepared, int32_t tokens, int32_t first, int32_t last, float *y,
                   int64_t y_stride) {
  int32_t size = tile_of(tokens), most = HELD / size * size;
  scratch s;
  for (int32_t unit = first; unit < last; unit++)
    for (int32_t t = 0; t < tokens; t += most) {
      int32_t now = least(most, tokens - t);
      const uint8_t *x = (const uint8_t *)prepared + t * token_bytes(m);
      if (tokens * parts_of(m) <= DIRECT)
        direct_any(m, unit, (const uint32_t *)x, now, s.total);
      else
        through_panel(m, unit, x, now, size, &s);
      for (int32_t i = 0; i < now; i++) write(m, unit, s.total[i], y + (t + i) * y_stride);
    }
}
#endif
