// The packed layout seen from a lane; kernels/fragments.py describes and writes it.
//
// Defines: BITS (8, 4, 3, 2), GROUP (32, 64, 128; 0 is per channel), ZEROS (1: zero points stored).
#pragma once
#include "common.cuh"

constexpr int kUnits = BITS == 8 ? 1 : BITS == 4 ? 2 : 4;  // units of 32 inputs in a k-tile
constexpr int kTile = 32 * kUnits;                         // inputs of a k-tile
constexpr int kStep = 128;                                 // inputs whose scales stand together
constexpr int kTilesPerStep = kStep / kTile;
constexpr int kWords = BITS == 3 ? 6 : 4;                  // words of a lane in a k-tile
constexpr int kTileBytes = 32 * 4 * kWords;
constexpr int kGroupsPerStep = GROUP == 0 ? 1 : kStep / GROUP;
constexpr int kSymmetricZero = 1 << (BITS - 1);

// How far the word is shifted before pair p of unit u is masked, and the bit it then begins at.
QB_DEVICE constexpr int slot_shift(int u, int p) {
  return BITS == 8 ? 0 : BITS == 4 ? (p < 2 ? 0 : 6) : BITS == 3 ? (u % 2 ? 8 : 0)
         : 4 * (u % 2) + p < 5 ? 0 : 6;
}
QB_DEVICE constexpr int slot_bit(int u, int p) {
  return BITS == 8 ? 0
         : BITS == 4 ? 4 * p - slot_shift(u, p)
         : BITS == 3 ? 2 * p
                     : 2 * (4 * (u % 2) + p) - slot_shift(u, p);
}
QB_DEVICE constexpr int slot_word(int u, int i, int p) {
  return BITS == 8 ? 2 * i + p / 2 : BITS == 4 ? 2 * u + i : 2 * (u / 2) + i;
}

// 2^(10 - s): an fp16 number of this size counts in units of bit s of its mantissa, so a code placed
// there is added to it. What stands above the code in these bits is the exponent.
QB_DEVICE constexpr int code_offset(int u, int p) { return 1 << (10 - slot_bit(u, p)); }
QB_DEVICE constexpr unsigned offset_bits(int u, int p) {
  return twice((unsigned)(25 - slot_bit(u, p)) << 10);
}

// Rows i (of g, g + 8), inputs 2p and 2p + 1 of a lane's 8 in unit u: offset + code, as two fp16.
QB_DEVICE unsigned code_pair(const unsigned* words, int u, int i, int p) {
  unsigned word = words[slot_word(u, i, p)];
  if (BITS == 8) return __byte_perm(word, 0x64646464u, p % 2 ? 0x4342 : 0x4140);
  const unsigned field = BITS == 3 ? 3u : (1u << BITS) - 1;
  unsigned pair =
      and_or(word >> slot_shift(u, p), twice(field << slot_bit(u, p)), offset_bits(u, p));
  if (BITS == 3) {
    unsigned high = words[4 + i];
    high = __funnelshift_r(high, high, u % 2 + 8 * (u / 2));
    pair = and_or(high, twice(4u << slot_bit(u, p)), pair);
  }
  return pair;
}

// The fp16 bits of a positive integer below 2048.
QB_DEVICE constexpr unsigned half_integer(int value) {
  int e = 0;
  while (value >> (e + 1)) ++e;
  return (unsigned)((e + 15) << 10 | (value << (10 - e) & 1023));
}

// code - zero, exactly, as two fp16. A zero point, placed as a code is, is what has to be taken off.
QB_DEVICE unsigned centred_pair(const unsigned* words, int u, int i, int p, unsigned zero) {
  unsigned off = ZEROS ? (zero * twice(1u << slot_bit(u, p))) | offset_bits(u, p)
                       : twice(half_integer(code_offset(u, p) + kSymmetricZero));
  return half2_sub(code_pair(words, u, i, p), off);
}

// The two A fragments of unit u, offsets not taken off.
QB_DEVICE void fragments_of(const unsigned* words, int u, unsigned (&a)[2][4]) {
#pragma unroll
  for (int p = 0; p < 4; ++p)
#pragma unroll
    for (int i = 0; i < 2; ++i) a[p / 2][2 * (p % 2) + i] = code_pair(words, u, i, p);
}

// Index of the first scale (of 2 * kGroupsPerStep) that lane group g needs in a step.
QB_DEVICE long long scale_index(int n_tile, int steps, int step, int g) {
  return (((long long)n_tile * steps + step) * 8 + g) * (2 * kGroupsPerStep);
}
