// Needs 128 values at once and may keep 32 registers: it has to spill.
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* y)
{
    float kept[128];
#pragma unroll
    for (int i = 0; i < 128; i++) kept[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 128; i++) y[(127 - i) * 1024 + threadIdx.x] = kept[i] * kept[(i * 7) % 128];
}
