// The CUDA that the kernels use, for a C++ compiler: a grid is two loops, run by one thread.
//
// Placed before the kernels' source (compiled.py). Build without contraction of a * b + c, so that
// the arithmetic is the device's.
#pragma once

#include <cmath>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline

struct Dim3 {
    unsigned x;
};

static thread_local Dim3 threadIdx{0}, blockIdx{0}, blockDim{1}, gridDim{1};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

static inline void* __cvta_global_to_generic(unsigned long address) {
    return reinterpret_cast<void*>(address);
}

static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Run a kernel on at least `threads` threads, one after the other.
extern "C" void kvtier_run(void (*kernel)(const long long*), long long threads,
                           const long long* job) {
    constexpr unsigned block = 256;
    blockDim.x = block;
    gridDim.x = static_cast<unsigned>((threads + block - 1) / block);
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) kernel(job);
    }
}
