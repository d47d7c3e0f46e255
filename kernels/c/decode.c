/* See decode.h.
 *
 * One parallel region a token. A phase is one or several matrices whose rows the threads share, or
 * the heads of attention; a barrier ends it. What lies between two phases (residual, norm, gate,
 * rounding the activations) is short, so each thread does all of it for itself, in memory of its
 * own: no barrier, and no cache line goes back and forth. The residual stream, too, every thread
 * keeps for itself.
 */
#include "decode.h"

#include "vectors.h"

#include <omp.h>
#include <stddef.h>
#include <string.h>

#define ALIGNMENT 64
#define PRODUCTS 4 /* of a block */
#define ATTENTION_BLOCK 32 /* keys read at once for all heads that share them: 8 KiB, in the L1 */

typedef struct {
  const qb_model *model;
  const qb_kept *kept;
  const float *cos, *sin;
  int32_t batch, length, thread, threads;
  int32_t phase; /* products done */
  /* shared by the threads */
  char *taken; /* units taken of each thread's part of each product: [phase][thread], in lines */
  float *query, *key, *value, *attended, *output, *gate, *up, *down;
  /* each thread's own */
  float *stream, *normed, *scores, *rotated;
  char *row;      /* a key and a value as the cache stores them */
  char *prepared; /* activations as the matrices read them */
} step;

typedef struct {
  const qb_matrix *matrix;
  float *y;
} product;

static int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

static void multiply_unit(const step *s, const product *products, const char *const *prepared,
                          int64_t unit) {
  int32_t i = 0;
  for (; unit >= qb_units(products[i].matrix); i++) unit -= qb_units(products[i].matrix);
  const qb_matrix *m = products[i].matrix;
  qb_multiply(m, prepared[i], s->batch, (int32_t)unit, (int32_t)unit + 1, products[i].y, m->rows);
}

/* Multiply x [batch, columns] by the units of all matrices together. Each thread has an equal part
 * of them, and when it is done takes from the others' parts: where the machine has other work, too,
 * one thread may be slow. */
static void multiply(step *s, const product *products, int32_t count, const float *x,
                     int64_t stride) {
  const char *prepared[3];
  char *free_from = s->prepared;
  int64_t total = 0;
  for (int32_t i = 0; i < count; i++) {
    const qb_matrix *m = products[i].matrix;
    total += qb_units(m);
    if (i > 0 && qb_shares(products[i - 1].matrix, m)) {
      prepared[i] = prepared[i - 1];
      continue;
    }
    qb_prepare(m, x, stride, s->batch, free_from);
    prepared[i] = free_from;
    free_from += aligned(qb_prepared_bytes(m, s->batch));
  }
  char *taken = s->taken + (int64_t)s->phase++ * s->threads * ALIGNMENT;
  for (int32_t turn = 0; turn < s->threads; turn++) {
    const int32_t whose = (s->thread + turn) % s->threads;
    const int64_t begin = total * whose / s->threads, end = total * (whose + 1) / s->threads;
    int64_t *next = (int64_t *)(taken + whose * ALIGNMENT);
    for (;;) {
      const int64_t unit = begin + __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
      if (unit >= end) break;
      multiply_unit(s, products, prepared, unit);
    }
  }
}

static void normalize_rows(const step *s, const float *weight) {
  const int32_t hidden = s->model->hidden;
  for (int32_t b = 0; b < s->batch; b++)
    normalize(s->stream + (int64_t)b * hidden, weight, hidden, s->model->epsilon,
              s->normed + (int64_t)b * hidden);
}

static void add_to_stream(const step *s, const float *y) {
  const int64_t size = (int64_t)s->batch * s->model->hidden;
#pragma omp simd
  for (int64_t i = 0; i < size; i++) s->stream[i] += y[i];
}

static void gate_rows(const step *s) {
  const int64_t size = (int64_t)s->batch * s->model->inner;
#pragma omp simd
  for (int64_t i = 0; i < size; i++)
    s->normed[i] = s->gate[i] / (1.0f + exponential(-s->gate[i])) * s->up[i];
}

/* `heads` query heads that share one key head over all tokens; the newest key and value lie in
 * s->row, the others in the cache. Some keys at a time for all heads, so that they come from the
 * memory once. */
QB_INLINE void attend(const step *s, const char *keys, const char *values, int32_t heads,
                      float *attended, const int32_t kind) {
  const int32_t size = s->model->head_size;
  const int64_t count = s->length, bytes = size * (kind == QB_F32 ? 4 : 2), stride = count + 1;
  const float scaling = s->model->scaling;
  for (int64_t from = 0; from < count; from += ATTENTION_BLOCK) {
    const int64_t to = from + ATTENTION_BLOCK < count ? from + ATTENTION_BLOCK : count;
    for (int32_t h = 0; h < heads; h++)
      score_keys(s->rotated + h * size, keys + from * bytes, from, to, size, scaling,
                 s->scores + h * stride, kind);
  }
  for (int32_t h = 0; h < heads; h++) {
    score_keys(s->rotated + h * size, s->row, count, stride, size, scaling, s->scores + h * stride,
               kind);
    softmax(s->scores + h * stride, stride);
  }
  memset(attended, 0, (size_t)(heads * size) * sizeof *attended);
  for (int64_t from = 0; from < count; from += ATTENTION_BLOCK) {
    const int64_t to = from + ATTENTION_BLOCK < count ? from + ATTENTION_BLOCK : count;
    for (int32_t h = 0; h < heads; h++)
      add_values(attended + h * size, values + from * bytes, from, to, size,
                 s->scores + h * stride, kind);
  }
  for (int32_t h = 0; h < heads; h++)
    add_values(attended + h * size, s->row + aligned(bytes), count, stride, size,
               s->scores + h * stride, kind);
}

/* Norm (where there is one) and rotary embedding of one head. */
static void rotate(const step *s, const float *x, const float *norm, float *y) {
  const int32_t size = s->model->head_size, half = size / 2;
  float *normed = s->normed;
  if (norm) {
    normalize(x, norm, size, s->model->epsilon, normed);
    x = normed;
  }
#pragma omp simd
  for (int32_t i = 0; i < half; i++) {
    y[i] = x[i] * s->cos[i] - x[i + half] * s->sin[i];
    y[i + half] = x[i + half] * s->cos[i + half] + x[i] * s->sin[i + half];
  }
}

/* Parts that the query heads of one key head are cut into, so that every thread has one. */
static int32_t head_parts(const qb_model *model, int32_t batch, int32_t threads) {
  const int32_t shared = model->heads / model->kv_heads;
  int32_t parts = 1;
  while (parts < shared && (batch * model->kv_heads * parts < threads || shared % parts)) parts++;
  return parts;
}

static void attention(const step *s, const qb_block *block, const qb_kept *kept) {
  const qb_model *model = s->model;
  const int32_t kind = model->cache_kind, size = model->head_size, kv_heads = model->kv_heads;
  const int32_t parts = head_parts(model, s->batch, s->threads);
  const int32_t heads = model->heads / kv_heads / parts;
  const int64_t row_bytes = (int64_t)size * (kind == QB_F32 ? 4 : 2);
  const int64_t items = (int64_t)s->batch * kv_heads * parts;
  for (int64_t item = items * s->thread / s->threads; item < items * (s->thread + 1) / s->threads;
       item++) {
    const int64_t pair = item / parts; /* sequence and key head */
    const int64_t first = pair * (model->heads / kv_heads) + item % parts * heads;
    char *keys = (char *)kept->keys + pair * kept->capacity * row_bytes;
    char *values = (char *)kept->values + pair * kept->capacity * row_bytes;
    char *new_value = s->row + aligned(row_bytes);
    rotate(s, s->key + pair * size, block->key_norm, s->rotated);
    store_row(s->rotated, size, kind, s->row);
    store_row(s->value + pair * size, size, kind, new_value);
    if (item % parts == 0) {
      /* No other thread reads this place: the newest key is taken from s->row. */
      memcpy(keys + s->length * row_bytes, s->row, (size_t)row_bytes);
      memcpy(values + s->length * row_bytes, new_value, (size_t)row_bytes);
    }
    for (int32_t h = 0; h < heads; h++)
      rotate(s, s->query + (first + h) * size, block->query_norm, s->rotated + (int64_t)h * size);
    if (kind == QB_F32)
      attend(s, keys, values, heads, s->attended + first * size, QB_F32);
    else
      attend(s, keys, values, heads, s->attended + first * size, QB_BF16);
  }
}

static void run_block(step *s, const qb_block *block, const qb_kept *kept) {
  const qb_model *model = s->model;
  const int64_t attended = (int64_t)model->heads * model->head_size;
  const product attention_inputs[3] = {
      {&block->query, s->query}, {&block->key, s->key}, {&block->value, s->value}};
  const product attention_output = {&block->output, s->output};
  const product mlp_inputs[2] = {{&block->gate, s->gate}, {&block->up, s->up}};
  const product mlp_output = {&block->down, s->down};
  normalize_rows(s, block->attention_norm);
  multiply(s, attention_inputs, 3, s->normed, model->hidden);
#pragma omp barrier
  attention(s, block, kept);
#pragma omp barrier
  multiply(s, &attention_output, 1, s->attended, attended);
#pragma omp barrier
  add_to_stream(s, s->output);
  normalize_rows(s, block->mlp_norm);
  multiply(s, mlp_inputs, 2, s->normed, model->hidden);
#pragma omp barrier
  gate_rows(s);
  multiply(s, &mlp_output, 1, s->normed, model->inner);
#pragma omp barrier
  add_to_stream(s, s->down);
}

static int64_t prepared_bytes(const qb_model *model, int32_t batch) {
  int64_t most = qb_prepared_bytes(&model->head, batch);
  for (int32_t i = 0; i < model->blocks; i++) {
    const qb_block *b = model->block + i;
    const int64_t inputs = aligned(qb_prepared_bytes(&b->query, batch)) +
                           aligned(qb_prepared_bytes(&b->key, batch)) +
                           aligned(qb_prepared_bytes(&b->value, batch));
    const int64_t gates = aligned(qb_prepared_bytes(&b->gate, batch)) +
                          aligned(qb_prepared_bytes(&b->up, batch));
    most = largest(largest(most, inputs), gates);
    most = largest(most, qb_prepared_bytes(&b->output, batch));
    most = largest(most, qb_prepared_bytes(&b->down, batch));
  }
  return aligned(most);
}

static int64_t taken_bytes(const qb_model *model, int32_t threads) {
  return (int64_t)(PRODUCTS * model->blocks + 1) * threads * ALIGNMENT;
}

/* Lay the buffers of `s` out from `start`; returns the bytes of all. */
static int64_t lay_out(step *s, char *start) {
  const qb_model *m = s->model;
  const int64_t batch = s->batch, heads = (int64_t)m->heads * m->head_size;
  const int64_t kv = (int64_t)m->kv_heads * m->head_size;
  const int64_t widest = largest(largest(m->hidden, m->inner), m->head_size);
  const int64_t shared = m->heads / m->kv_heads;
  const int64_t sizes[] = {heads, kv, kv, heads, m->hidden, m->inner, m->inner, m->hidden};
  float **const places[] = {&s->query,  &s->key,  &s->value, &s->attended,
                            &s->output, &s->gate, &s->up,    &s->down};
  int64_t at = taken_bytes(m, s->threads);
  s->taken = start;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    *places[i] = (float *)(start + at);
    at += aligned(batch * sizes[i] * 4);
  }
  const int64_t own[] = {aligned(batch * m->hidden * 4),
                         aligned(batch * widest * 4),
                         aligned(shared * (s->length + 1) * 4),
                         aligned(shared * m->head_size * 4),
                         2 * aligned((int64_t)m->head_size * 4),
                         prepared_bytes(m, s->batch)};
  int64_t own_bytes = 0;
  for (size_t i = 0; i < sizeof own / sizeof *own; i++) own_bytes += own[i];
  char *place = start + at + s->thread * own_bytes;
  s->stream = (float *)place;
  s->normed = (float *)(place += own[0]);
  s->scores = (float *)(place += own[1]);
  s->rotated = (float *)(place += own[2]);
  s->row = place += own[3];
  s->prepared = place + own[4];
  return at + s->threads * own_bytes;
}

int64_t qb_decode_scratch(const qb_model *model, int32_t batch, int32_t length, int32_t threads) {
  step s = {.model = model, .batch = batch, .length = length, .threads = threads};
  return lay_out(&s, NULL);
}

int32_t qb_decode(const qb_model *model, const qb_kept *kept, const float *x, const float *cos,
                  const float *sin, int32_t batch, int32_t length, float *logits, void *scratch,
                  int32_t threads) {
  for (int32_t i = 0; i < model->blocks; i++)
    if (kept[i].capacity <= length) return 1;
  memset(scratch, 0, (size_t)taken_bytes(model, threads));
#pragma omp parallel num_threads(threads)
  {
    step s = {.model = model, .kept = kept, .cos = cos, .sin = sin, .batch = batch,
              .length = length, .thread = omp_get_thread_num(), .threads = omp_get_num_threads()};
    lay_out(&s, scratch);
    memcpy(s.stream, x, (size_t)batch * (size_t)model->hidden * sizeof *x);
    for (int32_t i = 0; i < model->blocks; i++) run_block(&s, model->block + i, kept + i);
    const product head = {&model->head, logits};
    normalize_rows(&s, model->norm);
    multiply(&s, &head, 1, s.normed, model->hidden);
  }
  return 0;
}
