/* Work for several threads: each takes the next tokens, then the next units, until none are left. */
#include "inner.h"

enum { TOGETHER = 16 };

/* x float32 [tokens, columns], rows x_stride apart; prepared: qb_prepared_bytes; y float32 [tokens, rows]. */
void qb_linear(const qb_matrix *m, const float *x, int64_t x_stride, int32_t tokens, void *prepared, float *y,
               int64_t y_stride, int32_t threads) {
  int32_t units = qb_units(m), next = 0, token = 0;
  /* Few tokens are prepared sooner than threads are woken. */
  if (tokens <= TOGETHER) qb_prepare(m, x, x_stride, tokens, prepared);
#pragma omp parallel num_threads(threads)
  {
    if (tokens > TOGETHER) {
      for (;;) {
        int32_t first = __atomic_fetch_add(&token, TOGETHER, __ATOMIC_RELAXED);
        if (first >= tokens) break;
        prepare_some(m, x, x_stride, tokens, first, least(tokens, first + TOGETHER), prepared);
      }
#pragma omp barrier
    }
    for (;;) {
      int32_t unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (unit >= units) break;
      qb_multiply(m, prepared, tokens, unit, unit + 1, y, y_stride);
    }
  }
}

/* Weights in pairs, of units first..last-1, as `kind` (QB_BF16 or QB_F32): to [width, 64 * (last - first)]. */
void qb_dequantize(const qb_matrix *m, int32_t first, int32_t last, int32_t kind, void *to, int32_t threads) {
  const int64_t bytes = kind == QB_BF16 ? 2 : 4, stride = (last - first) * QB_UNIT_ROWS * bytes;
  int32_t next = first;
#pragma omp parallel num_threads(threads)
  for (;;) {
    int32_t unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
    if (unit >= last) break;
    for (int b = 0; b < blocks_of(m, unit); b++)
      bf16_dequantize(m, unit, b, kind, (uint8_t *)to + ((unit - first) * QB_UNIT_ROWS + b * LANES) * bytes, stride);
  }
}
