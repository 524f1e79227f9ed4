// Kernels whose gfx1030 code holds what gfx1010 cannot run: a loop of 132 to 192 bytes, around which LLVM puts
// s_inst_prefetch, and packed dot products where the chip has them.
#include <hip/hip_runtime.h>

extern "C" __global__ void prefetched_loop(const float* x, const float* w, float* y, int n, float limit) {
    float sum = 0, best = 0;
    for (int k = threadIdx.x; k < n; k += 64) {
        float value = x[k] * w[k];
        if (value > limit) sum += value * value;
        best = fmaxf(best, value);
        sum = fmaf(best, limit, sum);
        sum += fabsf(value - best) * limit + value * best;
    }
    y[threadIdx.x] = sum + best;
}

typedef _Float16 half2_t __attribute__((ext_vector_type(2)));

extern "C" __global__ void dot_product(const half2_t* x, const half2_t* w, float* y, int n) {
    float sum = 0;
    for (int k = 0; k < n; ++k)
#ifdef HAS_DOT
        sum = __builtin_amdgcn_fdot2(x[k], w[k], sum, false);
#else
        sum += (float)x[k].x * (float)w[k].x + (float)x[k].y * (float)w[k].y;
#endif
    y[threadIdx.x] = sum;
}

extern "C" __global__ void add(const float* x, float* y) { y[threadIdx.x] += x[threadIdx.x]; }

// Calls with a pointer to a function keep it apart from the kernel.
__device__ __attribute__((noinline)) float apart(float x) { return __expf(x) * x; }

extern "C" __global__ void calls(const float* x, float* y) { y[threadIdx.x] = apart(x[threadIdx.x]); }
