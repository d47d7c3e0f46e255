// What every kernel uses: the few instructions CUDA C++ has no plain name for, number formats as
// raw bits, and index arithmetic. Nothing here needs a header, so NVRTC compiles it in a moment.
//
// The block between QB_HOST guards has a second definition in tests/kernels/host_device.h: with it a
// C++ compiler builds the same kernels, and the tests run them lane by lane on the processor.
#pragma once

#ifndef QB_HOST

#define QB_DEVICE __device__ __forceinline__
// `blocks` on a multiprocessor: left open, the compiler spills a register or two to fit one more.
#define QB_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define QB_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// d += a * b; m16n8k16, fp16 factors, fp32 sums.
QB_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a * b; m16n8k32, signed bytes, int32 sums.
QB_DEVICE void mma_bytes(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Weights are read once: they pass by the L1. No evict-first hint, which crashed on an H100.
QB_DEVICE uint4 load_stream(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
QB_DEVICE uint2 load_stream(const uint2* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(from));
  return v;
}

template <class T>
QB_DEVICE T load(const T* from) {
  return *from;
}
template <class T>
QB_DEVICE void store(T* to, T value) {
  *to = value;
}

// Copies 16 bytes to shared memory behind the back of the registers; zeros where `real` is false.
QB_DEVICE void copy_async(void* to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   (unsigned)__cvta_generic_to_shared(to)),
               "l"(from), "r"(real ? 16 : 0)
               : "memory");
}
QB_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
QB_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

QB_DEVICE float half_to_float(unsigned short h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
QB_DEVICE unsigned short float_to_half(float f) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
QB_DEVICE unsigned half2_sub(unsigned a, unsigned b) {
  unsigned d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
QB_DEVICE unsigned half2_mul(unsigned a, unsigned b) {
  unsigned d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// (a & mask) | bits in one instruction; written plainly, the compiler takes two for two constants.
QB_DEVICE unsigned and_or(unsigned a, unsigned mask, unsigned bits) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}
QB_DEVICE float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
QB_DEVICE unsigned float_to_bits(float f) { return __float_as_uint(f); }
QB_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
QB_DEVICE int round_even(float f) { return __float2int_rn(f); }

#endif

// Number formats of activations, bias and result: 0 is fp16, 1 is bf16.
QB_DEVICE float bf16_to_float(unsigned short b) { return bits_to_float((unsigned)b << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
QB_DEVICE unsigned short float_to_bf16(float f) {
  unsigned bits = float_to_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <int FORMAT>
QB_DEVICE float to_float(unsigned short v) {
  return FORMAT == 1 ? bf16_to_float(v) : half_to_float(v);
}
template <int FORMAT>
QB_DEVICE unsigned short from_float(float f) {
  return FORMAT == 1 ? float_to_bf16(f) : float_to_half(f);
}

QB_DEVICE constexpr unsigned twice(unsigned half) { return half << 16 | half; }
QB_DEVICE unsigned half2(float a, float b) {
  return (unsigned)float_to_half(b) << 16 | float_to_half(a);
}

// The power of two that brings the largest of some bf16 numbers (`magnitude`: its bits without the
// sign) to [2^14, 2^15): bf16 has 8 significant bits, so everything down to 2^-31 of the largest is
// then exact in fp16. 1 where there is nothing to scale, or something that is not finite.
QB_DEVICE int bf16_shift(unsigned magnitude) {
  int exponent = (int)(magnitude >> 7);
  if (exponent == 0 || exponent == 255) return 0;
  int shift = 14 - (exponent - 127);
  return shift > 100 ? 100 : shift;
}
QB_DEVICE float power_of_two(int exponent) { return bits_to_float((unsigned)(exponent + 127) << 23); }

QB_DEVICE unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

// The largest of 16 neighbouring lanes, in all of them: one atomic for 16, which would come one after
// another. All 32 lanes of the warp have to be here.
QB_DEVICE unsigned largest_of_16(unsigned v) {
#pragma unroll
  for (int mask = 1; mask < 16; mask *= 2)
    v = larger(v, float_to_bits(shuffle_xor(bits_to_float(v), mask)));
  return v;
}

// Where part `i` of `parts` begins when `total` things are dealt out evenly and in order.
QB_DEVICE int part_begin(int total, int parts, int i) { return (int)((long long)total * i / parts); }
