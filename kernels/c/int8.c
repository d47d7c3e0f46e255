/* Packed weights times activations that were rounded to int8 per token: scale = max|x| / 127, ties to even.
 *
 * SLICE inputs of a unit at a time become bytes in `panel`: words of 4 consecutive inputs of a row. One instruction
 * multiplies the unsigned codes of 16 rows by 4 signed activations and adds them up in int32, exactly. A group's sum
 * begins at -zero point * (sum of its activations), and is scaled in float32 at its end.
 */
#include "inner.h"

typedef int8_t bytes __attribute__((vector_size(16)));

enum { FEW = 4, WIDE = 2, SLICE = 256, HELD = 11 * TILE };

typedef struct {
  words panel[SLICE / 4][BLOCKS];
  ints sums[HELD][BLOCKS];
  lanes total[HELD][BLOCKS];
} scratch;

/* A tile has [quad][token] words, [group][token] sums, [token] scales. */
QB_INLINE int64_t token_bytes(const qb_matrix *m) { return m->width + 4 * (int64_t)groups_of(m) + 4; }

int64_t int8_prepared_bytes(const qb_matrix *m, int32_t tokens) { return tokens * token_bytes(m); }

QB_INLINE lanes given_at(const qb_matrix *m, const float *x, int32_t k) {
  lanes value = {};
  int32_t from = least(k, m->columns);
  memcpy(&value, x + from, (size_t)least(LANES, m->columns - from) * 4);
  return value;
}

static void prepare_token(const qb_matrix *m, const float *x, uint32_t *quads, int64_t tile) {
  int32_t *sums = (int32_t *)quads + tile * m->width / 4;
  float *scale = (float *)(sums + tile * groups_of(m)), largest = 0;
  lanes most = {};
  for (int32_t k = 0; k < m->width; k += LANES) {
    words size = (words)given_at(m, x, k) & 0x7fffffff;
    words larger = (words)((lanes)size > most);
    most = (lanes)((size & larger) | ((words)most & ~larger));
  }
  for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
  *scale = largest / 127;
  const float divisor = largest > 0 ? *scale : 1;
  const float whole = 12582912; /* 1.5 * 2^23: adding it rounds to whole numbers, ties to even */
  ints sum = {};
  for (int32_t k = 0; k < m->width; k += LANES) {
    ints value = (ints)(given_at(m, x, k) / divisor + whole) - 0x4b400000;
    bytes narrow = __builtin_convertvector(value, bytes);
    uint32_t found[LANES / 4];
    memcpy(found, &narrow, sizeof found);
    for (int i = 0; i < LANES / 4; i++) quads[(k / 4 + i) * tile] = found[i];
    sum += value;
    if ((k + LANES) % m->group == 0) {
      int32_t all = 0;
      for (int i = 0; i < LANES; i++) all += sum[i];
      sums[k / m->group * tile] = all;
      sum = (ints){};
    }
  }
}

void int8_prepare(const qb_matrix *m, const float *x, int64_t x_stride, int32_t tokens, int32_t first, int32_t last,
                  void *prepared) {
  int32_t size = tile_of(tokens);
  for (int32_t t = first; t < last; t++) {
    int32_t start = t / size * size;
    uint32_t *quads = (uint32_t *)((uint8_t *)prepared + start * token_bytes(m));
    prepare_token(m, x + t * x_stride, quads + t - start, least(size, tokens - start));
  }
}

/* Quad `quad` (0..7, a constant) of the 32 inputs of 16 rows that `w` holds: 4 codes a word. */
QB_INLINE words quad_of(const uint8_t *w, const int bits, const int quad) {
  if (bits == 3) {
    words low = (load(w + 64 * (quad / 4)) >> 2 * (quad % 4)) & 0x03030303;
    return low | (((load(w + 128) >> quad) & 0x01010101) << 2);
  }
  const int in_word = 8 / bits;
  words found = load(w + 64 * (quad / in_word)) >> quad % in_word * bits;
  return bits == 8 ? found : found & (0x01010101u * ((1u << (bits & 7)) - 1));
}

QB_INLINE void convert(const uint8_t *w, int held, int32_t inputs, const int bits, words (*panel)[BLOCKS]) {
  for (int32_t k = 0; k < inputs; k += STEP)
    for (int b = 0; b < held; b++, w += bits * 64)
      QB_UNROLL for (int quad = 0; quad < STEP / 4; quad++) panel[k / 4 + quad][b] = quad_of(w, bits, quad);
}

static void convert_any(const uint8_t *w, int held, int32_t inputs, int bits, words (*panel)[BLOCKS]) {
  switch (bits) {
    case 8: convert(w, held, inputs, 8, panel); break;
    case 4: convert(w, held, inputs, 4, panel); break;
    case 3: convert(w, held, inputs, 3, panel); break;
    case 2: convert(w, held, inputs, 2, panel); break;
  }
}

QB_INLINE ints dot(ints sum, words codes, uint32_t x) {
#if QB_AVX512
  return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32((int)x));
#else
  for (int i = 0; i < 4; i++) sum += (ints)((codes >> 8 * i) & 255) * (int32_t)(int8_t)(x >> 8 * i);
  return sum;
#endif
}

/* Add a slice of two blocks to the sums of a tile. */
QB_INLINE void tile(const words (*panel)[BLOCKS], int32_t inputs, const uint32_t *x, const int tokens,
                    ints (*sums)[BLOCKS]) {
  ints held[TILE][WIDE];
  QB_UNROLL for (int t = 0; t < tokens; t++) QB_UNROLL for (int b = 0; b < WIDE; b++) held[t][b] = sums[t][b];
  for (int32_t quad = 0; quad < inputs / 4; quad++, x += tokens) {
    words first = panel[quad][0], second = panel[quad][1];
    QB_UNROLL for (int t = 0; t < tokens; t++) {
      held[t][0] = dot(held[t][0], first, x[t]);
      held[t][1] = dot(held[t][1], second, x[t]);
    }
  }
  QB_UNROLL for (int t = 0; t < tokens; t++) QB_UNROLL for (int b = 0; b < WIDE; b++) sums[t][b] = held[t][b];
}

static void tile_any(const words (*panel)[BLOCKS], int32_t inputs, const uint32_t *x, int32_t tokens,
                     ints (*sums)[BLOCKS]) {
#define TOKENS(n) case n: tile(panel, inputs, x, n, sums); break;
  switch (tokens) {
    TOKENS(1) TOKENS(2) TOKENS(3) TOKENS(4) TOKENS(5) TOKENS(6)
    TOKENS(7) TOKENS(8) TOKENS(9) TOKENS(10) TOKENS(11) TOKENS(12)
  }
#undef TOKENS
}

/* Totals of `tokens` prepared tokens (at most HELD, in tiles of `size`) for one unit. */
static void unit_totals(const qb_matrix *m, int32_t unit, const uint8_t *x, int32_t tokens, int32_t size, scratch *s) {
  const int held = blocks_of(m, unit), groups = groups_of(m);
  const uint8_t *w = unit_weight(m, unit);
  int64_t at = (int64_t)unit * QB_UNIT_ROWS * groups;
  memset(s->total, 0, (size_t)tokens * sizeof s->total[0]);
  for (int g = 0; g < groups; g++, at += held * LANES) {
    for (int b = 0; b < held; b++) {
      ints zero = zero_of(m, at + b * LANES);
      for (int32_t t = 0; t < tokens; t++) {
        int32_t begin = t / size * size, now = least(size, tokens - begin);
        const int32_t *x_sum = (const int32_t *)(x + begin * token_bytes(m)) + (int64_t)now * m->width / 4;
        s->sums[t][b] = -zero * x_sum[g * now + t - begin];
      }
    }
    for (int32_t from = 0; from < m->group; from += SLICE) {
      int32_t inputs = least(SLICE, m->group - from);
      int64_t k = (int64_t)g * m->group + from;
      convert_any(w, held, inputs, m->kind, s->panel);
      const int64_t bytes = (int64_t)held * inputs * m->kind * 2;
      w += bytes;
      for (int32_t t = 0; t < tokens; t += size) {
        int32_t now = least(size, tokens - t);
        /* With few tokens the processor's own prefetching keeps up, and this only delays it. */
        if (tokens > FEW) fetch(w, bytes * t / tokens, bytes * (t + now) / tokens);
        const uint32_t *given = (const uint32_t *)(x + t * token_bytes(m));
        for (int b = 0; b < held; b += WIDE)
          tile_any((const words(*)[BLOCKS]) & s->panel[0][b], inputs, given + k / 4 * now, now,
                   (ints(*)[BLOCKS]) & s->sums[t][b]);
      }
    }
    for (int b = 0; b < held; b++) {
      lanes scale = scale_of(m, at + b * LANES);
      for (int32_t t = 0; t < tokens; t++) s->total[t][b] += scale * __builtin_convertvector(s->sums[t][b], lanes);
    }
  }
}

static void write(const qb_matrix *m, int32_t unit, const lanes *totals, float scale, float *y) {
  for (int b = 0; b < blocks_of(m, unit); b++) {
    int32_t row = unit * QB_UNIT_ROWS + b * LANES;
    lanes value = totals[b] * scale;
    for (int i = 0; i < least(LANES, m->rows - row); i++) y[row + i] = value[i] + (m->bias ? m->bias[row + i] : 0);
  }
}

void int8_multiply(const qb_matrix *m, const void *prepared, int32_t tokens, int32_t first, int32_t last, float *y,
                   int64_t y_stride) {
  int32_t size = tile_of(tokens), most = HELD / size * size;
  scratch s;
  for (int32_t unit = first; unit < last; unit++)
    for (int32_t t = 0; t < tokens; t += most) {
      int32_t now = least(most, tokens - t);
      const uint8_t *x = (const uint8_t *)prepared + t * token_bytes(m);
      unit_totals(m, unit, x, now, size, &s);
      for (int32_t i = 0; i < now; i++) {
        int32_t begin = i / size * size, held = least(size, now - begin);
        const float *scales = (const float *)(x + begin * token_bytes(m) + held * (token_bytes(m) - 4));
        write(m, unit, s.total[i], scales[i - begin], y + (t + i) * y_stride);
      }
    }
}
