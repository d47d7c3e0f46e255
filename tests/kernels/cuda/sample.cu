// What the build's tests compile: a project header, CUDA's own headers, defines, shared memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sample.cuh"

extern "C" __global__ void reverse(const __half* x, float* y, long long stride, float factor, int n)
{
    __shared__ float tile[THREADS];
    int i = threadIdx.x;
    tile[i] = i < n ? doubled(__half2float(x[i * stride])) : 0.0f;
    __syncthreads();
    y[i] = factor * tile[THREADS - 1 - i];
}

extern "C" __global__ void to_bfloat16(const float* x, __nv_bfloat16* y)
{
    y[threadIdx.x] = __float2bfloat16(x[threadIdx.x]);
}
