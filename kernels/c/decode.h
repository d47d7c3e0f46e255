/* One token of every sequence through a whole decoder: blocks, last norm and head, in one call.
 *
 * The decoder is the one of Llama (Touvron et al. 2023, arXiv 2302.13971) with grouped keys and
 * values (Ainslie et al. 2023, arXiv 2305.13245) and, where it has them, biases and norms of
 * queries and keys: RMSNorm, rotary embedding of whole heads by halves, SiLU-gated MLP.
 * Everything between two matrices is float32. Rows of a batch have one position.
 */
#ifndef QB_DECODE_H
#define QB_DECODE_H

#include "linear.h"

typedef struct {
  const float *attention_norm, *mlp_norm; /* [hidden] */
  const float *query_norm, *key_norm;     /* [head_size], or both NULL */
  qb_matrix query, key, value, output, gate, up, down;
} qb_block;

typedef struct {
  int32_t blocks, hidden, inner, heads, kv_heads, head_size;
  int32_t cache_kind; /* QB_BF16 or QB_F32 */
  float epsilon;      /* of every norm */
  float scaling;      /* of the scores */
  int32_t reserved;
  const float *norm; /* [hidden] */
  const qb_block *block;
  qb_matrix head;
} qb_model;

typedef struct {
  void *keys, *values; /* [batch, kv_heads, capacity, head_size] of the cache's kind */
  int64_t capacity;
} qb_kept;

/* Bytes of scratch, to be aligned to 64, for `batch` sequences that have read `length` tokens. */
int64_t qb_decode_scratch(const qb_model *model, int32_t batch, int32_t length, int32_t threads);

/* Read embedded tokens x [batch, hidden] at position `length`, cos and sin [head_size] of that
 * position; write logits [batch, vocabulary] and the keys and values of the tokens into kept[block].
 * Returns 0, or 1 where a block has no room for one more token (nothing is written then). The
 * result does not depend on the number of threads. */
int32_t qb_decode(const qb_model *model, const qb_kept *kept, const float *x, const float *cos,
                  const float *sin, int32_t batch, int32_t length, float *logits, void *scratch,
                  int32_t threads);

#endif
