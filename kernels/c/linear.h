/* A linear map on a processor: y = x W^T + b, W packed or as it is, for one thread at a time.
 *
 * Rows are cut into units of up to QB_UNIT_ROWS; a caller gives each of its threads ranges of units. Layouts of
 * packed weights: kernels/panels.py. The order of the sums of one output depends on the matrix alone, never on the
 * number of tokens, units or threads.
 */
#ifndef QB_LINEAR_H
#define QB_LINEAR_H

#include <stdint.h>

/* Kind of the weights, and of scales. */
enum { QB_BF16 = 16, QB_F16 = 17, QB_F32 = 32, QB_W8 = 8, QB_W4 = 4, QB_W3 = 3, QB_W2 = 2 };

/* How activations are read: as one bfloat16; as two, which hold 16 of the 24 bits of a float32; rounded to int8 per
 * token, symmetric. Weights in QB_F16 and QB_F32 are multiplied by float32 whichever of the first two is asked for. */
enum { QB_ONE_BF16 = 1, QB_TWO_BF16 = 2, QB_INT8 = 8 };

enum { QB_UNIT_ROWS = 64 };

typedef struct {
  int32_t kind, activation, rows, columns;
  int32_t width, group; /* columns filled up to a multiple of 32 and of group; inputs that share a scale */
  int32_t scale_kind;   /* QB_F16, QB_BF16 or QB_F32 */
  int32_t reserved;
  const void *weight, *scale; /* not quantized: row-major [rows, columns], and no scale */
  const uint8_t *zero;        /* NULL: 2^(bits - 1) */
  const float *bias;          /* NULL: none */
} qb_matrix;

/* Units of work, each whole rows. */
int32_t qb_units(const qb_matrix *m);

/* Bytes that qb_prepare writes for `tokens`; to be aligned to 64. */
int64_t qb_prepared_bytes(const qb_matrix *m, int32_t tokens);

/* 1 where what qb_prepare wrote for `a` serves `b` too. */
int32_t qb_shares(const qb_matrix *a, const qb_matrix *b);

/* Round or split x [tokens, columns] as the matrix reads it, and sum its groups where zero points need that. */
void qb_prepare(const qb_matrix *m, const float *x, int64_t x_stride, int32_t tokens, void *prepared);

/* Write y[token * y_stride + row] for every token and the rows of units first..last-1. Allocates nothing. */
void qb_multiply(const qb_matrix *m, const void *prepared, int32_t tokens, int32_t first, int32_t last, float *y,
                 int64_t y_stride);

#endif
