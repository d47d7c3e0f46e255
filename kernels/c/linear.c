/* Which family of kernels a matrix belongs to: linear.h. */
#include "inner.h"

int32_t qb_units(const qb_matrix *m) { return (m->rows + QB_UNIT_ROWS - 1) / QB_UNIT_ROWS; }

int64_t qb_prepared_bytes(const qb_matrix *m, int32_t tokens) {
  if (!is_packed(m)) return dense_prepared_bytes(m, tokens);
  return m->activation == QB_INT8 ? int8_prepared_bytes(m, tokens) : bf16_prepared_bytes(m, tokens);
}

int32_t qb_shares(const qb_matrix *a, const qb_matrix *b) {
  if (a->activation != b->activation || a->columns != b->columns || is_packed(a) != is_packed(b)) return 0;
  if (!is_packed(a)) return (a->kind == QB_BF16) == (b->kind == QB_BF16);
  int same_sums = has_sums(a) == has_sums(b) && (!has_sums(a) || a->group == b->group);
  return a->width == b->width && (same_sums || a->activation == QB_INT8) &&
         (a->activation != QB_INT8 || a->group == b->group);
}

void prepare_some(const qb_matrix *m, const float *x, int64_t x_stride, int32_t tokens, int32_t first, int32_t last,
                  void *prepared) {
  if (!is_packed(m))
    dense_prepare(m, x, x_stride, first, last, prepared);
  else if (m->activation == QB_INT8)
    int8_prepare(m, x, x_stride, tokens, first, last, prepared);
  else
    bf16_prepare(m, x, x_stride, tokens, first, last, prepared);
}

void qb_prepare(const qb_matrix *m, const float *x, int64_t x_stride, int32_t tokens, void *prepared) {
  prepare_some(m, x, x_stride, tokens, 0, tokens, prepared);
}

void qb_multiply(const qb_matrix *m, const void *prepared, int32_t tokens, int32_t first, int32_t last, float *y,
                 int64_t y_stride) {
  if (!is_packed(m))
    dense_multiply(m, prepared, tokens, first, last, y, y_stride);
  else if (m->activation == QB_INT8)
    int8_multiply(m, prepared, tokens, first, last, y, y_stride);
  else
    bf16_multiply(m, prepared, tokens, first, last, y, y_stride);
}
