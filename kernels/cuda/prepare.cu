// Turns x [m, k] into fp16 [m, k_padded] for batch.cu and prefill.cu: bf16 numbers times a power of
// two per token (exact: common.cuh, bf16_shift), `unscale` being its inverse; zeros beyond k. Not
// needed for fp16 x whose k is a multiple of 8. One block of 256 threads a token.
//
// Defines: DTYPE (0 fp16, 1 bf16).
#include "common.cuh"

constexpr int kThreads = 256;

QB_KERNEL(kThreads, 4)
prepare(const unsigned short* x, unsigned short* out, float* unscale, int k, int k_padded) {
  QB_SHARED(memory);
  unsigned* largest = (unsigned*)memory;
  const unsigned short* row = x + (long long)blockIdx.x * k;
  if (threadIdx.x == 0) *largest = 0;
  __syncthreads();
  if (DTYPE == 1) {
    unsigned most = 0;
    for (int i = threadIdx.x; i < k; i += kThreads) most = larger(most, load(row + i) & 0x7fffu);
    most = largest_of_16(most);
    if (threadIdx.x % 16 == 0) atomicMax(largest, most);
    __syncthreads();
  }
  int shift = DTYPE == 1 ? bf16_shift(*largest) : 0;
  float scale = power_of_two(shift);
  if (threadIdx.x == 0) store(unscale + blockIdx.x, power_of_two(-shift));
  for (int i = threadIdx.x; i < k_padded; i += kThreads) {
    float value = i < k ? to_float<DTYPE>(load(row + i)) : 0.f;
    store(out + (long long)blockIdx.x * k_padded + i, float_to_half(value * scale));
  }
}
